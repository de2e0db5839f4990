"""Which part of which global tensor each local parameter is: one answer for everyone who asks.

megatron-core's sharded state dict already knows, because checkpoints need it. Initialisation and
comparisons between layouts read it from there, so that a parameter has one name and one global
shape everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

ModelChunk: TypeAlias = Any
"""A GPTModel, bare or wrapped for data parallelism (torch types any module attribute as
``Tensor | Module``, so a closer type would only get in the way)."""


@dataclass(frozen=True)
class Piece:
    """A local tensor as a block of a global one.

    `data` is a view into the parameter (or the tensor given in its place); fused matrices (gate and
    up) have one piece per matrix.
    """

    name: str  # global: the same at every layout
    param: torch.nn.Parameter
    data: torch.Tensor
    global_shape: tuple[int, ...]
    global_offset: tuple[int, ...]


METADATA = {"non_homogeneous_layers": True}  # layers are stored one by one under global numbers


def pieces(chunk: ModelChunk) -> Iterator[Piece]:
    """Every parameter of a model chunk, as pieces of global tensors.

    Raises:
        AssertionError: a parameter that the sharded state dict does not cover; it could not be
            saved either.
    """
    sharded = chunk.sharded_state_dict(metadata=dict(METADATA))
    for local_name, param in chunk.named_parameters():
        assert local_name in sharded, f"{local_name} is missing from the sharded state dict"
        entry = sharded[local_name]
        parts = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
        for part in parts:
            assert isinstance(part, ShardedTensor)
            yield Piece(part.key, param, part.data, part.global_shape, part.global_offset)
