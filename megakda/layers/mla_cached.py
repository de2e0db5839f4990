"""Latent attention of new tokens of cached sequences.

One new token attends in absorbed form, over the latents themselves (`megakda.kernels.mla_decode`).
Several new tokens expand keys and values from the latents, as in training; those of the past block
by block, so that memory does not grow with them.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from megakda.kernels.mla_decode import mla_decode
from megakda.kernels.tile_attention import Tile, attend_tiles, empty_attention
from megakda.layers.cached import CachedTokens, LatentCache, NewTokens
from megakda.layers.mla_context_parallel import LatentHeads, expand

PAST_BLOCK = 8192
"""Tokens of the past whose keys and values exist at once."""


@torch.no_grad()
def latent_attention_cached(
    q: torch.Tensor,
    latent: torch.Tensor,
    weight: torch.Tensor,
    *,
    heads: LatentHeads,
    new: CachedTokens,
    cache: LatentCache,
) -> torch.Tensor:
    """Causal attention of new tokens to themselves and their past; stores their latents.

    Args:
        q: [N, H, n + p], of `new.tokens` tokens and padding behind them.
        latent: [N, r + p] of the same tokens.
        weight: [H * (n + v), r], expands a latent to each head's key part and values.
        heads: sizes.

    Returns:
        [N, H, v] in the dtype of q; zero for padding.
    """
    pool = cache.latents.flatten(0, 1)
    pool[new.places] = latent[: new.tokens]
    if new.decoded == len(q):
        return _absorbed(q, weight, heads, new, cache)
    out = q.new_zeros(*q.shape[:2], heads.value)
    if new.decoded:
        out[: new.decoded] = _absorbed(q[: new.decoded], weight, heads, new, cache)
    for sequence, (start, end) in zip(new.prefilled, pairwise(new.bounds), strict=True):
        tokens = slice(new.decoded + start, new.decoded + end)
        out[tokens] = _expanded(
            q[tokens], latent[tokens], weight, heads, sequence, new.page_size, pool
        )
    return out


def _absorbed(
    q: torch.Tensor,
    weight: torch.Tensor,
    heads: LatentHeads,
    new: CachedTokens,
    cache: LatentCache,
) -> torch.Tensor:
    """One token of each sequence: q [n, H, n + p] -> [n, H, v]."""
    to_key, to_value = weight.unflatten(0, (-1, heads.key + heads.value)).split(
        [heads.key, heads.value], dim=1
    )  # [H, n, r], [H, v, r]
    nope, shared = q.split([heads.key, heads.shared], dim=-1)
    absorbed = torch.einsum("thn,hnr->thr", nope, to_key)
    mixed = mla_decode(
        torch.cat([absorbed, shared], dim=-1),
        cache.latents,
        new.lengths,
        heads.rank,
        scale=heads.scale,
        block_table=new.block_table,
    )
    assert isinstance(mixed, torch.Tensor)
    return torch.einsum("thr,hvr->thv", mixed, to_value)


def _expanded(
    q: torch.Tensor,
    latent: torch.Tensor,
    weight: torch.Tensor,
    heads: LatentHeads,
    sequence: NewTokens,
    page_size: int,
    pool: torch.Tensor,
) -> torch.Tensor:
    """Several tokens of one sequence: q [n, H, n + p], latent [n, r + p] -> [n, H, v]."""
    out, lse = empty_attention(q, heads.value)
    count = len(q)
    k, v = expand(latent, weight, heads)
    own = [Tile(0, count, 0, count, causal=True)]
    attend_tiles(q, k, v, own, heads.scale, out, lse, heads.backend)
    for first in range(0, sequence.past, PAST_BLOCK):
        last = min(first + PAST_BLOCK, sequence.past)
        k, v = expand(_past(sequence, first, last, page_size, pool), weight, heads)
        past = [Tile(0, count, 0, last - first, causal=False)]
        attend_tiles(q, k, v, past, heads.scale, out, lse, heads.backend)
    return out.to(q.dtype)


def _past(
    sequence: NewTokens, first: int, last: int, page_size: int, pool: torch.Tensor
) -> torch.Tensor:
    """Cached latents [last - first, r + p] of tokens first up to last."""
    pages = sequence.pages[first // page_size : -(-last // page_size)]
    index = torch.tensor(pages, device=pool.device)
    latents = pool.unflatten(0, (-1, page_size))[index].flatten(0, 1)
    skipped = first - first // page_size * page_size
    return latents[skipped : skipped + last - first]
