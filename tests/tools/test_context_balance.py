"""The command line of the context-parallel balance and of the exchange model."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

import megakda

ROOT = Path(megakda.__file__).resolve().parents[1]
TOOL = ROOT / "tools" / "context_balance.py"
RECIPE = ["model=kimi_linear_48b", "precision=bf16", "parallel.context=4", "train.context=65536"]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def main():
    spec = importlib.util.spec_from_file_location("context_balance_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def run(main, capsys, tmp_path):
    def run(*arguments):
        files = [f"--json={tmp_path}/x.json", f"--plot={tmp_path}/x.png"]
        assert main([*RECIPE, *files, *arguments]) == 0
        assert (tmp_path / "x.png").read_bytes()[:8] == PNG
        return capsys.readouterr().out, json.loads((tmp_path / "x.json").read_text())

    return run


def refused(main, capsys, *arguments):
    assert main([*RECIPE, *arguments]) == 2
    return capsys.readouterr().err


def test_both_layouts_and_a_recommendation(run):
    text, data = run()
    assert "contiguous: 1 x 16,384 tokens" in text
    assert "zigzag (the recipe's): 2 x 8,192 tokens" in text
    for name in ("state", "heads", "two_level(2)", "all_gather", "ring"):
        assert text.count(f", {name} ") >= 2, name
    assert "Recommended: parallel.context_layout=zigzag parallel.context_mode=state" in text
    assert data["choice"]["layout"] == "zigzag"
    row = next(line for line in text.splitlines() if "MLA, pairs" in line)
    spread = data["layouts"]["contiguous"]["attention"]
    assert float(row.split()[-1]) == pytest.approx(spread["most"] / spread["mean"], abs=1e-3)
    assert all(len(line) <= 100 for line in text.splitlines() if "Recommended" not in line)


def test_lengths_and_packing(run, tmp_path):
    text, data = run("--lengths=lognormal:mean=4096,sigma=1", "--samples=3", "train.micro_batch=2")
    assert "data.packing=none would make every row one document" in text.replace("\n ", "")
    assert data["micro_batches"] == 3 and data["packing"] == "documents"
    assert 10 < data["documents"] < 30
    assert data["layouts"]["contiguous"]["attention"]["most"] > 0
    _, other = run("--lengths=lognormal:mean=4096,sigma=1", "--samples=3", "--seed=5")
    assert other["documents"] != data["documents"]
    path = tmp_path / "lengths"
    path.write_text("16385\n" * 8)
    text, data = run(f"--lengths=file:{path}", "data.packing=best_fit")
    assert data["layouts"]["contiguous"]["linked"] == 0
    assert "Recommended: parallel.context_layout=contiguous" in text


def test_exchange_predictions(run):
    text, data = run("--exchange")
    assert "nothing here is measured" in text.replace("\n ", "")
    assert "data sheet" in text and "assumed shares" in text
    assert data["recipe"]["tokens"] == 16384 and data["recipe"]["ranks"] == 4
    assert {point["tensor"] for point in data["points"]} == {1, 2, 4, 8}
    _, slower = run("--exchange", "--assume=link=0.1", "--assume=latency=0.001")
    assert slower["assumed"]["link"] == 0.1
    for mode, its in slower["recipe"]["kda"].items():
        assert its["exposed"] > data["recipe"]["kda"][mode]["exposed"]


def test_errors_name_the_setting(main, capsys):
    assert "parallel.context=1" in refused(main, capsys, "parallel.context=1")
    assert "lengths=odd" in refused(main, capsys, "--lengths=odd")
    assert "--assume links=0.5" in refused(main, capsys, "--exchange", "--assume=links=0.5")
    assert "--assume link=1.5" in refused(main, capsys, "--exchange", "--assume=link=1.5")
    assert "train.context=65537" in refused(main, capsys, "train.context=65537")
    assert "--samples=0" in refused(main, capsys, "--samples=0", "--lengths=fixed:9")


def test_as_a_program():
    """From the checkout, settings on both sides of options."""
    command = [
        sys.executable,
        str(TOOL),
        "parallel.context=2",
        "--samples",
        "2",
        "train.context=64",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "tiny: train.context=64 over parallel.context=2" in done.stdout
