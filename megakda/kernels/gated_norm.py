"""RMSNorm over each head's channels times a gate: the norm on the output of linear attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from megakda.kernels.backend import choose_backend

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sigmoid": torch.sigmoid,
    "swish": F.silu,
}


def gated_rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    gate: torch.Tensor | None = None,
    activation: str | None = "sigmoid",
    eps: float = 1e-5,
    backend: str | None = None,
) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight * activation(gate), over the last dimension, in fp32.

    The torch backend is plain operations under autograd: on a CPU a hand-written backward pass is
    no faster.

    Args:
        x: [..., D], any floating dtype. The triton backend has no float64, and D up to 16384.
        weight: [D], shared by all heads.
        gate: shape of x, before its activation; None for the norm alone.
        activation: "sigmoid" (Kimi Linear, arXiv 2510.26692) or "swish" (Gated DeltaNet,
            arXiv 2412.06464); None only without a gate.
        eps: inside the root, at least 0.
        backend: "torch", "triton", "reference" (float64); None for "triton" on a GPU, else "torch".

    Returns:
        Shape and dtype of x.

    Raises:
        ValueError: a shape or value that breaks the rules above.
    """
    _check(x, weight, gate, activation, eps)
    backend = choose_backend(backend, x.device)
    if backend == "triton":
        from megakda.kernels.gated_norm_triton import gated_rms_norm_triton

        return gated_rms_norm_triton(x, weight, gate, activation, eps)
    if backend == "reference":
        return gated_rms_norm_reference(x, weight, gate, activation, eps).to(x.dtype)
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    mean_square = torch.linalg.vecdot(y, y).unsqueeze(-1) / x.shape[-1]
    y = y * torch.rsqrt(mean_square + eps) * weight.to(y.dtype)
    if gate is not None:
        y = y * _ACTIVATIONS[str(activation)](gate.to(y.dtype))
    return y.to(x.dtype)


def gated_rms_norm_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    gate: torch.Tensor | None = None,
    activation: str | None = "sigmoid",
    eps: float = 1e-5,
) -> torch.Tensor:
    """`gated_rms_norm` in float64, written from the formula; arguments as there."""
    x, weight = x.double(), weight.double()
    y = x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight
    if gate is None:
        return y
    gate = gate.double()
    openness = 1 / (1 + torch.exp(-gate))
    return y * (gate * openness if activation == "swish" else openness)


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    gate: torch.Tensor | None,
    activation: str | None,
    eps: float,
) -> None:
    if x.ndim == 0 or not x.is_floating_point():
        raise ValueError(f"x: {x.dtype} {list(x.shape)} must be floating, [..., D]")
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight: shape {list(weight.shape)} must be [D] = {list(x.shape[-1:])}")
    if activation is not None and activation not in _ACTIVATIONS:
        raise ValueError(f"activation: {activation!r} must be one of {(*_ACTIVATIONS, None)}")
    if gate is not None:
        if activation is None:
            raise ValueError(
                f"activation: None, but a gate was given; must be one of {(*_ACTIVATIONS,)}"
            )
        if gate.shape != x.shape:
            raise ValueError(f"gate: shape {list(gate.shape)} must be x's {list(x.shape)}")
    if not eps >= 0:
        raise ValueError(f"eps: {eps} must be at least 0")
