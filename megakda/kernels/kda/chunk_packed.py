"""Chunk-parallel KDA over packed sequences, all of them at once.

Chunks are cut over the packed row wherever they fall. A sequence's first token gets a decay of
zero, log -inf, and so everything that reaches across the boundary, scores inside a chunk and the
state from chunk to chunk, becomes an exact zero: the chunk form multiplies decays and never divides
or subtracts them, so it needs nothing else.

Initial states enter and final states leave in the middle of chunks. A sequence's first piece is its
tokens up to the end of the chunk it begins in, its last piece those from the start of the chunk it
ends in; a contained sequence begins and ends in the same chunk, a spanning one does not. The
initial state S_0 is read by the first piece, under every key and query, and what is left of it
joins the carried state:

    v_i <- v_i - S_0^T (k_i * D(i, before))        o_i <- o_i + scale * S_0^T (q_i * D(i, before))
    S <- S + Diag(D(end of the piece, before)) S_0

where D(i, before) counts the first token's own decay. The final state is what the last piece leaves
of the state before it, plus what its tokens wrote, n_j:

    S_final = Diag(D(last, start of the piece)) S + sum_j (k_j * D(last, j)) n_j^T

Both are batched over the sequences, in one batch per power of two of the piece's length.

Letters in shapes, besides those of `chunk_torch.py`:
    R sequences that are not empty   P pieces of a batch   L tokens of its longest, at most C
"""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from megakda.kernels.kda.chunk_torch import chunk_kda_torch, chunk_length, run_chunks


def packed_kda_torch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float,
    initial_state: torch.Tensor | None,
    bounds: list[int],
    *,
    output_final_state: bool,
    chunk_size: int = 64,
    delta_rule: bool = True,
    recompute: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gated delta rule over sequences that follow each other in one row.

    A sequence's results and gradients do not depend on the values of another, to the bit, as long
    as products of values of the two stay finite, for 0 times them is 0. A sequence that overflows
    to inf or NaN may spoil those that share a chunk with it or come later. Where a sequence begins
    within a chunk does matter to its own rounding.

    Args:
        q: [1, T, H, K], T >= 1; k, v, g, beta, scale, chunk_size, delta_rule and recompute as in
            `chunk_kda_torch`.
        initial_state: [N, HV, K, V] or None for zero.
        bounds: N + 1 token numbers, not falling, from 0 to T; sequence n is the tokens bounds[n] up
            to, not including, bounds[n + 1].
        output_final_state: without initial and final states the cost is that of one sequence of T
            tokens, however many they are.

    Returns:
        o [1, T, HV, V], and the state after the last token of each sequence [N, HV, K, V] (the
        initial one for an empty sequence) or None unless `output_final_state`.
    """
    dtype = torch.promote_types(v.dtype, torch.float32)
    if initial_state is not None:
        initial_state = initial_state.to(dtype)
    if len(bounds) == 2:
        o, final_state, _ = chunk_kda_torch(
            q,
            k,
            v,
            g,
            beta,
            scale,
            initial_state,
            chunk_size,
            delta_rule=delta_rule,
            recompute=recompute,
        )
        return o, final_state if output_final_state else None

    chunk = chunk_length(v.shape[1], chunk_size)
    present = [(n, start, end) for n, (start, end) in enumerate(pairwise(bounds)) if start < end]
    numbers, starts, ends = torch.tensor(present, device=v.device).unbind(1)
    first_chunk, last_chunk = starts // chunk, (ends - 1) // chunk
    spanning = (first_chunk < last_chunk).nonzero().squeeze(1)
    contained = (first_chunk == last_chunk).nonzero().squeeze(1)
    added_states = None
    if initial_state is not None:
        first = _Pieces(starts, torch.minimum(ends, (first_chunk + 1) * chunk) - starts, 1)
        entering = initial_state.index_select(0, numbers[first.order])
        tokens, read_by_q, read_by_k, left = _enter(q, k, g, entering, first)
        if delta_rule:
            v = v.to(dtype).index_add(1, tokens, read_by_k, alpha=-1)
        added_states = left.index_select(0, first.places[spanning]).unsqueeze(1)

    o, _, states, v_new = run_chunks(
        q,
        k,
        v,
        g.index_fill(1, starts, -torch.inf),
        beta,
        scale,
        None,
        chunk,
        added_states=added_states,
        added_after=tuple(first_chunk[spanning].tolist()),
        delta_rule=delta_rule,
        recompute=recompute,
    )
    if initial_state is not None:
        o = o.index_add(1, tokens, read_by_q, alpha=scale)
    if not output_final_state:
        return o, None

    last = _Pieces(ends - 1, ends - torch.maximum(starts, last_chunk * chunk), -1)
    final_state, total = _leave(k, g, v_new.transpose(2, 3).flatten(0, 2), last)
    places = last.places[spanning]
    before = states.squeeze(1).index_select(0, last_chunk[spanning])
    final_state.index_add_(0, places, total.index_select(0, places) * before)
    if initial_state is not None:
        before = left.index_select(0, first.places[contained])
        final_state.index_add_(0, last.places[contained], before)
    if len(present) == len(bounds) - 1:
        return o, final_state.index_select(0, last.places)
    if initial_state is None:
        initial_state = final_state.new_zeros(len(bounds) - 1, *final_state.shape[1:])
    return o, initial_state.index_copy(0, numbers[last.order], final_state)


class _Pieces:
    """A piece of each of R sequences: the tokens starts[r], starts[r] + step, ..., lengths[r] of
    them. They are worked on in batches of similar length, so that padding no more than doubles
    them; results that have one entry for each piece are in the order of the batches.

    order: [R], the sequences in that order.
    places: [R], where each sequence is in that order.
    masks: for each batch [L, P], which tokens exist; the padding repeats existing ones.
    tokens: the tokens of all batches [sum L*P].
    """

    def __init__(self, starts: torch.Tensor, lengths: torch.Tensor, step: int) -> None:
        members = defaultdict(list)
        for number, length in enumerate(lengths.tolist()):
            members[(length - 1).bit_length()].append(number)
        order, tokens, self.masks = [], [], []
        for numbers in members.values():
            ids = torch.tensor(numbers, device=starts.device)
            offsets = torch.arange(int(lengths[ids].max()), device=ids.device).unsqueeze(1)
            order.append(ids)
            tokens.append(starts[ids] + step * torch.minimum(offsets, lengths[ids] - 1))
            self.masks.append(offsets < lengths[ids])
        self.order = torch.cat(order)
        self.places = self.order.argsort()
        self.tokens = torch.cat([x.flatten() for x in tokens])

    def gather(self, x: torch.Tensor, heads: int, dtype: torch.dtype) -> list[torch.Tensor]:
        """x [T, h, D] -> for each batch [L, P, heads, D]."""
        x = x.index_select(0, self.tokens).to(dtype)
        if x.shape[1] != heads:
            x = x.repeat_interleave(heads // x.shape[1], dim=1)
        parts = x.split([mask.numel() for mask in self.masks])
        return [y.unflatten(0, mask.shape) for y, mask in zip(parts, self.masks, strict=True)]

    def decays(self, g: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
        """g [T, HV, D] -> for each batch the product of exp(g) over the first 1, 2, ... L tokens
        [L, P, HV, D]."""
        parts = self.gather(g, g.shape[1], dtype)
        return [
            _CumulativeDecay.apply(y.masked_fill(~mask[..., None, None], 0))
            for y, mask in zip(parts, self.masks, strict=True)
        ]


def _enter(
    q: torch.Tensor, k: torch.Tensor, g: torch.Tensor, states: torch.Tensor, pieces: _Pieces
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Initial states [R, HV, K, V] into the first pieces.

    Returns:
        The numbers of the pieces' tokens, what their queries and their keys read of the initial
        state, [1, tokens, HV, V] each, and what is left of it after the piece [R, HV, K, V].
    """
    dtype, heads = states.dtype, states.shape[1]
    reads: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    left = []
    for mask, decay, state, *rows in zip(
        pieces.masks,
        pieces.decays(g[0], dtype),
        states.split([mask.shape[1] for mask in pieces.masks]),
        pieces.gather(q[0], heads, dtype),
        pieces.gather(k[0], heads, dtype),
        strict=True,
    ):
        for x, out in zip(rows, reads, strict=True):
            read = torch.matmul((x * decay).permute(1, 2, 0, 3), state)  # [P, HV, L, V]
            out.append(read.permute(2, 0, 1, 3)[mask])
        left.append(decay[-1].unsqueeze(-1) * state)
    exists = torch.cat([mask.flatten() for mask in pieces.masks])
    read_by_q, read_by_k = (torch.cat(x).unsqueeze(0) for x in reads)
    return pieces.tokens[exists], read_by_q, read_by_k, torch.cat(left)


