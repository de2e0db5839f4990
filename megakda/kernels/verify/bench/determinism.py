"""Whether equal inputs give equal bits, again and again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megakda.kernels.verify.bench import agreement
from megakda.kernels.verify.bench.decode import OPERATORS
from megakda.kernels.verify.bench.problems import make_problem
from megakda.kernels.verify.bench.run import Settings
from megakda.kernels.verify.bench.sides import OURS


def check_determinism(
    settings: Settings, times: int, say: Callable[[str], None] = print
) -> list[dict[str, Any]]:
    """Runs our sides and decode steps `times` times on each shape, and compares with the first.

    Returns:
        What was run, how often, and the names of the results that were not equal to the bit.
    """
    rows = []
    for shape in settings.shapes:
        for side in (side for side in settings.sides if side.name.startswith(OURS)):
            options: dict[str, Any] = {"dtype": settings.dtype, "device": settings.device}
            options["scalar_decay"] = side.family == "gdn"
            problem = make_problem(shape, settings.gate, **options).with_gradients()
            run = side.prepare(problem)
            rows.append(
                _repeat(
                    f"{side.name}, {shape.label}",
                    lambda: agreement.results(run, problem.do, True),  # noqa: B023
                    times,
                )
            )
            say(_sentence(rows[-1]))
    for operator in OPERATORS:
        shape = settings.shapes[0]
        tensors = operator.tensors(shape, settings)

        def step() -> dict[str, torch.Tensor]:
            fresh = operator.fresh(tensors)  # noqa: B023
            got = operator.sides[OURS](fresh)()  # noqa: B023
            return dict(zip(("o", "state"), got, strict=False))

        with torch.no_grad():
            rows.append(_repeat(f"{operator.name}, {shape.label}", step, times))
        say(_sentence(rows[-1]))
    return rows


def _repeat(
    what: str, function: Callable[[], dict[str, torch.Tensor]], times: int
) -> dict[str, Any]:
    first = function()
    different: set[str] = set()
    for _ in range(times - 1):
        again = function()
        # As bits: a NaN equals itself, and zeros of different sign differ.
        different |= {name for name in first if not _equal_bits(first[name], again[name])}
    return {"what": what, "times": times, "different": sorted(different)}


def _equal_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _sentence(row: dict[str, Any]) -> str:
    found = "equal bits" if not row["different"] else f"DIFFERENT: {', '.join(row['different'])}"
    return f"{row['what']}: {row['times']} times, {found}"
