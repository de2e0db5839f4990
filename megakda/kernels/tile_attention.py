"""Softmax attention over a list of tiles, forward and backward.

A tile is a range of queries against a range of keys of which each query sees all, or, where the
tile lies on the diagonal, the keys up to its own position. Every causal mask of packed documents is
a list of tiles, whole or dealt over the ranks of a context-parallel group, so this one operator
serves them all. It runs in two passes over the tiles, and in each they are independent:

- forward: softmax over each tile's keys alone, merged by log-sum-exp. With (o, l) the output and
  log-sum-exp so far and (o', l') a tile's, w = sigmoid(l' - l): o <- (1 - w) o + w o',
  l <- log(e^l + e^l') (online softmax, arXiv 1805.02867; over ranks, arXiv 2310.01889).
- backward: with the final out and lse, P = exp(scale q k^T - lse) are a tile's own entries of the
  whole softmax, and dS = P (dout v^T - rowsum(dout out)) needs nothing of other tiles (arXiv
  2205.14135, appendix B).

Backends: "torch" is torch's own fused attention, on a CPU and on a GPU; "flash_attn" the package of
that name, 2.7 or later, where it is installed; "reference" is dense and float64. No backend but the
reference holds a tile's scores, so memory is linear in the sequence. The two that run on a GPU have
been tested with stand-ins of the same signatures, not yet on a GPU.

Fused attention keeps the largest logit of each head to itself. Where it is asked for, QK-Clip needs
it (arXiv 2507.20534, section 2.1), the forward pass is one of our own that finds it on its way: on
a GPU, for both backends, the Triton kernel of `tile_attention_triton`, on a CPU blocks of queries.
The backward pass, which needs (out, lse) alone, stays the backend's.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import lru_cache
from itertools import pairwise

import torch

from megakda.kernels.tile_engines import (
    BACKENDS,
    Batch,
    Engine,
    Recorder,
    Rows,
    Tile,
    accumulator_dtype,
    engine_for,
)

__all__ = ["BACKENDS", "Tile", "attend_tiles", "attend_tiles_backward", "empty_attention"]


def empty_attention(q: torch.Tensor, value_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of q [T, H, D] over no key yet: out [T, H, value_size] of 0, lse [T, H] of -inf.

    Both fp32, or float64 for float64 queries.
    """
    dtype = accumulator_dtype(q)
    out = q.new_zeros(*q.shape[:2], value_size, dtype=dtype)
    return out, q.new_full(q.shape[:2], -torch.inf, dtype=dtype)


@torch.no_grad()
def attend_tiles(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tiles: Sequence[Tile],
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
    backend: str | None = None,
    max_logit: torch.Tensor | None = None,
) -> None:
    """Merges softmax(scale q k^T) v of each tile into (out, lse), in place.

    Tiles may share queries and keys, but no (query, key) pair may be in two of them. Calls with
    other blocks of keys go on from what is in (out, lse); `empty_attention` makes the start.
    Queries in no tile are not touched.

    Args:
        q: [T, H, D], fp32, bf16 or fp16, on a CPU and for the reference also float64.
        k: [S, H, D], dtype of q.
        v: [S, H, Dv], dtype of q; any Dv.
        tiles: ranges of q and of k.
        scale: of the scores.
        out: [T, H, Dv], softmax(...) v over the keys so far; fp32, or float64 with q.
        lse: [T, H], log-sum-exp of the scores so far, natural logarithm; dtype of out.
        backend: "torch", "flash_attn" or "reference"; None for "torch".
        max_logit: [H], raised in place to the largest score, scale q k^T, of each head's pairs that
            the tiles let see each other; NaN where one is NaN. dtype of out. On a GPU it takes
            Triton, and D and Dv of at most 256.

    Raises:
        ValueError: a shape or dtype that breaks the rules above, or a backend that cannot run.
    """
    engine = engine_for(backend, q)
    record = {} if max_logit is None else {"max_logit": max_logit}
    _check(q, k, v, tiles, {"out": out, "lse": lse, **record})
    forward = engine if max_logit is None else engine.recorder
    for batch in _batches(tiles, forward):
        mine, theirs = _rows(batch.query_ranges, q.device), _rows(batch.key_ranges, q.device)
        part, part_lse, *largest = forward.forward(batch, q[mine], k[theirs], v[theirs], scale)
        _merge(out, lse, mine, part, part_lse)
        if max_logit is not None:
            torch.maximum(max_logit, largest[0], out=max_logit)


