"""What tests of attention over tiles share: backends, inputs, tiles, and a dense reference.

What needs a GPU runs on stand-ins: functions of the same signatures, which check what the real ones
take for granted and compute densely. The Triton kernel that records logits is interpreted.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch

from megakda.kernels import tile_engines
from megakda.kernels.tile_attention import (
    Tile,
    attend_tiles,
    attend_tiles_backward,
    empty_attention,
)
from tests.kernels.attention_stand_ins import (
    FlashAttention,
    efficient_backward,
    efficient_forward,
)

SCALE = 0.3
HEADS = 2
RESULTS = ("out", "lse", "dq", "dk", "dv")
Block = tuple[int, Sequence[Tile]]
"""Where a block of keys begins, and its tiles."""


@contextmanager
def ready(backend: str) -> Iterator[str]:
    """The name to call the backend by, with stand-ins; "gpu" is what "torch" runs on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        if backend == "gpu":
            patch.setattr(tile_engines, "_CPU", tile_engines._GPU)
            with torch.library._scoped_library("aten", "IMPL") as library:
                library.impl("_efficient_attention_forward", efficient_forward, "CPU")
                library.impl("_efficient_attention_backward", efficient_backward, "CPU")
                yield "torch"
            return
        if backend == "flash_attn":
            patch.setattr(tile_engines, "_flash_attn", lambda q: FlashAttention())
        yield backend


every_backend = pytest.mark.parametrize(
    "backend", ["torch", "gpu", "flash_attn", "reference"], indirect=True
)


def make(
    tokens: int, sizes: tuple[int, int] = (16, 16), dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(tokens, HEADS, size, generator=generator).to(dtype)
        for name, size in {"q": sizes[0], "k": sizes[0], "v": sizes[1], "dout": sizes[1]}.items()
    }


def run(
    x: dict[str, torch.Tensor],
    blocks: Sequence[Block],
    backend: str,
    scale: float = SCALE,
    max_logit: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Forward over the blocks in their order, then backward in the same, as a ring would."""
    q, k, v, dout = x.values()
    out, lse = empty_attention(q, v.shape[-1])
    pieces = [(k[start:], v[start:], tiles) for start, tiles in blocks]
    for keys, values, tiles in pieces:
        attend_tiles(q, keys, values, tiles, scale, out, lse, backend, max_logit)
    dq, dk, dv = (torch.zeros_like(t, dtype=out.dtype) for t in (q, k, v))
    final = out.transpose(0, 1).contiguous().transpose(0, 1)  # it may have any strides
    for (start, _), (keys, values, tiles) in zip(blocks, pieces, strict=True):
        attend_tiles_backward(
            dout, q, keys, values, tiles, scale, final, lse, dq, dk[start:], dv[start:], backend
        )
    return dict(zip(RESULTS, (out, lse, dq, dk, dv), strict=True))


def mask_of(x: dict[str, torch.Tensor], blocks: Sequence[Block]) -> torch.Tensor:
    mask = torch.zeros(len(x["q"]), len(x["k"]), dtype=torch.bool)
    for start, tiles in blocks:
        for tile in tiles:
            visible = torch.ones(tile.queries, tile.keys, dtype=torch.bool)
            rows = slice(tile.query_start, tile.query_end)
            columns = slice(start + tile.key_start, start + tile.key_end)
            assert not mask[rows, columns].any(), "a pair in two tiles"
            mask[rows, columns] = visible.tril() if tile.causal else visible
    return mask


def dense(
    x: dict[str, torch.Tensor], blocks: Sequence[Block], scale: float = SCALE
) -> dict[str, torch.Tensor]:
    q, k, v, dout = (t.double() for t in x.values())
    mask = mask_of(x, blocks)
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    scores = (scale * torch.einsum("ihd,jhd->hij", q, k)).masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(-1, keepdim=True)
    p = torch.exp(scores - lse.masked_fill(~mask.any(-1, keepdim=True), 0))
    out = torch.einsum("hij,jhd->ihd", p, v)
    gradients = torch.autograd.grad(out, (q, k, v), dout)
    results = (out.detach(), lse.detach()[..., 0].T, *gradients)
    return dict(zip(RESULTS, results, strict=True))


def ring(tokens: int, boundaries: Sequence[int], cuts: Sequence[int]) -> list[Block]:
    """The causal mask of documents whose keys are cut into blocks: a block's tiles for each."""
    documents = list(itertools.pairwise([0, *boundaries, tokens]))
    segments = list(itertools.pairwise([0, *cuts, tokens]))
    blocks = []
    for j, (start, end) in enumerate(segments):
        tiles = []
        for first, last in documents:
            keys = (max(first, start), min(last, end))
            for i, segment in enumerate(segments[j:]):
                queries = (max(first, segment[0]), min(last, segment[1]))
                if keys[0] < keys[1] and queries[0] < queries[1]:
                    tiles.append(Tile(*queries, keys[0] - start, keys[1] - start, i == 0))
        blocks.append((start, tiles))
    return blocks


def random_ring(seed: int, tokens: int, documents: int, segments: int) -> list[Block]:
    generator = torch.Generator().manual_seed(seed)
    boundaries, cuts = (
        (1 + torch.randperm(tokens - 1, generator=generator)[: count - 1]).sort().values.tolist()
        for count in (documents, segments)
    )
    return ring(tokens, boundaries, cuts)
