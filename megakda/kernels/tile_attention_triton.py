"""Attention over tiles in Triton, with the largest logit of every query row: a forward pass.

Fused attention of other packages keeps a row's maximum to itself; QK-Clip (Kimi K2, arXiv
2507.20534, section 2.1) needs it. One pass of online softmax (arXiv 1805.02867) over the keys has
it anyway. A program takes a block of queries of one tile and one head. Tiles of any lengths share a
launch, through a table that says where each block lies.

Channels of queries and keys need not be a power of two: they are multiplied in two parts, 192 as
128 + 64.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from megakda.kernels.launch import launch_config

LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)

MAX_CHANNELS = 256
"""Of a head: what a program can hold."""

USUAL_CHANNELS = 320
"""Of a head's queries and values together, padded: 128 + 64 + 128. Above it blocks are smaller."""

Lengths = tuple[tuple[int, int], ...]
"""Queries and keys of each tile."""


def tile_attention_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: Lengths,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Softmax attention within tiles that lie one after another.

    Args:
        q: [R, H, D], fp32, bf16 or fp16, channels contiguous; R queries of all tiles.
        k: [C, H, D], dtype of q, channels contiguous.
        v: [C, H, Dv], dtype of q, channels contiguous.
        lengths: of the tiles.
        causal: whether query i of a tile sees its keys 0 to i, or all.
        scale: of the scores.

    Returns:
        out [R, H, Dv], log-sum-exp [R, H] and the largest logit [R, H] of each row, all fp32. The
        logit is NaN where one of the row's logits is NaN or +inf.

    Raises:
        ValueError: heads wider than `MAX_CHANNELS`.
    """
    rows, heads, channels = q.shape
    value_channels = v.shape[-1]
    if max(channels, value_channels) > MAX_CHANNELS:
        raise ValueError(
            f"q, v: heads of {channels} and {value_channels} channels, but the kernel that records "
            f"max_logit on a GPU takes at most {MAX_CHANNELS}; use backend='reference', or do not "
            "pass max_logit"
        )
    first = max(16, 1 << (channels.bit_length() - 1))  # the largest power of two within
    rest = _padded(channels - first) if channels > first else 0
    last = _padded(value_channels)
    config = launch_config(
        "tile_attention",
        q.device,
        BYTES=q.element_size(),
        LARGE=int(first + rest + last > USUAL_CHANNELS),
    )
    table = _blocks(lengths, config["BLOCK_M"], causal, q.device)
    out = q.new_empty(rows, heads, value_channels, dtype=torch.float32)
    lse, largest = (q.new_empty(heads, rows, dtype=torch.float32) for _ in range(2))
    tile_attention_kernel[(len(table), heads)](
        q,
        k,
        v,
        table,
        out,
        lse,
        largest,
        scale * LOG2_E,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        rows,
        heads,
        D=channels,
        DV=value_channels,
        BLOCK_D=first,
        BLOCK_R=rest,
        BLOCK_V=last,
        CAUSAL=causal,
        **config,
    )
    return out, lse.T, largest.T


def _padded(channels: int) -> int:
    return max(16, triton.next_power_of_2(channels))


@lru_cache(maxsize=1024)
def _blocks(lengths: Lengths, size: int, causal: bool, device: torch.device) -> torch.Tensor:
    """For each block of `size` queries its first row, its tile's end, and its tile's keys: int32.

    [blocks, 4]. Those with the most keys come first, so that no long one is left over at the end.
    Cached, since copying them to a GPU makes the host wait.
    """
    blocks, row, key = [], 0, 0
    for queries, keys in lengths:
        for start in range(0, queries, size):
            seen = min(start + size, keys) if causal else keys
            blocks.append((-seen, row + start, row + queries, key, key + keys))
        row, key = row + queries, key + keys
    return torch.tensor([block[1:] for block in sorted(blocks)], dtype=torch.int32).to(device)


@triton.jit(do_not_specialize=["rows"])
def tile_attention_kernel(
    p_q,
    p_k,
    p_v,
    p_table,
    p_out,
    p_lse,
    p_max,
    scale_log2,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    rows,
    heads,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One block of queries of one head against the keys of its tile.

    Grid (blocks, H). q [R, H, D], k [C, H, D], v [C, H, DV] by strides; table [blocks, 4] of
    `_blocks`; writes out [R, H, DV], lse [H, R] and the rows' largest logits [H, R].
    """
    p_block = p_table + tl.program_id(0) * 4
    i_h = tl.program_id(1).to(tl.int64)
    row, row_end = tl.load(p_block), tl.load(p_block + 1)
    key, key_end = tl.load(p_block + 2), tl.load(p_block + 3)

    o_m = row + tl.arange(0, BLOCK_M)
    m_m = o_m < row_end
    o_d = tl.arange(0, BLOCK_D)
    p_row = p_q + o_m.to(tl.int64) * stride_qt + i_h * stride_qh
    b_q = tl.load(p_row[:, None] + o_d[None, :], mask=m_m[:, None] & (o_d < D)[None, :], other=0.0)
    if BLOCK_R > 0:
        o_r = BLOCK_D + tl.arange(0, BLOCK_R)
        b_q_rest = tl.load(
            p_row[:, None] + o_r[None, :], mask=m_m[:, None] & (o_r < D)[None, :], other=0.0
        )
    else:
        b_q_rest = b_q

    # Blocks of keys that every query here sees whole need no mask.
    if CAUSAL:  # as many keys as queries: the last of both see each other
        o_last = o_m + (key_end - row_end)
        whole_end = row + (key_end - row_end) + 1
        end = tl.minimum(whole_end - 1 + BLOCK_M, key_end)
    else:
        o_last = tl.zeros([BLOCK_M], tl.int32) + (key_end - 1)
        whole_end = key_end
        end = key_end
    whole_end = key + (whole_end - key) // BLOCK_N * BLOCK_N

    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_out = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for MASK in tl.static_range(2):
        b_max, b_sum, b_out = _attend(
            b_max,
            b_sum,
            b_out,
            b_q,
            b_q_rest,
            p_k + i_h * stride_kh,
            p_v + i_h * stride_vh,
            stride_kt,
            stride_vt,
            whole_end if MASK else key,
            end if MASK else whole_end,
            o_last,
            key_end,
            scale_log2,
            D,
            DV,
            BLOCK_D,
            BLOCK_R,
            BLOCK_V,
            BLOCK_N,
            MASK,
        )

    o_v = tl.arange(0, BLOCK_V)
    tl.store(
        p_out + ((o_m.to(tl.int64) * heads + i_h) * DV)[:, None] + o_v[None, :],
        b_out / b_sum[:, None],
        mask=m_m[:, None] & (o_v < DV)[None, :],
    )
    o_stat = i_h * rows + o_m
    tl.store(p_lse + o_stat, (b_max + tl.log2(b_sum)) * LN_2, mask=m_m)
    # A maximum passes over NaN, a sum does not.
    tl.store(p_max + o_stat, tl.where(b_sum == b_sum, b_max, b_sum) * LN_2, mask=m_m)


