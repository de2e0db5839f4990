"""The walk over the chunks that carries the state, and the walk back that carries its gradient.

One program per range of consecutive chunks, value head and block of BV columns of the state keeps
S [K, BV] on chip in fp32 and, chunk by chunk, with what `intra_triton` prepared:

    r = inverse (v - k_in S)      o = q_in S + scores r      S <- Diag(total) S + k_out^T r

A range is a whole sequence, or a piece of one where there are too few sequences and heads to fill
the GPU. Its effect on the state is an affine map, and the same walk computes it: K further columns
that begin as the identity, and to which v adds nothing, end as the map's matrix.

`ranges` is int32 [R, 5]: first token, end token, first chunk, slot of the initial state and slot of
the final state; -1 for none.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _program(COLUMNS: tl.constexpr, BV: tl.constexpr):
    """Block of columns, range or sequence, and head. Blocks of columns are neighbours, because they
    read the same tiles; ranges stand with them on the first axis of the grid, the long one.
    """
    BLOCKS: tl.constexpr = (COLUMNS + BV - 1) // BV
    return (
        tl.program_id(0) % BLOCKS,
        tl.program_id(0) // BLOCKS,
        tl.program_id(1).to(tl.int64),
    )


@triton.jit
def load_tile(x, first, m_t, o_k, K: tl.constexpr):
    """Tile [BT, BK] of an array of rows of K, from row `first` on."""
    o_i = tl.arange(0, m_t.shape[0])
    m_tile = m_t[:, None] & (o_k < K)[None, :]
    return tl.load(x + first * K + o_i[:, None] * K + o_k[None, :], mask=m_tile, other=0.0)


@triton.jit
def load_triangle(x, first, m_t, BT: tl.constexpr):
    """Lower triangular tile [BT, BT], of which whole blocks of 16 columns are stored."""
    o_i = tl.arange(0, BT)
    m_tile = m_t[:, None] & ((o_i // 16)[:, None] >= (o_i // 16)[None, :])
    return tl.load(x + first * BT + o_i[:, None] * BT + o_i[None, :], mask=m_tile, other=0.0)


@triton.jit
def kda_state_kernel(
    q_in, k_in, k_out, inverse, scores, total, v, ranges, initial_state,
    o, residuals, states, final_state,
    TOKENS, CHUNKS,
    HV: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, W: tl.constexpr,
    BT: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
    DELTA: tl.constexpr, IDENTITY: tl.constexpr, HAS_INITIAL: tl.constexpr,
    WRITE_O: tl.constexpr, WRITE_STATES: tl.constexpr, WRITE_FINAL: tl.constexpr,
):  # fmt: skip
    """W columns of state: the V of the values, and with IDENTITY K more."""
    i_v, i_r, i_hv = _program(W, BV)
    start = tl.load(ranges + 5 * i_r).to(tl.int64)
    tokens = (tl.load(ranges + 5 * i_r + 1) - start).to(tl.int32)
    i_c = i_hv * CHUNKS + tl.load(ranges + 5 * i_r + 2)
    o_i, o_k, o_v = tl.arange(0, BT), tl.arange(0, KP), i_v * BV + tl.arange(0, BV)
    DTYPE: tl.constexpr = k_out.dtype.element_ty

    p_state = o_k[:, None] * W + o_v[None, :]
    m_state = (o_k < K)[:, None] & (o_v < W)[None, :]
    b_S = tl.zeros((KP, BV), tl.float32)
    if IDENTITY:
        b_S += tl.where(m_state & (o_k[:, None] + V == o_v[None, :]), 1.0, 0.0)
    if HAS_INITIAL:
        slot = tl.load(ranges + 5 * i_r + 3).to(tl.int64)
        p_initial = initial_state + (slot * HV + i_hv) * K * W + p_state
        b_S += tl.load(p_initial, mask=m_state & (slot >= 0), other=0.0)

    for i in range(0, tl.cdiv(tokens, BT)):
        m_t = i * BT + o_i < tokens
        token = start + i * BT
        row = i_hv * TOKENS + token
        p_v = o_i[:, None] * (HV * V) + o_v[None, :]
        b_r = tl.load(
            v + (token * HV + i_hv) * V + p_v, mask=m_t[:, None] & (o_v < V)[None, :], other=0.0
        )
        b_state = b_S.to(DTYPE)
        if WRITE_STATES:
            p_chunk = states + (i_c + i) * K * W + p_state
            tl.store(p_chunk, b_state, mask=m_state)
        if DELTA:
            b_k = load_tile(k_in, row, m_t, o_k, K)
            b_y = b_r.to(tl.float32) - tl.dot(b_k, b_state, input_precision=PRECISION)
            b_T = load_triangle(inverse, row, m_t, BT)
            b_r = tl.dot(b_T, b_y.to(DTYPE), input_precision=PRECISION).to(DTYPE)
            if WRITE_STATES:
                p_r = residuals + (token * HV + i_hv) * W + o_i[:, None] * (HV * W) + o_v[None, :]
                tl.store(p_r, b_r, mask=m_t[:, None] & (o_v < W)[None, :])
        b_r = b_r.to(DTYPE)
        if WRITE_O:
            b_q = load_tile(q_in, row, m_t, o_k, K)
            b_o = tl.dot(b_q, b_state, input_precision=PRECISION)
            b_P = load_triangle(scores, row, m_t, BT)
            b_o += tl.dot(b_P, b_r, input_precision=PRECISION)
            p_o = o + (token * HV + i_hv) * V + p_v
            tl.store(p_o, b_o.to(o.dtype.element_ty), mask=m_t[:, None] & (o_v < V)[None, :])
        b_k = load_tile(k_out, row, m_t, o_k, K)
        p_total = total + (i_c + i) * K + o_k
        b_S *= tl.load(p_total, mask=o_k < K, other=0.0)[:, None]
        b_S += tl.dot(tl.trans(b_k), b_r, input_precision=PRECISION)

    if WRITE_FINAL:
        slot = tl.load(ranges + 5 * i_r + 4).to(tl.int64)
        p_final = final_state + (slot * HV + i_hv) * K * W + p_state
        tl.store(p_final, b_S, mask=m_state & (slot >= 0))


@triton.jit
def kda_state_grad_kernel(
    q_in, k_in, k_out, inverse, scores, total, do, ranges, dfinal_state,
    dv, dstates, dinitial_state,
    TOKENS, CHUNKS,
    HV: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr,
    BT: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
    DELTA: tl.constexpr, HAS_DO: tl.constexpr, HAS_DFINAL: tl.constexpr,
    WRITE_DSTATES: tl.constexpr, WRITE_DINITIAL: tl.constexpr,
):  # fmt: skip
    """The walk back, dS the gradient of the state after each chunk:

        dr = scores^T do + k_out dS      dy = inverse^T dr      dv = dy
        dS <- Diag(total) dS + q_in^T do - k_in^T dy

    Slots in `ranges` are those of the forward walk: the gradient of a final state comes in, that of
    an initial state goes out. `do` and dv are [tokens, HV, V].
    """
    i_v, i_r, i_hv = _program(V, BV)
    start = tl.load(ranges + 5 * i_r).to(tl.int64)
    tokens = (tl.load(ranges + 5 * i_r + 1) - start).to(tl.int32)
    i_c = i_hv * CHUNKS + tl.load(ranges + 5 * i_r + 2)
    o_i, o_k, o_v = tl.arange(0, BT), tl.arange(0, KP), i_v * BV + tl.arange(0, BV)
    DTYPE: tl.constexpr = k_out.dtype.element_ty

    p_state = o_k[:, None] * V + o_v[None, :]
    m_state = (o_k < K)[:, None] & (o_v < V)[None, :]
    b_dS = tl.zeros((KP, BV), tl.float32)
    if HAS_DFINAL:
        slot = tl.load(ranges + 5 * i_r + 4).to(tl.int64)
        p_final = dfinal_state + (slot * HV + i_hv) * K * V + p_state
        b_dS += tl.load(p_final, mask=m_state & (slot >= 0), other=0.0)

    steps = tl.cdiv(tokens, BT)
    for j in range(0, steps):
        i = steps - 1 - j
        m_t = i * BT + o_i < tokens
        token = start + i * BT
        row = i_hv * TOKENS + token
        value = (token * HV + i_hv) * V
        p_v = o_i[:, None] * (HV * V) + o_v[None, :]
        m_v = m_t[:, None] & (o_v < V)[None, :]
        b_dstate = b_dS.to(DTYPE)
        if WRITE_DSTATES:
            p_chunk = dstates + (i_c + i) * K * V + p_state
            tl.store(p_chunk, b_dstate, mask=m_state)
        b_k = load_tile(k_out, row, m_t, o_k, K)
        b_dy = tl.dot(b_k, b_dstate, input_precision=PRECISION)
        p_total = total + (i_c + i) * K + o_k
        b_dS *= tl.load(p_total, mask=o_k < K, other=0.0)[:, None]
        if HAS_DO:
            b_do = tl.load(do + value + p_v, mask=m_v, other=0.0).to(DTYPE)
            b_P = load_triangle(scores, row, m_t, BT)
            b_dy += tl.dot(tl.trans(b_P), b_do, input_precision=PRECISION)
            b_q = load_tile(q_in, row, m_t, o_k, K)
            b_dS += tl.dot(tl.trans(b_q), b_do, input_precision=PRECISION)
        if DELTA:
            b_T = load_triangle(inverse, row, m_t, BT)
            b_dy = tl.dot(tl.trans(b_T), b_dy.to(DTYPE), input_precision=PRECISION)
            b_k = load_tile(k_in, row, m_t, o_k, K)
            b_dS -= tl.dot(tl.trans(b_k), b_dy.to(DTYPE), input_precision=PRECISION)
        if WRITE_DSTATES:
            tl.store(dv + value + p_v, b_dy.to(dv.dtype.element_ty), mask=m_v)

    if WRITE_DINITIAL:
        slot = tl.load(ranges + 5 * i_r + 3).to(tl.int64)
        p_initial = dinitial_state + (slot * HV + i_hv) * K * V + p_state
        tl.store(p_initial, b_dS, mask=m_state & (slot >= 0))


@triton.jit
def kda_fold_kernel(
    maps, before, first_ranges, initial_state, folded,
    HV: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    HAS_INITIAL: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """States between the ranges of each sequence, from their maps S -> M S + E, in order.

    Forward: folded[r] is the state before range r. Backward, with E the gradient that range r's own
    outputs give the state before it: folded[r] is the gradient of the state after range r, from
    dS <- M^T dS + E taken from the last range on. Products are fp32.

    maps: [R, HV, K, V + K], E in the first V columns and M in the others; with BACKWARD, M alone is
    read there and E from `before` [R, HV, K, V]. first_ranges: int32 [N + 1].
    """
    i_v, i_n, i_hv = _program(V, BV)
    low, high = tl.load(first_ranges + i_n), tl.load(first_ranges + i_n + 1)
    o_k, o_v = tl.arange(0, KP), i_v * BV + tl.arange(0, BV)
    W: tl.constexpr = V + K
    m_state = (o_k < K)[:, None] & (o_v < V)[None, :]
    m_matrix = (o_k < K)[:, None] & (o_k < K)[None, :]
    p_state = o_k[:, None] * V + o_v[None, :]
    b_S = tl.zeros((KP, BV), tl.float32)
    if HAS_INITIAL:
        p_initial = initial_state + (i_n.to(tl.int64) * HV + i_hv) * K * V + p_state
        b_S = tl.load(p_initial, mask=m_state, other=0.0)
    for j in range(low, high):
        r = j
        if BACKWARD:
            r = high - 1 - (j - low)
        i_map = tl.cast(r, tl.int64) * HV + i_hv
        tl.store(folded + i_map * K * V + p_state, b_S, mask=m_state)
        p_map = maps + i_map * K * W
        if BACKWARD:
            p_M = p_map + o_k[None, :] * W + V + o_k[:, None]
            p_E = before + i_map * K * V + p_state
        else:
            p_M = p_map + o_k[:, None] * W + V + o_k[None, :]
            p_E = p_map + o_k[:, None] * W + o_v[None, :]
        b_M = tl.load(p_M, mask=m_matrix, other=0.0)
        b_E = tl.load(p_E, mask=m_state, other=0.0)
        b_S = b_E + tl.dot(b_M, b_S, input_precision="tf32x3")
