"""Chunk-parallel KDA in plain PyTorch: exact for any decay, forward and backward.

`megakda/kernels/kda/README.md` derives the formulas. Chunks are worked on in groups small enough
for their intermediate results to stay in the processor's cache: first what needs no state, for all
chunks of the group at once (`chunk_intra.py`), then the walk that carries the state through them.

Letters in shapes, besides those of `chunk_intra.py`:
    B batch   T tokens   H query/key heads   HV value heads   Z = B*HV independent states
    N chunks of a sequence   n chunks of each sequence in a group
    M = n*Z chunks of a group, ordered by position first: chunk i of state z is row i*Z + z, so that
      one step of the walk reads and writes contiguous memory
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from megakda.kernels.kda.chunk_intra import (
    Chunks,
    Pairs,
    Scores,
    decay_factors,
    decay_factors_backward,
)

_GROUP_BYTES = 1 << 20  # of one array [M, C, K or V]; about thirty are alive in the backward pass


def chunk_kda_torch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float,
    initial_state: torch.Tensor | None = None,
    chunk_size: int = 64,
    *,
    delta_rule: bool = True,
    recompute: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gated delta rule over a batch of sequences of equal length.

    Arithmetic is fp32 (float64 where v is float64). The bits of token t's output do not depend on
    the values of later tokens.

    Args:
        q: [B, T, H, K], T >= 1.
        k: [B, T, H, K].
        v: [B, T, HV, V], HV a multiple of H.
        g: [B, T, HV, K] or [B, T, HV, 1], decay in log space, <= 0, of any size, -inf included.
        beta: [B, T, HV].
        scale: of the output.
        initial_state: [B, HV, K, V] or None for zero.
        chunk_size: a power of two; memory grows with it, the number of serial steps falls.
        delta_rule: False for plain gated linear attention, S <- Diag(exp g) S + k (beta v)^T.
        recompute: keep nothing for the backward pass but the inputs and one state per group of
            chunks; it then runs the forward pass again, group by group.

    Returns:
        o [B, T, HV, V], the state after the last token [B, HV, K, V], and the state before each
        chunk [B, N, HV, K, V], which carries no gradient.
    """
    chunk = chunk_length(v.shape[1], chunk_size)
    o, final_state, states, _ = run_chunks(
        q,
        k,
        v,
        g,
        beta,
        scale,
        initial_state,
        chunk,
        delta_rule=delta_rule,
        recompute=recompute,
    )
    return o, final_state, states.detach().transpose(0, 1)


@torch.no_grad()
def initial_state_gradient(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float,
    do: torch.Tensor,
    dfinal_state: torch.Tensor | None,
    chunk_size: int = 64,
    *,
    delta_rule: bool = True,
) -> torch.Tensor:
    """The gradient of the initial state alone [B, HV, K, V], about the cost of a forward pass.

    It does not depend on the states, nor on the values of v. Arguments as in `chunk_kda_torch`,
    and the gradients of its results, do [B, T, HV, V] and dfinal_state [B, HV, K, V] or None.
    """
    chunk = chunk_length(v.shape[1], chunk_size)
    q, k, v, g, beta, do = _whole_chunks(chunk, q, k, v, g, beta, do)
    layout = _Layout(k, v, chunk)
    dstate = layout.empty(layout.streams, k.shape[-1], v.shape[-1]).zero_()
    if dfinal_state is not None:
        dstate += dfinal_state.flatten(0, 1)
    for span in reversed(layout.spans):
        q_n, k_n, g_n, beta_n = _load_factors(layout, span, q, k, g, beta)
        scores = Scores(q_n, k_n)
        chunks = decay_factors(q_n, k_n, g_n, beta_n, delta_rule, scores, None)
        dy = layout.load(do, span).mul_(scale)
        dwritten = torch.bmm(scores.q.mT, dy)
        dbefore = torch.bmm(chunks.rows[:, :, 0].mT, dy)
        _, dstate, _ = _walk_back(chunks, scores.inverse, dwritten, dbefore, dstate, span, {})
    return dstate.unflatten(0, (v.shape[0], v.shape[2]))


def chunk_length(tokens: int, chunk_size: int) -> int:
    """Shorter sequences than a chunk need no more than the next power of two."""
    return min(chunk_size, 1 << (tokens - 1).bit_length())


