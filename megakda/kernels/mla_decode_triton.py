"""Absorbed MLA decode in Triton: flash-decoding over the latent cache, then a merge of the splits.

A program takes a block of query rows (new tokens x heads) of one sequence and one split of its
latents. All rows read the same latents, so they form the M side of the products, and a tile of
latents is loaded once: all of it as keys, its first `value_dim` channels as values too. Tiles need
power-of-two widths, hence two of them: the values' channels and the rest.

The number of splits comes from shapes alone; where they lie is computed from each sequence's own
length on the device. So the host never waits, and a captured CUDA graph holds for any lengths.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from megakda.kernels.launch import launch_config

LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)

MAX_SPLITS = 128
"""The merge holds one tile of all splits."""

ASSUMED_PROCESSORS = 132
"""Where there is no GPU to ask: in the interpreter and on the meta device."""


def mla_decode_triton(
    q: torch.Tensor,
    cache: torch.Tensor,
    lengths: torch.Tensor,
    value_dim: int,
    scale: float,
    block_table: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`mla_decode` of checked arguments, q [N, S, H, D]: output and log-sum-exp."""
    sequences, queries, heads, width = q.shape
    rows, rest = queries * heads, width - value_dim
    out = q.new_empty(sequences, queries, heads, value_dim)
    lse = q.new_empty(sequences, queries, heads, dtype=torch.float32)
    if sequences == 0:
        return out, lse
    if q.stride(-1) != 1:
        q = q.contiguous()
    paged = block_table is not None
    max_tokens = cache.shape[1] * (block_table.shape[1] if block_table is not None else 1)
    config = launch_config(
        "mla_decode",
        q.device,
        BYTES=q.element_size(),
        ROWS=16 if rows <= 16 else 32,
        PAGED=int(paged),
    )
    row_blocks = triton.cdiv(rows, config["BLOCK_M"])
    splits = count_splits(
        max_tokens,
        config["MIN_TOKENS"],
        sequences * row_blocks,
        config.pop("PROGRAMS_PER_PROCESSOR") * _processors(q.device),
    )
    if splits == 1:
        partial, partial_lse = out, lse
    else:
        partial = q.new_empty(sequences, rows, splits, value_dim, dtype=torch.float32)
        partial_lse = q.new_empty(sequences, rows, splits, dtype=torch.float32)
    table = block_table.contiguous() if block_table is not None else None
    mla_decode_split_kernel[(sequences * row_blocks, splits)](
        q,
        cache,
        lengths.contiguous(),
        table,
        partial,
        partial_lse,
        scale * LOG2_E,
        *q.stride()[:3],
        *cache.stride()[:2],
        table.stride(0) if table is not None else 0,
        queries,
        heads,
        splits,
        VALUE_DIM=value_dim,
        REST=rest,
        BLOCK_V=_padded(value_dim),
        BLOCK_R=_padded(rest),
        PAGE_SIZE=cache.shape[1] if paged else 0,
        **config,
    )
    if splits > 1:
        config = launch_config("mla_decode_merge", q.device)
        block_s = triton.next_power_of_2(splits)
        block_c = min(_padded(value_dim), config.pop("BLOCK") // block_s)
        mla_decode_merge_kernel[(sequences * rows, triton.cdiv(value_dim, block_c))](
            partial,
            partial_lse,
            out,
            lse,
            splits,
            VALUE_DIM=value_dim,
            BLOCK_S=block_s,
            BLOCK_C=block_c,
            **config,
        )
    return out, lse


def count_splits(max_tokens: int, min_tokens: int, blocks: int, programs: int) -> int:
    """Splits per sequence: enough that `blocks` x splits fill the GPU, none too short to pay."""
    return max(1, min(programs // blocks, triton.cdiv(max_tokens, min_tokens), MAX_SPLITS))


def _padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


@lru_cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return ASSUMED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit(do_not_specialize=["splits", "stride_table"])
def mla_decode_split_kernel(
    p_q,
    p_cache,
    p_lengths,
    p_table,
    p_out,
    p_lse,
    scale_log2,
    stride_qn,
    stride_qs,
    stride_qh,
    stride_page,
    stride_token,
    stride_table,
    queries,
    heads,
    splits,
    VALUE_DIM: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    MIN_TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Attention of one block of query rows to one split of one sequence.

    Grid (N x row blocks, splits). q [N, S, H, D] by strides; cache [N, Tmax, D], or with PAGE_SIZE
    > 0 [pages, PAGE_SIZE, D] behind p_table [N, max_pages]; writes out [N, S*H, splits, VALUE_DIM],
    normalised within the split, and its log-sum-exp [N, S*H, splits].
    """
    rows = queries * heads
    row_blocks = tl.cdiv(rows, BLOCK_M)
    i_n = (tl.program_id(0) // row_blocks).to(tl.int64)
    i_m = tl.program_id(0) % row_blocks
    i_split = tl.program_id(1)

    length = tl.load(p_lengths + i_n).to(tl.int32)
    split_tokens = tl.maximum(tl.cdiv(length, splits), MIN_TOKENS)
    split_tokens = tl.cdiv(split_tokens, BLOCK_N) * BLOCK_N
    start = tl.minimum(i_split * split_tokens, length)
    end = tl.minimum(start + split_tokens, length)

    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < rows
    o_query = o_m // heads
    # Query s of S new tokens is token length - S + s, and sees itself.
    visible = length - queries + 1 + o_query

    p_row = p_q + i_n * stride_qn + o_query * stride_qs + (o_m % heads) * stride_qh
    o_v = tl.arange(0, BLOCK_V)
    m_v = o_v < VALUE_DIM
    b_q = tl.load(p_row[:, None] + o_v[None, :], mask=m_m[:, None] & m_v[None, :], other=0.0)
    if REST > 0:
        o_r = tl.arange(0, BLOCK_R)
        m_r = o_r < REST
        b_q_rest = tl.load(
            p_row[:, None] + VALUE_DIM + o_r[None, :], mask=m_m[:, None] & m_r[None, :], other=0.0
        )

    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_out = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for i_t in range(start, end, BLOCK_N):
        o_t = i_t + tl.arange(0, BLOCK_N)
        # Splits are whole tiles, so a tile passes its split's end only where the sequence ends.
        m_t = o_t < length
        if PAGE_SIZE == 0:
            p_token = p_cache + i_n * stride_page + o_t.to(tl.int64) * stride_token
        else:
            if PAGE_SIZE % BLOCK_N == 0:  # the tile lies in one page
                page = tl.load(p_table + i_n * stride_table + i_t // PAGE_SIZE)
            else:
                page = tl.load(p_table + i_n * stride_table + o_t // PAGE_SIZE, mask=m_t, other=0)
            p_token = p_cache + page.to(tl.int64) * stride_page + (o_t % PAGE_SIZE) * stride_token
        b_latent = tl.load(
            p_token[:, None] + o_v[None, :], mask=m_t[:, None] & m_v[None, :], other=0.0
        )
        b_score = tl.dot(b_q, tl.trans(b_latent), input_precision="ieee")
        if REST > 0:
            b_rest = tl.load(
                p_token[:, None] + VALUE_DIM + o_r[None, :],
                mask=m_t[:, None] & m_r[None, :],
                other=0.0,
            )
            b_score = tl.dot(b_q_rest, tl.trans(b_rest), b_score, input_precision="ieee")
        m_visible = o_t[None, :] < visible[:, None]
        b_score = tl.where(m_visible, b_score * scale_log2, float("-inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_score, 1))
        # A row that has seen nothing yet has the maximum -inf; subtracting it would give NaN.
        b_shift = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
        b_p = tl.exp2(b_score - b_shift[:, None])
        b_decay = tl.exp2(b_max - b_shift)
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        b_out = b_out * b_decay[:, None]
        b_out = tl.dot(b_p.to(b_latent.dtype), b_latent, b_out, input_precision="ieee")
        b_max = b_new_max

    b_sum_or_1 = tl.where(b_sum == 0.0, 1.0, b_sum)
    b_out = b_out / b_sum_or_1[:, None]
    b_lse = (b_max + tl.log2(b_sum_or_1)) * LN_2
    o_out = (i_n * rows + o_m) * splits + i_split
    tl.store(p_lse + o_out, b_lse, mask=m_m)
    # The merge does not read an empty split's output.
    m_out = m_m & ((end > start) | (splits == 1))
    tl.store(
        p_out + o_out[:, None] * VALUE_DIM + o_v[None, :],
        b_out.to(p_out.dtype.element_ty),
        mask=m_out[:, None] & m_v[None, :],
    )


@triton.jit(do_not_specialize=["splits"])
def mla_decode_merge_kernel(
    p_partial,
    p_partial_lse,
    p_out,
    p_lse,
    splits,
    VALUE_DIM: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One row's splits, weighted by exp(lse), in one sum whose order the tile's shape fixes.

    Grid (N*S*H, channel blocks). partial [N*S*H, splits, VALUE_DIM] and its lse [N*S*H, splits] to
    out [N*S*H, VALUE_DIM] and lse [N*S*H].
    """
    i_row = tl.program_id(0).to(tl.int64)
    i_c = tl.program_id(1)
    o_s = tl.arange(0, BLOCK_S)
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < VALUE_DIM
    b_lse = tl.load(p_partial_lse + i_row * splits + o_s, mask=o_s < splits, other=float("-inf"))
    m_s = b_lse > float("-inf")
    b_max = tl.max(b_lse, 0)
    b_shift = tl.where(b_max == float("-inf"), 0.0, b_max)
    b_weight = tl.exp(b_lse - b_shift)
    b_sum = tl.sum(b_weight, 0)
    b_sum_or_1 = tl.where(b_sum == 0.0, 1.0, b_sum)
    b_partial = tl.load(
        p_partial + (i_row * splits + o_s)[:, None] * VALUE_DIM + o_c[None, :],
        mask=m_s[:, None] & m_c[None, :],
        other=0.0,
    )
    b_out = tl.sum(b_partial * b_weight[:, None], 0) / b_sum_or_1
    tl.store(p_out + i_row * VALUE_DIM + o_c, b_out.to(p_out.dtype.element_ty), mask=m_c)
    if i_c == 0:
        tl.store(p_lse + i_row, b_max + tl.log(b_sum_or_1))
