"""What compiled kernels may cost, and whether they have become worse."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Kernel:
    """A kernel that a case launches, with its budget.

    Attributes:
        name: of the kernel.
        dot: whether it has matrix products, which have to reach the tensor cores.
        min_warps: the fewest warps that a multiprocessor must hold.
        may_spill: the architectures on which it may spill registers.
    """

    name: str
    dot: bool = False
    min_warps: int = 8
    may_spill: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """A call of an operator whose launches are guarded.

    Attributes:
        name: of the case.
        run: makes meta tensors of the shapes that matter and calls the operator.
        kernels: all kernels that it launches, in any order.
    """

    name: str
    run: Callable[[], Any]
    kernels: tuple[Kernel, ...]


class Figures(Protocol):
    """What is looked at in `aot.Compiled`."""

    kernel: str
    registers: int
    spill_stores: int
    spill_loads: int
    error: str | None

    @property
    def warps_per_sm(self) -> int: ...

    @property
    def matrix_instructions(self) -> int: ...


def over_budget(case: Case, architecture: str, compiled: Iterable[Figures]) -> list[str]:
    """Sentences on what costs more than it may, or is missing.

    Args:
        case: whose budgets count.
        architecture: that it was compiled for.
        compiled: all that it launched.
    """
    problems = []
    budgets = {kernel.name: kernel for kernel in case.kernels}
    launched = set()
    for figures in compiled:
        launched.add(figures.kernel)
        where = f"{case.name}, {figures.kernel}, {architecture}"
        if figures.kernel not in budgets:
            problems.append(f"{where}: not among the case's kernels; give it a budget")
            continue
        budget = budgets[figures.kernel]
        if figures.error is not None:
            problems.append(f"{where}: {figures.error}")
            continue
        spilled = figures.spill_stores + figures.spill_loads
        if spilled and architecture not in budget.may_spill:
            problems.append(
                f"{where}: spills {figures.spill_stores} bytes and loads {figures.spill_loads}, "
                f"at {figures.registers} registers"
            )
        if budget.dot and not figures.matrix_instructions:
            problems.append(f"{where}: no instruction for tensor cores")
        if figures.warps_per_sm < budget.min_warps:
            problems.append(
                f"{where}: {figures.warps_per_sm} warps on a multiprocessor, "
                f"fewer than {budget.min_warps}"
            )
    problems += [
        f"{case.name}, {name}, {architecture}: not launched"
        for name in budgets
        if name not in launched
    ]
    return problems


SAME = ("constexprs", "num_warps", "num_stages")
"""Figures that have to be as recorded: what is launched."""

NOT_MORE = ("registers", "spill_stores", "spill_loads", "stack", "shared")
NOT_LESS = ("blocks_per_sm",)

KEY = ("case", "architecture", "kernel")


def regressions(recorded: Sequence[dict[str, Any]], current: Sequence[dict[str, Any]]) -> list[str]:
    """Sentences on every kernel that has become worse than recorded, or is not the one recorded.

    Args:
        recorded: figures of launches by name, with those of `KEY`.
        current: the same, as compiled now, by the same version of triton.
    """
    problems = []
    before, now = _grouped(recorded), _grouped(current)
    for key in before | now:
        where = ", ".join(key[i] for i in (0, 2, 1))
        old, new = before.get(key, []), now.get(key, [])
        if len(old) != len(new):
            problems.append(f"{where}: {len(old)} specialisations recorded, now {len(new)}")
            continue
        for was, is_now in zip(old, new, strict=True):
            for name in (*SAME, *NOT_MORE, *NOT_LESS):
                a, b = was[name], is_now[name]
                if name in SAME and a != b:
                    problems.append(f"{where}: {name} {a} recorded, now {b}")
                elif (name in NOT_MORE and b > a) or (name in NOT_LESS and b < a):
                    problems.append(f"{where}: {name} {a} -> {b}")
    return problems


def _grouped(launches: Sequence[dict[str, Any]]) -> dict[tuple[str, ...], list[dict[str, Any]]]:
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for launch in launches:
        groups.setdefault(tuple(launch[name] for name in KEY), []).append(launch)
    return groups
