"""A model at full size and full rank count without memory: fake process groups, meta tensors.

Run in a process of its own: it stands for one rank of a large run, and needs no other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch

from megakda.config import Config, validate
from megakda.models.sharding import pieces
from megakda.runtime.distributed import model_parallel_groups


@dataclass(frozen=True)
class RankModel:
    """What one rank of a run holds."""

    rank: int
    layers: tuple[int, ...]  # 1-based numbers
    parameters: int  # on this rank
    tensors: dict[str, tuple[int, ...]]  # global name -> global shape


@contextmanager
def fake_ranks(config: Config, rank: int, world_size: int) -> Iterator[None]:
    """The process groups of `rank` in a run of `world_size` ranks, without the others: collectives
    return at once and leave tensors as they are."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    store = FakeStore()
    torch.distributed.init_process_group("fake", rank=rank, world_size=world_size, store=store)
    try:
        with model_parallel_groups(config.parallel, gloo=False):
            yield
    finally:
        torch.distributed.destroy_process_group()


def build_rank(config: Config, rank: int, world_size: int) -> RankModel:
    """Builds the model chunks of `rank` in a run of `world_size` ranks on the meta device.

    Raises:
        ConfigError: the config does not fit `world_size` ranks.
    """
    validate(config, world_size)
    from megakda.models.kimi_linear import build_chunks

    meta = torch.device("meta")
    with (
        fake_ranks(config, rank, world_size),
        mock.patch.object(torch.cuda, "current_device", lambda: meta),
        meta,
    ):
        chunks = build_chunks(config.model, config.parallel, config.precision, config.train.context)
        parts = [piece for chunk in chunks for piece in pieces(chunk)]
        assert all(piece.data.is_meta for piece in parts)
        return RankModel(
            rank=rank,
            layers=tuple(layer.layer_number for chunk in chunks for layer in chunk.decoder.layers),
            parameters=sum(p.numel() for chunk in chunks for p in chunk.parameters()),
            tensors={piece.name: piece.global_shape for piece in parts},
        )


def count_over_stages(config: Config, world_size: int) -> tuple[int, list[RankModel]]:
    """Parameters of the whole model, put together from the first rank of every pipeline stage.

    Returns:
        (parameters, the ranks looked at). A tensor that several ranks share counts once.
    """
    per_stage = world_size // config.parallel.pipeline
    ranks = [
        build_rank(config, stage * per_stage, world_size)
        for stage in range(config.parallel.pipeline)
    ]
    tensors: dict[str, tuple[int, ...]] = {}
    for rank in ranks:
        tensors.update(rank.tensors)
    return sum(math.prod(shape) for shape in tensors.values()), ranks
