"""The KDA recurrence token by token on a GPU: the state stays on chip, inputs are read as they are.

One program owns BV columns of one head's state. The columns do not depend on each other, so the
programs need no exchange, and the more of them the more of the memory's latency is hidden: for one
token, the work is to read and write the state.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megakda.kernels.kda.gate_triton import gate_value
from megakda.kernels.launch import launch_config

LARGEST_KEY_DIM = 256
"""The largest K: a program holds whole columns of the state in registers."""


@triton.jit
def kda_recurrent_kernel(
    p_q,  # [N * T, H, K], or packed [T, H, K]
    p_k,  # as p_q
    p_v,  # [N * T, HV, V]
    p_g,  # [N * T, HV, K], or [N * T, HV, 1] with HEAD_DECAY
    p_beta,  # [N * T, HV]
    p_A_log,  # [HV] or None
    p_dt_bias,  # [HV, K], [HV] with HEAD_DECAY, or None
    p_o,  # [N * T, HV, V]
    p_source,  # fp32 states, rows of HV * K * V elements; None for zero
    p_target,  # as p_source; None to drop the state
    p_bounds,  # [N + 1] where packed sequences begin, or None
    p_slots,  # rows of the states: [N], [N, T] with p_accepted; None for row n
    p_accepted,  # [N] column of p_slots to begin with, counted from 1, or None
    scale,
    lower_bound,
    T,
    stride_source,  # elements between rows of the states
    stride_target,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    V_FIRST: tl.constexpr,
    L2_NORM: tl.constexpr,
    GATE: tl.constexpr,
    BOUNDED: tl.constexpr,
    HEAD_DECAY: tl.constexpr,
    BETA_SIGMOID: tl.constexpr,
    BETA_FACTOR: tl.constexpr,
    DELTA: tl.constexpr,
):
    NV: tl.constexpr = (V + BV - 1) // BV
    # One flat grid: its other dimensions end at 65535. The programs of a head are neighbours.
    i_v = tl.program_id(0) % NV
    i_hv = (tl.program_id(0) // NV) % HV
    i_n = tl.program_id(0) // (NV * HV)
    i_h = i_hv // (HV // H)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V

    if p_bounds is None:
        i_start = i_n.to(tl.int64) * T
        n_tokens = T
    else:
        i_start = tl.load(p_bounds + i_n).to(tl.int64)
        n_tokens = (tl.load(p_bounds + i_n + 1) - i_start).to(tl.int32)

    if p_slots is None:
        i_source = i_n.to(tl.int64)
        m_live = True
    elif p_accepted is None:
        i_source = tl.load(p_slots + i_n).to(tl.int64)
        m_live = i_source >= 0
    else:
        # The first column tells padding, whose count of accepted tokens may be anything.
        m_live = tl.load(p_slots + i_start) >= 0
        i_accepted = tl.load(p_accepted + i_n, mask=m_live, other=1)
        i_source = tl.load(p_slots + i_start + i_accepted - 1).to(tl.int64)

    # Where this program's columns lie in one row of the states.
    if V_FIRST:
        o_s = i_hv * (K * V) + o_v[None, :] * K + o_k[:, None]
    else:
        o_s = i_hv * (K * V) + o_k[:, None] * V + o_v[None, :]
    m_s = m_k[:, None] & m_v[None, :] & m_live
    if p_source is None:
        b_s = tl.zeros((BK, BV), dtype=tl.float32)
    else:
        b_s = tl.load(p_source + i_source * stride_source + o_s, mask=m_s, other=0.0)

    if GATE:
        b_rate = 1.0
        if p_A_log is not None:
            b_rate = tl.exp(tl.load(p_A_log + i_hv).to(tl.float32))
        b_bias = 0.0
        if p_dt_bias is not None:
            if HEAD_DECAY:
                b_bias = tl.load(p_dt_bias + i_hv).to(tl.float32)
            else:
                b_bias = tl.load(p_dt_bias + i_hv * K + o_k, mask=m_k, other=0.0).to(tl.float32)

    for i_t in range(n_tokens):
        i_row = i_start + i_t
        b_q = tl.load(p_q + (i_row * H + i_h) * K + o_k, mask=m_k, other=0.0).to(tl.float32)
        b_k = tl.load(p_k + (i_row * H + i_h) * K + o_k, mask=m_k, other=0.0).to(tl.float32)
        b_v = tl.load(p_v + (i_row * HV + i_hv) * V + o_v, mask=m_v, other=0.0).to(tl.float32)
        b_beta = tl.load(p_beta + i_row * HV + i_hv).to(tl.float32)
        if L2_NORM:
            b_q *= tl.rsqrt(tl.sum(b_q * b_q) + 1e-6)
            b_k *= tl.rsqrt(tl.sum(b_k * b_k) + 1e-6)
        if BETA_SIGMOID:
            b_beta = BETA_FACTOR * tl.sigmoid(b_beta)

        if HEAD_DECAY:
            b_g = tl.load(p_g + i_row * HV + i_hv).to(tl.float32)
        else:
            b_g = tl.load(p_g + (i_row * HV + i_hv) * K + o_k, mask=m_k, other=0.0).to(tl.float32)
        if GATE:
            b_g = gate_value(b_g + b_bias, b_rate, BOUNDED, lower_bound)
        if HEAD_DECAY:
            b_s *= tl.exp(b_g)
        else:
            b_s *= tl.exp(b_g)[:, None]

        b_n = b_v
        if DELTA:
            b_n -= tl.sum(b_s * b_k[:, None], axis=0)
        b_s += b_k[:, None] * (b_beta * b_n)[None, :]
        b_o = scale * tl.sum(b_s * b_q[:, None], axis=0)
        b_o = tl.where(m_live, b_o, 0.0)
        tl.store(p_o + (i_row * HV + i_hv) * V + o_v, b_o.to(p_o.dtype.element_ty), mask=m_v)

        if p_accepted is not None:
            i_target = tl.load(p_slots + i_row).to(tl.int64)
            # A state smaller than the program is held by several threads: all of them must have
            # read it before one of them writes over it.
            tl.debug_barrier()
            tl.store(p_target + i_target * stride_target + o_s, b_s, mask=m_s)

    if p_accepted is None and p_target is not None:
        tl.debug_barrier()
        tl.store(p_target + i_source * stride_target + o_s, b_s, mask=m_s)


def recurrent_kda_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float,
    initial_state: torch.Tensor | None = None,
    *,
    output_final_state: bool = True,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    delta_rule: bool = True,
    cu_seqlens: torch.Tensor | None = None,
    state_v_first: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Whole sequences token by token; no gradients. Arguments as in `fused_recurrent_kda`, checked.

    Besides, `delta_rule=False` writes v as it is, S <- Diag(exp g) S + k (beta v)^T: gated linear
    attention. `initial_state` is not written to. `cu_seqlens` may be on any device.

    Returns:
        o [B, T, HV, V] in the dtype of v; the final state fp32, or None unless asked for.

    Raises:
        ValueError: K above 256 or float64 inputs, which this kernel does not have.
    """
    sequences = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    sizes = (k.shape[-1], v.shape[-1])
    final_state = None
    if output_final_state:
        shape = (sequences, v.shape[2], *(reversed(sizes) if state_v_first else sizes))
        final_state = v.new_empty(shape, dtype=torch.float32)
    o = launch_recurrent(
        (q, k, v, g, beta),
        scale,
        None if initial_state is None else initial_state.contiguous(),
        final_state,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.to(q.device),
        A_log=A_log,
        dt_bias=dt_bias,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_gate_in_kernel=use_gate_in_kernel,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        lower_bound=lower_bound,
        delta_rule=delta_rule,
        state_v_first=state_v_first,
    )
    return o, final_state