def run_chunks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float,
    initial_state: torch.Tensor | None,
    chunk: int,
    *,
    added_states: torch.Tensor | None = None,
    added_after: tuple[int, ...] = (),
    delta_rule: bool = True,
    recompute: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`chunk_kda_torch` with the insides that packed sequences need; everything has gradients.

    Args:
        added_states: [len(added_after), B, HV, K, V]; entry i is added to the state after the chunk
            at position added_after[i].

    Returns:
        o [B, T, HV, V], the final state [B, HV, K, V], the states before each chunk
        [N, B, HV, K, V], and what each token wrote to the state, N in the README [N, B, HV, C, V].
    """
    dtype = torch.promote_types(v.dtype, torch.float32)
    batch, tokens, heads, value_dim = v.shape
    if initial_state is None:
        initial_state = v.new_zeros(batch, heads, k.shape[-1], value_dim, dtype=dtype)
    q, k, v, g, beta = _whole_chunks(chunk, q, k, v, g, beta)
    inputs = (q, k, v, g, beta, initial_state, added_states)
    differentiable = any(x is not None and x.requires_grad for x in inputs)
    keep = differentiable and torch.is_grad_enabled() and not recompute
    o, final_state, states, v_new = _ChunkKDA.apply(
        *inputs, scale, chunk, added_after, delta_rule, keep
    )
    return o[:, :tokens], final_state, states, v_new


def _whole_chunks(chunk: int, *sequences: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """[B, T, ...] each, filled up to whole chunks with zeros: a token with k = v = beta = 0 and
    g = 0 leaves the state as it is."""
    padding = -sequences[0].shape[1] % chunk
    if not padding:
        return sequences
    return tuple(F.pad(x, (0, 0) * (x.ndim - 2) + (0, padding)) for x in sequences)


class _Layout:
    """How sequences [B, T, h, D] lie in chunks [M, C, D], group by group."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor, chunk: int) -> None:
        batch, tokens, self.heads, value_dim = v.shape
        self.chunk = chunk
        self.streams = batch * self.heads
        self.positions = tokens // chunk
        self.dtype = torch.promote_types(v.dtype, torch.float32)
        self.device = v.device
        chunk_bytes = chunk * max(k.shape[-1], value_dim) * self.dtype.itemsize
        self.group = max(1, _GROUP_BYTES // (self.streams * chunk_bytes))
        starts = range(0, self.positions, self.group)
        self.spans = [range(n, min(n + self.group, self.positions)) for n in starts]

    def empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def load(self, x: torch.Tensor, span: range, out: torch.Tensor | None = None) -> torch.Tensor:
        """[B, T, h, D] -> the chunks of `span` [M, C, D], heads repeated to HV. Into `out` if
        given; it may be strided, and repeats a last dimension of 1 where it is wider."""
        x = self._chunked(x, span).unsqueeze(3)
        n, batch, h, _, _, dim = x.shape
        if out is None:
            out = self.empty(n * self.streams, self.chunk, dim)
        out.unflatten(0, (n, batch, h, self.heads // h)).copy_(x)
        return out

    def store(self, x: torch.Tensor, span: range, out: torch.Tensor) -> None:
        """The adjoint of `load`: x [M, C, D] into out [B, T, h, D], summing what was repeated."""
        out = self._chunked(out, span)
        n, batch, h, _, dim = out.shape
        x = x.unflatten(0, (n, batch, h, self.heads // h))
        x = x.sum(3) if h < self.heads else x.squeeze(3)
        out.copy_(x.sum(-1, keepdim=True) if dim < x.shape[-1] else x)

    def _chunked(self, x: torch.Tensor, span: range) -> torch.Tensor:
        """View [B, T, h, D] -> [n, B, h, C, D]."""
        x = x[:, span.start * self.chunk : span.stop * self.chunk]
        return x.unflatten(1, (len(span), self.chunk)).permute(1, 0, 3, 2, 4)


class _ChunkKDA(torch.autograd.Function):
    """Shapes as in `run_chunks`, T a multiple of C. Per chunk, S being the state before it:

        x = beta v - b_in S        v_new = (I + A)^-1 x
        o = scale * (q_in S + scores_q v_new)
        S <- Diag(total) S + k_out^T v_new

    The inverse is applied to x inside the walk: one product more per step than with the product
    of inverse and (b_in, v) made beforehand, but two fewer for each chunk in the forward pass and
    four in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        initial_state: torch.Tensor,
        added_states: torch.Tensor | None,
        scale: float,
        chunk: int,
        added_after: tuple[int, ...],
        delta_rule: bool,
        keep: bool,
    ) -> tuple[torch.Tensor, ...]:
        layout = _Layout(k, v, chunk)
        added = _by_position(added_states, added_after)
        o = layout.empty(*v.shape)
        states = layout.empty(layout.positions + 1, layout.streams, k.shape[-1], v.shape[-1])
        states[0] = initial_state.flatten(0, 1)
        v_new = layout.empty(layout.positions, layout.streams, chunk, v.shape[-1])
        kept = []
        for span in layout.spans:
            q_n, k_n, g_n, beta_n = _load_factors(layout, span, q, k, g, beta)
            scores = Scores(q_n, k_n)
            chunks = decay_factors(q_n, k_n, g_n, beta_n, delta_rule, scores, None)
            before, written = states[span.start : span.stop + 1], v_new[span.start : span.stop]
            x = layout.load(v, span).mul_(beta_n)
            _walk(chunks, scores.inverse, x, before, written, span, added)
            out = torch.bmm(chunks.rows[:, :, 0], before[:-1].flatten(0, 1))
            out.baddbmm_(scores.q, written.flatten(0, 1), alpha=scale, beta=scale)
            layout.store(out, span, o)
            if keep:
                kept += [scores.q, scores.inverse]

        saved = [states, v_new, *kept] if keep else [states[: -1 : layout.group].clone()]
        ctx.save_for_backward(q, k, v, g, beta, added_states, *saved)
        ctx.constants = scale, chunk, added_after, delta_rule, keep
        ctx.set_materialize_grads(False)  # or backward would be handed zeros the size of `states`
        batch_heads = (v.shape[0], v.shape[2])
        return (
            o,
            states[-1].unflatten(0, batch_heads).clone(),
            states[:-1].unflatten(1, batch_heads),
            v_new.unflatten(1, batch_heads),
        )

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        do: torch.Tensor | None,
        dfinal_state: torch.Tensor | None,
        dstates: torch.Tensor | None,
        dv_new: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, ...]:
        q, k, v, g, beta, added_states, *saved = ctx.saved_tensors
        scale, chunk, added_after, delta_rule, keep = ctx.constants
        layout = _Layout(k, v, chunk)
        added = _by_position(added_states, added_after)
        dadded_states = None if added_states is None else torch.empty_like(added_states)
        dadded = _by_position(dadded_states, added_after)
        dinputs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, g, beta)]
        dstate = saved[0].new_zeros(saved[0].shape[1:])
        if dfinal_state is not None:
            dstate += dfinal_state.flatten(0, 1)

        for group, span in reversed(list(enumerate(layout.spans))):
            q_n, k_n, g_n, beta_n = _load_factors(layout, span, q, k, g, beta)
            v_n = layout.load(v, span)
            merged: list[Pairs] = []
            if keep:
                chunks = decay_factors(q_n, k_n, g_n, beta_n, delta_rule, None, merged)
                states, v_new, *kept = saved
                before, written = states[span.start : span.stop + 1], v_new[span.start : span.stop]
                scores_q, inverse = kept[2 * group : 2 * group + 2]
            else:
                scores = Scores(q_n, k_n)
                chunks = decay_factors(q_n, k_n, g_n, beta_n, delta_rule, scores, merged)
                before = layout.empty(len(span) + 1, *dstate.shape)
                before[0] = saved[0][group]
                written = layout.empty(len(span), layout.streams, *v_n.shape[1:])
                scores_q, inverse = scores.q, scores.inverse
                _walk(chunks, inverse, v_n * beta_n, before, written, span, added)
            before, written = before[:-1].flatten(0, 1), written.flatten(0, 1)

            # The gradients of o and, with the sign turned, of x: those of the two rows of a token.
            dy = layout.empty(len(written), chunk, 2, v.shape[-1])
            if do is None:
                dy[:, :, 0] = 0
            else:
                layout.load(do, span, dy[:, :, 0]).mul_(scale)
            # First what each chunk's output adds, for all chunks at once; the walk adds the rest.
            dwritten = torch.bmm(scores_q.mT, dy[:, :, 0])
            dbefore = torch.bmm(chunks.rows[:, :, 0].mT, dy[:, :, 0])
            if dv_new is not None:
                dwritten += dv_new[span.start : span.stop].flatten(0, 2)
            if dstates is not None:
                dbefore += dstates[span.start : span.stop].flatten(0, 2)
            dx, dstate, dafter = _walk_back(
                chunks, inverse, dwritten, dbefore, dstate, span, dadded
            )
            torch.neg(dx, out=dy[:, :, 1])

            gradients = decay_factors_backward(
                chunks,
                merged,
                dy,
                written,
                torch.bmm(dy.flatten(1, 2), before.mT).view_as(chunks.rows),
                torch.bmm(written, dafter.mT),
                (dafter * before).sum(-1),
                delta_rule,
            )
            dq_n, dk_n, dg_n, dbeta_n = gradients
            dbeta_n.add_((dx * v_n).sum(-1, keepdim=True))
            dv_n = dx.mul_(beta_n)
            for x, out in zip((dq_n, dk_n, dv_n, dg_n, dbeta_n), dinputs, strict=True):
                layout.store(x, span, out if out.ndim == 4 else out.unsqueeze(-1))
        dinitial_state = dstate.unflatten(0, (v.shape[0], v.shape[2]))
        return *dinputs, dinitial_state, dadded_states, None, None, None, None, None


def _by_position(
    states: torch.Tensor | None, positions: tuple[int, ...]
) -> dict[int, torch.Tensor]:
    """Position of a chunk -> the state [B, HV, K, V] that belongs to it, as a view [Z, K, V]."""
    return {} if states is None else dict(zip(positions, states.flatten(1, 2), strict=True))


def _load_factors(
    layout: _Layout,
    span: range,
    q: torch.Tensor,
    k: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """What `decay_factors` takes."""
    k_n = layout.load(k, span)
    g_n = layout.load(g, span, torch.empty_like(k_n))
    return layout.load(q, span), k_n, g_n, layout.load(beta.unsqueeze(-1), span)


def _walk(
    chunks: Chunks,
    inverse: torch.Tensor,
    x: torch.Tensor,
    states: torch.Tensor,
    v_new: torch.Tensor,
    span: range,
    added: dict[int, torch.Tensor],
) -> None:
    """Carries the state through the chunks of `span`.

    inverse [M, C, C] is that of `Scores`; x [M, C, V] is beta v, and overwritten;
    states [n + 1, Z, K, V] has its first entry given, the others are filled in, as is
    v_new [n, Z, C, V].
    """
    steps = len(span)
    before, written = states.unbind(0), v_new.unbind(0)
    x_n = _steps(x, steps)
    b_in, k_out = _steps(chunks.rows[:, :, 1], steps), _steps(chunks.columns.mT, steps)
    total, inverse_n = _steps(chunks.total.unsqueeze(-1), steps), _steps(inverse, steps)
    for n in range(steps):
        x_n[n].baddbmm_(b_in[n], before[n], alpha=-1)
        torch.bmm(inverse_n[n], x_n[n], out=written[n])
        torch.mul(before[n], total[n], out=before[n + 1])
        before[n + 1].baddbmm_(k_out[n], written[n])
        if span[n] in added:
            before[n + 1].add_(added[span[n]])


def _walk_back(
    chunks: Chunks,
    inverse: torch.Tensor,
    dv_new: torch.Tensor,
    dstates: torch.Tensor,
    dfinal_state: torch.Tensor,
    span: range,
    dadded: dict[int, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The adjoint of `_walk`; fills `dadded`.

    dv_new [M, C, V] (overwritten) and dstates [M, K, V] are what v_new and the states before each
    chunk get from elsewhere, dfinal_state [Z, K, V] what the last state gets.

    Returns:
        The gradients of x [M, C, V], of the first state [Z, K, V], and of the states after each
        chunk [M, K, V].
    """
    steps = len(span)
    dx = torch.empty_like(dv_new)
    dall = dstates.new_empty(steps + 1, *dfinal_state.shape)
    dall[-1] = dfinal_state
    dbefore = dall.unbind(0)
    dv_n, dx_n, dstates_n = _steps(dv_new, steps), _steps(dx, steps), _steps(dstates, steps)
    b_in, k_out = _steps(chunks.rows[:, :, 1].mT, steps), _steps(chunks.columns, steps)
    total, inverse_n = _steps(chunks.total.unsqueeze(-1), steps), _steps(inverse.mT, steps)
    for n in reversed(range(steps)):
        dafter = dbefore[n + 1]
        if span[n] in dadded:
            dadded[span[n]].copy_(dafter)
        dv_n[n].baddbmm_(k_out[n], dafter)
        torch.bmm(inverse_n[n], dv_n[n], out=dx_n[n])
        torch.addcmul(dstates_n[n], dafter, total[n], out=dbefore[n])
        dbefore[n].baddbmm_(b_in[n], dx_n[n], alpha=-1)
    return dx, dall[0], dall[1:].flatten(0, 1)


def _steps(x: torch.Tensor, steps: int) -> tuple[torch.Tensor, ...]:
    """[n*Z, ...] -> n views [Z, ...]."""
    return x.unflatten(0, (steps, -1)).unbind(0)
