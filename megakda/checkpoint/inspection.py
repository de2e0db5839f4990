"""What checkpoints hold, as tables: shapes, dtypes, norms, numbers that are none, differences."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megakda.checkpoint.convert import progress_bar, row_blocks
from megakda.checkpoint.folders import find
from megakda.checkpoint.stored import StoredCheckpoint, StoredTensor
from megakda.errors import ConfigError

_BLOCK_BYTES = 16 * 10**6  # read at a time


@dataclass(frozen=True)
class TensorFacts:
    """Numbers about one tensor; norms are NaN where it holds NaN."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    elements: int
    nbytes: int
    rms: float
    largest: float  # absolute
    nan: int
    inf: int


@dataclass(frozen=True)
class TensorDifference:
    """How a tensor differs between two checkpoints.

    `relative` is the L2 norm of the difference over that of the first. Both numbers are None where
    the tensors cannot be subtracted; `note` says why, or that dtypes differ.
    """

    name: str
    shape: tuple[int, ...]
    largest: float | None = None  # absolute
    relative: float | None = None
    differs: bool = True
    note: str = ""


@dataclass(frozen=True)
class Inspection:
    """One checkpoint's tensors. `str` of it is a table."""

    title: str
    tensors: list[TensorFacts]

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("name", "shape", "dtype", "rms", "max |x|", "nan", "inf")]
        for t in self.tensors:
            numbers = (f"{t.rms:.4g}", f"{t.largest:.4g}", str(t.nan), str(t.inf))
            rows.append((t.name, _shape(t.shape), t.dtype, *numbers))
        total = (
            f"{len(self.tensors):,} tensors, {sum(t.elements for t in self.tensors):,} numbers, "
            f"{sum(t.nbytes for t in self.tensors):,} bytes"
        )
        broken = [t for t in self.tensors if t.nan or t.inf]
        if broken:
            total += (
                f"; {len(broken)} tensors hold {sum(t.nan for t in broken):,} NaN and "
                f"{sum(t.inf for t in broken):,} infinite numbers"
            )
        return "\n".join([self.title, "", *_table(rows, range(3, 7)), "", total])


@dataclass(frozen=True)
class Comparison:
    """Two checkpoints' tensors. `str` of it is a table of those that differ."""

    title: str
    tensors: list[TensorDifference]

    @property
    def differs(self) -> bool:
        return any(t.differs for t in self.tensors)

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("name", "shape", "max |a-b|", "|a-b| / |a|", "")]
        for t in self.tensors:
            if t.differs:
                numbers = ["" if x is None else f"{x:.4g}" for x in (t.largest, t.relative)]
                rows.append((t.name, _shape(t.shape), *numbers, t.note))
        differing = len(rows) - 1
        total = f"{differing:,} of {len(self.tensors):,} tensors differ"
        table = [*_table(rows, range(2, 4)), ""] if differing else []
        return "\n".join([self.title, "", *table, total])


def inspect(checkpoint: str, pattern: str | None = None, optimizer: bool = False) -> Inspection:
    """Reads a checkpoint once.

    Args:
        checkpoint: a checkpoint or run folder; of a run the newest.
        pattern: a regular expression to be found in the names; None: all.
        optimizer: with the optimizer's state.

    Raises:
        ConfigError: `pattern` is no regular expression.
        CheckpointError: no checkpoint, or a damaged one.
    """
    source = StoredCheckpoint(find(checkpoint, "CHECKPOINT"))
    names = list(_chosen(source, pattern, optimizer))
    with progress_bar(sum(source.tensors[name].nbytes for name in names), "inspect") as bar:
        return Inspection(_title(source), [_facts(source, name, bar) for name in names])


def compare(
    checkpoint: str, other: str, pattern: str | None = None, optimizer: bool = False
) -> Comparison:
    """Compares two checkpoints, number by number and in float64; a NaN equals a NaN.

    Arguments and errors are `inspect`'s.
    """
    a = StoredCheckpoint(find(checkpoint, "CHECKPOINT"))
    b = StoredCheckpoint(find(other, "--other"))
    names = dict.fromkeys([*_chosen(a, pattern, optimizer), *_chosen(b, pattern, optimizer)])
    title = f"a: {_title(a)}\nb: {_title(b)}"
    nbytes = sum(a.tensors[name].nbytes for name in names if name in a.tensors)
    with progress_bar(nbytes, "compare") as bar:
        return Comparison(title, [_difference(a, b, name, bar) for name in names])


