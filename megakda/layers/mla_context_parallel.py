"""Latent attention over a sequence that several ranks hold, exact for every document.

Each rank keeps its own queries and meets the keys and values of all ranks, block by block: a block
is what one rank holds. What travels is the latent, from which keys and values are expanded when a
block is met (DeepSeek-V2, arXiv 2405.04434, section 2.1), so that bytes do not depend on the number
of heads. Blocks are merged by log-sum-exp (`megakda.kernels.tile_attention`). They arrive in one of
two ways:

- all_gather: all at once, before the first is needed. In the backward pass they are gathered again,
  and their gradients reduce-scattered.
- ring: one by one from the rank before (Ring Attention, arXiv 2310.01889), each on its way while
  the one before it is worked on. In the backward pass they go round again, and their gradients
  travel one step behind them, collecting every rank's share.

Letters in shapes: N tokens of this rank, B rows together; H heads on this rank; r width of the
latent and p of the shared key part, n and v of a head's own key part and values.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from megakda.kernels.tile_attention import (
    Tile,
    attend_tiles,
    attend_tiles_backward,
    empty_attention,
)
from megakda.layers.context_layout import ContextPlan, Documents, plan_context
from megakda.layers.context_parallel import ContextParallel, Group, exchange

Wait = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class LatentHeads:
    """Sizes of the expanded heads, and how scores are made.

    Attributes:
        rank: r; key: n; shared: p; value: v.
        scale: of the scores.
        backend: of `megakda.kernels.tile_attention`.
    """

    rank: int
    key: int
    shared: int
    value: int
    scale: float
    backend: str | None = None


def latent_attention(
    q: torch.Tensor,
    latent: torch.Tensor,
    weight: torch.Tensor,
    *,
    heads: LatentHeads,
    context: ContextParallel,
    documents: Documents,
    max_logit: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal softmax attention within documents, expanding keys and values from latents.

    A collective call on all ranks of the context-parallel group, and so is its backward pass. The
    gradient of `weight` is this rank's share: the sum over the group is the whole.

    Args:
        q: [N, H, n + p], this rank's queries.
        latent: [N, r + p], the latent and the shared key part of the same tokens, dtype of q.
        weight: [H * (n + v), r], expands a latent to each head's key part and values.
        heads: sizes.
        context: layout, group and way of exchange.
        documents: of the whole batch, the same on every rank.
        max_logit: [H] in fp32, raised in place to the largest logit of this rank's queries, see
            `attend_tiles`.

    Returns:
        [N, H, v] in the dtype of q.

    Raises:
        CommunicationError: another rank has died or does not answer.
    """
    return _LatentAttention.apply(q, latent, weight, heads, context, documents, max_logit)


class _LatentAttention(torch.autograd.Function):
    """Saves its inputs, the output and the log-sum-exp; everything else is made again."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        latent: torch.Tensor,
        weight: torch.Tensor,
        heads: LatentHeads,
        context: ContextParallel,
        documents: Documents,
        max_logit: torch.Tensor | None,
    ) -> torch.Tensor:
        out, lse = empty_attention(q, heads.value)
        for source, block in _blocks(latent.contiguous(), context):
            tiles = _tiles(context, documents, source)
            if tiles:
                k, v = expand(block, weight, heads)
                attend_tiles(q, k, v, tiles, heads.scale, out, lse, heads.backend, max_logit)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, latent, weight, out, lse)
        ctx.constants = heads, context, documents
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, latent, weight, out, lse = ctx.saved_tensors
        heads, context, documents = ctx.constants
        latent = latent.contiguous()
        dq = torch.zeros_like(q, dtype=lse.dtype)
        dweight = torch.zeros_like(weight, dtype=lse.dtype)

        def share(source: int, block: torch.Tensor, dblock: torch.Tensor) -> None:
            """Adds what this rank's queries give a block [N, r + p], dq and dweight."""
            tiles = _tiles(context, documents, source)
            if tiles:
                k, v = expand(block, weight, heads)
                dk, dv = torch.zeros_like(k, dtype=lse.dtype), torch.zeros_like(v, dtype=lse.dtype)
                attend_tiles_backward(
                    dout, q, k, v, tiles, heads.scale, out, lse, dq, dk, dv, heads.backend
                )
                _expand_backward(dk, dv, block, weight, heads, dblock, dweight)

        dlatent = _block_gradients(latent, context, share)
        gradients = (dq.to(q.dtype), dlatent.to(latent.dtype), dweight.to(weight.dtype))
        return *gradients, None, None, None, None


