"""Candidates are compiled, refused if they compute something else, and the fastest is kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import megakda
from megakda.kernels import launch
from megakda.kernels.verify.tuning import cases, command, search, tables
from megakda.kernels.verify.tuning.screen import Compilation
from megakda.kernels.verify.tuning.search import Trial
from megakda.kernels.verify.tuning.targets import TARGETS, Target

ROOT = Path(megakda.__file__).resolve().parents[1]
CPU = torch.device("cpu")


def run_python(*args: str) -> subprocess.CompletedProcess[str]:
    """A process that may compile, as pytest's own, which interprets, may not."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *args],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )


# ------------------------------------------------------------------ targets


@pytest.mark.parametrize("architecture", launch.ARCHITECTURES)
def test_every_kernel_of_the_tables_has_a_target_whose_grid_fits(architecture):
    table = tables.read(architecture)
    assert {target.kernel for target in TARGETS} == table["kernels"].keys()
    assert len({target.name for target in TARGETS}) == len(TARGETS)
    for target in TARGETS:
        current = tables.lookup(table, target.kernel, target.when)
        assert target.grid.keys() <= current.keys(), target.name
        candidates = list(target.candidates(current))
        assert len(candidates) >= 3 and current not in candidates, target.name
        assert all(candidate.keys() == current.keys() for candidate in candidates)


def test_cases_launch_their_targets():
    program = """
from dataclasses import replace
from megakda.kernels.verify.tuning import screen, tables, targets
table = tables.read("sm_90")
print(screen.unreached(targets.TARGETS, table))
wrong = replace(targets.TARGETS[0], when={"K": 64}, cases=("kda_prefill_h32",))
print(screen.unreached([wrong], table))
"""
    done = run_python("-c", program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "[]",
        "['kda_prefill_h32 launches no kda_state_kernel with kda_state[K=64]']",
    ]


@pytest.fixture(scope="module")
def interpreter() -> None:
    from megakda.kernels.verify import interpreter

    interpreter.install()


@pytest.fixture
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN, so that results cannot depend on memory that nobody wrote."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", cases.CASES)
def test_cases_give_equal_results_every_time(interpreter, poisoned, name):
    first, second = (cases.build(name, CPU, cases.SMALL)() for _ in range(2))
    assert first.keys() == second.keys() and len(first) >= 1
    for key, x in first.items():
        assert x.isfinite().all(), key
        assert torch.equal(x, second[key]), key


# ------------------------------------------------------------------ tables


TABLE = {
    "measured_on": None,
    "kernels": {
        "walk": [
            {"when": {"K": 256}, "BV": 16, "num_warps": 4},
            {"BV": 64, "num_warps": 4},
        ]
    },
}


def test_entries_of_a_table():
    assert tables.lookup(TABLE, "walk", {"K": 128, "V": 128}) == {"BV": 64, "num_warps": 4}
    changed = tables.with_entry(TABLE, "walk", {"K": 128}, {"BV": 32, "num_warps": 8})
    assert tables.lookup(changed, "walk", {"K": 128, "V": 64}) == {"BV": 32, "num_warps": 8}
    assert tables.lookup(changed, "walk", {"K": 256}) == {"BV": 16, "num_warps": 4}
    assert tables.lookup(changed, "walk", {"K": 64}) == {"BV": 64, "num_warps": 4}
    again = tables.with_entry(changed, "walk", {"K": 128}, {"BV": 16, "num_warps": 8})
    assert len(again["kernels"]["walk"]) == 3
    default = tables.with_entry(TABLE, "walk", {}, {"BV": 8, "num_warps": 1})
    assert tables.lookup(default, "walk", {"K": 64}) == {"BV": 8, "num_warps": 1}
    assert tables.lookup(default, "walk", {"K": 256}) == {"BV": 16, "num_warps": 4}
    assert len(TABLE["kernels"]["walk"]) == 2  # tables that are given are not changed


