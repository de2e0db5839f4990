"""The decay gate of Kimi Delta Attention and of Gated DeltaNet, before the recurrence."""

from __future__ import annotations

import torch
import torch.nn.functional as F

LOWEST_BOUND = -5.0
"""The smallest `lower_bound`: 8 steps of it stay within the exponents of fp32 and bf16, so a GPU
kernel may factor the decay of a 16-token block around the block's middle."""


def kda_gate(
    raw: torch.Tensor,
    A_log: torch.Tensor | None,
    dt_bias: torch.Tensor | None = None,
    lower_bound: float | None = None,
) -> torch.Tensor:
    """Log-space decay g <= 0 from the gate projection's output.

    Without `lower_bound`, g = -exp(A_log) * softplus(raw + dt_bias), unbounded below (Kimi Linear,
    arXiv 2510.26692; the gate of Mamba-2, arXiv 2405.21060). With it,
    g = lower_bound * sigmoid(exp(A_log) * (raw + dt_bias)), in (lower_bound, 0).

    The decay is never formed and logged again, so a gate that closes (exp g = 0) or opens fully
    (g = 0) has finite values and gradients.

    Args:
        raw: [..., H, K], any floating dtype; [..., H, 1] for one decay per head (Gated DeltaNet).
        A_log: H elements, log of the decay rate of each head; None for a rate of 1.
        dt_bias: H*K elements (H elements for raw [..., H, 1]); None for no bias.
        lower_bound: least decay per step in log space, in [-5, 0); None for the softplus gate.

    Returns:
        g, shape of `raw`, fp32 (float64 for float64 `raw`).

    Raises:
        ValueError: a wrong number of elements, or `lower_bound` out of range.
    """
    check_lower_bound(lower_bound)
    heads, key_dim = raw.shape[-2:]
    x = raw.to(torch.promote_types(raw.dtype, torch.float32))
    if dt_bias is not None:
        if dt_bias.numel() != heads * key_dim:
            raise ValueError(
                f"dt_bias: {list(dt_bias.shape)} has {dt_bias.numel()} elements, must have "
                f"{heads * key_dim}: one per head and channel of the gate {list(raw.shape)}"
            )
        x = x + dt_bias.to(x.dtype).view(heads, key_dim)
    rate = None
    if A_log is not None:
        if A_log.numel() != heads:
            raise ValueError(
                f"A_log: {list(A_log.shape)} has {A_log.numel()} elements, must have {heads}: "
                f"one per head of the gate {list(raw.shape)}"
            )
        rate = A_log.to(x.dtype).view(heads, 1).exp()
    if lower_bound is None:
        return F.softplus(x) * (-1.0 if rate is None else -rate)
    return lower_bound * torch.sigmoid(x if rate is None else rate * x)


def check_lower_bound(lower_bound: float | None) -> None:
    """Raises ValueError unless `lower_bound` is None or a number in [-5, 0)."""
    if lower_bound is None:
        return
    # A NaN fails the comparison, too.
    if not LOWEST_BOUND <= lower_bound < 0:
        raise ValueError(f"lower_bound: {lower_bound} must be in [{LOWEST_BOUND:g}, 0)")
