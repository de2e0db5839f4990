"""What tools/bench_kernels.py does once its command line is read; each returns an exit status."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from megakda.kernels.verify.bench import environment, plot, report
from megakda.kernels.verify.bench.decode import decode_benchmark
from megakda.kernels.verify.bench.determinism import check_determinism
from megakda.kernels.verify.bench.measure import copy_bandwidth
from megakda.kernels.verify.bench.problems import parse_shape
from megakda.kernels.verify.bench.run import Disagreement, Results, Settings, benchmark
from megakda.kernels.verify.bench.sides import find_sides


def default_device() -> str:
    """cuda if there is a GPU, otherwise cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def set_threads(threads: int) -> None:
    """Of torch's operators on the CPU."""
    torch.set_num_threads(threads)


def settings(
    device: str, shapes: Sequence[str], only: list[str] | None, *, dtype: str, **options: Any
) -> Settings:
    """Settings from words.

    Raises:
        ValueError: a word that is none of them.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no GPU")
    return Settings(
        shapes=tuple(map(parse_shape, shapes)),
        sides=tuple(find_sides(only)),
        dtype=getattr(torch, dtype),
        device=torch.device(device),
        **options,
    )


def sequences(settings: Settings, path: Path, line: list[str]) -> int:
    """Whole sequences: JSON, Markdown and a picture."""

    def measure() -> tuple[Results, dict[str, Any]]:
        cuda = settings.device.type == "cuda"
        bandwidth = copy_bandwidth(settings.device) if cuda else None
        return benchmark(settings, bandwidth), {"bandwidth": bandwidth}

    content = _measured(settings, line, measure)
    if content is None:
        return 1
    report.write(path, content, report.sequence_tables(content))
    if content["rows"]:
        plot.draw(content, path.with_suffix(".png"))
    return _told(content, path)


def decode(settings: Settings, path: Path, line: list[str]) -> int:
    """Decode steps: JSON and Markdown."""
    content = _measured(settings, line, lambda: (decode_benchmark(settings), {}))
    if content is None:
        return 1
    report.write(path, content, report.decode_table(content))
    return _told(content, path)


def determinism(settings: Settings, times: int) -> int:
    """Equal bits over `times` runs of our own sides: prints what differs."""
    rows = check_determinism(settings, times)
    different = [row for row in rows if row["different"]]
    print(f"{len(rows) - len(different)} of {len(rows)} gave equal bits {times} times")
    return 1 if different else 0


def _measured(
    settings: Settings, line: list[str], measure: Callable[[], tuple[Results, dict[str, Any]]]
) -> dict[str, Any] | None:
    described = environment.describe(settings.device, line)
    try:
        results, extra = measure()
    except Disagreement as error:
        print(f"error: nothing is timed: {error}")
        return None
    return {
        "environment": described,
        "gate": settings.gate,
        "dtype": str(settings.dtype).removeprefix("torch."),
        "repeats": settings.repeats,
        "load_average_after": os.getloadavg(),
        **extra,
        **dataclasses.asdict(results),
    }


def _told(content: dict[str, Any], path: Path) -> int:
    print(f"written: {path} and beside it")
    for sentence in content["wrong"]:
        print(f"error: not timed: {sentence}")
    return 1 if content["wrong"] else 0
