"""Initial weights that depend on the seed and the parameter's name only.

A global tensor is drawn in blocks of whole rows along its first axis, each block from a generator
of its own, on the CPU and in fp32. A rank draws the blocks that its share touches and keeps its
share, so the weights are the same numbers at every layout and rank count, and no rank ever holds a
whole large tensor.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable

import torch

from megakda.layers.initializers import Initializer, normal
from megakda.models.sharding import ModelChunk, Piece, pieces

BLOCK_ELEMENTS = 1 << 20
"""Elements per block; part of the definition of the weights, so it never changes."""


@torch.no_grad()
def initialize(chunks: Iterable[ModelChunk], seed: int, std: float) -> None:
    """Fills every parameter in place; N(0, std^2) where a layer asks for nothing else."""
    for chunk in chunks:
        for piece in pieces(chunk):
            _fill(piece, seed, getattr(piece.param, "initializer", None) or normal(std))


def _fill(piece: Piece, seed: int, initializer: Initializer) -> None:
    row_shape = piece.global_shape[1:]
    rows_per_block = max(1, BLOCK_ELEMENTS // math.prod(row_shape))
    first = piece.global_offset[0]
    last = first + piece.data.shape[0]
    inner = tuple(
        slice(offset, offset + size)
        for offset, size in zip(piece.global_offset[1:], piece.data.shape[1:], strict=True)
    )
    for block in range(first // rows_per_block, -(-last // rows_per_block)):
        start = block * rows_per_block
        stop = min(start + rows_per_block, piece.global_shape[0])
        generator = torch.Generator().manual_seed(_block_seed(seed, piece.name, block))
        values = initializer((stop - start, *row_shape), generator)
        low, high = max(start, first), min(stop, last)
        rows = values[(slice(low - start, high - start), *inner)]
        piece.data[low - first : high - first].copy_(rows)


def _block_seed(seed: int, name: str, block: int) -> int:
    digest = hashlib.sha256(f"{seed}/{name}/{block}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1  # fits in a signed 64-bit integer