def test_a_table_in_use_and_out_of_use():
    before = launch.launch_config("kda_state", CPU, K=128)
    changed = tables.with_entry(tables.read("sm_90"), "kda_state", {"K": 128}, {"BV": 1})
    with tables.using(changed):
        assert launch.launch_config("kda_state", CPU, K=128) == {"BV": 1}
    assert launch.launch_config("kda_state", CPU, K=128) == before


def test_unknown_architectures_begin_with_the_default_table():
    assert tables.read("sm_120") == launch.read_table(launch.DEFAULT)


def test_tables_are_written_as_they_are_read(tmp_path, monkeypatch):
    here = {"device": "a GPU", "kernels": ["walk"], "date": "2026-01-01"}
    tables.write(tmp_path / "sm_90.json", TABLE, here)
    monkeypatch.setattr(launch, "TABLES", tmp_path)
    launch.read_table.cache_clear()
    try:
        table = launch.read_table("sm_90")
        assert table == {**TABLE, "measured_on": here}
        later = {**here, "kernels": ["fold"], "date": "2026-02-02"}
        tables.write(tmp_path / "more.json", table, later)
        written = json.loads((tmp_path / "more.json").read_text())["measured_on"]
        assert written == {**later, "kernels": ["fold", "walk"]}
        tables.write(tmp_path / "other.json", table, {**later, "device": "another GPU"})
        written = json.loads((tmp_path / "other.json").read_text())["measured_on"]
        assert written["kernels"] == ["fold"]
    finally:
        launch.read_table.cache_clear()


# ------------------------------------------------------------------ search


def test_the_fastest_by_a_margin():
    old = Trial({"BV": 64}, {"a": 1.0, "b": 2.0})
    slower = Trial({"BV": 32}, {"a": 0.9, "b": 4.0})
    faster = Trial({"BV": 16}, {"a": 0.5, "b": 2.2})
    fastest = Trial({"BV": 8}, {"a": 0.1, "b": 0.1}, rejected="a: o differs by 1.0")
    barely = Trial({"BV": 4}, {"a": 0.99, "b": 1.98})
    assert search.choose(old, [slower, faster, fastest]) is faster
    assert search.choose(old, [slower, fastest, barely]) is old
    assert search.ratio(faster, old) == pytest.approx((0.5 * 1.1) ** 0.5)


Results = Callable[[int], cases.Tensors]


def tuned(monkeypatch, results: Results, skip: dict[str, str] | None = None) -> search.Outcome:
    """The outcome for a kernel whose results and time depend on its number of warps alone."""
    target = Target("walk", {"K": 128}, ("case",), {"num_warps": (1, 2, 4, 8)})

    def warps() -> int:
        return launch.launch_config("walk", CPU, K=128)["num_warps"]

    monkeypatch.setattr(search, "build", lambda case, device, sizes: lambda: results(warps()))
    return search.tune(target, TABLE, CPU, lambda run: float(warps()), skip or {})


def test_candidates_that_compute_something_else_are_refused(monkeypatch):
    def results(warps: int) -> cases.Tensors:
        if warps == 1:
            raise RuntimeError("out of resources\nshared memory")
        return {"o": torch.ones(4) * (1.01 if warps == 2 else 1.0), "state": torch.ones(2)}

    outcome = tuned(monkeypatch, results)
    reasons = {trial.config["num_warps"]: trial.rejected for trial in outcome.trials}
    assert reasons[1] == "RuntimeError: out of resources"
    assert reasons[2] == "case: o differs by 1.0e-02"
    assert reasons[8] is None
    assert not outcome.changed and outcome.new.config == {"BV": 64, "num_warps": 4}
    assert "  refused: BV 64, num_warps 2: case: o differs by 1.0e-02" in command.told(outcome)


