"""One token of a KDA mixer in one launch: convolutions, gate, state, gated norm.

A program does all that belongs to one query/key head of one sequence. The norm needs all values of
a head, so the head's whole state is in one program's registers: 64 KB of it at K = V = 128, spread
over 4 warps. And the convolution's state, which every value head of the group reads, is written by
the one program that reads it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megakda.kernels.kda.gate_triton import gate_value
from megakda.kernels.launch import launch_config

LARGEST_SIZE = 128
"""The largest K and V: a program holds the state of a head in the registers of 4 warps."""


@triton.jit
def _convolve(p_x, p_state, p_weight, o_d, m_d, m_live, W: tl.constexpr):
    """SiLU of the convolution at channels o_d."""
    # Tap by tap: with a sum over taps, Triton would lay out the head's state like its operand.
    b_x = tl.load(p_x + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_y = b_x * tl.load(p_weight + o_d * W + W - 1, mask=m_d, other=0.0).to(tl.float32)
    for j in tl.static_range(W - 1):
        b_x = tl.load(p_state + o_d * (W - 1) + j, mask=m_d & m_live, other=0.0).to(tl.float32)
        b_y += b_x * tl.load(p_weight + o_d * W + j, mask=m_d, other=0.0).to(tl.float32)
    return b_y * tl.sigmoid(b_y)


@triton.jit
def _shift(p_x, p_state, o_d, m_d, m_live, W: tl.constexpr):
    """Drops the oldest input from the convolution's state and appends the new one."""
    for j in tl.static_range(W - 1):
        if j < W - 2:
            b_x = tl.load(p_state + o_d * (W - 1) + j + 1, mask=m_d & m_live, other=0.0)
        else:
            b_x = tl.load(p_x + o_d, mask=m_d, other=0.0)
        # Several threads may hold one element: all must have read before one of them writes.
        tl.debug_barrier()
        tl.store(p_state + o_d * (W - 1) + j, b_x, mask=m_d & m_live)


