"""Times candidates, keeps those that compute the same, and takes the fastest."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from megakda.kernels.verify.bench.measure import Clock, Lap
from megakda.kernels.verify.tuning.cases import PRODUCTION, Run, Sizes, Tensors, build
from megakda.kernels.verify.tuning.tables import Config, Table, lookup, using, with_entry
from megakda.kernels.verify.tuning.targets import Target

LARGEST_ERROR = 0.005
"""RMS of the difference to the current configuration's results, relative: what bf16 may lose."""

LEAST_GAIN = 0.02
"""A candidate has to be this much faster: less is noise, and would make tables restless."""

Timer = Callable[[Run], float]


@dataclass(frozen=True)
class Trial:
    """One configuration.

    Attributes:
        config: of the launch.
        milliseconds: of each case; empty if it was not timed.
        rejected: why it cannot be taken, or None.
        launched: whether it got as far as giving results.
    """

    config: Config
    milliseconds: dict[str, float] = field(default_factory=dict)
    rejected: str | None = None
    launched: bool = False


@dataclass(frozen=True)
class Outcome:
    """What was found for a target: its configuration before and after, and everything tried."""

    target: Target
    old: Trial
    new: Trial
    trials: list[Trial]

    @property
    def changed(self) -> bool:
        return self.new is not self.old


class GpuTimer:
    """Median milliseconds of a call on a GPU, replayed from a CUDA graph with an empty cache."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self._clock, self._repeats = Clock(device), repeats

    def __call__(self, run: Run) -> float:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()

        def step(lap: Lap) -> None:
            graph.replay()
            lap()

        self._clock.time(step)
        return 1e3 * statistics.median(self._clock.time(step)[0] for _ in range(self._repeats))


def tune(
    target: Target,
    table: Table,
    device: torch.device,
    timer: Timer,
    skip: dict[str, str],
    sizes: Sizes = PRODUCTION,
) -> Outcome:
    """Tries every candidate of a target.

    Args:
        target: what to tune.
        table: the table in use.
        device: a GPU; in tests a CPU with the interpreter.
        timer: milliseconds of a call.
        skip: configurations that need not be timed, as `describe` writes them, with the reason.
        sizes: of the cases.

    Raises:
        RuntimeError: the current configuration does not give equal bits twice, or not a number.
    """
    current = lookup(table, target.kernel, target.when)
    with using(table):
        expected = {case: _results(case, device, sizes) for case in target.cases}
        for case, results in expected.items():
            problem = _difference(_results(case, device, sizes), results, exactly=True)
            if problem is not None:
                raise RuntimeError(f"{target.name}, {case}, as it is: {problem}")
        old = Trial(current, {case: timer(build(case, device, sizes)) for case in target.cases})
    trials = []
    for config in target.candidates(current):
        if describe(config) in skip:
            trials.append(Trial(config, rejected=skip[describe(config)]))
            continue
        with using(with_entry(table, target.kernel, target.when, config)):
            trials.append(_try(target, config, expected, device, timer, sizes))
    return Outcome(target, old, choose(old, trials), trials)


def choose(old: Trial, trials: Sequence[Trial]) -> Trial:
    """The fastest trial over all cases, if it is `LEAST_GAIN` faster than the old one."""
    best, best_ratio = old, 1 - LEAST_GAIN
    for trial in trials:
        if trial.rejected is None and ratio(trial, old) < best_ratio:
            best, best_ratio = trial, ratio(trial, old)
    return best


def ratio(trial: Trial, old: Trial) -> float:
    """Time of a trial divided by that of another, geometric mean over the cases."""
    logs = [math.log(ms / old.milliseconds[case]) for case, ms in trial.milliseconds.items()]
    return math.exp(statistics.fmean(logs))


def describe(config: Config) -> str:
    """A configuration as text: BV 64, num_warps 4."""
    return ", ".join(f"{name} {value}" for name, value in sorted(config.items()))


def _try(
    target: Target,
    config: Config,
    expected: dict[str, Tensors],
    device: torch.device,
    timer: Timer,
    sizes: Sizes,
) -> Trial:
    milliseconds = {}
    try:
        for case in target.cases:
            results = _results(case, device, sizes)
            problem = _difference(results, expected[case]) or _difference(
                _results(case, device, sizes), results, exactly=True
            )
            if problem is not None:
                return Trial(config, rejected=f"{case}: {problem}", launched=True)
            milliseconds[case] = timer(build(case, device, sizes))
    except Exception as error:  # whatever the compiler, the driver or an operator says to it
        [reason, *_] = str(error).splitlines() or [""]
        return Trial(config, rejected=f"{type(error).__name__}: {reason}")
    return Trial(config, milliseconds, launched=True)


def _results(case: str, device: torch.device, sizes: Sizes) -> Tensors:
    # Decode steps give the state that they update in place, which a later step would change.
    return {name: x.clone() for name, x in build(case, device, sizes)().items()}


def _difference(got: Tensors, expected: Tensors, exactly: bool = False) -> str | None:
    for name, truth in expected.items():
        if not got[name].isfinite().all():
            return f"{name} is not finite"
        if exactly:
            if not torch.equal(got[name], truth):
                return f"{name} differs from run to run"
            continue
        rms, size = (
            x.square().mean().sqrt() for x in (got[name].double() - truth.double(), truth.double())
        )
        error = rms / size.clamp_min(1e-30)
        if not error <= LARGEST_ERROR:
            return f"{name} differs by {error.item():.1e}"
    return None
