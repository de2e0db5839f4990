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
    delta_rule: bool = True,
    bounds: list[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One pass over the state per token; differentiable by autograd, which keeps every state.

    Packed sequences go side by side, token t of all that have one in one step, so the number of
    steps is the length of the longest.

    Args:
        q: [B, T, H, K].
        k: [B, T, H, K].
        v: [B, T, HV, V], HV a multiple of H.
        g: [B, T, HV, K] or [B, T, HV, 1], decay in log space, <= 0.
        beta: [B, T, HV].
        scale: of the output.
        initial_state: [N, HV, K, V], N = B or the number of packed sequences, or None for zero. It
            is not written to.
        delta_rule: False for plain gated linear attention.
        bounds: for packed sequences, B = 1: N + 1 token numbers, not falling, from 0 to T; sequence
            n is the tokens bounds[n] up to, not including, bounds[n + 1].

    Returns:
        o [B, T, HV, V] and the state after the last token of each sequence [N, HV, K, V], the
        initial one where it is empty; both fp32 (float64 where v is float64).
    """
    dtype = torch.promote_types(v.dtype, torch.float32)
    batch, tokens, heads, value_dim = v.shape
    if bounds is None:
        sizes = [batch] * tokens
        q, k, v, g, beta = (x.transpose(0, 1).flatten(0, 1) for x in (q, k, v, g, beta))
    else:
        order, index, sizes = _side_by_side(bounds, v.device)
        q, k, v, g, beta = (x.squeeze(0).index_select(0, index) for x in (q, k, v, g, beta))
    # Heads next to tokens, so that one step is a batch of small matrix products.
    q, k = (_repeat_heads(x, heads).to(dtype).unsqueeze(-2) for x in (q, k))  # [B*T, HV, 1, K]
    v = v.to(dtype).unsqueeze(-2)  # [B*T, HV, 1, V]
    beta = beta.to(dtype)[..., None, None]
    decay = g.to(dtype).exp().unsqueeze(-1)  # [B*T, HV, K or 1, 1]
    if initial_state is None:
        sequences = batch if bounds is None else len(bounds) - 1
        state = v.new_zeros(sequences, heads, k.shape[-1], value_dim)
    else:
        state = initial_state.to(dtype)
    if bounds is not None:
        state = state.index_select(0, order)

    outputs, ended = [], []
    for q_t, k_t, v_t, decay_t, beta_t in zip(
        *(x.split(sizes) for x in (q, k, v, decay, beta)), strict=True
    ):
        if len(v_t) < len(state):
            ended.append(state[len(v_t) :])
            state = state[: len(v_t)]
        state = state * decay_t
        new = v_t - k_t @ state if delta_rule else v_t
        state = torch.addcmul(state, k_t.mT, beta_t * new)
        outputs.append(q_t @ state)
    o = torch.cat(outputs).squeeze(-2) * scale  # [B*T, HV, V]
    if bounds is None:
        return o.unflatten(0, (tokens, batch)).transpose(0, 1), state
    state = torch.cat([state, *reversed(ended)])
    return o.index_select(0, index.argsort()).unsqueeze(0), state.index_select(0, order.argsort())


def _side_by_side(
    bounds: list[int], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """The packed sequences, longest first; the tokens in the order of the steps, all first tokens
    before all second ones; and the number of tokens in each step."""
    edges = torch.tensor(bounds)
    lengths = edges.diff()
    order = lengths.argsort(descending=True, stable=True)
    starts, lengths = edges[:-1][order], lengths[order]
    steps = torch.arange(int(lengths[0])).unsqueeze(1)
    exists = steps < lengths  # [steps, N]
    index = (starts + steps)[exists]
    return order.to(device), index.to(device), exists.sum(1).tolist()


def _repeat_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[tokens, H, K] -> [tokens, heads, K]; a view where H = heads."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)
