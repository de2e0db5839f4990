"""Pass 1 of the chunked form on a GPU: everything inside a chunk that needs no state.

One program per chunk of BT tokens and value head reads q, k, g and beta once, raw as they come from
the projections, and writes what the walk over the chunks multiplies with and no more. In the
letters of `megakda/kernels/kda/README.md`, with D(i, j) the decay from after token j up to token i:

    q_in  = scale * q_i * D(i, start)      k_in = k_i * D(i, start)
    k_out = beta_j * k_j * D(end, j)       total = D(end, start)
    scores[i, j] = scale * beta_j * sum_d q_id k_jd D_d(i, j)       j <= i
    inverse      = (I + [beta_j * sum_d k_id k_jd D_d(i, j)])^-1    j <  i

beta stands with the columns, not with the rows: what the walk then solves for are the prediction
errors r_i = v_i - S_i^T k_i, whose gradient is the gradient of v.

Decays are in units of log2 from here on.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megakda.kernels.kda.gate_triton import gate_value

# Below 2^-150 fp32 has only zero, so a smaller decay is the same number, and cumulative sums stay
# small enough for differences of them to mean something.
SMALLEST_LOG2 = tl.constexpr(-150.0)
LOG2_E = tl.constexpr(1.4426950408889634)
# Half a 16-token block may fall by this much before its midpoint no longer serves as an anchor.
MIDPOINT_LIMIT = tl.constexpr(80.0)


@triton.jit
def load_decay(
    g, A_log, dt_bias, start, o_i, m_t, o_k, i_hv, lower_bound,
    HV: tl.constexpr, K: tl.constexpr, GATE: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """The decay of a tile [BT, BK] in log2, zero for tokens past the end, and the gate's input."""
    m_tile = m_t[:, None] & (o_k < K)[None, :]
    p_g = g + (start * HV + i_hv) * K + o_i[:, None] * (HV * K) + o_k[None, :]
    b_x = tl.load(p_g, mask=m_tile, other=0.0).to(tl.float32)
    if HAS_BIAS:
        b_x += tl.load(dt_bias + i_hv * K + o_k, mask=o_k < K, other=0.0).to(tl.float32)[None, :]
    b_g = b_x
    if GATE != "none":
        b_rate = tl.exp(tl.load(A_log + i_hv).to(tl.float32))
        b_g = gate_value(b_x, b_rate, GATE == "bounded", lower_bound)
    b_g *= LOG2_E
    # Not tl.maximum, which would turn a NaN into complete forgetting.
    b_g = tl.where(b_g < SMALLEST_LOG2, SMALLEST_LOG2, b_g)
    return tl.where(m_tile, b_g, 0.0), b_x


@triton.jit
def load_beta(beta, start, o_i, m_t, i_hv, HV: tl.constexpr, BETA: tl.constexpr):
    """beta [BT], after its sigmoid where asked for, zero for tokens past the end."""
    b_beta = tl.load(beta + start * HV + i_hv + o_i * HV, mask=m_t, other=0.0).to(tl.float32)
    if BETA != "plain":
        b_beta = tl.sigmoid(b_beta)
        if BETA == "double_sigmoid":
            b_beta *= 2.0
        b_beta = tl.where(m_t, b_beta, 0.0)
    return b_beta


@triton.jit
def inverse_norm(x, start, o_i, m_t, i_h, H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr):
    """1 / sqrt(sum of squares + 1e-6) over the K channels of each token, [BT]."""
    b_sum = tl.zeros((o_i.shape[0],), tl.float32)
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        b_x = load_rows(x, start, o_i, m_t, o_k, i_h, H, K)
        b_sum += tl.sum(b_x * b_x, axis=1)
    return 1.0 / tl.sqrt(b_sum + 1e-6)


@triton.jit
def load_rows(x, start, o_i, m_t, o_k, i_h, H: tl.constexpr, K: tl.constexpr):
    """Tile [BT, BK] of x [tokens, H, K] in fp32."""
    p_x = x + (start * H + i_h) * K + o_i[:, None] * (H * K) + o_k[None, :]
    return tl.load(p_x, mask=m_t[:, None] & (o_k < K)[None, :], other=0.0).to(tl.float32)


@triton.jit
def away_from_middle(b_G, S):
    """Cumulative decay between each token and the middle of its block of 2S tokens, [BT, BK]:
    what lies between, so never positive to the right of the middle nor negative to the left.
    """
    o_i = tl.arange(0, b_G.shape[0])
    i_middle = (o_i | (2 * S - 1)) - S  # last token of the left half
    return b_G - tl.gather(b_G, tl.broadcast_to(i_middle[:, None], b_G.shape), axis=0)


@triton.jit
def midpoint_fits(b_G, MIDPOINT: tl.constexpr):
    """Whether the middle of each block of 16 tokens serves as the anchor of all its tokens."""
    if MIDPOINT == "if_it_fits":
        return tl.max(tl.abs(away_from_middle(b_G, 8))) < MIDPOINT_LIMIT
    else:
        return tl.full((), MIDPOINT == "always", tl.int1)