@triton.jit
def _attend(
    b_max,
    b_sum,
    b_out,
    b_q,
    b_q_rest,
    p_k,
    p_v,
    stride_kt,
    stride_vt,
    start,
    end,
    o_last,
    key_end,
    scale_log2,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASK: tl.constexpr,
):
    """Online softmax over the keys [start, end); a row sees keys up to its own of o_last."""
    o_n = tl.arange(0, BLOCK_N)
    o_d, o_r = tl.arange(0, BLOCK_D), BLOCK_D + tl.arange(0, BLOCK_R if BLOCK_R > 0 else 16)
    o_v = tl.arange(0, BLOCK_V)
    for i_n in range(start, end, BLOCK_N):
        m_n = i_n + o_n < key_end if MASK else o_n >= 0
        p_keys = p_k + tl.cast(i_n, tl.int64) * stride_kt + o_n * stride_kt
        b_k = tl.load(
            p_keys[:, None] + o_d[None, :], mask=m_n[:, None] & (o_d < D)[None, :], other=0.0
        )
        b_score = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        if BLOCK_R > 0:
            b_k_rest = tl.load(
                p_keys[:, None] + o_r[None, :], mask=m_n[:, None] & (o_r < D)[None, :], other=0.0
            )
            b_score = tl.dot(b_q_rest, tl.trans(b_k_rest), b_score, input_precision="ieee")
        b_score = b_score * scale_log2
        if MASK:
            b_score = tl.where((i_n + o_n)[None, :] <= o_last[:, None], b_score, float("-inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_score, 1))
        # Of logits of -inf alone; subtracting it would give NaN.
        b_shift = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
        b_p = tl.exp2(b_score - b_shift[:, None])
        b_decay = tl.exp2(b_max - b_shift)
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        b_out = b_out * b_decay[:, None]
        p_values = p_v + tl.cast(i_n, tl.int64) * stride_vt + o_n * stride_vt
        b_v = tl.load(
            p_values[:, None] + o_v[None, :], mask=m_n[:, None] & (o_v < DV)[None, :], other=0.0
        )
        b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out, input_precision="ieee")
        b_max = b_new_max
    return b_max, b_sum, b_out
