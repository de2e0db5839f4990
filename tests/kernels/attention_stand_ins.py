"""Fused attention for GPUs by its signatures, on a CPU: dense in float64.

Each function checks what the real one takes for granted.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch


def softmax(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """[L, H, D] -> out [L, H, Dv] and fp32 lse [H, L]."""
    scores = scale * torch.einsum("ihd,jhd->hij", q.double(), k.double())
    if causal:
        assert len(q) == len(k)
        scores += torch.full(scores.shape[1:], -torch.inf, dtype=scores.dtype).triu(1)
    out = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v.double())
    return out.to(q.dtype), scores.logsumexp(-1).float()


def softmax_gradients(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
    scale: float,
) -> list[torch.Tensor]:
    """From the out and lse [H, L] that are given, whatever keys they cover."""
    kind = q.dtype
    dout, q, k, v, out, lse = (t.double() for t in (dout, q, k, v, out, lse))
    p = torch.exp(scale * torch.einsum("ihd,jhd->hij", q, k) - lse.unsqueeze(-1))
    if causal:
        p = p.tril()
    ds = scale * p * (torch.einsum("ihd,jhd->hij", dout, v) - (dout * out).sum(-1).T.unsqueeze(-1))
    gradients = (
        torch.einsum("hij,jhd->ihd", ds, k),
        torch.einsum("hij,ihd->jhd", ds, q),
        torch.einsum("hij,ihd->jhd", p, dout),
    )
    return [t.to(kind) for t in gradients]


def efficient_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: None,
    cu_seqlens_q: None,
    cu_seqlens_k: None,
    max_seqlen_q: None,
    max_seqlen_k: None,
    dropout_p: float,
    custom_mask_type: int,
    compute_log_sumexp: bool = False,
    *,
    scale: float,
    **_: Any,
) -> tuple[Any, ...]:
    assert bias is cu_seqlens_q is cu_seqlens_k is max_seqlen_q is max_seqlen_k is None
    assert dropout_p == 0 and compute_log_sumexp and custom_mask_type in (0, 1)
    for x in (query, key, value):
        assert x.stride(-1) == 1 and x.shape[-1] % 8 == 0
    pairs = [
        softmax(*qkv, bool(custom_mask_type), scale) for qkv in zip(query, key, value, strict=True)
    ]
    queries = query.shape[1]
    lse = torch.full((len(pairs), query.shape[2], -(-queries // 32) * 32), torch.inf)
    lse[..., :queries] = torch.stack([lse for _, lse in pairs])
    seed = torch.empty((), dtype=torch.int64)
    return torch.stack([out for out, _ in pairs]), lse, seed, seed.clone(), queries, key.shape[1]


def efficient_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: None,
    out: torch.Tensor,
    cu_seqlens_q: None,
    cu_seqlens_k: None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    logsumexp: torch.Tensor,
    dropout_p: float,
    philox_seed: torch.Tensor,
    philox_offset: torch.Tensor,
    custom_mask_type: int,
    bias_requires_grad: bool,
    *,
    scale: float,
    num_splits_key: int,
    **_: Any,
) -> tuple[Any, ...]:
    assert bias is cu_seqlens_q is cu_seqlens_k is None and not bias_requires_grad
    assert dropout_p == 0 and num_splits_key == 1 and custom_mask_type in (0, 1)
    assert (max_seqlen_q, max_seqlen_k) == (query.shape[1], key.shape[1])
    for x in (query, key, value):
        assert x.stride(-1) == 1 and x.shape[-1] % 8 == 0
    # The kernel takes these for granted, unchecked.
    assert grad_out.is_contiguous() and out.is_contiguous() and logsumexp.is_contiguous()
    assert {t.dtype for t in (grad_out, query, key, value, out)} == {query.dtype}
    assert logsumexp.dtype == torch.float32 and logsumexp.shape[-1] % 32 == 0
    assert torch.isposinf(logsumexp[..., query.shape[1] :]).all()
    lse = logsumexp[..., : query.shape[1]]
    gradients = [
        softmax_gradients(*rows, bool(custom_mask_type), scale)
        for rows in zip(grad_out, query, key, value, out, lse, strict=True)
    ]
    return *(torch.stack(parts) for parts in zip(*gradients, strict=True)), torch.empty(0)


class FlashAttention:
    """`flash_attn.flash_attn_interface` of flash-attn 2.7 and 2.8: the two calls that are used."""

    forwards = 0

    def _flash_attn_varlen_forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int = -1,
        window_size_right: int = -1,
        softcap: float = 0.0,
        alibi_slopes: torch.Tensor | None = None,
        return_softmax: bool = False,
        block_table: torch.Tensor | None = None,
        leftpad_k: torch.Tensor | None = None,
        seqused_k: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        FlashAttention.forwards += 1
        assert (dropout_p, window_size_left, window_size_right, softcap) == (0.0, -1, -1, 0.0)
        ranges = self.ranges(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        pairs = [softmax(q[a], k[b], v[b], causal, softmax_scale) for a, b in ranges]
        out, lse = torch.cat([out for out, _ in pairs]), torch.cat([lse for _, lse in pairs], 1)
        return out, lse, q.new_empty(0), torch.empty(2, dtype=torch.int64)

    def _flash_attn_varlen_backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        softmax_lse: torch.Tensor,
        dq: torch.Tensor,
        dk: torch.Tensor,
        dv: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int,
        window_size_right: int,
        softcap: float,
        alibi_slopes: torch.Tensor | None,
        deterministic: bool,
        rng_state: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert (dropout_p, window_size_left, window_size_right, softcap) == (0.0, -1, -1, 0.0)
        assert deterministic and alibi_slopes is None
        assert dout.shape == out.shape == q.shape and dout.dtype == out.dtype == q.dtype
        assert softmax_lse.shape == (q.shape[1], len(q)) and softmax_lse.dtype == torch.float32
        for x in (softmax_lse, dq, dk, dv):
            assert x.is_contiguous()
        for a, b in self.ranges(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
            dq[a], dk[b], dv[b] = softmax_gradients(
                dout[a], q[a], k[b], v[b], out[a], softmax_lse[:, a], causal, softmax_scale
            )
        return torch.empty(0)

    def ranges(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
    ) -> list[tuple[slice, slice]]:
        assert q.shape[-1] == k.shape[-1] == v.shape[-1] and q.shape[-1] % 8 == 0
        result = []
        for x, bounds, longest in (
            (q, cu_seqlens_q, max_seqlen_q),
            (k, cu_seqlens_k, max_seqlen_k),
        ):
            assert x.stride(-1) == 1 and bounds.dtype == torch.int32
            assert bounds[0] == 0 and bounds[-1] == len(x) and bounds.diff().max() == longest
            result.append([slice(a, b) for a, b in itertools.pairwise(bounds.tolist())])
        return list(zip(*result, strict=True))
