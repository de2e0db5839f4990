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
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from megakda.kernels.backend import choose_backend

BACKENDS = ("torch", "flash_attn", "reference")


@dataclass(frozen=True)
class Tile:
    """Queries [query_start, query_end) against keys [key_start, key_end), neither range empty.

    `causal`: query i of the tile sees its keys 0 to i, and there are as many of one as of the
    other. Otherwise every query sees every key.
    """

    query_start: int
    query_end: int
    key_start: int
    key_end: int
    causal: bool

    def __post_init__(self) -> None:
        assert 0 <= self.query_start < self.query_end, self
        assert 0 <= self.key_start < self.key_end, self
        assert not self.causal or self.queries == self.keys, self

    @property
    def queries(self) -> int:
        return self.query_end - self.query_start

    @property
    def keys(self) -> int:
        return self.key_end - self.key_start


def empty_attention(q: torch.Tensor, value_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of q [T, H, D] over no key yet: out [T, H, value_size] of 0, lse [T, H] of -inf.

    Both fp32, or float64 for float64 queries.
    """
    dtype = _accumulator_dtype(q)
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

    Raises:
        ValueError: a shape or dtype that breaks the rules above, or a backend that cannot run.
    """
    engine = _engine(backend, q)
    _check(q, k, v, tiles, {"out": out, "lse": lse})
    for batch in _batches(tiles, engine):
        mine, theirs = _rows(batch.query_ranges, q.device), _rows(batch.key_ranges, q.device)
        _merge(out, lse, mine, *engine.forward(batch, q[mine], k[theirs], v[theirs], scale))


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
    engine = _engine(backend, q)
    gradients = {"dq": dq, "dk": dk, "dv": dv}
    _check(q, k, v, tiles, {"lse": lse, **gradients}, {"dout": dout, "out": out})
    for batch in _batches(tiles, engine):
        mine, theirs = _rows(batch.query_ranges, q.device), _rows(batch.key_ranges, q.device)
        rows = _Rows(dout[mine], out[mine], lse[mine], q[mine], k[theirs], v[theirs])
        parts = engine.backward(batch, rows, scale)
        for total, where, part in zip((dq, dk, dv), (mine, theirs, theirs), parts, strict=True):
            _add(total, where, part)


# Tiles to batches: the tiles of one call of the fused attention.


class _Batch(list[Tile]):
    """Tiles of one kind in ascending order, no two of which share a query or a key."""

    @property
    def causal(self) -> bool:
        return self[0].causal

    @property
    def query_ranges(self) -> list[tuple[int, int]]:
        return [(tile.query_start, tile.query_end) for tile in self]

    @property
    def key_ranges(self) -> list[tuple[int, int]]:
        return [(tile.key_start, tile.key_end) for tile in self]

    def takes(self, tile: Tile, most_tokens: float) -> bool:
        in_order = self[-1].query_end <= tile.query_start and self[-1].key_end <= tile.key_start
        return in_order and (len(self) + 1) * max(tile.queries, tile.keys) <= most_tokens


class _Rows(NamedTuple):
    """What the backward pass needs of the rows of a batch."""

    dout: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


_Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Of q, k and v."""


class _Engine(NamedTuple):
    """One way to compute the attention of a batch whose rows lie one tile after another.

    kind: tiles that agree in it may share a batch.
    most_tokens: of the tiles that share a batch, together.
    forward: (batch, q [R, H, D], k [C, H, D], v [C, H, Dv], scale) -> out [R, H, Dv], lse [R, H].
    backward: (batch, rows, scale) -> dq, dk, dv, in shapes as above.
    """

    kind: Callable[[Tile], Hashable]
    most_tokens: float
    forward: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    backward: Callable[[_Batch, _Rows, float], _Gradients]


def _batches(tiles: Sequence[Tile], engine: _Engine) -> list[_Batch]:
    batches: list[_Batch] = []
    open_batches: dict[Hashable, _Batch] = {}
    for tile in tiles:
        kind = engine.kind(tile)
        batch = open_batches.get(kind)
        if batch is None or not batch.takes(tile, engine.most_tokens):
            batch = open_batches[kind] = _Batch()
            batches.append(batch)
        batch.append(tile)
    return batches


def _rows(ranges: list[tuple[int, int]], device: torch.device) -> slice | torch.Tensor:
    """The rows of the ranges: a slice, which makes views, where they follow one another."""
    if all(end == start for (_, end), (start, _) in pairwise(ranges)):
        return slice(ranges[0][0], ranges[-1][1])
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


# The engines. Fused attention takes [n, L, H, D], or as views of that [n, H, L, D].


def _stack(x: torch.Tensor, batch: _Batch) -> torch.Tensor:
    return x.unflatten(0, (len(batch), -1))


def _fit(x: torch.Tensor, size: int, dtype: torch.dtype) -> torch.Tensor:
    """x with zeros up to `size` channels, in `dtype`, channels next to each other in memory."""
    x = x.to(dtype)
    if x.shape[-1] < size:
        return F.pad(x, (0, size - x.shape[-1]))
    return x if x.stride(-1) == 1 else x.contiguous()


def _unfit(gradients: Iterable[torch.Tensor], x: _Rows) -> _Gradients:
    """dq, dk and dv without the channels that `_fit` added."""
    dq, dk, dv = gradients
    return dq[..., : x.q.shape[-1]], dk[..., : x.k.shape[-1]], dv[..., : x.v.shape[-1]]


def _forward_cpu(
    batch: _Batch, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    size = max(q.shape[-1], v.shape[-1])  # it has one head size; columns of 0 change nothing
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(_stack(_fit(x, size, q.dtype), batch).transpose(1, 2) for x in (q, k, v)),
        is_causal=batch.causal,
        scale=scale,
    )
    out, lse = (x.transpose(1, 2).flatten(0, 1) for x in (out, lse))
    return out[..., : v.shape[-1]], lse


def _backward_cpu(batch: _Batch, x: _Rows, scale: float) -> _Gradients:
    # In half precision it rounds dq, dk and dv after every block, an error that grows with the
    # sequence: 1 percent at 16384 tokens.
    dtype = _accumulator_dtype(x.q)
    size = max(x.q.shape[-1], x.v.shape[-1])
    rows = (_fit(t, size, dtype) for t in (x.dout, x.q, x.k, x.v, x.out))
    gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(_stack(t, batch).transpose(1, 2) for t in rows),
        _stack(x.lse, batch).transpose(1, 2),
        dropout_p=0.0,
        is_causal=batch.causal,
        scale=scale,
    )
    return _unfit((t.transpose(1, 2).flatten(0, 1) for t in gradients), x)


_LSE_ALIGNMENT = 32


def _forward_gpu(
    batch: _Batch, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse, *_ = torch.ops.aten._efficient_attention_forward(
        *(_stack(_fit(x, _aligned(x), q.dtype), batch) for x in (q, k, v)),
        bias=None,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        dropout_p=0.0,
        custom_mask_type=int(batch.causal),  # 1: causal from the top left corner
        compute_log_sumexp=True,
        scale=scale,
    )
    lse = lse[..., : batch[0].queries].transpose(1, 2)  # it is padded to full blocks
    return out.flatten(0, 1)[..., : v.shape[-1]], lse.flatten(0, 1)


def _backward_gpu(batch: _Batch, x: _Rows, scale: float) -> _Gradients:
    # The kernel reads lse in whole blocks, where inf makes P = 0, and takes `out` for contiguous.
    padding = -batch[0].queries % _LSE_ALIGNMENT
    lse = F.pad(_stack(x.lse, batch).transpose(1, 2), (0, padding), value=torch.inf)
    dout, q, k, v, out = (
        _stack(_fit(t, _aligned(t), x.q.dtype), batch) for t in (x.dout, x.q, x.k, x.v, x.out)
    )
    unused = torch.zeros((), dtype=torch.int64, device=q.device)
    *gradients, _ = torch.ops.aten._efficient_attention_backward(
        dout.contiguous(),
        q,
        k,
        v,
        bias=None,
        out=out.contiguous(),
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        max_seqlen_q=batch[0].queries,
        max_seqlen_k=batch[0].keys,
        logsumexp=lse.contiguous(),
        dropout_p=0.0,
        philox_seed=unused,
        philox_offset=unused,
        custom_mask_type=int(batch.causal),
        bias_requires_grad=False,
        scale=scale,
        num_splits_key=1,  # more of them would add to dq in the order in which they come
    )
    return _unfit((t.flatten(0, 1) for t in gradients), x)


def _aligned(x: torch.Tensor) -> int:
    """The channels of x, rounded up to what every kernel for GPUs can load."""
    return math.ceil(x.shape[-1] / 8) * 8


def _flash_arguments(batch: _Batch, device: torch.device) -> dict[str, Any]:
    """What forward and backward have in common; lengths differ, so one call takes many tiles."""
    queries, keys = [tile.queries for tile in batch], [tile.keys for tile in batch]
    bounds = [
        torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        for lengths in (queries, keys)
    ]
    return {
        "cu_seqlens_q": bounds[0],
        "cu_seqlens_k": bounds[1],
        "max_seqlen_q": max(queries),
        "max_seqlen_k": max(keys),
        "dropout_p": 0.0,
        "causal": batch.causal,  # counted from the last query and key, the same in a square
        "window_size_left": -1,
        "window_size_right": -1,
        "softcap": 0.0,
        "alibi_slopes": None,
    }


def _forward_flash(
    batch: _Batch, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    size = max(_aligned(q), _aligned(v))
    out, lse, *_ = _flash_attn(q)._flash_attn_varlen_forward(
        *(_fit(x, size, q.dtype) for x in (q, k, v)),
        softmax_scale=scale,
        **_flash_arguments(batch, q.device),
    )
    return out[..., : v.shape[-1]], lse.T


def _backward_flash(batch: _Batch, x: _Rows, scale: float) -> _Gradients:
    size = max(_aligned(x.q), _aligned(x.v))
    rows = [_fit(t, size, x.q.dtype) for t in (x.dout, x.q, x.k, x.v, x.out)]
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in rows[1:4])
    _flash_attn(x.q)._flash_attn_varlen_backward(
        *rows,
        softmax_lse=x.lse.T.contiguous(),
        dq=dq,
        dk=dk,
        dv=dv,
        softmax_scale=scale,
        deterministic=True,
        **_flash_arguments(batch, x.q.device),
    )
    return _unfit((dq, dk, dv), x)


def _flash_attn(q: torch.Tensor) -> Any:
    """The module of flash-attn that has the two calls.

    They have had these arguments, and an lse of [H, R], since 2.7.

    Raises:
        ValueError: it is missing or older, or cannot take q.
    """
    if importlib.util.find_spec("flash_attn") is None:
        raise ValueError(
            "backend: 'flash_attn' needs the package flash-attn, 2.7 or later, which is not "
            "installed; backend='torch' runs without it"
        )
    version = importlib.import_module("flash_attn").__version__
    if tuple(int(part) for part in version.split(".")[:2]) < (2, 7):
        raise ValueError(
            f"backend: 'flash_attn' needs flash-attn 2.7 or later, this is {version}; update it or "
            "use backend='torch'"
        )
    if q.device.type != "cuda" or q.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"q: {q.dtype} on {q.device}, but backend='flash_attn' takes bf16 and fp16 on a GPU; "
            "use backend='torch'"
        )
    return importlib.import_module("flash_attn.flash_attn_interface")


def _forward_reference(
    batch: _Batch, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = _reference_scores(batch, q, k, scale)
    out = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), _stack(v.double(), batch))
    return out.flatten(0, 1), scores.logsumexp(-1).transpose(1, 2).flatten(0, 1)


def _backward_reference(batch: _Batch, x: _Rows, scale: float) -> _Gradients:
    scores = _reference_scores(batch, x.q, x.k, scale)
    dout, out, lse, q, k, v = (_stack(t.double(), batch) for t in x)
    p = torch.exp(scores - lse.transpose(1, 2).unsqueeze(-1))
    delta = (dout * out).sum(-1).transpose(1, 2).unsqueeze(-1)
    ds = p * (torch.einsum("bihd,bjhd->bhij", dout, v) - delta) * scale
    dq = torch.einsum("bhij,bjhd->bihd", ds, k).flatten(0, 1)
    dk = torch.einsum("bhij,bihd->bjhd", ds, q).flatten(0, 1)
    dv = torch.einsum("bhij,bihd->bjhd", p, dout).flatten(0, 1)
    return dq, dk, dv


def _reference_scores(
    batch: _Batch, q: torch.Tensor, k: torch.Tensor, scale: float
) -> torch.Tensor:
    """[n, H, L, L'], -inf where the mask is."""
    q, k = (_stack(x.double(), batch) for x in (q, k))
    scores = scale * torch.einsum("bihd,bjhd->bhij", q, k)
    if batch.causal:
        scores += torch.full_like(scores[0, 0], -torch.inf).triu(1)
    return scores


def _shape(tile: Tile) -> Hashable:
    return tile.causal, tile.queries, tile.keys


# Batching saves calls, and gathering rows costs copies. On a CPU short tiles alone gain: 500
# documents of 32 tokens take a third of the time, while 1000 tokens gain nothing.
_CPU = _Engine(_shape, 2048, _forward_cpu, _backward_cpu)
_GPU = _Engine(_shape, 32768, _forward_gpu, _backward_gpu)
_FLASH = _Engine(lambda tile: tile.causal, math.inf, _forward_flash, _backward_flash)
_REFERENCE = _Engine(_shape, 1, _forward_reference, _backward_reference)


def _engine(backend: str | None, q: torch.Tensor) -> _Engine:
    """What runs here.

    Raises:
        ValueError: an unknown backend, or one that cannot take q.
    """
    backend = choose_backend("torch" if backend is None else backend, q.device, BACKENDS)
    if backend == "reference":
        return _REFERENCE
    if backend == "flash_attn":
        _flash_attn(q)
        return _FLASH
    if q.device.type == "cpu":
        return _CPU
    if q.dtype == torch.float64:
        raise ValueError(
            f"q: {q.dtype}, but backend='torch' takes fp32, bf16 and fp16 on a GPU; use one of "
            "these or backend='reference'"
        )
    return _GPU


def _accumulator_dtype(q: torch.Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


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
        if x.dtype != _accumulator_dtype(q):
            raise ValueError(
                f"{name}: dtype {x.dtype} must be {_accumulator_dtype(q)}, since q is {q.dtype}"
            )
    for tile in tiles:
        assert tile.query_end <= tokens and tile.key_end <= keys, (tile, tokens, keys)