def launch_recurrent(
    inputs: tuple[torch.Tensor, ...],
    scale: float,
    source: torch.Tensor | None,
    target: torch.Tensor | None,
    *,
    cu_seqlens: torch.Tensor | None = None,
    state_indices: torch.Tensor | None = None,
    num_accepted: torch.Tensor | None = None,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    delta_rule: bool = True,
    state_v_first: bool = False,
) -> torch.Tensor:
    """One launch of the kernel on checked arguments; it does not wait for the device.

    Args:
        inputs: q, k, v, g, beta.
        scale: of the output.
        source: states to begin with, or None for zero; rows contiguous, at any distance.
        target: where to write states, as `source`, which it may be; None to drop them.
        cu_seqlens: as in `fused_recurrent_kda`, on the device of the inputs.
        state_indices: as in `kda_decode_step`.
        num_accepted: as in `kda_decode_step`.

    Returns:
        o [B, T, HV, V] in the dtype of v.

    Raises:
        ValueError: K above 256 or float64 inputs.
    """
    q, k, v, g, beta = (x.contiguous() for x in inputs)
    batch, tokens, heads, key_dim = q.shape
    value_heads, value_dim = v.shape[2:]
    if key_dim > LARGEST_KEY_DIM:
        raise ValueError(
            f"q: K = {key_dim} must be at most {LARGEST_KEY_DIM}; backend='torch' has no limit"
        )
    for name, x in zip(("q", "k", "v", "g", "beta"), inputs, strict=True):
        if x.dtype == torch.float64:
            raise ValueError(f"{name}: float64, but the kernel's arithmetic is fp32; use 'torch'")
    sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
    o = torch.empty_like(v)

    block_k = triton.next_power_of_2(key_dim)
    config = launch_config("kda_recurrent", q.device, BK=block_k)
    block_v = min(config.pop("BV"), triton.next_power_of_2(value_dim))
    grid = (triton.cdiv(value_dim, block_v) * value_heads * sequences,)
    kda_recurrent_kernel[grid](
        q,
        k,
        v,
        g,
        beta,
        None if A_log is None else A_log.contiguous(),
        None if dt_bias is None else dt_bias.contiguous(),
        o,
        source,
        target,
        None if cu_seqlens is None else cu_seqlens.contiguous(),
        None if state_indices is None else state_indices.contiguous(),
        None if num_accepted is None else num_accepted.contiguous(),
        float(scale),
        0.0 if lower_bound is None else float(lower_bound),
        tokens,
        0 if source is None else source.stride(0),
        0 if target is None else target.stride(0),
        H=heads,
        HV=value_heads,
        K=key_dim,
        V=value_dim,
        BK=block_k,
        BV=block_v,
        V_FIRST=state_v_first,
        L2_NORM=use_qk_l2norm_in_kernel,
        GATE=use_gate_in_kernel,
        BOUNDED=lower_bound is not None,
        HEAD_DECAY=g.shape[-1] != key_dim,
        BETA_SIGMOID=use_beta_sigmoid_in_kernel,
        BETA_FACTOR=2.0 if allow_neg_eigval else 1.0,
        DELTA=delta_rule,
        **config,
    )
    return o