def _leave(
    k: torch.Tensor, g: torch.Tensor, written: torch.Tensor, pieces: _Pieces
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the last pieces, whose tokens are in reverse order, make of the state.

    written is n of all tokens [tokens, HV, V]. Returns the state that each piece leaves if it
    begins with zero [R, HV, K, V], and its decay [R, HV, K or 1, 1].
    """
    dtype, heads = written.dtype, written.shape[1]
    states, totals = [], []
    for mask, decay, keys, values in zip(
        pieces.masks,
        pieces.decays(g[0], dtype),
        pieces.gather(k[0], heads, dtype),
        pieces.gather(written, heads, dtype),
        strict=True,
    ):
        after = torch.cat((torch.ones_like(decay[:1]), decay[:-1]))
        keys = (keys * after).masked_fill(~mask[..., None, None], 0)
        states.append(torch.matmul(keys.permute(1, 2, 3, 0), values.permute(1, 2, 0, 3)))
        totals.append(decay[-1].unsqueeze(-1))
    return torch.cat(states), torch.cat(totals)


class _CumulativeDecay(torch.autograd.Function):
    """Cumulative products of exp(g) along the first dimension. Like those inside the chunks they
    are formed, and differentiated, without a sum of logarithms and without a quotient."""

    @staticmethod
    def forward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        decay = g.exp()
        for previous, this in pairwise(decay.unbind(0)):
            this.mul_(previous)
        ctx.save_for_backward(decay)
        return decay

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, ddecay: torch.Tensor) -> torch.Tensor:
        (decay,) = ctx.saved_tensors
        dg = decay * ddecay
        for this, previous in pairwise(reversed(dg.unbind(0))):
            previous.add_(this)
        return dg
