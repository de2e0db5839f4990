"""RMSNorm that works with and without sequence parallelism."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megakda.kernels.gated_norm import gated_rms_norm
from megakda.layers.initializers import ones, set_initializer


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last dimension (Zhang & Sennrich, arXiv 1910.07467).

    Under sequence parallelism each rank sees its own tokens only; the `sequence_parallel` mark
    makes megatron-core sum the weight's gradient over the tensor-parallel group.

    Shape: [..., hidden_size] -> the same, in the input's dtype.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.empty(hidden_size, device=torch.cuda.current_device(), dtype=config.params_dtype)
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        set_initializer(self.weight, ones)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Not torch's rms_norm: it rounds otherwise with and without autograd, so that activation
        # recomputation would not repeat the forward pass bit by bit.
        return gated_rms_norm(x, self.weight, eps=self.eps)
