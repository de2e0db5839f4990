"""The benchmark of context-parallel operators at tiny sizes: its cases, bytes, memory and files."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest

import megakda
from megakda.bench import context_parallel
from megakda.bench.context_parallel import ALONE, Case, Sizes, cases, measure
from megakda.config import compose
from megakda.config.schema import LinearAttentionConfig, MLAConfig
from megakda.errors import CommunicationError
from megakda.layers.context_layout import ContextLayout
from megakda.models.context_cost import Sharing, kda_traffic, mla_traffic
from tests.layers.context_jobs import world

ROOT = Path(megakda.__file__).resolve().parents[1]
SIZES = Sizes(heads=4, head_dim=16)
HEADS_RANKS = {"state": lambda ranks: 1, "heads": lambda ranks: ranks, "two_level": lambda ranks: 2}


def expected_bytes(case, sizes=SIZES):
    """What `context_cost` says of a case in fp32."""
    if case.mode == ALONE:
        return 0, 0
    linear = LinearAttentionConfig(head_dim_k=sizes.head_dim, head_dim_v=sizes.head_dim)
    mla = MLAConfig(kv_lora_rank=sizes.latent, qk_shared_head_dim=sizes.shared)
    model = replace(compose(["model=tiny"]).model, num_heads=sizes.heads, linear=linear, mla=mla)
    sharing = Sharing(ContextLayout(case.layout, case.ranks), element_bytes=4)
    if case.layer == "mla":
        return mla_traffic(model, replace(sharing, attention=case.mode), 1, case.tokens).bytes
    heads_ranks = HEADS_RANKS[case.mode](case.ranks)
    sharing = replace(sharing, mode=case.mode, heads_ranks=heads_ranks)
    return kda_traffic(model, sharing, 1, case.tokens).bytes


def test_cases():
    found = cases(["kda", "mla"], [1, 2, 4], {"kda": [64], "mla": [32, 64]})
    kda = [case for case in found if case.layer == "kda"]
    assert [case.mode for case in kda if case.ranks == 1] == [ALONE]
    assert {(case.mode, case.layout) for case in kda if case.ranks == 2} == {
        (mode, kind) for mode in ("state", "heads") for kind in ("contiguous", "zigzag")
    }
    assert {case.mode for case in kda if case.ranks == 4} == {"state", "heads", "two_level"}
    assert len([case for case in found if case.layer == "mla"]) == 2 * (1 + 4 + 4)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The tool on 1 and 2 ranks: exit status, its files."""
    spec = importlib.util.spec_from_file_location(
        "bench_context_parallel_tool", ROOT / "tools" / "bench_context_parallel.py"
    )
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    out = tmp_path_factory.mktemp("out")
    arguments = ["--ranks", "1", "2", "--tokens", "64", "4096", "--mla-tokens", "64", "2048"]
    arguments += ["--head-dim", "16", "--repeats", "1", "--out", str(out)]
    assert tool.main(arguments) == 0
    content = json.loads((out / "context_parallel.json").read_text())
    return content, (out / "context_parallel.md").read_text(), tool


def test_files_say_what_was_run(run):
    content, text, _ = run
    where = content["environment"]
    assert where["command"].startswith("python tools/bench_context_parallel.py --ranks 1 2")
    assert where["versions"]["torch"] and where["hardware"]["name"] and where["date"]
    assert content["threads_per_rank"] == 1 and content["sizes"]["head_dim"] == 16
    assert text.count("\n| kda |") == 2 * (1 + 4) and text.count("\n| mla |") == 2 * (1 + 4)
    assert where["versions"]["torch"] in text and where["command"] in text


def test_times_and_bytes(run):
    rows = run[0]["rows"]
    for row in rows:
        case = Case(*(row[name] for name in ("layer", "mode", "layout", "ranks", "tokens")))
        assert (row["forward_bytes"], row["backward_bytes"]) == expected_bytes(case), case
        assert 0 < row["forward_ms"] < 60_000 and 0 < row["backward_ms"] < 60_000
        assert len(row["ranks_ms"]) == case.ranks


def test_memory_falls_with_the_ranks(run):
    peaks = {
        (row["layer"], row["mode"], row["layout"]): row["peak_bytes"]
        for row in run[0]["rows"]
        if row["tokens"] > 64
    }
    assert len(peaks) == 10
    for (layer, mode, kind), peak in peaks.items():
        if mode != ALONE:
            assert 0 < peak < 0.85 * peaks[layer, ALONE, "contiguous"], (layer, mode, kind)


def test_two_levels_on_four_ranks(ranks):
    wanted = [case for case in cases(["kda"], [4], {"kda": [64]}) if case.mode == "two_level"]
    for found in ranks.run(4, timed, wanted):
        assert found == [expected_bytes(case) for case in wanted]


def timed(wanted):
    with world():
        found = context_parallel._time(wanted, SIZES, repeats=1)
        return [(times.forward_bytes, times.backward_bytes) for times in found]


def test_what_cannot_run(run, capsys):
    tool = run[2]
    assert tool.main(["--layers", "kda", "--ranks", "4", "--tokens", "66"]) == 2
    assert "66 tokens cannot be cut into the 4 equal segments" in capsys.readouterr().err
    with pytest.raises(ValueError, match="3 heads cannot be shared by 2 ranks"):
        measure(cases(["kda"], [2], {"kda": [64]}), Sizes(heads=3), 1)
    with pytest.raises(CommunicationError, match="(?s)rank . of 2 failed: .*'odd'"):
        context_parallel._world(2, {}, fail, "odd")


def fail(what):
    raise RuntimeError(repr(what))
