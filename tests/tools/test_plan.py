"""`tools/plan.py`: its report, its files, and its errors before any work."""

from __future__ import annotations

import importlib.util
import json
import shlex
from pathlib import Path

import pytest

import megakda

ROOT = Path(megakda.__file__).resolve().parents[1]
TINY = ["model=tiny", "precision=bf16", "train.global_batch=64", "train.steps=10"]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("plan_tool", ROOT / "tools" / "plan.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_prints_a_plan_and_writes_it_down(tool, capsys, tmp_path):
    out = tmp_path / "plan.json"
    assert tool.main([*TINY, "cluster=h200x8", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "tiny on h200 x 8" in printed and "GPU-hours" in printed
    data = json.loads(out.read_text())
    assert data["fits"] and data["cluster"]["gpus"] == 8
    assert data["phases"][0]["steps"] == 10
    assert data["phases"][0]["memory"][0]["state"]["weights"] > 2 * data["parameters"]


def test_searches_and_prints_the_overrides(tool, capsys, tmp_path):
    out = tmp_path / "plan.json"
    small = ["model.num_layers=2", "model.moe.num_experts=2", "model.num_heads=1"]
    search = ["cluster=h200x2", "--search", "--top", "3", "--json", str(out)]
    assert tool.main([*TINY, *small, *search]) == 0
    printed = capsys.readouterr().out
    assert "The recipe as it is, speed 1:" in printed
    written = json.loads(out.read_text())
    found = written["search"]
    assert written["given"]["fits"] and written["given"]["seconds"] >= found[0]["seconds"]
    assert len(found) == 3
    for proposal in found:
        assert shlex.join(proposal["overrides"]) in printed  # ready to paste
        assert proposal["reason"] in printed


ERRORS = {
    "no cluster": (TINY, "exactly one cluster"),
    "unknown cluster": ([*TINY, "cluster=h300x8"], "did you mean"),
    "mistyped setting": ([*TINY, "cluster=h200x8", "parallel.tensr=2"], "parallel.tensor"),
    "impossible layout": ([*TINY, "cluster=h200x8", "parallel.tensor=3"], "parallel.tensor=3"),
    "too few GPUs": ([*TINY, "cluster=h200x2", "parallel.tensor=4"], "start a multiple of 4"),
    "any layout": ([*TINY, "cluster=h200x8", "--search", "optim.qk_clip=-1"], "optim.qk_clip=-1"),
    "no folder": ([*TINY, "cluster=h200x8", "--json", "/nowhere/plan.json"], "--json=/nowhere"),
    "top": ([*TINY, "cluster=h200x8", "--search", "--top", "0"], "--top=0"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_come_before_any_work(tool, case, capsys):
    arguments, expected = ERRORS[case]
    assert tool.main(arguments) == 2
    said = capsys.readouterr()
    assert expected in said.err and not said.out