def test_candidates_that_change_from_run_to_run_are_refused(monkeypatch):
    calls = iter(range(100))

    def results(warps: int) -> cases.Tensors:
        shift = {1: float("nan"), 2: 1e-6 * next(calls)}.get(warps, 0.0)
        return {"o": torch.ones(4) + shift}

    outcome = tuned(monkeypatch, results)
    reasons = {trial.config["num_warps"]: trial.rejected for trial in outcome.trials}
    assert reasons[1] == "case: o is not finite"
    assert reasons[2] == "case: o differs from run to run"
    assert sum("refused" in line for line in command.told(outcome)) == 2


def test_a_faster_candidate_is_taken_and_told(monkeypatch):
    skip = {"BV 64, num_warps 1": "spills 100 bytes"}
    outcome = tuned(monkeypatch, lambda warps: {"o": torch.ones(4)}, skip)
    assert outcome.changed and outcome.new.config == {"BV": 64, "num_warps": 2}
    lines = command.told(outcome)
    assert "walk[K=128]: 2 of 3 candidates timed" in lines[0]
    assert "  new  BV 64, num_warps 2: 0.500 of the time" in lines
    assert lines[-1].split() == ["case", "4000.0", "us", "->", "2000.0", "us"]


def test_a_configuration_in_use_that_is_restless_stops_the_search(monkeypatch):
    calls = iter(range(100))
    with pytest.raises(RuntimeError, match=r"walk\[K=128\], case, as it is: o differs from run"):
        tuned(monkeypatch, lambda warps: {"o": torch.ones(4) + next(calls)})


def test_a_search_over_a_kernel(interpreter, poisoned):
    target = Target(
        "kda_state",
        {"K": 16, "V": 16, "dtype": "bfloat16"},
        ("kda_prefill_h32", "kda_train_h32"),
        {"BV": (16, 32), "num_warps": (1, 4)},
    )

    def timer(run: cases.Run) -> float:
        return float(launch.launch_config("kda_state", CPU, **target.when)["num_warps"])

    outcome = search.tune(target, tables.read("sm_90"), CPU, timer, {}, cases.SMALL)
    assert [trial.rejected for trial in outcome.trials] == [None] * len(outcome.trials)
    assert outcome.new.config["num_warps"] == 1


# ------------------------------------------------------------------ without a GPU


def test_hopeless_candidates_are_dropped():
    compilations = [
        Compilation({"BV": 64}, registers=128, spills=8, warps_per_sm=16),
        Compilation({"BV": 128}, registers=255, spills=12),
        Compilation({"BV": 32}, registers=64, spills=8),
        Compilation({"BV": 256}, error="too much shared memory\nby far"),
    ]
    lines, dropped = command.screening(TARGETS[0], compilations)
    assert dropped == 2
    assert lines[2].endswith("BV 64  (current)") and lines[4].endswith("  BV 32")
    assert lines[3].endswith("dropped: spills 12 bytes")
    assert lines[5].endswith("dropped: too much shared memory")


def test_dry_run_compiles_every_candidate():
    done = run_python("tools/tune_kernels.py", "--dry-run", "--only", "short_conv_step")
    assert done.returncode == 0, done.stderr
    assert "short_conv_step[W=4], compiled as in short_conv_step" in done.stdout
    rows = [line.split() for line in done.stdout.splitlines() if "num_warps" in line]
    target = next(target for target in TARGETS if target.kernel == "short_conv_step")
    current = tables.lookup(tables.read("sm_90"), target.kernel, target.when)
    assert len(rows) == 1 + len(list(target.candidates(current)))
    assert all(16 <= int(row[0]) <= 255 for row in rows) and rows[0][-1] == "(current)"
    assert f"{len(rows) - 1} candidates for sm_90, 0 of them hopeless" in done.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "there is no GPU to time kernels on; --dry-run compiles the candidates without one"),
        (["--only", "walk"], "no kernel walk; there are kda_state, "),
        (["--dry-run", "--only", "walk"], "no kernel walk; there are kda_state, "),
    ],
)
def test_what_cannot_be_tuned(args, message):
    done = run_python("tools/tune_kernels.py", *args)
    assert done.returncode == 2 and f"error: {message}" in done.stderr
