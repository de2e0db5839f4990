"""A Hugging Face folder loaded straight into model chunks, at any layout.

Every rank reads its own slices of the published tensors, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megakda.checkpoint.hf_source import HFSource
from megakda.config.schema import ModelConfig
from megakda.models.sharding import METADATA, ModelChunk


@torch.no_grad()
def load_hf(folder: Path, chunks: Sequence[ModelChunk], model: ModelConfig) -> None:
    """Fills the chunks, routing biases included, from a Hugging Face folder. Not collective.

    Args:
        folder: published, or as megakda or transformers wrote it.
        chunks: this rank's, without data-parallel wrappers, built for `model` in any precision.
        model: `megakda.checkpoint.hf_config.read(folder)`, or another spelling of it.

    Raises:
        CheckpointError: the folder does not hold exactly the tensors of `model`, or cannot be read.
    """
    with HFSource(folder, model) as source:
        for chunk in chunks:
            for part in _local(chunk):
                source.fill(part.key, part.data, part.global_offset)


def _local(chunk: ModelChunk) -> Iterator[ShardedTensor]:
    """Parameters and persistent buffers of a chunk as blocks of global tensors."""
    for entry in chunk.sharded_state_dict(metadata=dict(METADATA)).values():
        parts = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
        yield from (part for part in parts if isinstance(part, ShardedTensor))