@triton.jit
def anchored(b_G, i, fits):
    """The i-th anchoring: factors of rows and of columns [BT, BK], and the pairs [BT, BT] for which
    row factor times column factor is D(row, column).

    The anchors are the middles of blocks of 2S tokens, S = BT/2, BT/4, ... 1, the pairs those with
    the row in a right half and the column in the left half of one block, so no factor is ever above
    1. All pairs j < i are met once. But if the midpoint `fits`, S = 8 is the last: its anchors
    serve all pairs of 16 tokens, and one of the two factors is then above 1, far from overflow.
    """
    BT: tl.constexpr = b_G.shape[0]
    S = (BT // 2) >> i
    o_i = tl.arange(0, BT)
    m_pair = (o_i[:, None] | (2 * S - 1)) == (o_i[None, :] | (2 * S - 1))
    m_halves = ((o_i & S) != 0)[:, None] & ((o_i & S) == 0)[None, :]
    is_last = fits & (S == 8)
    m_pair = m_pair & (m_halves | (is_last & (o_i[:, None] > o_i[None, :])))
    b_away = away_from_middle(b_G, S)
    b_near = -tl.abs(b_away)
    b_row = tl.exp2(tl.where(is_last, b_away, b_near))
    b_column = tl.exp2(tl.where(is_last, -b_away, b_near))
    return b_row, b_column, m_pair


@triton.jit
def anchorings(fits, BT: tl.constexpr):
    """How many anchorings there are."""
    return BT // 32 + tl.where(fits, 1, 4)


@triton.jit
def split_mask(BT: tl.constexpr, S: tl.constexpr):
    """[BT, BT]: row in the right, column in the left half of one block of 2S tokens."""
    o_i = tl.arange(0, BT)
    m_same = (o_i // (2 * S))[:, None] == (o_i // (2 * S))[None, :]
    return m_same & ((o_i & S) != 0)[:, None] & ((o_i & S) == 0)[None, :]


@triton.jit
def invert_blocks(b_A):
    """(I + A)^-1 for strictly lower triangular 16 x 16 blocks A [NB, 16, 16].

    By substitution, row by row in all blocks at once: it stays accurate where the powers of A that
    a series needs would grow (equal keys).
    """
    o_r = tl.arange(0, 16)
    b_X = -b_A
    for i in range(1, 16):
        m_row = (o_r == i)[None, :, None]
        b_row = tl.sum(tl.where(m_row, b_X, 0.0), axis=1)  # [NB, 16]
        b_row += tl.sum(b_row[:, :, None] * b_X, axis=1)
        b_X = tl.where(m_row, b_row[:, None, :], b_X)
    return b_X + tl.where(o_r[:, None] == o_r[None, :], 1.0, 0.0)[None, :, :]


@triton.jit
def merge_inverse(b_T, b_A, S: tl.constexpr, PRECISION: tl.constexpr):
    """From the inverses of blocks of S tokens, on the diagonal of T, those of blocks of 2S: the
    inverse of [[P, 0], [Q, R]] is [[P^-1, 0], [-R^-1 Q P^-1, R^-1]].
    """
    b_Q = tl.where(split_mask(b_A.shape[0], S), b_A, 0.0)
    b_Q = tl.dot(b_Q, b_T, input_precision=PRECISION)
    return b_T - tl.dot(b_T, b_Q, input_precision=PRECISION)


@triton.jit
def unit_lower_inverse(b_A, PRECISION: tl.constexpr):
    """(I + A)^-1 for strictly lower triangular A [BT, BT]."""
    BT: tl.constexpr = b_A.shape[0]
    NB: tl.constexpr = BT // 16
    o_b = tl.arange(0, NB)
    m_diagonal = (o_b[:, None] == o_b[None, :])[:, None, :, None]
    b_X = tl.sum(tl.where(m_diagonal, tl.reshape(b_A, (NB, 16, NB, 16)), 0.0), axis=2)
    b_X = tl.broadcast_to(invert_blocks(b_X)[:, :, None, :], (NB, 16, NB, 16))
    b_T = tl.reshape(tl.where(m_diagonal, b_X, 0.0), (BT, BT))
    if BT >= 32:
        b_T = merge_inverse(b_T, b_A, 16, PRECISION)
    if BT >= 64:
        b_T = merge_inverse(b_T, b_A, 32, PRECISION)
    return b_T


@triton.jit
def kda_intra_kernel(
    q, k, g, beta, A_log, dt_bias, chunks,
    q_in, k_in, k_out, inverse, scores, total,
    scale, lower_bound, TOKENS, CHUNKS,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    GATE: tl.constexpr, HAS_BIAS: tl.constexpr, BETA: tl.constexpr, L2_NORM: tl.constexpr,
    HAS_Q: tl.constexpr, DELTA: tl.constexpr, SCALAR_DECAY: tl.constexpr, MIDPOINT: tl.constexpr,
):  # fmt: skip
    i_c, i_hv = tl.program_id(0), tl.program_id(1)
    i_h = i_hv // (HV // H)
    o_i = tl.arange(0, BT)
    start = tl.load(chunks + 2 * i_c).to(tl.int64)
    rows = (tl.load(chunks + 2 * i_c + 1) - start).to(tl.int32)
    m_t = o_i < rows
    first = i_hv * TOKENS + start  # row of the outputs, [HV, TOKENS, ...]

    b_beta = load_beta(beta, start, o_i, m_t, i_hv, HV, BETA)
    if L2_NORM:
        b_k_norm = inverse_norm(k, start, o_i, m_t, i_h, H, K, BK)
        if HAS_Q:
            b_q_norm = inverse_norm(q, start, o_i, m_t, i_h, H, K, BK)
    if SCALAR_DECAY:
        b_g, _ = load_decay(g, A_log, dt_bias, start, o_i, m_t, tl.arange(0, 1), i_hv, lower_bound,
                            HV, 1, GATE, HAS_BIAS)  # fmt: skip
        # [BT, 1], scanned as [BT]: triton 3.6 fails to compile a scan of one column.
        b_G_head = tl.cumsum(tl.sum(b_g, axis=1), axis=0)[:, None]

    b_P = tl.zeros((BT, BT), tl.float32)
    b_A = tl.zeros((BT, BT), tl.float32)
    b_self = tl.zeros((BT,), tl.float32)

    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        m_tile = m_t[:, None] & (o_k < K)[None, :]
        b_k = load_rows(k, start, o_i, m_t, o_k, i_h, H, K)
        if L2_NORM:
            b_k *= b_k_norm[:, None]
        b_q = b_k
        if HAS_Q:
            b_q = load_rows(q, start, o_i, m_t, o_k, i_h, H, K) * scale
            if L2_NORM:
                b_q *= b_q_norm[:, None]
        if SCALAR_DECAY:
            b_G = tl.broadcast_to(b_G_head, (BT, BK))
        else:
            b_g, _ = load_decay(g, A_log, dt_bias, start, o_i, m_t, o_k, i_hv, lower_bound,
                                HV, K, GATE, HAS_BIAS)  # fmt: skip
            b_G = tl.cumsum(b_g, axis=0)
        b_last = tl.sum(tl.where((o_i == BT - 1)[:, None], b_G, 0.0), axis=0)

        p_tile = o_i[:, None] * K + o_k[None, :]
        if HAS_Q:
            tl.store(q_in + first * K + p_tile, (b_q * tl.exp2(b_G)).to(DTYPE), mask=m_tile)
        if DELTA:
            tl.store(k_in + first * K + p_tile, (b_k * tl.exp2(b_G)).to(DTYPE), mask=m_tile)
        b_end = tl.exp2(b_last[None, :] - b_G) * b_beta[:, None]
        tl.store(k_out + first * K + p_tile, (b_k * b_end).to(DTYPE), mask=m_tile)
        p_total = total + (i_hv.to(tl.int64) * CHUNKS + i_c) * K + o_k
        tl.store(p_total, tl.exp2(b_last), mask=o_k < K)

        b_self += tl.sum(b_q * b_k, axis=1)
        fits = midpoint_fits(b_G, MIDPOINT)
        for i in range(0, anchorings(fits, BT)):
            b_row_factor, b_column_factor, m_pair = anchored(b_G, i, fits)
            b_column = tl.trans((b_k * b_column_factor).to(DTYPE))
            if HAS_Q:
                b_row = (b_q * b_row_factor).to(DTYPE)
                b_x = tl.dot(b_row, b_column, input_precision=PRECISION)
                b_P += tl.where(m_pair, b_x, 0.0)
            if DELTA:
                b_row = (b_k * b_row_factor).to(DTYPE)
                b_x = tl.dot(b_row, b_column, input_precision=PRECISION)
                b_A += tl.where(m_pair, b_x, 0.0)

    p_tile = o_i[:, None] * BT + o_i[None, :]
    # Whole blocks of 16 columns, the 32 bytes that memory is read by.
    m_tile = m_t[:, None] & ((o_i // 16)[:, None] >= (o_i // 16)[None, :])
    if HAS_Q:
        b_P += tl.where(o_i[:, None] == o_i[None, :], b_self[:, None], 0.0)
        b_P *= b_beta[None, :]
        tl.store(scores + first * BT + p_tile, b_P.to(DTYPE), mask=m_tile)
    if DELTA:
        b_T = unit_lower_inverse(b_A * b_beta[None, :], PRECISION)
        tl.store(inverse + first * BT + p_tile, b_T.to(DTYPE), mask=m_tile)
