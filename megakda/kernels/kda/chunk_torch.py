"""Chunk-parallel KDA in plain PyTorch: exact for any decay, forward and backward.

`megakda/kernels/README.md` derives the formulas. Two autograd functions do the work: `_IntraChunk`,
everything that needs no state, for all chunks at once; and `_ChunkRecurrence`, the walk over the
chunks that carries the state.

Letters in shapes:
    B batch   T tokens   H query/key heads   HV value heads   K key size   V value size
    C tokens of a chunk   N chunks of a sequence   Z = B*HV independent states
    M = N*Z chunks in all, ordered by position first: chunk n of state z is row n*Z + z, so that
      one step of the walk reads and writes contiguous memory
    s tokens of a block while blocks are merged in pairs: 1, 2, 4, ... C/2
    G width of the decay: K, or 1 for one decay per head
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def chunk_kda_torch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float,
    initial_state: torch.Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gated delta rule over a batch of sequences of equal length.

    Arithmetic is fp32 (float64 where v is float64). The bits of token t's output do not depend on
    the values of later tokens.

    Args:
        q: [B, T, H, K], T >= 1.
        k: [B, T, H, K].
        v: [B, T, HV, V], HV a multiple of H.
        g: [B, T, HV, G], decay in log space, <= 0, of any size; G is K or 1.
        beta: [B, T, HV].
        scale: of the output.
        initial_state: [B, HV, K, V] or None for zero.
        chunk_size: a power of two; memory grows with it, the number of serial steps falls.

    Returns:
        o [B, T, HV, V], the state after the last token [B, HV, K, V], and the state before each
        chunk [B, N, HV, K, V], which carries no gradient.
    """
    dtype = torch.promote_types(v.dtype, torch.float32)
    batch, tokens, heads, value_dim = v.shape
    key_dim = k.shape[-1]
    # Shorter sequences than a chunk need no more than the next power of two.
    chunk = min(chunk_size, 1 << (tokens - 1).bit_length())

    q, k, v, g = (_to_chunks(x, heads, chunk, dtype) for x in (q, k, v, g))
    beta = _to_chunks(beta.unsqueeze(-1), heads, chunk, dtype)
    if initial_state is None:
        initial_state = v.new_zeros(batch * heads, key_dim, value_dim)
    else:
        initial_state = initial_state.to(dtype).flatten(0, 1)

    intra = _IntraChunk.apply(q * scale, k * beta, k, g)
    o, final_state, states = _ChunkRecurrence.apply(*intra, v * beta, initial_state)

    o = o.view(-1, batch, heads, chunk, value_dim).permute(1, 0, 3, 2, 4)  # [B, N, C, HV, V]
    o = o.reshape(batch, -1, heads, value_dim)[:, :tokens]
    state_shape = (batch, heads, key_dim, value_dim)
    return o, final_state.view(state_shape), states.unflatten(1, state_shape[:2]).transpose(0, 1)


def _to_chunks(x: torch.Tensor, heads: int, chunk: int, dtype: torch.dtype) -> torch.Tensor:
    """[B, T, h, D] -> [M, C, D]: heads repeated to `heads`, the last chunk filled with zeros.

    A filled token has k = v = beta = 0 and g = 0: it leaves the state as it is.
    """
    if x.shape[1] % chunk:
        x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % chunk))
    x = x.unflatten(1, (-1, chunk)).permute(1, 0, 3, 2, 4)  # [N, B, h, C, D]
    if x.shape[2] != heads:
        repeats = heads // x.shape[2]
        x = x.unsqueeze(3).expand(-1, -1, -1, repeats, -1, -1)
    # A conversion of dtype lays the memory out in the same pass; otherwise `contiguous` does.
    x = x.to(dtype, memory_format=torch.contiguous_format).contiguous()
    return x.view(-1, chunk, x.shape[-1])


# ------------------------------------------------------------------ inside a chunk