@triton.jit
def kda_decode_fused_kernel(
    p_q,  # [N, H, K]
    p_k,  # [N, H, K]
    p_v,  # [N, HV, V]
    p_g,  # [N, HV, K]
    p_beta,  # [N, HV]
    p_gate,  # [N, HV, V]
    p_conv_q,  # rows of [H, K, W - 1]
    p_conv_k,  # rows of [H, K, W - 1]
    p_conv_v,  # rows of [HV, V, W - 1]
    p_weight_q,  # [H, K, W]
    p_weight_k,  # [H, K, W]
    p_weight_v,  # [HV, V, W]
    p_A_log,  # [HV] or None
    p_dt_bias,  # [HV, K] or None
    p_norm,  # [V]
    p_state,  # rows of HV * K * V elements
    p_slots,  # [N], or None for row n
    p_o,  # [N, HV, V]
    scale,
    lower_bound,
    eps,
    stride_conv_q,  # elements between rows
    stride_conv_k,
    stride_conv_v,
    stride_state,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    W: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    V_FIRST: tl.constexpr,
    BOUNDED: tl.constexpr,
    BETA_FACTOR: tl.constexpr,
    SWISH: tl.constexpr,
):
    G: tl.constexpr = HV // H
    i_n = (tl.program_id(0) // H).to(tl.int64)
    i_h = tl.program_id(0) % H
    i_slot = i_n
    m_live = True
    if p_slots is not None:
        i_slot = tl.load(p_slots + i_n).to(tl.int64)
        m_live = i_slot >= 0
    o_k = tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V
    o_s = o_v[None, :] * K + o_k[:, None] if V_FIRST else o_k[:, None] * V + o_v[None, :]
    m_s = m_k[:, None] & m_v[None, :] & m_live
    p_q += (i_n * H + i_h) * K
    p_k += (i_n * H + i_h) * K
    p_weight_q += i_h * (K * W)
    p_weight_k += i_h * (K * W)
    p_conv_q += i_slot * stride_conv_q + i_h * (K * (W - 1))
    p_conv_k += i_slot * stride_conv_k + i_h * (K * (W - 1))
    p_conv_v += i_slot * stride_conv_v
    p_state += i_slot * stride_state
    b_norm = tl.load(p_norm + o_v, mask=m_v, other=0.0).to(tl.float32)

    for i_g in range(G):
        i_hv = i_h * G + i_g
        i_row = i_n * HV + i_hv
        # First what takes longest to come.
        b_s = tl.load(p_state + i_hv * (K * V) + o_s, mask=m_s, other=0.0)
        b_q = _convolve(p_q, p_conv_q, p_weight_q, o_k, m_k, m_live, W)
        b_k = _convolve(p_k, p_conv_k, p_weight_k, o_k, m_k, m_live, W)
        i_v = i_hv * V
        p_conv = p_conv_v + i_v * (W - 1)
        b_v = _convolve(p_v + i_row * V, p_conv, p_weight_v + i_v * W, o_v, m_v, m_live, W)
        b_q *= scale * tl.rsqrt(tl.sum(b_q * b_q) + 1e-6)
        b_k *= tl.rsqrt(tl.sum(b_k * b_k) + 1e-6)

        b_rate = 1.0
        if p_A_log is not None:
            b_rate = tl.exp(tl.load(p_A_log + i_hv).to(tl.float32))
        b_x = tl.load(p_g + i_row * K + o_k, mask=m_k, other=0.0).to(tl.float32)
        if p_dt_bias is not None:
            b_x += tl.load(p_dt_bias + i_hv * K + o_k, mask=m_k, other=0.0).to(tl.float32)
        b_g = gate_value(b_x, b_rate, BOUNDED, lower_bound)
        b_beta = BETA_FACTOR * tl.sigmoid(tl.load(p_beta + i_row).to(tl.float32))

        b_s *= tl.exp(b_g)[:, None]
        b_n = b_beta * (b_v - tl.sum(b_s * b_k[:, None], axis=0))
        b_s += b_k[:, None] * b_n[None, :]
        b_o = tl.sum(b_s * b_q[:, None], axis=0)

        b_o *= tl.rsqrt(tl.sum(b_o * b_o) / V + eps) * b_norm
        b_gate = tl.load(p_gate + i_row * V + o_v, mask=m_v, other=0.0).to(tl.float32)
        b_o *= tl.sigmoid(b_gate)
        if SWISH:
            b_o *= b_gate
        b_o = tl.where(m_live, b_o, 0.0)
        tl.store(p_o + i_row * V + o_v, b_o.to(p_o.dtype.element_ty), mask=m_v)

        _shift(p_v + i_row * V, p_conv, o_v, m_v, m_live, W)
        tl.store(p_state + i_hv * (K * V) + o_s, b_s, mask=m_s)
    _shift(p_q, p_conv_q, o_k, m_k, m_live, W)
    _shift(p_k, p_conv_k, o_k, m_k, m_live, W)


def kda_decode_fused_triton(
    inputs: tuple[torch.Tensor, ...],
    conv_states: tuple[torch.Tensor, ...],
    conv_weights: tuple[torch.Tensor, ...],
    norm_weight: torch.Tensor,
    state: torch.Tensor,
    *,
    A_log: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    lower_bound: float | None,
    allow_neg_eigval: bool,
    scale: float,
    eps: float,
    activation: str,
    state_indices: torch.Tensor | None,
    state_v_first: bool,
) -> torch.Tensor:
    """`kda_decode_fused` on checked arguments; inputs are q, k, v, g, beta and the output gate.

    Raises:
        ValueError: K or V above 128, or float64.
    """
    inputs = tuple(x.contiguous() for x in inputs)
    value_heads = state.shape[1]
    key_dim, value_dim = reversed(state.shape[2:]) if state_v_first else state.shape[2:]
    block_k, block_v = triton.next_power_of_2(key_dim), triton.next_power_of_2(value_dim)
    if max(key_dim, value_dim) > LARGEST_SIZE:
        raise ValueError(
            f"state: K = {key_dim} and V = {value_dim} must be at most {LARGEST_SIZE}; "
            "kda_decode_step has larger ones"
        )
    if any(x.dtype == torch.float64 for x in inputs):
        raise ValueError("q: float64, but the kernel's arithmetic is fp32; use backend='torch'")
    heads = inputs[0].shape[1] // key_dim
    taps = conv_weights[0].shape[1]
    o = torch.empty_like(inputs[2])
    config = launch_config("kda_decode_fused", o.device, elements=block_k * block_v)
    kda_decode_fused_kernel[(len(o) * heads,)](
        *inputs,
        *conv_states,
        *(x.contiguous() for x in conv_weights),
        None if A_log is None else A_log.contiguous(),
        None if dt_bias is None else dt_bias.contiguous(),
        norm_weight.contiguous(),
        state,
        None if state_indices is None else state_indices.contiguous(),
        o,
        float(scale),
        0.0 if lower_bound is None else float(lower_bound),
        float(eps),
        *(x.stride(0) for x in (*conv_states, state)),
        H=heads,
        HV=value_heads,
        K=key_dim,
        V=value_dim,
        W=taps,
        BK=block_k,
        BV=block_v,
        V_FIRST=state_v_first,
        BOUNDED=lower_bound is not None,
        BETA_FACTOR=2.0 if allow_neg_eigval else 1.0,
        SWISH=activation == "swish",
        **config,
    )
    return o
