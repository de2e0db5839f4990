"""How each parameter starts, as a function that `megakda.models.init` calls block by block.

A layer attaches an initialiser to its parameter; parameters without one (megatron-core's linears,
embeddings and routers) start from the model's normal distribution. Initialisers draw from the
generator that they are given, always on the CPU and in fp32, so that the numbers are the same on
every device and at every layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

Initializer = Callable[[tuple[int, ...], torch.Generator], torch.Tensor]


def set_initializer(param: torch.nn.Parameter, initializer: Initializer) -> None:
    """Marks `param` to start from ``initializer(shape, generator)``."""
    param.initializer = initializer  # type: ignore[attr-defined]


def ones(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """All ones (norm weights)."""
    return torch.ones(shape)


def normal(std: float) -> Initializer:
    """N(0, std^2)."""

    def draw(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        return torch.empty(shape).normal_(0.0, std, generator=generator)

    return draw


def short_conv(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """U(-1/sqrt(W), 1/sqrt(W)) for a depthwise kernel [channels, W], torch's default for Conv1d."""
    bound = 1.0 / math.sqrt(shape[-1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def log_decay_rate(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """A_log = log U(1, 16) (Mamba, arXiv 2312.00752; Kimi Linear, arXiv 2510.26692)."""
    return torch.empty(shape).uniform_(1.0, 16.0, generator=generator).log_()


def decay_bias(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """dt_bias: the inverse softplus of exp U(log 1e-3, log 1e-1) (same sources as A_log)."""
    dt = torch.empty(shape).uniform_(math.log(1e-3), math.log(1e-1), generator=generator).exp_()
    return dt + torch.log(-torch.expm1(-dt))
