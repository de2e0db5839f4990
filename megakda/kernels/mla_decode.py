"""Decode step of multi-head latent attention in absorbed form: attention over the latents alone.

MLA makes the keys and values of all heads from one latent c per token: k_h = W_uk_h c beside
channels p that the heads share, v_h = W_uv_h c (DeepSeek-V2, arXiv 2405.04434, section 2.1). With
W_uk_h absorbed into the query and W_uv_h into the output projection,

    score_ht = scale * ([W_uk_h^T q_h, q'_h] . [c_t, p_t])     out_h = sum_t softmax(score_h)_t c_t

the cache holds [c_t, p_t] and nothing per head: multi-query attention whose key is the whole row of
the cache, and whose value is the first part of the same row.
"""

from __future__ import annotations

import math

import torch

from megakda.kernels.backend import choose_backend

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INDEX_DTYPES = (torch.int32, torch.int64)

MAX_VALUE_DIM = 512
MAX_SHARED_DIM = 128


def mla_decode(
    q: torch.Tensor,
    cache: torch.Tensor,
    lengths: torch.Tensor,
    value_dim: int = 512,
    *,
    scale: float,
    block_table: torch.Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of the newest tokens of N sequences to their cached latents; no gradients.

    With S > 1 the queries are the S newest tokens of each sequence, already in the cache: query s
    sees the first lengths[n] - S + 1 + s latents. A query that sees none gives zeros.

    Args:
        q: [N, S, H, D], or [N, H, D] for S = 1; fp32, bf16 or fp16.
        cache: dtype of q, channels contiguous: [N, Tmax, D], or with `block_table` a pool
            [pages, page_size, D]. Rows behind a sequence's end are never read.
        lengths: integer [N], each sequence's number of latents, 0 to Tmax (max_pages * page_size).
        value_dim: width of the latent, 1 to 512; the other D - value_dim channels, 0 to 128, are
            the shared part of the keys.
        scale: of the scores. The heads' width before absorption counts, (128 + 64)^-1/2 in Kimi
            Linear, and not D; so there is no default.
        block_table: integer [N, max_pages], the pages of each sequence in order. Entries behind a
            sequence's end are never used.
        return_lse: whether to return the log-sum-exp too.
        backend: "torch", "triton", "reference" (float64); None for "triton" on a GPU, else "torch".
            The triton backend never waits for the GPU, and a captured CUDA graph holds for whatever
            lengths and pages are then in the tensors; the other two read `lengths` on the host.

    Returns:
        out, shape of q with value_dim channels, dtype of q. With `return_lse` also the natural
        logarithm of the sum of exp(score), fp32 [N, S, H] or [N, H]; -inf where nothing is seen.
        Softmax and sums are in fp32. Equal inputs give equal bits.

    Raises:
        ValueError: a shape, dtype or value that breaks the rules above. Values in `lengths` and
            `block_table` are checked on the CPU only: on a GPU that would mean waiting for it, and
            values out of range read memory that is not the sequence's.
    """
    _check(q, cache, lengths, value_dim, scale, block_table)
    backend = choose_backend(backend, q.device)
    queries = q.unsqueeze(1) if q.ndim == 3 else q
    if backend == "triton":
        from megakda.kernels.mla_decode_triton import mla_decode_triton

        out, lse = mla_decode_triton(queries, cache, lengths, value_dim, scale, block_table)
    elif backend == "reference":
        out, lse = mla_decode_reference(
            queries, cache, lengths, value_dim, scale=scale, block_table=block_table
        )
        out, lse = out.to(q.dtype), lse.float()
    else:
        out, lse = _mla_decode_torch(queries, cache, lengths, value_dim, scale, block_table)
    if q.ndim == 3:
        out, lse = out.squeeze(1), lse.squeeze(1)
    return (out, lse) if return_lse else out


def mla_decode_reference(
    q: torch.Tensor,
    cache: torch.Tensor,
    lengths: torch.Tensor,
    value_dim: int,
    *,
    scale: float,
    block_table: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`mla_decode` in float64, query by query from the formula; q [N, S, H, D]: out and lse."""
    q, cache = q.double(), cache.double()
    sequences, queries, heads, _ = q.shape
    out = q.new_zeros(sequences, queries, heads, value_dim)
    lse = q.new_full((sequences, queries, heads), -math.inf)
    for n, length in enumerate(lengths.tolist()):
        for s in range(queries):
            visible = length - queries + 1 + s
            if visible <= 0:
                continue
            if block_table is None:
                rows = [cache[n, t] for t in range(visible)]
            else:
                size = cache.shape[1]
                rows = [cache[block_table[n, t // size], t % size] for t in range(visible)]
            latents = torch.stack(rows)  # [T, D]
            for h in range(heads):
                scores = scale * (latents @ q[n, s, h])
                out[n, s, h] = scores.softmax(0) @ latents[:, :value_dim]
                lse[n, s, h] = scores.logsumexp(0)
    return out, lse


def _mla_decode_torch(
    q: torch.Tensor,
    cache: torch.Tensor,
    lengths: torch.Tensor,
    value_dim: int,
    scale: float,
    block_table: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequence by sequence, so that no more than its own latents are read; q [N, S, H, D]."""
    sequences, queries, heads, _ = q.shape
    out = q.new_zeros(sequences, queries, heads, value_dim)
    lse = q.new_full((sequences, queries, heads), -math.inf, dtype=torch.float32)
    for n, length in enumerate(lengths.tolist()):
        if block_table is None:
            latents = cache[n, :length]
        else:
            latents = _pages(cache, block_table[n, : -(-length // cache.shape[1])])[:length]
        latents = latents.float()
        scores = scale * (q[n].float() @ latents.t())  # [S, H, T]
        newest = torch.arange(queries, device=q.device) + length - queries
        hidden = torch.arange(length, device=q.device) > newest[:, None]
        scores = scores.masked_fill(hidden[:, None], -math.inf)
        lse[n] = scores.logsumexp(-1)
        shift = lse[n].masked_fill(lse[n] == -math.inf, 0.0)
        out[n] = (scores - shift.unsqueeze(-1)).exp() @ latents[:, :value_dim]
    return out, lse


def _pages(cache: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    """The tokens of some pages in order [n * page_size, D]; a view where the pages follow on."""
    first, count = int(pages[0]) if len(pages) else 0, len(pages)
    follow = torch.arange(first, first + count, device=pages.device, dtype=pages.dtype)
    found = cache[first : first + count] if torch.equal(pages, follow) else cache[pages.long()]
    return found.flatten(0, 1)


def _check(
    q: torch.Tensor,
    cache: torch.Tensor,
    lengths: torch.Tensor,
    value_dim: int,
    scale: float,
    block_table: torch.Tensor | None,
) -> None:
    if q.ndim not in (3, 4) or q.dtype not in DTYPES or 0 in q.shape[1:]:
        raise ValueError(
            f"q: {q.dtype} {list(q.shape)} must be fp32, bf16 or fp16, [N, S, H, D] or [N, H, D] "
            "with S, H and D at least 1"
        )
    sequences, width = q.shape[0], q.shape[-1]
    if cache.ndim != 3 or cache.shape[2] != width or cache.dtype != q.dtype:
        raise ValueError(
            f"cache: {cache.dtype} {list(cache.shape)} must be q's {q.dtype}, [N, Tmax, D] or "
            f"[pages, page_size, D] with D = {width}"
        )
    if cache.stride(2) != 1:
        raise ValueError(
            f"cache: strides {cache.stride()} must end with 1: a copy would cost more than the step"
        )
    if not 1 <= value_dim <= MAX_VALUE_DIM or not 0 <= width - value_dim <= MAX_SHARED_DIM:
        raise ValueError(
            f"value_dim: {value_dim} must be in 1..{MAX_VALUE_DIM}, and D - value_dim = "
            f"{width} - {value_dim} in 0..{MAX_SHARED_DIM}"
        )
    if not math.isfinite(scale):
        raise ValueError(f"scale: {scale} must be finite")
    if lengths.shape != (sequences,) or lengths.dtype not in INDEX_DTYPES:
        raise ValueError(
            f"lengths: {lengths.dtype} {list(lengths.shape)} must be int32 or int64, [N] = "
            f"[{sequences}]"
        )
    if block_table is None:
        if cache.shape[0] != sequences:
            raise ValueError(
                f"cache: {list(cache.shape)} must have one row per sequence, N = {sequences}, "
                "unless block_table is given"
            )
    else:
        if (
            block_table.ndim != 2
            or block_table.shape[0] != sequences
            or block_table.dtype not in INDEX_DTYPES
        ):
            raise ValueError(
                f"block_table: {block_table.dtype} {list(block_table.shape)} must be int32 or "
                f"int64, [N, max_pages] with N = {sequences}"
            )
        if cache.shape[1] == 0:
            raise ValueError(f"cache: {list(cache.shape)} must have pages of at least one token")
    for name, x in (("cache", cache), ("lengths", lengths), ("block_table", block_table)):
        if x is not None and x.device != q.device:
            raise ValueError(f"{name}: is on {x.device}, must be on q's device {q.device}")
    if torch.is_grad_enabled() and (q.requires_grad or cache.requires_grad):
        raise ValueError(
            "q, cache: require gradients, and decoding has none; call it under torch.no_grad()"
        )
    if q.device.type == "cpu":
        _check_values(cache, lengths, block_table)


def _check_values(
    cache: torch.Tensor, lengths: torch.Tensor, block_table: torch.Tensor | None
) -> None:
    page_size = cache.shape[1]
    most = page_size if block_table is None else page_size * block_table.shape[1]
    for n, length in enumerate(lengths.tolist()):
        if not 0 <= length <= most:
            raise ValueError(f"lengths: {length} of sequence {n} must be in 0..{most}")
        if block_table is None:
            continue
        pages = block_table[n, : -(-length // page_size)]
        if ((pages < 0) | (pages >= cache.shape[0])).any():
            raise ValueError(
                f"block_table: {pages.tolist()} of sequence {n} must be pages of the pool, in "
                f"0..{cache.shape[0] - 1}"
            )
