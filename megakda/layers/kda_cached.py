"""KDA and Gated DeltaNet over new tokens of cached sequences: chunks or single steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megakda.kernels.gated_norm import gated_rms_norm
from megakda.kernels.kda import chunk_kda, kda_decode_step
from megakda.kernels.kda.decode_fused import kda_decode_fused
from megakda.kernels.short_conv import short_conv, short_conv_step
from megakda.layers.cached import CachedTokens, LinearCache

FUSED_HEAD_DIM = 128
"""Largest head that `kda_decode_fused` takes on a GPU."""

_Tensors = Sequence[torch.Tensor]


@dataclass(frozen=True)
class MixerWeights:
    """What the mixer applies between its input projections and its output projection.

    Attributes:
        convolutions: of q, k and v, [H*K or H*V, W]; empty for none.
        A_log: [H]. dt_bias: [H*K], or [H] for one decay per head.
        lower_bound: of the bounded gate; None for the softplus gate.
        norm: [V]. eps: of the norm. activation: of the output gate; None without one.
    """

    convolutions: tuple[torch.Tensor, ...]
    A_log: torch.Tensor
    dt_bias: torch.Tensor
    lower_bound: float | None
    norm: torch.Tensor
    eps: float
    activation: str | None


def mix_cached(
    projections: _Tensors,
    gate: torch.Tensor | None,
    weights: MixerWeights,
    new: CachedTokens,
    cache: LinearCache,
) -> torch.Tensor:
    """Convolution, recurrence, norm and output gate of new tokens; brings `cache` up to date.

    Args:
        projections: q, k [N, H*K], v [N, H*V], decay [N, H*K or H] and beta [N, H], before
            convolutions and activations; N is `new.tokens` and padding behind them.
        gate: [N, H*V] before its activation, or None.

    Returns:
        [N, H*V] for the output projection; zero for padding.
    """
    v = projections[2]
    split, end = new.decoded, new.tokens
    if split == len(v):
        return _decode(projections, gate, weights, new, cache)
    out = torch.zeros_like(v)
    for part, run in ((slice(0, split), _decode), (slice(split, end), _prefill)):
        if part.start < part.stop:
            inputs = [x[part] for x in projections]
            out[part] = run(inputs, None if gate is None else gate[part], weights, new, cache)
    return out


def _decode(
    projections: _Tensors,
    gate: torch.Tensor | None,
    weights: MixerWeights,
    new: CachedTokens,
    cache: LinearCache,
) -> torch.Tensor:
    """One token of each of `new.decoded` sequences: [n, ...] -> [n, H*V]."""
    q, k, v, decay, beta = projections
    heads, key_dim, value_dim = cache.state.shape[1:]
    rows = new.rows[: new.decoded]
    gates: dict[str, Any] = dict(
        A_log=weights.A_log, dt_bias=weights.dt_bias, lower_bound=weights.lower_bound
    )
    per_channel = decay.shape[-1] == heads * key_dim
    small = max(key_dim, value_dim) <= FUSED_HEAD_DIM
    if weights.convolutions and gate is not None and per_channel and small:
        return kda_decode_fused(
            q,
            k,
            v,
            decay,
            beta,
            gate,
            cache.convolutions,  # type: ignore[arg-type]
            weights.convolutions,  # type: ignore[arg-type]
            weights.norm,
            cache.state,
            eps=weights.eps,
            activation=weights.activation,  # type: ignore[arg-type]  # there is a gate
            state_indices=rows,
            unchecked=True,
            **gates,
        )
    if weights.convolutions:
        q, k, v = (
            short_conv_step(x.contiguous(), tail, weight, state_indices=rows)
            for x, tail, weight in zip(
                (q, k, v), cache.convolutions, weights.convolutions, strict=True
            )
        )
    o = kda_decode_step(
        q.view(-1, 1, heads, key_dim),
        k.view(-1, 1, heads, key_dim),
        v.view(-1, 1, heads, value_dim),
        decay.reshape(len(decay), 1, heads, -1),
        beta.unsqueeze(1),
        cache.state,
        state_indices=rows,
        use_qk_l2norm_in_kernel=True,
        use_gate_in_kernel=True,
        use_beta_sigmoid_in_kernel=True,
        **gates,
    )
    return _normed(o.squeeze(1), gate, weights)


def _prefill(
    projections: _Tensors,
    gate: torch.Tensor | None,
    weights: MixerWeights,
    new: CachedTokens,
    cache: LinearCache,
) -> torch.Tensor:
    """Several tokens of each of the other sequences, packed: [n, ...] -> [n, H*V]."""
    q, k, v, decay, beta = (x.unsqueeze(0) for x in projections)
    heads = cache.state.shape[1]
    rows = new.rows[new.decoded :]
    if weights.convolutions:
        mixed = []
        for x, tail, weight in zip(
            (q, k, v), cache.convolutions, weights.convolutions, strict=True
        ):
            y, last = short_conv(
                x,
                weight,
                initial_state=tail[rows],
                output_final_state=True,
                cu_seqlens=new.cu_seqlens,
            )
            assert last is not None
            tail[rows] = last
            mixed.append(y)
        q, k, v = mixed
    q, k, v, decay = (x.unflatten(-1, (heads, -1)) for x in (q, k, v, decay))
    o, state = chunk_kda(
        q,
        k,
        v,
        decay,
        beta,
        A_log=weights.A_log,
        dt_bias=weights.dt_bias,
        lower_bound=weights.lower_bound,
        initial_state=cache.state[rows],
        output_final_state=True,
        cu_seqlens=new.cu_seqlens,
        use_gate_in_kernel=True,
        use_qk_l2norm_in_kernel=True,
        use_beta_sigmoid_in_kernel=True,
    )
    cache.state[rows] = state
    return _normed(o.squeeze(0), gate, weights)


def _normed(o: torch.Tensor, gate: torch.Tensor | None, weights: MixerWeights) -> torch.Tensor:
    """[n, H, V] -> [n, H*V]."""
    if gate is not None:
        gate = gate.reshape(o.shape)
    normed = gated_rms_norm(o, weights.norm, gate, activation=weights.activation, eps=weights.eps)
    return normed.flatten(1)
