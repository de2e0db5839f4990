"""The decay gate of Kimi Delta Attention and of Gated DeltaNet, before the recurrence."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megakda.kernels.backend import choose_backend

LOWEST_BOUND = -5.0
"""The smallest `lower_bound`: 8 steps of it stay within the exponents of fp32 and bf16, so a GPU
kernel may factor the decay of a 16-token block around the block's middle."""


def kda_gate(
    raw: torch.Tensor,
    A_log: torch.Tensor | None,
    dt_bias: torch.Tensor | None = None,
    lower_bound: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Log-space decay g <= 0 from the gate projection's output.

    Without `lower_bound`, g = -exp(A_log) * softplus(raw + dt_bias), unbounded below (Kimi Linear,
    arXiv 2510.26692; the gate of Mamba-2, arXiv 2405.21060). With it,
    g = lower_bound * sigmoid(exp(A_log) * (raw + dt_bias)), in (lower_bound, 0).

    The decay is never formed and logged again, so a gate that closes (exp g = 0) or opens fully
    (g = 0) has finite values and gradients.

    Args:
        raw: [..., H, K], any floating dtype; [..., H, 1] for one decay per head (Gated DeltaNet).
            The triton backend has no float64.
        A_log: H elements, log of the decay rate of each head; None for a rate of 1.
        dt_bias: H*K elements (H elements for raw [..., H, 1]); None for no bias.
        lower_bound: least decay per step in log space, in [-5, 0); None for the softplus gate.
        backend: "torch", "triton", "reference" (float64); None for "triton" on a GPU, else "torch".

    Returns:
        g, shape of `raw`, fp32 (float64 for float64 `raw`).

    Raises:
        ValueError: a wrong number of elements, or `lower_bound` out of range.
    """
    _check(raw, A_log, dt_bias, lower_bound)
    backend = choose_backend(backend, raw.device)
    if backend == "triton":
        from megakda.kernels.kda.gate_triton import kda_gate_triton

        return kda_gate_triton(raw, A_log, dt_bias, lower_bound)
    dtype = torch.promote_types(raw.dtype, torch.float32)
    if backend == "reference":
        return kda_gate_reference(raw, A_log, dt_bias, lower_bound).to(dtype)
    heads, key_dim = raw.shape[-2:]
    x = raw.to(dtype)
    if dt_bias is not None:
        x = x + dt_bias.to(dtype).view(heads, key_dim)
    rate = None if A_log is None else A_log.to(dtype).view(heads, 1).exp()
    if lower_bound is None:
        return F.softplus(x) * (-1.0 if rate is None else -rate)
    return lower_bound * torch.sigmoid(x if rate is None else rate * x)


def kda_gate_reference(
    raw: torch.Tensor,
    A_log: torch.Tensor | None,
    dt_bias: torch.Tensor | None = None,
    lower_bound: float | None = None,
) -> torch.Tensor:
    """`kda_gate` in float64, written from the formulas; arguments as there."""
    heads, key_dim = raw.shape[-2:]
    x = raw.double()
    if dt_bias is not None:
        x = x + dt_bias.double().reshape(heads, key_dim)
    rate = x.new_ones(()) if A_log is None else A_log.double().reshape(heads, 1).exp()
    if lower_bound is None:
        return -rate * torch.logaddexp(x, torch.zeros_like(x))
    return lower_bound / (1 + torch.exp(-rate * x))


def _check(
    raw: torch.Tensor,
    A_log: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    lower_bound: float | None,
) -> None:
    check_lower_bound(lower_bound)
    if raw.ndim < 2 or not raw.is_floating_point():
        raise ValueError(f"raw: {raw.dtype} {list(raw.shape)} must be floating, [..., H, K]")
    heads, key_dim = raw.shape[-2:]
    if dt_bias is not None and dt_bias.numel() != heads * key_dim:
        raise ValueError(
            f"dt_bias: {list(dt_bias.shape)} has {dt_bias.numel()} elements, must have "
            f"{heads * key_dim}: one per head and channel of the gate {list(raw.shape)}"
        )
    if A_log is not None and A_log.numel() != heads:
        raise ValueError(
            f"A_log: {list(A_log.shape)} has {A_log.numel()} elements, must have {heads}: "
            f"one per head of the gate {list(raw.shape)}"
        )


def check_lower_bound(lower_bound: float | None) -> None:
    """Raises ValueError unless `lower_bound` is None or a number in [-5, 0)."""
    if lower_bound is None:
        return
    # A NaN fails the comparison, too.
    if not LOWEST_BOUND <= lower_bound < 0:
        raise ValueError(f"lower_bound: {lower_bound} must be in [{LOWEST_BOUND:g}, 0)")
