"""L2 norm over the last dimension: what makes unit vectors of queries and keys."""

from __future__ import annotations

import torch

from megakda.kernels.backend import choose_backend


def l2_norm(x: torch.Tensor, eps: float = 1e-6, backend: str | None = None) -> torch.Tensor:
    """x / sqrt(sum(x^2) + eps) over the last dimension, in fp32.

    Args:
        x: [..., D], any floating dtype. The triton backend has no float64, and D up to 16384.
        eps: inside the root, at least 0; a row of zeros stays zero if it is larger.
        backend: "torch", "triton", "reference" (float64); None for "triton" on a GPU, else "torch".

    Returns:
        Shape and dtype of x.

    Raises:
        ValueError: a shape or value that breaks the rules above.
    """
    if x.ndim == 0 or not x.is_floating_point():
        raise ValueError(f"x: {x.dtype} {list(x.shape)} must be floating, [..., D]")
    if not eps >= 0:
        raise ValueError(f"eps: {eps} must be at least 0")
    backend = choose_backend(backend, x.device)
    if backend == "triton":
        from megakda.kernels.l2_norm_triton import l2_norm_triton

        return l2_norm_triton(x, eps)
    if backend == "reference":
        return l2_norm_reference(x, eps).to(x.dtype)
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    return (y * torch.rsqrt(torch.linalg.vecdot(y, y).unsqueeze(-1) + eps)).to(x.dtype)


def l2_norm_reference(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """`l2_norm` in float64, written from the formula; arguments as there."""
    x = x.double()
    return x / (x.square().sum(-1, keepdim=True) + eps).sqrt()
