"""Orthogonalisation of matrices by Newton-Schulz iterations."""

from __future__ import annotations

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic (K. Jordan et al., Muon, 2024): steepest at 0, and it keeps singular values that
have grown near 1 between about 0.7 and 1.2."""

EPS = 1e-7

BATCH_ELEMENTS = 1 << 26
"""Of the matrices that are orthogonalised at once, to bound temporary memory."""


def orthogonalize(x: torch.Tensor, steps: int) -> torch.Tensor:
    """U V^T of each matrix U S V^T, roughly: singular values end near 1, not at it.

    X <- a X + (b X X^T + c (X X^T)^2) X, from X scaled to Frobenius norm 1 (Muon; Moonlight,
    arXiv 2502.16982, eq. 2). A matrix of zeros stays one.

    Args:
        x: [n, rows, columns]; the arithmetic is in its dtype, norms are fp32 at least.
        steps: of the iteration.

    Returns:
        [n, rows, columns] in the dtype of `x`.
    """
    a, b, c = COEFFICIENTS
    tall = x.shape[-2] > x.shape[-1]
    if tall:  # the product of a matrix with its transpose is the smaller one
        x = x.mT
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=wide)
    x = x / norm.clamp_min(EPS).to(x.dtype)
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


def flops(rows: int, columns: int, steps: int) -> int:
    """Floating-point operations of `orthogonalize` on one matrix, a multiply-add being two."""
    short, long = sorted((rows, columns))
    return steps * (4 * short * short * long + 2 * short**3)