class _IntraChunk(torch.autograd.Function):
    """Decayed scores inside each chunk, and the factors that tie it to the state.

    With D(i, j) the product of exp(g) over the tokens after j up to and including i:

        scores_q[i, j] = sum_d q_id k_jd D_d(i, j)   for j <= i
        scores_b[i, j] = sum_d b_id k_jd D_d(i, j)   for j <  i
        q_in = q * D(i, start)   b_in = b * D(i, start)   (start: before the first token)
        k_out = k * D(end, j)    total = D(end, start)    (end: the last token)

    D(i, j) is never formed for pairs, and never as a quotient. Blocks are merged in pairs: for i in
    the right block and j in the left one, D(i, j) = (product from the right block's start up to i)
    * (product from after j to the left block's end), both at most 1. The products themselves are
    built by the same merging, so nothing is subtracted, nothing overflows, and a decay too strong
    for the number format becomes the zero it stands for.

    Shapes: q, b, k [M, C, K], g [M, C, G] -> scores_q, scores_b [M, C, C], q_in, b_in,
    k_out [M, C, K], total [M, G].
    """

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, b: torch.Tensor, k: torch.Tensor, g: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        chunks, chunk, _ = k.shape
        scores_q, scores_b = (k.new_zeros(chunks, chunk, chunk) for _ in range(2))
        torch.diagonal(scores_q, dim1=1, dim2=2).copy_(torch.linalg.vecdot(q, k))
        prefix, suffix = g.exp(), torch.ones_like(g)
        for s, row_decay, column_decay in _merge_decays(prefix, suffix):
            columns = (_left(k, s) * column_decay).mT
            for x, scores in ((q, scores_q), (b, scores_b)):
                block = torch.bmm(_right(x, s) * row_decay, columns)
                _lower_left(scores, s).copy_(block.view(chunks, -1, s, s))
        ctx.save_for_backward(q, b, k, g)
        return scores_q, scores_b, q * prefix, b * prefix, k * suffix, prefix[:, -1].clone()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        dscores_q: torch.Tensor,
        dscores_b: torch.Tensor,
        dq_in: torch.Tensor,
        db_in: torch.Tensor,
        dk_out: torch.Tensor,
        dtotal: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        # dg_t is the sum, over all products that contain exp(g_t), of product * its gradient. Such
        # terms are collected per token, `dprefix` for products that end at a token and `dsuffix`
        # for products that begin after one, and shared out while blocks are split in halves again.
        # The terms of a token with itself, which do not depend on the decay, never enter: taking
        # them in and subtracting them, as the shorter q*dq - k*dk formula does, costs all digits
        # of dg where the decay is strong.
        q, b, k, g = ctx.saved_tensors
        prefix, suffix = g.exp(), torch.ones_like(g)
        merges = [
            (s, row_decay.clone(), column_decay.clone())
            for s, row_decay, column_decay in _merge_decays(prefix, suffix)
        ]
        dq, db, dk = dq_in * prefix, db_in * prefix, dk_out * suffix
        dprefix, dsuffix = torch.zeros_like(g), torch.zeros_like(g)
        _add_product(dprefix, dq, q)
        _add_product(dprefix, db, b)
        _add_product(dsuffix, dk, k)
        dprefix[:, -1].addcmul_(dtotal, prefix[:, -1])

        diagonal = torch.diagonal(dscores_q, dim1=1, dim2=2).unsqueeze(-1)
        dq.addcmul_(diagonal, k)
        dk.addcmul_(diagonal, q)
        for s, row_decay, column_decay in reversed(merges):
            # A product over (start .. i in the right block) holds all of the left block, one over
            # (after j in the left block .. end) all of the right block.
            _left(dprefix, s)[:, -1].add_(_right(dprefix, s).sum(1))
            _right(dprefix, s)[:, -1].add_(_left(dsuffix, s).sum(1))
            columns = _left(k, s) * column_decay
            dcolumns = torch.zeros_like(columns)
            for x, dx, dscores in ((q, dq, dscores_q), (b, db, dscores_b)):
                rows = _right(x, s) * row_decay
                dblock = _lower_left(dscores, s).reshape(-1, s, s)
                drows = _bmm(dblock, columns)
                dcolumns.add_(_bmm(dblock.mT, rows))
                _right(dx, s).addcmul_(drows, row_decay)
                _add_product(_right(dprefix, s), drows, rows)
            _left(dk, s).addcmul_(dcolumns, column_decay)
            _add_product(_left(dsuffix, s), dcolumns, columns)
        return dq, db, dk, dprefix


