"""Whole sequences: every side on every shape, checked first, then timed in turns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from megakda.kernels.verify.bench import agreement
from megakda.kernels.verify.bench.measure import (
    Clock,
    Lap,
    Step,
    cpu_peak_elsewhere,
    cuda_peak,
    interleave,
    summary,
)
from megakda.kernels.verify.bench.problems import (
    Problem,
    Shape,
    floor_bytes,
    make_problem,
    small_shape,
)
from megakda.kernels.verify.bench.sides import FAMILIES, OURS, CannotRun, Run, Side, reference

MODES = ("forward", "backward", "both")


class Disagreement(Exception):
    """What is measured computes something else than it should: nothing was timed."""


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        shapes: one after the other.
        sides: what is compared.
        gate: see `problems.Problem`.
        dtype: of q, k, v, g and beta.
        device: cpu or cuda.
        repeats: of each measurement.
        seconds: a side that has had this long in one measurement stops early.
        memory: whether to measure peak memory too.
    """

    shapes: tuple[Shape, ...]
    sides: tuple[Side, ...]
    gate: str
    dtype: torch.dtype
    device: torch.device
    repeats: int
    seconds: float
    memory: bool = True


@dataclass
class Results:
    """What was found.

    Attributes:
        rows: one per shape, side and mode.
        skipped: which side could not run a shape, and why.
        wrong: which side was not timed because it is wrong, with its errors.
        errors: of each side on each shape, against float64 at a small size, and against the first
            side of its family at the timed one.
    """

    rows: list[dict[str, Any]]
    skipped: list[dict[str, str]]
    wrong: list[str]
    errors: list[dict[str, Any]]


def benchmark(
    settings: Settings, bandwidth: float | None = None, say: Callable[[str], None] = print
) -> Results:
    """Checks and times all sides.

    Args:
        settings: what to measure.
        bandwidth: bytes per second of the memory, for the share of the roofline.
        say: is told about progress.

    Raises:
        Disagreement: one of our own sides is wrong; no time was taken.
    """
    results = Results([], [], [], [])
    clock = Clock(settings.device)
    for shape in settings.shapes:
        say(f"{shape.label}, gate {settings.gate}")
        trusted = [side for side in settings.sides if _passes_small(settings, shape, side, results)]
        problems = _problems(settings, shape)
        runs: dict[Side, Run] = {}
        for side in trusted:
            try:
                runs[side] = side.prepare(problems[side.family])
            except CannotRun as reason:
                results.skipped.append(_skipped(side, shape, reason))
        runs = _agreeing(settings, shape, runs, problems, results)
        peaks = _peaks(settings, shape, runs, problems) if settings.memory else {}
        times = _times(settings, clock, runs, problems)
        for (side, mode), seconds in times.items():
            found = summary(seconds)
            median = found["median_ms"] * 1e-3
            row: dict[str, Any] = {
                "shape": shape.label,
                "side": side.name,
                "family": side.family,
                "mode": mode,
                "tokens": shape.batch * shape.tokens,
                **found,
                "tokens_per_s": shape.batch * shape.tokens / median,
                "peak_bytes": peaks.get((side, mode)),
            }
            if side.family == "kda":
                row["floor_bytes"] = floor_bytes(problems["kda"], mode)
                if bandwidth is not None:
                    row["roofline"] = row["floor_bytes"] / bandwidth / median
            results.rows.append(row)
            say(f"  {side.name:14} {mode:8} {found['median_ms']:10.3f} ms")
    return results


def _skipped(side: Side, shape: Shape, reason: CannotRun) -> dict[str, str]:
    return {"side": side.name, "shape": shape.label, "reason": str(reason)}


def _problems(settings: Settings, shape: Shape) -> dict[str, Problem]:
    """Inputs for each family that is measured; queries, keys and values are shared."""
    wanted = {side.family for side in settings.sides}
    options: dict[str, Any] = {"dtype": settings.dtype, "device": settings.device}
    problem = make_problem(shape, settings.gate, **options).with_gradients()
    problems = {family: problem for family in FAMILIES if family in wanted}
    if "gdn" in wanted:
        scalar = make_problem(shape, settings.gate, **options, scalar_decay=True).with_gradients()
        problems["gdn"] = replace(problem, g=scalar.g, A_log=scalar.A_log, dt_bias=scalar.dt_bias)
    return problems


