"""Kernels are timed beside others only if all compute the same."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

import megakda
from megakda.kernels.verify.bench import agreement, command, measure, plot, report, run
from megakda.kernels.verify.bench.decode import OPERATORS, decode_benchmark
from megakda.kernels.verify.bench.determinism import check_determinism
from megakda.kernels.verify.bench.problems import (
    floor_bytes,
    make_problem,
    parse_shape,
    small_shape,
)
from megakda.kernels.verify.bench.sides import SIDES, Run, Side, find_sides

ROOT = Path(megakda.__file__).resolve().parents[1]
OURS, GDN, SOFTMAX = find_sides(["megakda", "megakda_gdn", "softmax"])
TINY = "H2,K16,T70"


def settings(sides: list[Side], shapes: tuple[str, ...] = (TINY,), **changes: Any) -> run.Settings:
    return run.Settings(
        **{
            "shapes": tuple(map(parse_shape, shapes)),
            "sides": tuple(sides),
            "gate": "none",
            "dtype": torch.float32,
            "device": torch.device("cpu"),
            "repeats": 3,
            "seconds": 5.0,
            "memory": False,
            **changes,
        }
    )


def quiet(text: str) -> None:
    del text


def altered(name: str, factor: float, from_tokens: int = 0, backward: bool = True) -> Side:
    """Our KDA, off by a factor on problems of at least so many tokens."""

    def prepare(problem: Any) -> Run:
        right = OURS.prepare(problem)
        wrong = factor if problem.shape.tokens >= from_tokens else 1.0
        return Run(lambda: wrong * right.forward(), right.leaves)

    return Side(name, "kda", prepare, "an example", backward)


# ------------------------------------------------------------------ shapes and inputs


@pytest.mark.parametrize(
    ("text", "label", "lengths", "tokens"),
    [
        ("H16,T8192", "B1,H16,K128,T8192", (8192,), 8192),
        ("B2,H4,K64,V32,T512", "B2,H4,K64,V32,T512", (512,), 512),
        ("H96,T8x1024", "B1,H96,K128,T8x1024", (1024,) * 8, 8192),
        ("H96,T1300+547", "B1,H96,K128,T1300+547", (1300, 547), 1847),
    ],
)
def test_shapes(text, label, lengths, tokens):
    shape = parse_shape(text)
    assert (shape.label, shape.lengths, shape.tokens) == (label, lengths, tokens)
    assert parse_shape(shape.label) == shape
    assert small_shape(shape).packed == shape.packed and small_shape(shape).tokens == 256


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("H16", "needs heads and tokens"),
        ("H16,T8192,Q4", "'Q4' is not one of"),
        ("H16,H8,T64", "each once"),
        ("H16,T4x64+3", "both x and"),
        ("H0,T64", "at least 1"),
        ("B2,H4,T4x64", "lie in one row"),
    ],
)
def test_shapes_that_are_none(text, reason):
    with pytest.raises(ValueError, match=reason):
        parse_shape(text)


def test_inputs_of_each_gate():
    shape = parse_shape("H2,K16,T30+10")
    plain = make_problem(shape, "none", torch.bfloat16)
    assert plain.q.dtype == torch.bfloat16 and plain.g.dtype == torch.float32
    torch.testing.assert_close(
        plain.k.float().norm(dim=-1), torch.ones(1, 40, 2), atol=0.01, rtol=0
    )
    assert (plain.g < 0).all() and plain.cu_seqlens.tolist() == [0, 30, 40]
    assert plain.A_log is None and plain.inputs.keys() == {"q", "k", "v", "g", "beta"}
    bounded = make_problem(shape, "bounded", scalar_decay=True)
    assert bounded.g.shape == (1, 40, 2, 1) and bounded.dt_bias.shape == (2,)
    decay = bounded.activated().g
    assert ((decay < 0) & (decay > bounded.lower_bound)).all()
    with pytest.raises(ValueError, match="gate: 'hard' must be one of"):
        make_problem(shape, "hard")


def test_least_bytes_of_a_token_and_head():
    """1.28 KB forward, 3.6 KB for both, as one counts it by hand; beta and parameters on top."""
    problem = make_problem(parse_shape("H1,K128,T1000"), "bounded", torch.bfloat16)
    per_token = {mode: floor_bytes(problem, mode) / 1000 for mode in run.MODES}
    assert per_token["forward"] == pytest.approx(5 * 128 * 2, rel=0.01)
    assert per_token["both"] == pytest.approx(14 * 128 * 2, rel=0.01)
    assert per_token["backward"] == pytest.approx(9 * 128 * 2, rel=0.01)


# ------------------------------------------------------------------ checked before timed


@pytest.mark.parametrize("gate", ["none", "softplus", "bounded"])
def test_every_mode_of_every_side_is_timed(gate):
    sides = [OURS, altered("forward_only", 1.0, backward=False), GDN, SOFTMAX]
    found = run.benchmark(settings(sides, (TINY, "H2,K16,T2x64"), gate=gate), say=quiet)
    assert found.wrong == [] and found.skipped == []
    modes: dict[tuple[str, str], list[str]] = {}
    for row in found.rows:
        modes.setdefault((row["shape"], row["side"]), []).append(row["mode"])
        assert 0 < row["min_ms"] <= row["median_ms"] <= row["p90_ms"] and row["repeats"] == 3
        assert row["tokens_per_s"] == pytest.approx(row["tokens"] / row["median_ms"] * 1e3)
    assert len(modes) == 8
    for (_, side), names in modes.items():
        assert names == ([*run.MODES] if side != "forward_only" else ["forward"])
    against = {(e["side"], e["where"].split(" against ")[1]) for e in found.errors}
    assert against >= {("megakda", "float64"), ("megakda_gdn", "float64"), ("softmax", "float64")}
    assert ("forward_only", "megakda") in against and ("softmax", "megakda") not in against


@pytest.mark.parametrize(("from_tokens", "where"), [(0, "T256 against float64"), (300, "T320 ag")])
def test_a_wrong_peer_gets_no_time(from_tokens, where):
    wrong = altered("peer", 1.01, from_tokens)
    found = run.benchmark(settings([OURS, wrong], ("H2,K16,T320",)), say=quiet)
    assert {row["side"] for row in found.rows} == {"megakda"}
    [sentence] = found.wrong
    assert sentence.startswith("peer, ") and where in sentence and "o: error 1.0e-02" in sentence


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_nothing_is_timed_if_we_are_wrong(factor):
    wrong = altered("megakda", factor)
    with pytest.raises(run.Disagreement, match="megakda, .* against float64: .*at most 1.0e-04"):
        run.benchmark(settings([wrong, SOFTMAX]), say=quiet)


def test_what_cannot_run_is_told():
    sides = find_sides(["megakda", "fla", "flash_kda", "fla_dplr", "softmax"])
    found = run.benchmark(settings(sides, ("H2,K16,T30+40",)), say=quiet)
    assert {row["side"] for row in found.rows} == {"megakda"}
    reasons = {entry["side"]: entry["reason"] for entry in found.skipped}
    assert reasons.keys() == {"fla", "flash_kda", "fla_dplr", "softmax"}
    assert "runs on a GPU" in reasons["fla_dplr"] and "different lengths" in reasons["softmax"]


def test_transformers_is_one_of_the_sides():
    pytest.importorskip("transformers.models.kimi_linear")
    sides = find_sides(["megakda", "transformers"])
    found = run.benchmark(settings(sides, ("H2,K16,T2x64",), gate="softplus"), say=quiet)
    assert found.wrong == [] and {row["side"] for row in found.rows} == {"megakda", "transformers"}


def test_bf16_limits_are_wider():
    truth = {"o": torch.ones(8), "dg": torch.ones(8)}
    got = {"o": truth["o"] * 1.006, "dg": truth["dg"] * 1.006, "dz": torch.ones(1)}
    found = agreement.errors(got, truth)
    assert found == {"dg": pytest.approx(0.006, rel=1e-3), "o": pytest.approx(0.006, rel=1e-3)}
    [sentence] = agreement.too_large(found, torch.bfloat16)
    assert sentence.startswith("o: error 6.0e-03, at most 5.0e-03")
    assert len(agreement.too_large(found, torch.float32)) == 2
    assert agreement.too_large(found, torch.bfloat16, slack=2) == []


# ------------------------------------------------------------------ measuring


def test_summary():
    found = measure.summary([0.001, 0.003, 0.002, 0.004, 0.010])
    assert found["median_ms"] == 3 and found["min_ms"] == 1 and found["repeats"] == 5
    assert (found["q1_ms"], found["q3_ms"]) == (2, 4)
    assert found["p90_ms"] == pytest.approx(7.6)


def test_steps_take_turns_and_slow_ones_stop():
    order: list[str] = []

    class Clock:
        def time(self, step: Any) -> list[float]:
            step(lambda: None)
            return [1.0 if order[-1] == "slow" else 0.1]

    steps = {name: lambda lap, name=name: order.append(name) for name in ("slow", "fast")}
    laps = measure.interleave(Clock(), steps, 6, seconds=2.0)
    assert {name: len(x) for name, x in laps.items()} == {"slow": 3, "fast": 6}
    assert order[:6] == ["slow", "fast"] * 3  # the first two warm up


def test_laps_of_a_step():
    def step(lap: measure.Lap) -> None:
        lap()
        sum(range(200_000))
        lap()

    first, second = measure.Clock(torch.device("cpu")).time(step)
    assert 0 <= first < second


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory():
    # In a process of its own: this one may have freed as much and use it again.
    program = "import torch; from megakda.kernels.verify.bench.measure import cpu_peak\n"
    program += "print(cpu_peak(lambda: torch.ones(64 << 18)))"  # 64 MiB
    command = [sys.executable, "-c", program]
    peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert 60 << 20 < peak < 100 << 20
    task = {"side": "megakda", "shape": "H2,K64,T1024", "gate": "none", "dtype": "float32"}
    peaks = measure.cpu_peak_elsewhere({**task, "threads": 1})
    output = 2 * 64 * 1024 * 4
    assert output / 2 < peaks["forward"] < peaks["both"] < 200 * output
    with pytest.raises(RuntimeError, match="no side nobody"):
        measure.cpu_peak_elsewhere({**task, "threads": 1, "side": "nobody"})


# ------------------------------------------------------------------ decode, equal bits


def test_decode_steps_are_checked_and_timed():
    found = decode_benchmark(
        settings([OURS, SOFTMAX], ("B2,H2,K16,T64",), gate="softplus"), say=quiet
    )
    assert [(row["operator"], row["side"]) for row in found.rows] == [
        ("kda_decode_step", "megakda"),
        ("kda_decode_fused", "megakda"),
        ("mla_decode", "megakda"),
        ("mla_decode", "softmax"),
    ]
    assert all(row["call"]["median_ms"] > 0 and row["graph"] is None for row in found.rows)
    assert all(e["errors"] and max(e["errors"].values()) < 1e-5 for e in found.errors)
    assert {"o", "state"} <= found.errors[0]["errors"].keys()


def test_a_wrong_decode_step_gets_no_time(monkeypatch):
    operator = OPERATORS[0]
    wrong = {"megakda": lambda x: lambda: (x["problem"].v, x["state"])}
    changed = replace(operator, sides=wrong)
    monkeypatch.setattr("megakda.kernels.verify.bench.decode.OPERATORS", (changed,))
    with pytest.raises(run.Disagreement, match="megakda, kda_decode_step, .*: o: error"):
        decode_benchmark(settings([OURS], ("H2,K16,T64",)), say=quiet)


def test_equal_bits(capsys):
    rows = check_determinism(settings([OURS, GDN, SOFTMAX], gate="bounded"), 3, say=quiet)
    assert len(rows) == 2 + len(OPERATORS)  # SDPA is not ours
    assert all(row["times"] == 3 and row["different"] == [] for row in rows)

    def prepare(problem: Any) -> Run:
        right = OURS.prepare(problem)
        return Run(lambda: right.forward() * (1 + 1e-6 * random.random()), right.leaves)

    restless = Side("megakda_restless", "kda", prepare, "an example")
    assert command.determinism(settings([restless]), 3) == 1
    printed = capsys.readouterr().out
    assert "megakda_restless, B1,H2,K16,T70: 3 times, DIFFERENT:" in printed
    assert "3 of 4 gave equal bits 3 times" in printed


# ------------------------------------------------------------------ reports


def test_reports(tmp_path):
    shapes = (TINY, "H2,K16,T128", "H4,K16,T128", "H2,K16,T30+40")
    here = settings([OURS, altered("peer", 1.01, from_tokens=100), SOFTMAX], shapes)
    path = tmp_path / "kernels_cpu.json"
    assert command.sequences(here, path, ["python", "x"]) == 1  # one side was wrong
    content = json.loads(path.read_text())
    assert content["environment"]["command"] == "python x" and content["gate"] == "none"
    assert content["environment"]["versions"]["torch"] == metadata.version("torch")
    assert content["environment"]["hardware"]["cores"] == os.cpu_count()
    assert len(content["environment"]["load_average"]) == 3
    ours = [row for row in content["rows"] if row["side"] == "megakda"]
    assert len(ours) == 4 * 3 and all(row["floor_bytes"] > 0 for row in ours)
    text = path.with_suffix(".md").read_text()
    assert "## B1,H2,K16,T70" in text and "| megakda | " in text and " 1.00 |" in text
    assert "Not timed, because they are wrong:" in text and "- peer, " in text
    assert "- softmax: has no form for packed sequences of different lengths" in text
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_picture_of_a_gpu_shows_the_roofline(tmp_path, monkeypatch):
    row = {"side": "megakda", "mode": "both", "median_ms": 2.0, "roofline": 0.4}
    rows = [{**row, "shape": f"B1,H{heads},K128,T8192"} for heads in (16, 32, 64)]
    hardware = {"hardware": {"name": "a GPU"}}
    content = {"rows": rows, "environment": hardware, "dtype": "bfloat16", "gate": "bounded"}
    chosen, axis = plot._varying(rows)
    assert (len(chosen), axis) == (3, "heads")
    plot.draw(content, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000
    table = report.sequence_tables(
        {
            **content,
            "rows": [{**x, "min_ms": 1.9, "p90_ms": 2.2, "peak_bytes": 3 << 20} for x in rows],
            **{"bandwidth": 4e12, "skipped": [], "wrong": [], "errors": []},
        }
    )
    assert any(line.startswith("| megakda |") and line.endswith("|  | 40 % |") for line in table)


def bench_kernels(*args: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "tools/bench_kernels.py", *args],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def test_command_line(tmp_path):
    options = ["--only", "megakda", "softmax", "--repeats", "1", "--threads", "1", "--no-memory"]
    done = bench_kernels("--shapes", "H1,K16,T64", *options, "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "kernels_cpu.json").read_text())
    assert content["environment"]["variables"]["MALLOC_MMAP_MAX_"] == "0"
    assert content["environment"]["hardware"]["threads"] == 1
    assert len(content["rows"]) == 6 and "H1,K16,T64" in content["environment"]["command"]
    assert {x.name for x in tmp_path.iterdir()} == {
        f"kernels_cpu.{x}" for x in ("json", "md", "png")
    }


@pytest.mark.parametrize(
    ("args", "variables", "message"),
    [
        ([], {"TRITON_INTERPRET": "1"}, "TRITON_INTERPRET is set"),
        (["--only", "nobody"], {}, "no side nobody; there are megakda, fla, "),
        (["--shapes", "T64"], {}, "needs heads and tokens"),
        (["--device", "cuda"], {"CUDA_VISIBLE_DEVICES": ""}, "there is no GPU"),
    ],
)
def test_command_line_errors(args, variables, message):
    done = bench_kernels(*args, **variables)
    assert done.returncode == 2 and message in done.stdout


def test_sides_have_names_of_their_own():
    assert len({side.name for side in SIDES}) == len(SIDES)
