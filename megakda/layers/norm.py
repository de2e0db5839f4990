"""RMSNorm that works with and without sequence parallelism."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megakda.layers.initializers import ones, set_initializer


class RMSNorm(torch.nn.RMSNorm):
    """Root-mean-square norm over the last dimension (Zhang & Sennrich, arXiv 1910.07467).

    Under sequence parallelism each rank sees its own tokens only; the `sequence_parallel` mark
    makes megatron-core sum the weight's gradient over the tensor-parallel group.

    Shape: [..., hidden_size] -> the same, in the input's dtype.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5):
        super().__init__(
            hidden_size, eps=eps, device=torch.cuda.current_device(), dtype=config.params_dtype
        )
        self.weight.sequence_parallel = config.sequence_parallel
        set_initializer(self.weight, ones)