def _chosen(source: StoredCheckpoint, pattern: str | None, optimizer: bool) -> Iterator[str]:
    try:
        expression = re.compile(pattern or "")
    except re.error as error:
        raise ConfigError(f"--filter={pattern}: no regular expression: {error}") from error
    names = source.tensors if optimizer else source.model_names()
    return (name for name in names if expression.search(name))


def _facts(source: StoredCheckpoint, name: str, bar: Any) -> TensorFacts:
    tensor = source.tensors[name]
    squares, largest, nan, inf = 0.0, 0.0, 0, 0
    for (block,) in _blocks([source], tensor, bar):
        squares += _squares(block)
        # max() of Python would lose a NaN that comes second.
        largest = float(torch.tensor([largest, float(block.abs().max())]).max())
        nan += int(block.isnan().sum())
        inf += int(block.isinf().sum())
    elements = math.prod(tensor.shape)
    rms = math.sqrt(squares / max(1, elements))
    return TensorFacts(
        name, tensor.shape, _dtype(tensor), elements, tensor.nbytes, rms, largest, nan, inf
    )


def _difference(a: StoredCheckpoint, b: StoredCheckpoint, name: str, bar: Any) -> TensorDifference:
    first, second = a.tensors.get(name), b.tensors.get(name)
    if first is None or second is None:
        tensor = first or second
        assert tensor is not None
        where = "a" if second is None else "b"
        return TensorDifference(name, tensor.shape, note=f"only in {where}")
    if first.shape != second.shape:
        note = f"{_shape(second.shape)} in b"
        return TensorDifference(name, first.shape, note=note)
    note = "" if first.dtype == second.dtype else f"{_dtype(first)} in a, {_dtype(second)} in b"
    differs, largest, squares, norm = bool(note), 0.0, 0.0, 0.0
    for x, y in _blocks([a, b], first, bar):
        same = (x == y) | (x.isnan() & y.isnan())
        differs |= not bool(same.all())
        gap = torch.where(same, 0.0, x.double() - y.double())
        largest = float(torch.tensor([largest, float(gap.abs().max())]).max())
        squares += _squares(gap)
        norm += _squares(x)
    relative = math.sqrt(squares / norm) if norm else math.inf if squares else 0.0
    return TensorDifference(name, first.shape, largest, relative, differs, note)


def _blocks(
    sources: list[StoredCheckpoint], tensor: StoredTensor, bar: Any
) -> Iterator[list[torch.Tensor]]:
    """The same rows of every checkpoint, block by block; none of a tensor without elements."""
    if not math.prod(tensor.shape):
        return
    for start, stop in row_blocks(tensor.rows, tensor.nbytes, _BLOCK_BYTES):
        yield [source.read(tensor.name, start, stop) for source in sources]
        bar.update(tensor.nbytes * (stop - start) // tensor.rows)


def _squares(block: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(block, dtype=torch.float64)) ** 2


def _title(source: StoredCheckpoint) -> str:
    manifest = source.manifest
    sizes = manifest.get("parallel", {})
    layout = " x ".join(
        f"{axis} {sizes[axis]}"
        for axis in ("tensor", "pipeline", "context", "expert")
        if sizes.get(axis, 1) != 1
    )
    facts = [
        f"step {manifest.get('step')}",
        str(manifest.get("precision")),
        "weights only" if manifest.get("weights_only") else "with optimizer",
    ]
    if layout:
        facts.append(f"saved at {layout}")
    return f"{source.path} ({', '.join(facts)})"


def _dtype(tensor: StoredTensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def _table(rows: Sequence[tuple[str, ...]], numbers: range) -> list[str]:
    """Columns of text, those in `numbers` aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            text.rjust(width) if column in numbers else text.ljust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