def _merge_decays(
    prefix: torch.Tensor, suffix: torch.Tensor
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Merges blocks of 1, 2, 4, ... tokens in pairs, up to the chunk; works in place.

    On entry prefix [M, C, G] is exp(g) and suffix [M, C, G] is 1; after the last merge prefix[i] is
    the product up to and including token i, suffix[j] the product of the tokens after j.

    Yields, before each merge, the block size s, the right blocks' prefixes and the left blocks'
    suffixes, [M*C/2s, s, G] each: views, valid until the next step.
    """
    s = 1
    while s < prefix.shape[1]:
        yield s, _right(prefix, s), _left(suffix, s)
        _left(suffix, s).mul_(_right(prefix, s)[:, -1:])
        _right(prefix, s).mul_(_left(prefix, s)[:, -1:])
        s *= 2


def _left(x: torch.Tensor, s: int) -> torch.Tensor:
    """The first of each pair of s-token blocks: view [M, C, D] -> [M*C/2s, s, D]."""
    return x.view(-1, 2, s, x.shape[-1])[:, 0]


def _right(x: torch.Tensor, s: int) -> torch.Tensor:
    """The second of each pair of s-token blocks: view [M, C, D] -> [M*C/2s, s, D]."""
    return x.view(-1, 2, s, x.shape[-1])[:, 1]


def _lower_left(scores: torch.Tensor, s: int) -> torch.Tensor:
    """Right rows against left columns of each pair: view [M, C, C] -> [M, C/2s, s, s]."""
    pairs = scores.shape[1] // (2 * s)
    blocks = scores.unflatten(2, (pairs, 2, s)).unflatten(1, (pairs, 2, s))
    # [M, pair, half, row, pair, half, column]: right half of the rows, left half of the columns
    return blocks[:, :, 1, :, :, 0].diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)


def _bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a [X, I, J] @ b [X, J, D]. For J <= 2 torch's CPU bmm runs a scalar loop, so that is
    written as sums of products."""
    if a.shape[2] > 2:
        return torch.bmm(a, b)
    out = a[:, :, :1] * b[:, :1]
    for j in range(1, a.shape[2]):
        out.addcmul_(a[:, :, j : j + 1], b[:, j : j + 1])
    return out


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a * b, summed over the channels where they share one decay (total's width is 1)."""
    if total.shape[-1] == a.shape[-1]:
        total.addcmul_(a, b)
    else:
        total.add_(torch.linalg.vecdot(a, b).unsqueeze(-1))


# ------------------------------------------------------------------ from chunk to chunk


class _ChunkRecurrence(torch.autograd.Function):
    """Walks the chunks in order, S being the state before each of them:

        x = v - b_in S        v_new = (I + scores_b)^-1 x
        o = q_in S + scores_q v_new
        S <- Diag(total) S + k_out^T v_new

    The inverse is applied to x inside the walk: one product more per step than with the product
    of inverse and (b_in, v) made beforehand, but two fewer for each chunk in the forward pass and
    four in the backward pass.

    Shapes: the outputs of `_IntraChunk`, v [M, C, V] (times beta), state [Z, K, V] -> o [M, C, V],
    final state [Z, K, V], states before each chunk [N, Z, K, V] (not differentiable).
    """

    @staticmethod
    def forward(
        ctx: Any,
        scores_q: torch.Tensor,
        scores_b: torch.Tensor,
        q_in: torch.Tensor,
        b_in: torch.Tensor,
        k_out: torch.Tensor,
        total: torch.Tensor,
        v: torch.Tensor,
        state: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        streams = state.shape[0]
        steps = v.shape[0] // streams
        inverse = _unit_lower_inverse(scores_b)
        v_new = torch.empty_like(v)
        states = state.new_empty(steps + 1, *state.shape)
        states[0] = state

        before = states.unbind(0)
        b_n, inverse_n, k_n, total_n, v_n, v_new_n = (
            _steps(x, streams) for x in (b_in, inverse, k_out.mT, total.unsqueeze(-1), v, v_new)
        )
        for n in range(steps):
            x = torch.baddbmm(v_n[n], b_n[n], before[n], alpha=-1)
            torch.bmm(inverse_n[n], x, out=v_new_n[n])
            torch.mul(before[n], total_n[n], out=before[n + 1])
            before[n + 1].baddbmm_(k_n[n], v_new_n[n])

        states, final_state = states[:-1], states[-1].clone()
        o = torch.bmm(q_in, states.flatten(0, 1)).baddbmm_(scores_q, v_new)
        ctx.save_for_backward(scores_q, inverse, q_in, b_in, k_out, total, v_new, states)
        ctx.mark_non_differentiable(states)
        ctx.set_materialize_grads(False)  # or backward would be handed zeros the size of `states`
        return o, final_state, states

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, do: torch.Tensor | None, dfinal_state: torch.Tensor | None, _: None
    ) -> tuple[torch.Tensor, ...]:
        scores_q, inverse, q_in, b_in, k_out, total, v_new, states = ctx.saved_tensors
        steps, streams = states.shape[:2]
        if do is None:
            do = torch.zeros_like(v_new)
        # First what each chunk's output adds, for all chunks at once; the walk back adds the rest.
        dstate_o = torch.bmm(q_in.mT, do)
        dv_new = torch.bmm(scores_q.mT, do)
        dx = torch.empty_like(dv_new)
        dstates = states.new_empty(steps + 1, *states.shape[1:])
        dstates[-1] = 0 if dfinal_state is None else dfinal_state

        dbefore = dstates.unbind(0)
        b_n, inverse_n, k_n, total_n, dstate_o_n, dv_new_n, dx_n = (
            _steps(x, streams)
            for x in (b_in.mT, inverse.mT, k_out, total.unsqueeze(-1), dstate_o, dv_new, dx)
        )
        for n in reversed(range(steps)):
            dafter = dbefore[n + 1]
            dv_new_n[n].baddbmm_(k_n[n], dafter)
            torch.bmm(inverse_n[n], dv_new_n[n], out=dx_n[n])
            torch.addcmul(dstate_o_n[n], dafter, total_n[n], out=dbefore[n])
            dbefore[n].baddbmm_(b_n[n], dx_n[n], alpha=-1)

        states, dafter = states.flatten(0, 1), dstates[1:].flatten(0, 1)
        dtotal = torch.linalg.vecdot(dafter, states)  # [M, K]
        if total.shape[-1] != dtotal.shape[-1]:
            dtotal = dtotal.sum(-1, keepdim=True)
        return (
            torch.bmm(do, v_new.mT),
            # Only the strictly lower triangles of the scores are variables; `_IntraChunk` reads
            # no more of these gradients.
            torch.bmm(dx, v_new.mT).neg_(),
            torch.bmm(do, states.mT),
            torch.bmm(dx, states.mT).neg_(),
            torch.bmm(v_new, dafter.mT),
            dtotal,
            dx,
            dstates[0],
        )


def _steps(x: torch.Tensor, streams: int) -> tuple[torch.Tensor, ...]:
    """[N*Z, ...] -> N views [Z, ...]."""
    return x.unflatten(0, (-1, streams)).unbind(0)


def _unit_lower_inverse(a: torch.Tensor) -> torch.Tensor:
    """(I + a)^-1 for strictly lower triangular a [M, C, C], by merging blocks in pairs: the inverse
    of [[P, 0], [Q, R]] is [[P^-1, 0], [-R^-1 Q P^-1, R^-1]].
    """
    inverse = a.new_ones(a.shape[0] * a.shape[1], 1, 1)
    s = 1
    while s < a.shape[1]:
        upper, lower = inverse.view(-1, 2, s, s).unbind(1)
        block = _lower_left(a, s).reshape(-1, s, s)
        inverse = a.new_zeros(len(upper), 2 * s, 2 * s)
        inverse[:, :s, :s] = upper
        inverse[:, s:, s:] = lower
        inverse[:, s:, :s] = torch.bmm(lower, torch.bmm(block, upper)).neg_()
        s *= 2
    return inverse
