"""The KDA recurrence step by step in fp32: the form for decoding, one or a few tokens at a time."""

from __future__ import annotations

import torch


def recurrent_kda_torch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float,
    initial_state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One pass over the state per token; differentiable by autograd, which keeps every state.

    Args:
        q: [B, T, H, K].
        k: [B, T, H, K].
        v: [B, T, HV, V], HV a multiple of H.
        g: [B, T, HV, K] or [B, T, HV, 1], decay in log space, <= 0.
        beta: [B, T, HV].
        scale: of the output.
        initial_state: [B, HV, K, V] or None for zero. It is not written to.

    Returns:
        o [B, T, HV, V] and the state after the last token [B, HV, K, V], both fp32 (float64 where
        v is float64).
    """
    dtype = torch.promote_types(v.dtype, torch.float32)
    heads, value_dim = v.shape[2:]
    # Heads next to tokens, so that one step is a batch of small matrix products.
    q, k = (_repeat_heads(x, heads).to(dtype).unsqueeze(-2) for x in (q, k))  # [B, T, HV, 1, K]
    v = v.to(dtype).unsqueeze(-2)  # [B, T, HV, 1, V]
    beta = beta.to(dtype)[..., None, None]
    decay = g.to(dtype).exp().unsqueeze(-1)  # [B, T, HV, K or 1, 1]
    if initial_state is None:
        state = v.new_zeros(v.shape[0], heads, k.shape[-1], value_dim)
    else:
        state = initial_state.to(dtype)
    outputs = []
    for t in range(v.shape[1]):
        state = state * decay[:, t]
        error = v[:, t] - k[:, t] @ state
        state = torch.addcmul(state, k[:, t].mT, beta[:, t] * error)
        outputs.append(q[:, t] @ state)
    return torch.cat(outputs, dim=-2).transpose(1, 2) * scale, state


def _repeat_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, T, H, K] -> [B, T, heads, K]; a view where H = heads."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)
