"""The ways to compute softmax attention over tiles: torch's fused kernels, flash-attn, a reference.

`tile_attention` cuts its work into batches of tiles and merges their results; an engine here
computes one batch. None but the reference holds a tile's scores, so memory is linear in the
sequence. Those that run on a GPU have been tested with stand-ins of the same signatures, not yet on
a GPU. Fused kernels do not say what the largest logit was: where that is asked for, an engine's
recorder is the forward pass.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from itertools import accumulate
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


class Batch(list[Tile]):
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


class Rows(NamedTuple):
    """What the backward pass needs of the rows of a batch."""

    dout: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Of q, k and v."""


class Recorder(NamedTuple):
    """A forward pass that finds the largest logit of each head too; fields as in `Engine`.

    forward: (batch, q, k, v, scale) -> out [R, H, Dv], lse [R, H], largest scaled logit [H].
    """

    kind: Callable[[Tile], Hashable]
    most_tokens: float
    forward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


class Engine(NamedTuple):
    """One way to compute the attention of a batch whose rows lie one tile after another.

    kind: tiles that agree in it may share a batch.
    most_tokens: of the tiles that share a batch, together.
    forward: (batch, q [R, H, D], k [C, H, D], v [C, H, Dv], scale) -> out [R, H, Dv], lse [R, H].
    backward: (batch, rows, scale) -> dq, dk, dv, in shapes as above.
    recorder: the forward pass while logits are recorded.
    """

    kind: Callable[[Tile], Hashable]
    most_tokens: float
    forward: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    backward: Callable[[Batch, Rows, float], Gradients]
    recorder: Recorder


# The engines. Fused attention takes [n, L, H, D], or as views of that [n, H, L, D].


def _stack(x: torch.Tensor, batch: Batch) -> torch.Tensor:
    return x.unflatten(0, (len(batch), -1))


def _fit(x: torch.Tensor, size: int, dtype: torch.dtype) -> torch.Tensor:
    """x with zeros up to `size` channels, in `dtype`, channels next to each other in memory."""
    x = x.to(dtype)
    if x.shape[-1] < size:
        return F.pad(x, (0, size - x.shape[-1]))
    return x if x.stride(-1) == 1 else x.contiguous()


def _unfit(gradients: Iterable[torch.Tensor], x: Rows) -> Gradients:
    """dq, dk and dv without the channels that `_fit` added."""
    dq, dk, dv = gradients
    return dq[..., : x.q.shape[-1]], dk[..., : x.k.shape[-1]], dv[..., : x.v.shape[-1]]


def _forward_cpu(
    batch: Batch, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    size = max(q.shape[-1], v.shape[-1])  # it has one head size; columns of 0 change nothing
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(_stack(_fit(x, size, q.dtype), batch).transpose(1, 2) for x in (q, k, v)),
        is_causal=batch.causal,
        scale=scale,
    )
    out, lse = (x.transpose(1, 2).flatten(0, 1) for x in (out, lse))
    return out[..., : v.shape[-1]], lse


def _backward_cpu(batch: Batch, x: Rows, scale: float) -> Gradients:
    # In half precision it rounds dq, dk and dv after every block, an error that grows with the
    # sequence: 1 percent at 16384 tokens.
    dtype = accumulator_dtype(x.q)
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


_BLOCK_SCORES = 2**20
_BLOCK_QUERIES = 128