def _passes_small(settings: Settings, shape: Shape, side: Side, results: Results) -> bool:
    """Whether a side can run a small problem of that kind, and is right against float64."""
    small = small_shape(shape)
    problem = _problems(replace(settings, sides=(side,)), small)[side.family]
    try:
        run = side.prepare(problem)
    except CannotRun as reason:
        results.skipped.append(_skipped(side, shape, reason))
        return False
    got = agreement.results(run, problem.do, side.backward)
    leaves = problem.inputs
    if side.family == "softmax":
        leaves = {name: leaves[name] for name in ("q", "k", "v")}
    truth = Run(lambda: reference(side.family, problem), leaves)
    expected = agreement.results(truth, problem.do, side.backward)
    return _note(settings, side, f"{small.label} against float64", got, expected, 1, results)


def _agreeing(
    settings: Settings,
    shape: Shape,
    runs: dict[Side, Run],
    problems: dict[str, Problem],
    results: Results,
) -> dict[Side, Run]:
    """The runs that agree with the first one of their family at the timed size."""
    right: dict[Side, Run] = {}
    for family, problem in problems.items():
        first: tuple[str, dict[str, torch.Tensor]] | None = None
        for side in (side for side in runs if side.family == family):
            got = agreement.results(runs[side], problem.do, side.backward)
            if first is None:
                first = side.name, got
            name, expected = first
            where = f"{shape.label} against {name}"
            # Each may be off by its limit, so the two by twice as much.
            if name == side.name or _note(settings, side, where, got, expected, 2, results):
                right[side] = runs[side]
    return {side: right[side] for side in runs if side in right}


def _note(
    settings: Settings,
    side: Side,
    where: str,
    got: dict[str, torch.Tensor],
    expected: dict[str, torch.Tensor],
    factor: float,
    results: Results,
) -> bool:
    found = agreement.errors(got, expected)
    results.errors.append({"side": side.name, "where": where, "errors": found})
    problems = agreement.too_large(found, settings.dtype, factor * side.slack)
    if not problems:
        return True
    sentence = f"{side.name}, {where}: {'; '.join(problems)}"
    if side.name.startswith(OURS):
        raise Disagreement(sentence)
    results.wrong.append(sentence)
    return False


def _forward_step(run: Run) -> Step:
    def step(lap: Lap) -> None:
        with torch.no_grad():
            run.forward()
        lap()

    return step


def _train_step(run: Run, do: torch.Tensor) -> Step:
    leaves = list(run.leaves.values())

    def step(lap: Lap) -> None:
        o = run.forward()
        lap()
        torch.autograd.grad(o, leaves, do)
        lap()

    return step


def _times(
    settings: Settings, clock: Clock, runs: dict[Side, Run], problems: dict[str, Problem]
) -> dict[tuple[Side, str], list[float]]:
    """Seconds of every repetition, by side and mode."""
    limits = (settings.repeats, settings.seconds)
    names = {side.name: side for side in runs}
    forward = {side.name: _forward_step(run) for side, run in runs.items()}
    train = {
        side.name: _train_step(run, problems[side.family].do)
        for side, run in runs.items()
        if side.backward
    }
    found: dict[tuple[Side, str], list[float]] = {}
    for name, laps in interleave(clock, forward, *limits).items():
        found[names[name], "forward"] = [lap[0] for lap in laps]
    for name, laps in interleave(clock, train, *limits).items():
        found[names[name], "backward"] = [lap[1] for lap in laps]
        found[names[name], "both"] = [sum(lap) for lap in laps]
    return {
        (side, mode): found[side, mode] for side in runs for mode in MODES if (side, mode) in found
    }


def _peaks(
    settings: Settings, shape: Shape, runs: dict[Side, Run], problems: dict[str, Problem]
) -> dict[tuple[Side, str], int]:
    """Peak bytes by side and mode, "forward" and "both"."""
    found: dict[tuple[Side, str], int] = {}
    for side, run in runs.items():
        if settings.device.type == "cuda":
            do = problems[side.family].do
            peaks = {"forward": cuda_peak(lambda: agreement.results(run, do, False))}  # noqa: B023
            if side.backward:
                peaks["both"] = cuda_peak(lambda: agreement.results(run, do, True))  # noqa: B023
        else:
            peaks = cpu_peak_elsewhere(
                {
                    "side": side.name,
                    "shape": shape.label,
                    "gate": settings.gate,
                    "dtype": str(settings.dtype).removeprefix("torch."),
                    "threads": torch.get_num_threads(),
                }
            )
        found |= {(side, mode): peak for mode, peak in peaks.items()}
    return found