@torch.no_grad()
def attend_tiles_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tiles: Sequence[Tile],
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    backend: str | None = None,
) -> None:
    """Adds the gradients of each tile to dq, dk and dv, in place; equal inputs give equal bits.

    Args:
        dout: gradient of the final output, [T, H, Dv], any floating dtype.
        q, k, v, tiles, scale, backend: as in `attend_tiles`.
        out: the final output, over all keys of all calls, [T, H, Dv], any floating dtype.
        lse: the final log-sum-exp [T, H], as `attend_tiles` left it.
        dq, dk, dv: shapes of q, k and v; fp32, or float64 with q.

    Raises:
        ValueError: a shape or dtype that breaks the rules above, or a backend that cannot run.
    """
    engine = engine_for(backend, q)
    gradients = {"dq": dq, "dk": dk, "dv": dv}
    _check(q, k, v, tiles, {"lse": lse, **gradients}, {"dout": dout, "out": out})
    for batch in _batches(tiles, engine):
        mine, theirs = _rows(batch.query_ranges, q.device), _rows(batch.key_ranges, q.device)
        rows = Rows(dout[mine], out[mine], lse[mine], q[mine], k[theirs], v[theirs])
        parts = engine.backward(batch, rows, scale)
        for total, where, part in zip((dq, dk, dv), (mine, theirs, theirs), parts, strict=True):
            _add(total, where, part)


# Tiles to batches: the tiles of one call of the fused attention.


def _batches(tiles: Sequence[Tile], engine: Engine | Recorder) -> list[Batch]:
    batches: list[Batch] = []
    open_batches: dict[Hashable, Batch] = {}
    for tile in tiles:
        kind = engine.kind(tile)
        batch = open_batches.get(kind)
        if batch is None or not batch.takes(tile, engine.most_tokens):
            batch = open_batches[kind] = Batch()
            batches.append(batch)
        batch.append(tile)
    return batches


def _rows(ranges: list[tuple[int, int]], device: torch.device) -> slice | torch.Tensor:
    """The rows of the ranges: a slice, which makes views, where they follow one another."""
    if all(end == start for (_, end), (start, _) in pairwise(ranges)):
        return slice(ranges[0][0], ranges[-1][1])
    return _gathered_rows(tuple(ranges), device)


@lru_cache(maxsize=1024)
def _gathered_rows(ranges: tuple[tuple[int, int], ...], device: torch.device) -> torch.Tensor:
    """Cached, since copying them to a GPU makes the host wait."""
    return torch.cat([torch.arange(start, end) for start, end in ranges]).to(device)


def _merge(
    out: torch.Tensor,
    lse: torch.Tensor,
    rows: slice | torch.Tensor,
    part: torch.Tensor,
    part_lse: torch.Tensor,
) -> None:
    before, before_lse = out[rows], lse[rows]  # views of a slice, copies of an index
    part_lse = part_lse.to(lse.dtype)
    # The two weights add up to 1 whatever rounding did to large log-sum-exps. -inf - (-inf), no key
    # on either side, would be nan.
    weight = (part_lse - before_lse).sigmoid_().masked_fill_(part_lse == -torch.inf, 0)
    before.lerp_(part.to(out.dtype), weight.unsqueeze(-1))
    before_lse.copy_(torch.logaddexp(before_lse, part_lse))
    if not isinstance(rows, slice):
        out[rows], lse[rows] = before, before_lse


def _add(total: torch.Tensor, rows: slice | torch.Tensor, part: torch.Tensor) -> None:
    if isinstance(rows, slice):
        total[rows].add_(part)
    else:  # no row is there twice, so this needs no atomic additions, unlike index_add_
        total[rows] = total[rows] + part


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tiles: Sequence[Tile],
    accumulators: dict[str, torch.Tensor],
    finals: dict[str, torch.Tensor] | None = None,
) -> None:
    """Raises ValueError for tensors that do not fit together; `finals` may have any dtype."""
    if q.ndim != 3:
        raise ValueError(f"q: shape {tuple(q.shape)} must be [T, H, D]")
    tokens, heads, size = q.shape
    keys, value_size = k.shape[0], v.shape[-1]
    shapes = {
        "k": (keys, heads, size),
        "v": (keys, heads, value_size),
        "out": (tokens, heads, value_size),
        "lse": (tokens, heads),
        "max_logit": (heads,),
        "dq": q.shape,
        "dk": k.shape,
        "dv": v.shape,
    }
    shapes["dout"] = shapes["out"]
    for name, x in {"k": k, "v": v, **accumulators, **(finals or {})}.items():
        if x.shape != shapes[name]:
            raise ValueError(
                f"{name}: shape {tuple(x.shape)} must be {tuple(shapes[name])}, with q "
                f"{tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}"
            )
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise ValueError(f"{name}: dtype {x.dtype} must be that of q, {q.dtype}")
    for name, x in accumulators.items():
        if x.dtype != accumulator_dtype(q):
            raise ValueError(
                f"{name}: dtype {x.dtype} must be {accumulator_dtype(q)}, since q is {q.dtype}"
            )
    for tile in tiles:
        assert tile.query_end <= tokens and tile.key_end <= keys, (tile, tokens, keys)