def _record_cpu(
    batch: Batch, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Some heads of some tiles, and some of their queries, at a time: 4 MiB of scores in fp32."""
    dtype = accumulator_dtype(q)
    q, k, v = (_stack(x.to(dtype), batch).transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    matrices, queries, keys = len(q), q.shape[1], k.shape[1]  # q [n * H, L, D]
    out, lse = q.new_empty(matrices, queries, v.shape[-1]), q.new_empty(matrices, queries)
    largest = q.new_full((matrices,), -torch.inf)
    some_rows = min(queries, _BLOCK_QUERIES, max(1, _BLOCK_SCORES // keys))
    some = max(1, _BLOCK_SCORES // (some_rows * keys))
    for m in range(0, matrices, some):
        for row in range(0, queries, some_rows):
            where = slice(m, m + some), slice(row, row + some_rows)
            seen = slice(m, m + some), slice(0, row + some_rows if batch.causal else keys)
            scores = (q[where] @ k[seen].mT).mul_(scale)
            if batch.causal:
                later = torch.ones_like(scores[0, :, row:], dtype=torch.bool).triu(1)
                scores[..., row:].masked_fill_(later, -torch.inf)
            block = scores.amax((1, 2))
            largest[m : m + some] = torch.maximum(largest[m : m + some], block)
            lse[where] = scores.logsumexp(-1)
            out[where] = scores.softmax(-1) @ v[seen]
    out, lse = (x.unflatten(0, (len(batch), -1)).transpose(1, 2).flatten(0, 1) for x in (out, lse))
    return out, lse, largest.view(len(batch), -1).amax(0)


_LSE_ALIGNMENT = 32


def _forward_gpu(
    batch: Batch, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
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


def _backward_gpu(batch: Batch, x: Rows, scale: float) -> Gradients:
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


def _record_gpu(
    batch: Batch, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if importlib.util.find_spec("triton") is None:
        raise ValueError(
            "max_logit: recording it on a GPU needs the triton package (pip install "
            "'triton>=3.6'); install it, or do not pass max_logit"
        )
    choose_backend("triton", q.device)
    from megakda.kernels.tile_attention_triton import tile_attention_triton

    lengths = tuple((tile.queries, tile.keys) for tile in batch)
    q, k, v = (_fit(x, x.shape[-1], q.dtype) for x in (q, k, v))
    out, lse, largest = tile_attention_triton(q, k, v, lengths, batch.causal, scale)
    return out, lse, largest.amax(0)


def _aligned(x: torch.Tensor) -> int:
    """The channels of x, rounded up to what every kernel for GPUs can load."""
    return math.ceil(x.shape[-1] / 8) * 8


def _flash_arguments(batch: Batch, device: torch.device) -> dict[str, Any]:
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
    batch: Batch, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    size = max(_aligned(q), _aligned(v))
    out, lse, *_ = _flash_attn(q)._flash_attn_varlen_forward(
        *(_fit(x, size, q.dtype) for x in (q, k, v)),
        softmax_scale=scale,
        **_flash_arguments(batch, q.device),
    )
    return out[..., : v.shape[-1]], lse.T


def _backward_flash(batch: Batch, x: Rows, scale: float) -> Gradients:
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
    batch: Batch, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse, _ = _record_reference(batch, q, k, v, scale)
    return out, lse


def _record_reference(
    batch: Batch, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scores = _reference_scores(batch, q, k, scale)
    out = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), _stack(v.double(), batch))
    lse = scores.logsumexp(-1).transpose(1, 2).flatten(0, 1)
    return out.flatten(0, 1), lse, scores.amax((0, 2, 3))


def _backward_reference(batch: Batch, x: Rows, scale: float) -> Gradients:
    scores = _reference_scores(batch, x.q, x.k, scale)
    dout, out, lse, q, k, v = (_stack(t.double(), batch) for t in x)
    p = torch.exp(scores - lse.transpose(1, 2).unsqueeze(-1))
    delta = (dout * out).sum(-1).transpose(1, 2).unsqueeze(-1)
    ds = p * (torch.einsum("bihd,bjhd->bhij", dout, v) - delta) * scale
    dq = torch.einsum("bhij,bjhd->bihd", ds, k).flatten(0, 1)
    dk = torch.einsum("bhij,bihd->bjhd", ds, q).flatten(0, 1)
    dv = torch.einsum("bhij,bihd->bjhd", p, dout).flatten(0, 1)
    return dq, dk, dv


def _reference_scores(batch: Batch, q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """[n, H, L, L'], -inf where the mask is."""
    q, k = (_stack(x.double(), batch) for x in (q, k))
    scores = scale * torch.einsum("bihd,bjhd->bhij", q, k)
    if batch.causal:
        later = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    return scores


def _shape(tile: Tile) -> Hashable:
    return tile.causal, tile.queries, tile.keys


def _causal(tile: Tile) -> Hashable:
    return tile.causal


# Batching saves calls, and gathering rows costs copies. On a CPU short tiles alone gain: 500
# documents of 32 tokens take a third of the time, while 1000 tokens gain nothing.
_CPU = Engine(_shape, 2048, _forward_cpu, _backward_cpu, Recorder(_shape, 2048, _record_cpu))
_RECORDER_GPU = Recorder(_causal, math.inf, _record_gpu)
_GPU = Engine(_shape, 32768, _forward_gpu, _backward_gpu, _RECORDER_GPU)
_FLASH = Engine(_causal, math.inf, _forward_flash, _backward_flash, _RECORDER_GPU)
_REFERENCE = Engine(
    _shape, 1, _forward_reference, _backward_reference, Recorder(_shape, 1, _record_reference)
)


def engine_for(backend: str | None, q: torch.Tensor) -> Engine:
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


def accumulator_dtype(q: torch.Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)
