"""What tools/tune_kernels.py does once its command line is read; each returns an exit status."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path

import torch

from megakda.kernels import launch
from megakda.kernels.verify.bench.environment import describe as describe_machine
from megakda.kernels.verify.gpu import GPUS
from megakda.kernels.verify.tuning import tables
from megakda.kernels.verify.tuning.screen import Compilation, screen
from megakda.kernels.verify.tuning.search import GpuTimer, Outcome, describe, ratio, tune
from megakda.kernels.verify.tuning.targets import Target, find_targets


def dry_run(architecture: str, only: list[str] | None, jobs: int) -> int:
    """Compiles all candidates and prints what the compiler made of them.

    Raises:
        ValueError: an unknown kernel.
    """
    table = tables.read(architecture)
    targets, dropped, count = find_targets(only), 0, 0
    for target, compilations in screen(targets, table, architecture, jobs):
        lines, hopeless = screening(target, compilations)
        print("\n".join(lines), flush=True)
        dropped += hopeless
        count += len(compilations) - 1
    print(f"\n{count} candidates for {architecture}, {dropped} of them hopeless")
    return 0


def screening(target: Target, compilations: Sequence[Compilation]) -> tuple[list[str], int]:
    """Lines of a table, the current configuration first, and how many need not be timed."""
    lines = [
        f"\n{target.name}, compiled as in {target.cases[0]}",
        f"  {'registers':>9} {'spills':>7} {'shared':>7} {'warps':>6}  configuration",
    ]
    hopeless = 0
    for compilation in compilations:
        reason = compilation.hopeless(compilations[0])
        first = compilation is compilations[0]
        note = "  (current)" if first else f"  dropped: {reason}" if reason else ""
        hopeless += bool(reason) and not first
        lines.append(
            f"  {compilation.registers:9} {compilation.spills:7} {compilation.shared:7} "
            f"{compilation.warps_per_sm:6}  {describe(compilation.config)}{note}"
        )
    return lines, hopeless


def tune_all(only: list[str] | None, repeats: int, jobs: int, path: Path | None) -> int:
    """Times the candidates on the GPU of this machine and writes its table.

    Raises:
        ValueError: an unknown kernel, or no GPU.
    """
    targets = find_targets(only)
    if not torch.cuda.is_available():
        raise ValueError(
            "there is no GPU to time kernels on; --dry-run compiles the candidates without one"
        )
    device = torch.device("cuda")
    architecture = tables.architecture_of(device)
    path = path or launch.TABLES / f"{architecture}.json"
    table = tables.read(architecture)
    skips = _skips(targets, table, architecture, jobs)
    timer = GpuTimer(device, repeats)
    outcomes = []
    for target in targets:
        outcome = tune(target, table, device, timer, skips.get(target.name, {}))
        outcomes.append(outcome)
        print("\n".join(told(outcome)), flush=True)
        table = tables.with_entry(table, target.kernel, target.when, outcome.new.config)
        # After each target, so that what is found is not lost with the machine.
        tables.write(path, table, _measured_on(device, outcomes))
    print(f"\n{sum(x.changed for x in outcomes)} of {len(outcomes)} changed, written to {path}")
    if architecture not in launch.ARCHITECTURES:
        print(f"to use it, add {architecture} to ARCHITECTURES in megakda/kernels/launch.py")
    return 0


def told(outcome: Outcome) -> list[str]:
    """Lines on one target: old and new configuration, and times of each case."""
    target, old, new = outcome.target, outcome.old, outcome.new
    timed = sum(trial.rejected is None for trial in outcome.trials)
    lines = [f"\n{target.name}: {timed} of {len(outcome.trials)} candidates timed"]
    wrong = [t for t in outcome.trials if t.rejected and t.launched]
    lines += [f"  refused: {describe(trial.config)}: {trial.rejected}" for trial in wrong]
    lines.append(f"  old  {describe(old.config)}")
    if outcome.changed:
        lines.append(f"  new  {describe(new.config)}: {ratio(new, old):.3f} of the time")
    for case, before in old.milliseconds.items():
        after = new.milliseconds[case]
        lines.append(f"    {case:26} {1e3 * before:10.1f} us -> {1e3 * after:10.1f} us")
    return lines


def _skips(
    targets: Sequence[Target], table: tables.Table, architecture: str, jobs: int
) -> dict[str, dict[str, str]]:
    """By target the configurations that are hopeless, with the reason."""
    if architecture not in GPUS:
        return {}  # nothing is known of its limits; what does not launch is refused when it is run
    skips: dict[str, dict[str, str]] = {}
    for target, compilations in screen(targets, table, architecture, jobs):
        reasons = ((x.config, x.hopeless(compilations[0])) for x in compilations[1:])
        skips[target.name] = {describe(config): reason for config, reason in reasons if reason}
        print(f"{target.name}: {len(skips[target.name])} of {len(compilations) - 1} are hopeless")
    return skips


def _measured_on(device: torch.device, outcomes: Sequence[Outcome]) -> dict[str, object]:
    machine = describe_machine(device, [])
    return {
        "device": machine["hardware"]["name"],
        "versions": machine["versions"],
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": machine["commit"],
        "kernels": sorted({outcome.target.name for outcome in outcomes}),
    }
