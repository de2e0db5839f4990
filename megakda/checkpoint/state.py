"""What a checkpoint holds: model and optimizer as global tensors, and the trainer's few numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import (
    get_default_load_sharded_strategy,
    get_default_save_sharded_strategy,
)
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)

from megakda.checkpoint.folders import CONTENT
from megakda.models.sharding import ModelChunk


def write(
    folder: Path,
    chunks: list[ModelChunk],
    optimizer: Any,
    trainer_state: dict[str, Any],
    async_save: bool,
) -> AsyncRequest | None:
    """Writes a torch_dist checkpoint into an empty folder. A collective call.

    Args:
        chunks: model chunks wrapped in DistributedDataParallel.
        optimizer: megatron-core's optimizer.
        trainer_state: the same on every rank.
        async_save: return a request that writes in a forked process instead of waiting.
    """
    state = _sharded_state(chunks, optimizer, is_loading=False)
    state["trainer"] = trainer_state
    strategy = FullyParallelSaveStrategyWrapper(
        get_default_save_sharded_strategy("torch_dist"), _data_parallel_group()
    )
    return dist_checkpointing.save(
        state,
        str(folder),
        sharded_strategy=strategy,
        async_sharded_save=async_save,
        content_metadata=dict(CONTENT),
    )


def read(folder: Path, chunks: list[ModelChunk], optimizer: Any | None) -> dict[str, Any]:
    """Loads weights, and optimizer state where an optimizer is given; returns the trainer's state.

    A collective call; works at another layout than the checkpoint was saved at.
    """
    state = _sharded_state(chunks, optimizer, is_loading=True)
    strategy = FullyParallelLoadStrategyWrapper(
        get_default_load_sharded_strategy(str(folder)), _data_parallel_group()
    )
    loaded = dist_checkpointing.load(state, str(folder), sharded_strategy=strategy)
    for name, chunk in zip(_chunk_names(chunks), chunks, strict=True):
        model = _unwrap(chunk)
        nothing = {key: None for key in model.state_dict() if key.endswith("_extra_state")}
        model.load_state_dict({**nothing, **loaded[name]})
    if optimizer is not None:
        with torch.no_grad():
            optimizer.load_state_dict(loaded["optimizer"])
    return loaded["trainer"]


def _sharded_state(chunks: list[ModelChunk], optimizer: Any, is_loading: bool) -> dict[str, Any]:
    metadata = {**CONTENT, "dp_cp_group": _data_parallel_group()}
    state: dict[str, Any] = {
        name: _unwrap(chunk).sharded_state_dict(metadata=dict(metadata))
        for name, chunk in zip(_chunk_names(chunks), chunks, strict=True)
    }
    if optimizer is not None:
        model_state = state if len(chunks) > 1 else state["model"]
        state["optimizer"] = optimizer.sharded_state_dict(
            model_state, is_loading=is_loading, metadata=dict(metadata)
        )
    for name in _chunk_names(chunks):
        state[name] = {key: part for key, part in state[name].items() if not _is_nothing(part)}
    return state


def _is_nothing(part: Any) -> bool:
    """Whether this is the empty `_extra_state` of a linear layer, of use to TransformerEngine's.

    A checkpoint is global tensors; what would only stand for None is neither written nor asked for.
    """
    return isinstance(part, ShardedObject) and part.data is None


def _chunk_names(chunks: list[ModelChunk]) -> list[str]:
    return ["model"] if len(chunks) == 1 else [f"model{i}" for i in range(len(chunks))]


def _unwrap(chunk: ModelChunk) -> ModelChunk:
    return chunk.module if hasattr(chunk, "ddp_config") else chunk


def _data_parallel_group() -> torch.distributed.ProcessGroup:
    return parallel_state.get_data_parallel_group(with_context_parallel=True)
