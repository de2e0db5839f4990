"""Checkpoints as files: read and written tensor by tensor, in one process with bounded memory.

The folders are those of `megakda.checkpoint.manager`: megatron-core's torch_dist format, which is
torch.distributed.checkpoint's, with `common.pt`, `metadata.json` and `manifest.json`. In a
`.distcp` file every chunk of a tensor is an archive of its own, as `torch.save` writes it, and
`.metadata` says where each begins. No model, no process group and no megatron-core is needed.
"""

from __future__ import annotations

import torch

from megakda.checkpoint.folders import OPTIMIZER
from megakda.checkpoint.stored_reader import StoredCheckpoint, StoredChunk, StoredTensor
from megakda.checkpoint.stored_writer import CheckpointWriter

__all__ = [
    "OPTIMIZER",
    "CheckpointWriter",
    "StoredCheckpoint",
    "StoredChunk",
    "StoredTensor",
    "is_finite",
]


def is_finite(tensor: torch.Tensor) -> bool:
    """No NaN and no infinity among the numbers of a tensor."""
    # A finite sum tells it without the copy that isfinite() makes; only then numbers are looked at.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())
