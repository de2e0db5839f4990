"""The KDA recurrence, token by token in float64: the truth that every other form is held against.

Source: Kimi Linear, arXiv 2510.26692, equation 1; `megakda/kernels/kda/README.md` derives the rest.
"""

from __future__ import annotations

import torch


def kda_recurrence(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    delta_rule: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Applies the gated delta rule one token at a time, in float64; differentiable by autograd.

    Per head, with the state S in R^{K x V}:

        S <- Diag(exp g_t) S,   S <- S + k_t (beta_t (v_t - S^T k_t))^T,   o_t = scale * S^T q_t

    Args:
        q: [B, T, H, K].
        k: [B, T, H, K].
        v: [B, T, HV, V]; HV a multiple of H, query/key head h serves heads h*HV/H and following.
        g: [B, T, HV, K] decay in log space, <= 0; a last dimension of 1 is one decay per head.
        beta: [B, T, HV] step size of the delta rule.
        scale: of the output, K^-1/2 by default.
        initial_state: [B, HV, K, V], zero by default.
        delta_rule: False for plain gated linear attention, S <- S + k_t (beta_t v_t)^T.

    Returns:
        o [B, T, HV, V] and the state after the last token [B, HV, K, V], both float64.
    """
    q, k, v, g, beta = (x.double() for x in (q, k, v, g, beta))
    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], dim=2) for x in (q, k))
    batch, tokens, heads, key_dim = q.shape
    scale = key_dim**-0.5 if scale is None else scale
    if initial_state is None:
        state = v.new_zeros(batch, heads, key_dim, v.shape[-1])
    else:
        state = initial_state.double()
    outputs = []
    for t in range(tokens):
        state = state * g[:, t].exp().unsqueeze(-1)
        new = v[:, t]
        if delta_rule:
            new = new - torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t].unsqueeze(-1) * new)
        outputs.append(scale * torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return torch.stack(outputs, dim=1), state
