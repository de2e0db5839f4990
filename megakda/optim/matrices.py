"""Which optimizer each parameter has, and the matrices that Muon orthogonalises one by one.

A parameter may hold several matrices: gate and up, or those of all experts. A matrix may lie on
several ranks: rows or columns over tensor-parallel ranks, and flat ranges of these over
data-parallel ranks. What does not depend on the layout is the matrix of the global model, so that
is what is named and orthogonalised (Moonlight, arXiv 2502.16982, section 2.3).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from megatron.core import parallel_state

from megakda.config.pattern import FULL
from megakda.models.sharding import ModelChunk, Piece, pieces

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_PER_HEAD = re.compile(r"self_attention\.(q|k|v|f_b|g_b|q_b|kv_b)_proj\.weight$")
"""Matrices with as many rows for each head (b_proj and a_proj have one row each)."""


GROUPS = (
    "embedding",
    "lm_head",
    "linear_attention",
    "full_attention",
    "dense_ffn",
    "experts",
    "shared_experts",
    "router",
    "convolutions",
    "decays",
    "norms",
)
"""Components of the model; all parameters of one have the same optimizer."""


@dataclass(frozen=True)
class Matrix:
    """One matrix of the global model."""

    name: str  # of the global tensor, with an index where that holds several
    rows: int
    columns: int


@dataclass(frozen=True)
class Block:
    """A rectangle of a matrix as a local parameter holds it: row by row, without gaps."""

    matrix: Matrix
    row: int  # of its first element in the matrix
    column: int
    rows: int
    columns: int

    @property
    def size(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True)
class GlobalTensor:
    """A tensor of the global model, as checkpoints hold it."""

    name: str
    shape: tuple[int, ...]
    matrices: int  # that Muon makes of it; AdamW: 0


@dataclass(frozen=True)
class Assignment:
    """What becomes of one parameter of this rank."""

    param: torch.nn.Parameter
    group: str  # the component, as in metrics: "embedding", "experts", ...
    blocks: tuple[tuple[int, Block], ...]  # (first element in the parameter, block); AdamW: none
    tensor: GlobalTensor  # that it holds parts of

    @property
    def optimizer(self) -> str:
        return "muon" if self.blocks else "adamw"


def assign(
    chunks: Iterable[ModelChunk],
    kinds: Sequence[str],
    muon: bool,
    heads: int,
    heads_per_matrix: int,
) -> list[Assignment]:
    """Each parameter of this rank's chunks, once, in the order of the model.

    Muon has every matrix of the layers; embedding, LM head, norms, convolutions and decay
    parameters have AdamW, and without `muon` all have it.

    Args:
        chunks: wrapped in megatron-core's DistributedDataParallel.
        kinds: of each layer of the model, "linear" or "full".
        heads: of the model.
        heads_per_matrix: heads that are orthogonalised together; 0 for all.
    """
    by_param: dict[torch.nn.Parameter, list[Piece]] = {}
    for chunk in chunks:
        for piece in pieces(chunk.module):
            by_param.setdefault(piece.param, []).append(piece)
    found = []
    for param, parts in by_param.items():
        name, shape = parts[0].name, parts[0].global_shape
        assert all(part.name == name for part in parts), f"{name} shares a parameter"
        blocks: list[tuple[int, Block]] = []
        cuts = 0
        if muon and is_matrix(name, shape):
            cuts = len(parts)  # gate and up are two pieces of one tensor
            if heads_per_matrix and _PER_HEAD.search(name):
                cuts = heads // heads_per_matrix
            blocks = [block for part in parts for block in _blocks(part, shape[-2] // cuts)]
            assert sum(block.size for _, block in blocks) == param.numel(), name
        tensor = GlobalTensor(name, shape, math.prod(shape[:-2]) * cuts)
        found.append(Assignment(param, group_of(name, kinds), tuple(blocks), tensor))
    return found


def assignment_table(assignments: Iterable[Assignment]) -> list[str]:
    """A line per component of the whole model. Collective over the pipeline.

    Raises:
        AssertionError: two parameters, perhaps of two stages, hold one tensor in different roles.
    """
    mine = {
        assignment.tensor.name: (assignment.group, assignment.optimizer, assignment.tensor)
        for assignment in assignments
    }
    stages: list[Any] = [None] * parallel_state.get_pipeline_model_parallel_world_size()
    torch.distributed.all_gather_object(
        stages, mine, group=parallel_state.get_pipeline_model_parallel_group()
    )
    roles: dict[str, tuple[str, str, GlobalTensor]] = {}
    for stage in stages:
        for name, role in stage.items():
            assert roles.setdefault(name, role) == role, f"{name}: {roles[name]} and {role}"
    lines = [
        f"{'component':<17} {'optimizer':<9} {'tensors':>7} {'matrices':>9} {'parameters':>15}"
    ]
    for group in GROUPS:
        of_group = [(optimizer, tensor) for g, optimizer, tensor in roles.values() if g == group]
        if of_group:
            (optimizer,) = {optimizer for optimizer, _ in of_group}
            matrices = sum(tensor.matrices for _, tensor in of_group)
            parameters = sum(math.prod(tensor.shape) for _, tensor in of_group)
            lines.append(
                f"{group:<17} {optimizer:<9} {len(of_group):>7,} {matrices or '-':>9} "
                f"{parameters:>15,}"
            )
    return lines


def is_matrix(name: str, global_shape: Sequence[int]) -> bool:
    """Whether a global tensor is one or more matrices that map activations to activations."""
    return bool(_LAYER.match(name)) and len(global_shape) > 1 and "conv1d" not in name


def group_of(name: str, kinds: Sequence[str]) -> str:
    """The component that a global tensor belongs to, for tables and metrics."""
    layer = _LAYER.match(name)
    if layer is None:
        if name.startswith("embedding."):
            return "embedding"
        return "lm_head" if name.startswith("output_layer.") else "norms"
    kind, rest = kinds[int(layer.group(1))], layer.group(2)
    if "norm" in rest:
        return "norms"
    if "conv1d" in rest:
        return "convolutions"
    if rest.endswith(("A_log", "dt_bias")):
        return "decays"
    if rest.startswith("self_attention."):
        return "full_attention" if kind == FULL else "linear_attention"
    for part in ("router", "shared_experts", "experts"):
        if rest.startswith(f"mlp.{part}."):
            return part
    assert rest.startswith("mlp."), name
    return "dense_ffn"


def _blocks(piece: Piece, matrix_rows: int) -> Iterator[tuple[int, Block]]:
    """The parts of a piece's matrices, each with its first element in the parameter.

    Leading dimensions, such as experts, count matrices; rows are cut every `matrix_rows`.
    """
    assert piece.data.is_contiguous(), piece.name
    start = int(piece.data.storage_offset()) - int(piece.param.data.storage_offset())
    *local, rows, columns = piece.data.shape
    *_, total_rows, total_columns = piece.global_shape
    *leading, row, column = piece.global_offset
    for place in product(*(range(size) for size in local)):
        index = [offset + at for offset, at in zip(leading, place, strict=True)]
        for first in range(row // matrix_rows * matrix_rows, row + rows, matrix_rows):
            top, bottom = max(first, row), min(first + matrix_rows, row + rows)
            cut = [f"{first}:{first + matrix_rows}"] if matrix_rows < total_rows else []
            name = piece.name + "".join(f"[{at}]" for at in [*index, *cut])
            matrix = Matrix(name, matrix_rows, total_columns)
            where = start + (top - row) * columns
            yield where, Block(matrix, top - first, column, bottom - top, columns)
        start += rows * columns
