"""Compiles candidates without a GPU: what spills or does not fit need not be timed."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from megakda.kernels.verify.tuning.cases import build
from megakda.kernels.verify.tuning.tables import Config, Table, lookup, using, with_entry
from megakda.kernels.verify.tuning.targets import TARGETS, Target

_MARK = "of_the_target"


@dataclass(frozen=True)
class Compilation:
    """A configuration as it was compiled; of several specialisations the worst figures.

    Attributes:
        config: of the launch.
        registers: of a thread.
        spills: bytes of a thread that are stored to memory and loaded again.
        shared: bytes of shared memory of a block.
        warps_per_sm: warps that a multiprocessor holds at once.
        error: why it would not run, or None.
    """

    config: Config
    registers: int = 0
    spills: int = 0
    shared: int = 0
    warps_per_sm: int = 0
    error: str | None = None

    def hopeless(self, current: Compilation) -> str | None:
        """Why it need not be timed beside the current configuration, or None."""
        if self.error is not None:
            return self.error.splitlines()[0]
        if self.spills > current.spills:
            return f"spills {self.spills} bytes"
        return None


class NotLaunched(Exception):
    """A case does not launch its target's kernel with the target's configuration."""


def unreached(targets: Sequence[Target], table: Table) -> list[str]:
    """Sentences on cases that do not launch their target's kernel with the target's sizes.

    Nothing is compiled or run. Not in a process with TRITON_INTERPRET=1.
    """
    from triton.runtime.jit import JITFunction

    problems = []
    for target in targets:
        marked = _marked(target, table)
        for case in target.cases:
            found = set()

            def launch(jit: Any, *args: Any, **kwargs: Any) -> None:
                if kwargs.get(_MARK):
                    found.add(jit.__name__)  # noqa: B023

            with using(marked), mock.patch.object(JITFunction, "run", launch):
                build(case, torch.device("meta"))()
            if found != {target.jit_name}:
                problems.append(f"{case} launches no {target.jit_name} with {target.name}")
    return problems


def screen(
    targets: Sequence[Target], table: Table, architecture: str, jobs: int
) -> Iterator[tuple[Target, list[Compilation]]]:
    """Compiles the current configuration, which comes first, and all candidates of each target.

    In processes of its own, because a process that compiles for an absent GPU can use no other.

    Args:
        targets: what to compile.
        table: of the current configurations.
        architecture: a key of `gpu.GPUS`.
        jobs: how many processes.

    Raises:
        NotLaunched: a case launches the kernel with other sizes than the target says.
    """
    problems = unreached(targets, table)
    if problems:
        raise NotLaunched("; ".join(problems))
    work = [(TARGETS.index(target), table, architecture) for target in targets]
    with multiprocessing.get_context("spawn").Pool(min(jobs, len(work))) as pool:
        yield from zip(targets, pool.imap(_compile_target, work), strict=True)


def _compile_target(task: tuple[int, Table, str]) -> list[Compilation]:
    index, table, architecture = task
    target = TARGETS[index]
    current = lookup(table, target.kernel, target.when)
    return [
        compile_config(target, with_entry(table, target.kernel, target.when, config), architecture)
        for config in (current, *target.candidates(current))
    ]


def compile_config(target: Target, table: Table, architecture: str) -> Compilation:
    """Compiles a target's kernel as its first case launches it with a table."""
    from triton.runtime.jit import JITFunction

    from megakda.kernels.verify import aot

    config = lookup(table, target.kernel, target.when)
    failed = None
    with using(_marked(target, table)), aot.compiling(architecture, keep_going=True) as compiled:
        compile_launch = JITFunction.run

        def only_target(jit: Any, *args: Any, **kwargs: Any) -> Any:
            return compile_launch(jit, *args, **kwargs) if kwargs.pop(_MARK, False) else None

        with mock.patch.object(JITFunction, "run", only_target):
            try:
                build(target.cases[0], torch.device("meta"))()
            except (ValueError, AssertionError) as error:  # the operator refuses these sizes
                failed = f"{type(error).__name__}: {error}"
    if failed is not None:
        return Compilation(config, error=failed)
    errors = [entry.error for entry in compiled if entry.error is not None]
    return Compilation(
        config,
        registers=max(entry.registers for entry in compiled),
        spills=max(entry.spill_stores + entry.spill_loads for entry in compiled),
        shared=max(entry.shared for entry in compiled),
        warps_per_sm=min(entry.warps_per_sm for entry in compiled),
        error=errors[0] if errors else None,
    )


def _marked(target: Target, table: Table) -> Table:
    """The table with a mark on the target's entry, which launches that take it carry along."""
    config = lookup(table, target.kernel, target.when)
    return with_entry(table, target.kernel, target.when, {**config, _MARK: 1})
