"""Gradients of everything inside a chunk, once both walks have left their states.

One program per chunk and value head. It reads q, k, g and beta as the forward pass got them, the
output's gradient do, the residuals r, dy (the gradient of v), and the state S before and its
gradient dS after the chunk; what pass 1 wrote is not read, but made again. The gradients of gate,
norms and sigmoid are taken on the way. No atomics: sums over chunks are left to a second step.

With the letters of `intra_triton`:

    dscores = do r^T (j <= i)     dA = -dy r^T (j < i)
    dq_in = do S^T     dk_in = -dy S^T     dk_out = r dS^T     dtotal = rows of S * dS, summed

and with `row_k` and `column_k` the two places of k in the scores, `column_k` times beta. The
gradient of the cumulative decay is row gradients times rows minus column gradients times columns.
A token's product with itself contains no decay: it is left out there and added to q and k after.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megakda.kernels.kda.gate_triton import gate_derivatives
from megakda.kernels.kda.intra_triton import (
    anchored,
    anchorings,
    inverse_norm,
    load_beta,
    load_decay,
    load_rows,
    midpoint_fits,
)


@triton.jit
def _state_products(
    do, residuals, dv, states, dstates, start, o_i, m_t, o_k, i_c, i_hv, CHUNKS,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr, HAS_Q: tl.constexpr, DELTA: tl.constexpr,
):  # fmt: skip
    """do S^T, -dy S^T, r dS^T [BT, BK] and the rows of S * dS summed [BK], over all V columns."""
    BT: tl.constexpr = o_i.shape[0]
    BK: tl.constexpr = o_k.shape[0]
    b_dq = tl.zeros((BT, BK), tl.float32)
    b_drow = tl.zeros((BT, BK), tl.float32)
    b_dcolumn = tl.zeros((BT, BK), tl.float32)
    b_dtotal = tl.zeros((BK,), tl.float32)
    i_chunk = (i_hv.to(tl.int64) * CHUNKS + i_c) * K * V
    for i_v in range(0, V, BV):
        o_v = i_v + tl.arange(0, BV)
        p_state = i_chunk + o_k[:, None] * V + o_v[None, :]
        m_state = (o_k < K)[:, None] & (o_v < V)[None, :]
        b_S = tl.load(states + p_state, mask=m_state, other=0.0)
        b_dS = tl.load(dstates + p_state, mask=m_state, other=0.0)
        b_dtotal += tl.sum(b_S.to(tl.float32) * b_dS.to(tl.float32), axis=1)
        b_r, b_dy, b_do = _value_tiles(do, residuals, dv, start, o_i, m_t, o_v, i_hv,
                                       HV, V, HAS_Q, DELTA)  # fmt: skip
        b_dcolumn += tl.dot(b_r, tl.trans(b_dS), input_precision=PRECISION)
        if DELTA:
            b_drow -= tl.dot(b_dy, tl.trans(b_S), input_precision=PRECISION)
        if HAS_Q:
            b_dq += tl.dot(b_do, tl.trans(b_S), input_precision=PRECISION)
    return b_dq, b_drow, b_dcolumn, b_dtotal


@triton.jit
def _value_tiles(
    do, residuals, dv, start, o_i, m_t, o_v, i_hv,
    HV: tl.constexpr, V: tl.constexpr, HAS_Q: tl.constexpr, DELTA: tl.constexpr,
):  # fmt: skip
    """r, dy and do [BT, BV] in the dtype of r. Without the delta rule r is v itself."""
    m_tile = m_t[:, None] & (o_v < V)[None, :]
    p_tile = (start * HV + i_hv) * V + o_i[:, None] * (HV * V) + o_v[None, :]
    b_r = tl.load(residuals + p_tile, mask=m_tile, other=0.0)
    b_dy, b_do = b_r, b_r
    if DELTA:
        b_dy = tl.load(dv + p_tile, mask=m_tile, other=0.0).to(b_r.dtype)
    if HAS_Q:
        b_do = tl.load(do + p_tile, mask=m_tile, other=0.0).to(b_r.dtype)
    return b_r, b_dy, b_do


@triton.jit
def _through_norm(dx, x, b_norm, b_radial, start, o_i, m_t, o_k, i_h, i_hv,
                  H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr):  # fmt: skip
    """Replaces the gradient of x / |x|, just stored, by that of x."""
    p_dx = dx + (start * HV + i_hv) * K + o_i[:, None] * (HV * K) + o_k[None, :]
    m_tile = m_t[:, None] & (o_k < K)[None, :]
    b_x = load_rows(x, start, o_i, m_t, o_k, i_h, H, K) * b_norm[:, None]
    b_dx = tl.load(p_dx, mask=m_tile, other=0.0).to(tl.float32)
    b_dx = (b_dx - b_x * b_radial[:, None]) * b_norm[:, None]
    tl.store(p_dx, b_dx.to(dx.dtype.element_ty), mask=m_tile)


@triton.jit
def _store_decay_gradient(dg, dt_bias_parts, b_dG, g, A_log, dt_bias, start, o_i, m_t, o_k, i_c,
                          i_hv, lower_bound, HV: tl.constexpr, K: tl.constexpr,
                          GATE: tl.constexpr, HAS_BIAS: tl.constexpr):  # fmt: skip
    """Stores the gradient of the gate's input, given that of the cumulative decay [BT, BK], and
    this chunk's sum for dt_bias; returns its sum for A_log.
    """
    m_tile = m_t[:, None] & (o_k < K)[None, :]
    # Token t's decay is in the cumulative decays of t and of all later tokens.
    if K == 1:  # triton 3.6 fails to compile a scan of one column
        b_dg = tl.cumsum(tl.sum(b_dG, axis=1), axis=0, reverse=True)[:, None]
    else:
        b_dg = tl.cumsum(b_dG, axis=0, reverse=True)
    b_dA_log = 0.0
    if GATE != "none":
        _, b_x = load_decay(g, A_log, dt_bias, start, o_i, m_t, o_k, i_hv, lower_bound,
                            HV, K, GATE, HAS_BIAS)  # fmt: skip
        b_rate = tl.exp(tl.load(A_log + i_hv).to(tl.float32))
        _, b_slope, b_slope_A = gate_derivatives(b_x, b_rate, GATE == "bounded", lower_bound)
        b_dA_log = tl.sum(tl.sum(tl.where(m_tile, b_dg * b_slope_A, 0.0), axis=1), axis=0)
        b_dg *= b_slope
        if HAS_BIAS:
            b_sum = tl.sum(tl.where(m_tile, b_dg, 0.0), axis=0)
            p_part = dt_bias_parts + (i_c.to(tl.int64) * HV + i_hv) * K + o_k
            tl.store(p_part, b_sum, mask=o_k < K)
    p_dg = dg + (start * HV + i_hv) * K + o_i[:, None] * (HV * K) + o_k[None, :]
    tl.store(p_dg, b_dg.to(dg.dtype.element_ty), mask=m_tile)
    return b_dA_log


@triton.jit
def kda_grad_kernel(
    q, k, g, beta, A_log, dt_bias, chunks, do, residuals, dv, states, dstates,
    dq, dk, dg, dbeta, dA_log_parts, dt_bias_parts,
    scale, lower_bound, CHUNKS,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    GATE: tl.constexpr, HAS_BIAS: tl.constexpr, BETA: tl.constexpr, L2_NORM: tl.constexpr,
    HAS_Q: tl.constexpr, DELTA: tl.constexpr, SCALAR_DECAY: tl.constexpr, MIDPOINT: tl.constexpr,
):  # fmt: skip
    i_c, i_hv = tl.program_id(0), tl.program_id(1)
    i_h = i_hv // (HV // H)
    o_i = tl.arange(0, BT)
    start = tl.load(chunks + 2 * i_c).to(tl.int64)
    rows = (tl.load(chunks + 2 * i_c + 1) - start).to(tl.int32)
    m_t, m_last = o_i < rows, o_i == rows - 1

    b_beta = load_beta(beta, start, o_i, m_t, i_hv, HV, BETA)
    b_q_norm = tl.full((BT,), 1.0, tl.float32)
    b_k_norm = b_q_norm
    if L2_NORM:
        b_k_norm = inverse_norm(k, start, o_i, m_t, i_h, H, K, BK)
        if HAS_Q:
            b_q_norm = inverse_norm(q, start, o_i, m_t, i_h, H, K, BK)

    b_dP = tl.zeros((BT, BT), tl.float32)
    b_dA = tl.zeros((BT, BT), tl.float32)
    b_dself = tl.zeros((BT,), tl.float32)  # of each token with itself
    for i_v in range(0, V, BV):
        b_r, b_dy, b_do = _value_tiles(do, residuals, dv, start, o_i, m_t, i_v + tl.arange(0, BV),
                                       i_hv, HV, V, HAS_Q, DELTA)  # fmt: skip
        if HAS_Q:
            b_dself += tl.sum(b_do.to(tl.float32) * b_r.to(tl.float32), axis=1)
            b_dP += tl.dot(b_do, tl.trans(b_r), input_precision=PRECISION)
        if DELTA:
            b_dA -= tl.dot(b_dy, tl.trans(b_r), input_precision=PRECISION)

    b_dP, b_dA = b_dP.to(DTYPE), b_dA.to(DTYPE)

    b_dbeta = tl.zeros((BT,), tl.float32)
    b_q_radial = tl.zeros((BT,), tl.float32)
    b_k_radial = tl.zeros((BT,), tl.float32)
    b_dg_sum = tl.zeros((BT, 1), tl.float32)  # of one decay for all channels
    b_dA_log = 0.0
    if SCALAR_DECAY:
        b_g, _ = load_decay(g, A_log, dt_bias, start, o_i, m_t, tl.arange(0, 1), i_hv, lower_bound,
                            HV, 1, GATE, HAS_BIAS)  # fmt: skip
        b_G_head = tl.cumsum(tl.sum(b_g, axis=1), axis=0)[:, None]

    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        b_k = load_rows(k, start, o_i, m_t, o_k, i_h, H, K) * b_k_norm[:, None]
        b_q = b_k
        if HAS_Q:
            b_q = load_rows(q, start, o_i, m_t, o_k, i_h, H, K) * (b_q_norm * scale)[:, None]
        if SCALAR_DECAY:
            b_G = tl.broadcast_to(b_G_head, (BT, BK))
        else:
            b_g, _ = load_decay(g, A_log, dt_bias, start, o_i, m_t, o_k, i_hv, lower_bound,
                                HV, K, GATE, HAS_BIAS)  # fmt: skip
            b_G = tl.cumsum(b_g, axis=0)
        b_last = tl.sum(tl.where((o_i == BT - 1)[:, None], b_G, 0.0), axis=0)

        b_dq, b_drow, b_dcolumn, b_dtotal = _state_products(
            do, residuals, dv, states, dstates, start, o_i, m_t, o_k, i_c, i_hv, CHUNKS,
            HV, K, V, BV, PRECISION, HAS_Q, DELTA)  # fmt: skip
        b_dq *= tl.exp2(b_G)
        b_drow *= tl.exp2(b_G)
        b_dcolumn *= tl.exp2(b_last[None, :] - b_G)
        # The decay of the whole chunk is in the state, and in k_out, where of the last token there
        # is none whatever g: that share is left out, here and below.
        b_dout = tl.where(m_last[:, None], 0.0, (b_k * b_beta[:, None]) * b_dcolumn)
        b_dlast = tl.sum(b_dout, axis=0) + tl.exp2(b_last) * b_dtotal

        b_dG = b_q * b_dq + b_k * b_drow - b_dout
        b_dG += tl.where((o_i == BT - 1)[:, None], b_dlast[None, :], 0.0)
        b_dk = b_drow + b_beta[:, None] * b_dcolumn
        b_dbeta += tl.sum(b_k * b_dcolumn, axis=1)

        # A pair of tokens adds to dG at its row what it takes away at its column, so that after the
        # cumulative sum only the decays between the two have it. For that to be exact, both are
        # made of the factors as rounded: next to strong decay all that remains is the error.
        fits = midpoint_fits(b_G, MIDPOINT)
        for i in range(0, anchorings(fits, BT)):
            b_row_factor, b_column_factor, m_pair = anchored(b_G, i, fits)
            b_column = (b_k * (b_column_factor * b_beta[:, None])).to(DTYPE)
            b_dcolumn = tl.zeros((BT, BK), tl.float32)
            if HAS_Q:
                b_d = tl.where(m_pair, b_dP, 0.0)
                b_row = (b_q * b_row_factor).to(DTYPE)
                b_x = tl.dot(b_d, b_column, input_precision=PRECISION)
                b_dq += b_row_factor * b_x
                b_dG += b_row.to(tl.float32) * b_x
                b_x = tl.dot(tl.trans(b_d), b_row, input_precision=PRECISION)
                b_dcolumn += b_column_factor * b_x
                b_dG -= b_column.to(tl.float32) * b_x
            if DELTA:
                b_d = tl.where(m_pair, b_dA, 0.0)
                b_row = (b_k * b_row_factor).to(DTYPE)
                b_x = tl.dot(b_d, b_column, input_precision=PRECISION)
                b_dk += b_row_factor * b_x
                b_dG += b_row.to(tl.float32) * b_x
                b_x = tl.dot(tl.trans(b_d), b_row, input_precision=PRECISION)
                b_dcolumn += b_column_factor * b_x
                b_dG -= b_column.to(tl.float32) * b_x
            b_dk += b_beta[:, None] * b_dcolumn
            b_dbeta += tl.sum(b_k * b_dcolumn, axis=1)

        if HAS_Q:
            b_dq += b_dself[:, None] * (b_k * b_beta[:, None])
            b_dk += (b_dself * b_beta)[:, None] * b_q
            b_dbeta += b_dself * tl.sum(b_k * b_q, axis=1)
            b_q_radial += tl.sum(b_q * b_dq, axis=1)
            b_dq *= scale
        b_k_radial += tl.sum(b_k * b_dk, axis=1)
        p_tile = (start * HV + i_hv) * K + o_i[:, None] * (HV * K) + o_k[None, :]
        m_tile = m_t[:, None] & (o_k < K)[None, :]
        if HAS_Q:
            tl.store(dq + p_tile, b_dq.to(dq.dtype.element_ty), mask=m_tile)
        tl.store(dk + p_tile, b_dk.to(dk.dtype.element_ty), mask=m_tile)

        if SCALAR_DECAY:
            b_dg_sum += tl.sum(b_dG, axis=1)[:, None]
        else:
            b_dA_log += _store_decay_gradient(
                dg, dt_bias_parts, b_dG, g, A_log, dt_bias, start, o_i, m_t, o_k, i_c, i_hv,
                lower_bound, HV, K, GATE, HAS_BIAS)  # fmt: skip

    if SCALAR_DECAY:
        b_dA_log += _store_decay_gradient(
            dg, dt_bias_parts, b_dg_sum, g, A_log, dt_bias, start, o_i, m_t, tl.arange(0, 1), i_c,
            i_hv, lower_bound, HV, 1, GATE, HAS_BIAS)  # fmt: skip
    if GATE != "none":
        tl.store(dA_log_parts + i_c * HV + i_hv, b_dA_log)
    if BETA == "sigmoid":
        b_dbeta *= b_beta * (1.0 - b_beta)
    if BETA == "double_sigmoid":
        b_dbeta *= b_beta * (1.0 - 0.5 * b_beta)
    p_beta = start * HV + i_hv + o_i * HV
    tl.store(dbeta + p_beta, b_dbeta.to(dbeta.dtype.element_ty), mask=m_t)
    if L2_NORM:
        # Known only now that all channels are summed: the part of each gradient along q or k, which
        # a norm takes away.
        for i_k in range(0, K, BK):
            o_k = i_k + tl.arange(0, BK)
            if HAS_Q:
                _through_norm(
                    dq, q, b_q_norm, b_q_radial, start, o_i, m_t, o_k, i_h, i_hv, H, HV, K
                )
            _through_norm(dk, k, b_k_norm, b_k_radial, start, o_i, m_t, o_k, i_h, i_hv, H, HV, K)