def expand(
    block: torch.Tensor, weight: torch.Tensor, heads: LatentHeads
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents [N, r + p] -> keys [N, H, n + p] and values [N, H, v]."""
    latent, shared = block.split([heads.rank, heads.shared], dim=-1)
    expanded = F.linear(latent, weight).unflatten(-1, (-1, heads.key + heads.value))
    key, value = expanded.split([heads.key, heads.value], dim=-1)
    shared = shared.unsqueeze(1).expand(-1, key.shape[1], -1)
    return torch.cat([key, shared], dim=-1), value


def _expand_backward(
    dk: torch.Tensor,
    dv: torch.Tensor,
    block: torch.Tensor,
    weight: torch.Tensor,
    heads: LatentHeads,
    dblock: torch.Tensor,
    dweight: torch.Tensor,
) -> None:
    """The adjoint of `_expand`; adds to dblock and dweight."""
    dkey, dshared = dk.split([heads.key, heads.shared], dim=-1)
    dexpanded = torch.cat([dkey, dv], dim=-1).flatten(1).to(weight.dtype)
    latent = block[:, : heads.rank]
    dblock[:, : heads.rank] += dexpanded @ weight
    dblock[:, heads.rank :] += dshared.sum(1)
    dweight += dexpanded.T @ latent


# ------------------------------------------------------------------ tiles


@lru_cache(maxsize=256)
def _context_tiles(plan: ContextPlan, source: int) -> tuple[Tile, ...]:
    """This rank's queries against the keys that `source` holds."""
    held = plan_context(plan.layout, plan.documents, source).pieces
    by_document = defaultdict(list)
    for piece in held:
        by_document[piece.document].append(piece)
    tiles = []
    for mine in plan.pieces:
        for theirs in by_document[mine.document]:
            if theirs.first <= mine.first:
                causal = theirs.first == mine.first
                tiles.append(Tile(mine.start, mine.end, theirs.start, theirs.end, causal))
    return tuple(tiles)


def _tiles(context: ContextParallel, documents: Documents, source: int) -> Sequence[Tile]:
    return _context_tiles(context.plan(documents), source)


# ------------------------------------------------------------------ blocks on their way


def _blocks(latent: torch.Tensor, context: ContextParallel) -> Iterator[tuple[int, torch.Tensor]]:
    """(rank that holds it, block [N, r + p]) of every rank, this rank's own first."""
    group = context.group
    if group is None:
        yield 0, latent
    elif context.attention == "all_gather":
        wait = _gather(latent, group)
        yield context.rank, latent  # while the others are on their way
        blocks = wait()
        for source in _sources(context)[1:]:
            yield source, blocks[source]
    else:
        block, sources = latent, _sources(context)
        for source in sources[:-1]:
            wait = _pass_on(block, group, "the ring of latents")
            yield source, block
            block = wait()
        yield sources[-1], block


def _block_gradients(
    latent: torch.Tensor,
    context: ContextParallel,
    share: Callable[[int, torch.Tensor, torch.Tensor], None],
) -> torch.Tensor:
    """The sum of all ranks' shares of the gradient of this rank's own block [N, r + p]."""
    group = context.group
    if group is None or context.attention == "all_gather":
        dtype = torch.promote_types(latent.dtype, torch.float32)
        joint = latent.new_zeros(context.layout.ranks, *latent.shape, dtype=dtype)
        for source, block in _blocks(latent, context):
            share(source, block, joint[source])
        if group is None:
            return joint[0]
        total = torch.empty_like(joint[0])
        with exchange("the exchange of latents' gradients", group):
            torch.distributed.reduce_scatter_tensor(total, joint.flatten(0, 1), group=group)
        return total
    arrive: Wait | None = None
    for source, block in _blocks(latent, context):
        total = torch.zeros_like(block, dtype=torch.promote_types(block.dtype, torch.float32))
        share(source, block, total)
        if arrive is not None:  # the shares of the ranks that have met this block before
            total += arrive()
        arrive = _pass_on(total, group, "the ring of latents' gradients")
    assert arrive is not None
    return arrive()  # home again


def _sources(context: ContextParallel) -> list[int]:
    """Whose block arrives at each step of the ring."""
    ranks = context.layout.ranks
    return [(context.rank - step) % ranks for step in range(ranks)]


def _gather(latent: torch.Tensor, group: Group) -> Wait:
    """Starts to gather the blocks of all ranks; the result waits, and gives [P, N, r + p]."""
    blocks = latent.new_empty(group.size() * latent.shape[0], latent.shape[1])
    with exchange("the gathering of latents", group):
        work = torch.distributed.all_gather_into_tensor(blocks, latent, group=group, async_op=True)

    def wait() -> torch.Tensor:
        with exchange("the gathering of latents", group):
            work.wait()
        return blocks.unflatten(0, (group.size(), -1))

    return wait


def _pass_on(x: torch.Tensor, group: Group, what: str) -> Wait:
    """Starts to send x to the next rank of the ring, and to receive from the one before."""
    ranks, rank = group.size(), group.rank()
    received = torch.empty_like(x)
    following = torch.distributed.get_global_rank(group, (rank + 1) % ranks)
    previous = torch.distributed.get_global_rank(group, (rank - 1) % ranks)
    with exchange(what, group):
        works = torch.distributed.batch_isend_irecv(
            [
                torch.distributed.P2POp(torch.distributed.isend, x, following, group),
                torch.distributed.P2POp(torch.distributed.irecv, received, previous, group),
            ]
        )

    def wait(sent: torch.Tensor = x) -> torch.Tensor:  # which has to live until then
        with exchange(what, group):
            for work in works:
                work.wait()
        return received

    return wait
