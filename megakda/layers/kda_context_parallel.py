"""KDA over a sequence that several ranks hold, exact for every document.

Two exchanges, alone or one inside the other:

- heads: within a group of neighbours an all-to-all gives each rank the whole group's tokens for
  its share of the heads, and another takes the outputs back. Bytes grow with the tokens.
- state: what a segment does to the state is an affine map S -> M S + E, one [K, K + V] per head
  however long the segment. An all-gather brings all maps to all ranks, which fold them in global
  order to the states before their own segments. The backward pass does the same with the
  adjoint maps. The short convolution before it needs the last few tokens of the segment before.

`state` mode uses the second alone, `heads` the first alone; `two_level` exchanges heads within a
node and states between nodes. All work on contiguous and zig-zag layouts and with documents whose
bounds lie anywhere (`context_layout.py`).

Letters in shapes: B rows, S tokens of a row on this rank, H heads, K and V their sizes, w tokens of
a halo, P ranks of a group, G segments of a row, L tokens of a segment, D channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import all_to_all
from torch.autograd.function import once_differentiable

from megakda.kernels.kda import chunk_kda
from megakda.kernels.kda.affine import fold, fold_backward
from megakda.kernels.kda.linked import Links, linked_kda
from megakda.kernels.kda.plan import index_tensor
from megakda.kernels.short_conv import short_conv
from megakda.layers.context_layout import ContextLayout, ContextPlan, Documents
from megakda.layers.context_parallel import ContextParallel, Group, exchange


def kda_context_parallel(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    context: ContextParallel,
    documents: Documents,
    conv_weights: Sequence[torch.Tensor] = (),
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    chunk_size: int = 64,
    backend: str | None = None,
    **settings: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`chunk_kda`, after short convolutions of q, k and v, on this rank's tokens of a batch.

    A collective call on all ranks of the context-parallel group, and so is its backward pass. The
    gradients of what all ranks have (weights, A_log, dt_bias, initial_state) are this rank's share:
    their sum over the group is the gradient of the sum of all ranks' losses.

    Args:
        q, k: [B, S, H, K]; v: [B, S, H, V]; g: [B, S, H, K] or [B, S, H, 1]; beta: [B, S, H]. Of
            one dtype; tokens as `context.layout` says.
        context: layout and groups.
        documents: of the whole batch, the same on every rank.
        conv_weights: of the convolutions of q, k and v with SiLU, [H*K or H*V, taps]; empty for
            none.
        A_log: [H]; dt_bias: [H*K] or [H].
        initial_state: fp32 [documents, H, K, V], the same on every rank.
        output_final_state: whether to return the states after all documents, on every rank.
        chunk_size, backend: as in `chunk_kda`.
        settings: its switches: use_gate_in_kernel, lower_bound, use_qk_l2norm_in_kernel, ...

    Returns:
        o [B, S, H, V] and the final states, fp32 [documents, H, K, V], or None.

    Raises:
        ValueError: shapes that break the rules above, or rows that the layout cannot cut.
        CommunicationError: another rank has died or does not answer.
    """
    heads, neighbours = q.shape[2], context.heads_ranks
    mine = slice(0, heads)
    if context.heads_group is not None:
        if heads % neighbours:
            raise ValueError(
                f"q: {heads} heads cannot be shared by the {neighbours} ranks of a heads group: "
                "use parallel.context_mode=state, or another parallel.context_heads"
            )
        share = heads // neighbours
        mine = slice(context.heads_group.rank() * share, (context.heads_group.rank() + 1) * share)
        q, k, v, g, beta = _tokens_for_heads((q, k, v, g, beta), context)
        if conv_weights:
            conv_weights = [of_heads(weight, heads, mine) for weight in conv_weights]
        A_log, dt_bias = (None if x is None else of_heads(x, heads, mine) for x in (A_log, dt_bias))

    rows, tokens = q.shape[:2]
    plan = context.state_plan(documents)
    if tokens * plan.layout.ranks != documents.tokens or rows != documents.rows:
        raise ValueError(
            f"q: {rows} rows of {tokens} tokens on each of {plan.layout.ranks} ranks, but the "
            f"documents are of {documents.rows} rows of {documents.tokens} tokens"
        )
    cu_seqlens = None
    if plan.layout.ranks > 1 or not documents.are_rows:
        q, k, v, g, beta = (x.flatten(0, 1).unsqueeze(0) for x in (q, k, v, g, beta))
        cu_seqlens = plan.cu_seqlens
    if conv_weights:
        q, k, v = _convolved((q, k, v), conv_weights, cu_seqlens, plan, context, backend)

    common: dict[str, Any] = dict(
        A_log=A_log,
        dt_bias=dt_bias,
        initial_state=_of_pieces(initial_state, plan, mine),
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        chunk_size=chunk_size,
        backend=backend,
        **settings,
    )
    if plan.linked and context.state_group is not None:
        links = Links(plan.entering, plan.leaving, _StateExchange(plan, context.state_group))
        o, states = linked_kda(q, k, v, g, beta, links=links, **common)
    else:
        o, states = chunk_kda(q, k, v, g, beta, **common)
    if cu_seqlens is not None:
        o = o.squeeze(0).unflatten(0, (rows, tokens))
    final_state = None
    if output_final_state:
        assert states is not None
        final_state = _of_documents(states, initial_state, plan, context, heads, mine)
    if context.heads_group is not None:
        o = _heads_for_tokens(o, context)
    return o, final_state


# ------------------------------------------------------------------ heads


def _tokens_for_heads(
    tensors: Sequence[torch.Tensor], context: ContextParallel
) -> tuple[torch.Tensor, ...]:
    """[B, S, H, D] or [B, S, H] each, for all heads -> [B, S * P, H / P, D] in global order."""
    group = context.heads_group
    assert group is not None
    whole = [x if x.ndim == 4 else x.unsqueeze(-1) for x in tensors]
    joint = torch.cat(whole, -1)  # one message instead of five
    parts = joint.unflatten(2, (group.size(), -1)).permute(2, 0, 1, 3, 4)
    with exchange("the all-to-all of KDA's heads", group):
        parts = all_to_all(group, parts.contiguous())  # [P, B, S, H/P, D], from each neighbour
    joint = _in_order(parts, context.layout)
    split = joint.split([x.shape[-1] for x in whole], -1)
    return tuple(
        x.squeeze(-1) if old.ndim == 3 else x for x, old in zip(split, tensors, strict=True)
    )


def _heads_for_tokens(o: torch.Tensor, context: ContextParallel) -> torch.Tensor:
    """The way back: [B, S * P, H / P, V] -> [B, S, H, V]."""
    group = context.heads_group
    assert group is not None
    parts = _by_neighbour(o, context.layout, group.size())
    with exchange("the all-to-all of KDA's heads", group):
        parts = all_to_all(group, parts.contiguous())  # [P, B, S, H/P, V], of each share of heads
    return parts.permute(1, 2, 0, 3, 4).flatten(2, 3)


def _in_order(parts: torch.Tensor, layout: ContextLayout) -> torch.Tensor:
    """[P, B, S, ...], held by neighbouring ranks -> [B, P * S, ...] in global order.

    Of a zig-zag layout the second segments of neighbours follow each other in falling order.
    """
    segments = parts.unflatten(2, (layout.per_rank, -1)).unbind(2)
    ordered = [segments[0], *(segment.flip(0) for segment in segments[1:])]
    return torch.stack([x.movedim(0, 1).flatten(1, 2) for x in ordered], 1).flatten(1, 2)


def _by_neighbour(x: torch.Tensor, layout: ContextLayout, neighbours: int) -> torch.Tensor:
    """The reverse of `_in_order`."""
    segments = x.unflatten(1, (layout.per_rank, neighbours, -1)).unbind(1)
    ordered = [segments[0], *(segment.flip(1) for segment in segments[1:])]
    return torch.stack(ordered, 2).movedim(1, 0).flatten(2, 3)


def of_heads(parameter: torch.Tensor, heads: int, mine: slice) -> torch.Tensor:
    """The part of a parameter whose first axis follows the heads that belongs to some of them."""
    return parameter.unflatten(0, (heads, -1))[mine].flatten(0, 1)


# ------------------------------------------------------------------ states


class _StateExchange:
    """`megakda.kernels.kda.linked.StateExchange` by all-gather over a process group.

    Every segment has one slot of [H, K, V + K], which is zero where nothing leaves it and whose M
    is zero where a document begins in it: so the fold needs to know nothing of documents.
    """

    def __init__(self, plan: ContextPlan, group: Group):
        self.plan, self.group = plan, group

    def _slots(self, numbers: Sequence[int], device: torch.device) -> torch.Tensor:
        """The segments' slots of pieces."""
        return index_tensor(tuple(self.plan.pieces[n].segment for n in numbers), device)

    def _filled(self, maps: torch.Tensor, value_dim: int) -> torch.Tensor:
        """Maps of the pieces that leave in their slots; no M where nothing enters the piece."""
        pieces, leaving = self.plan.pieces, self.plan.leaving
        begun = [n for n in leaving if not pieces[n].enters]
        slots = maps.new_zeros(self.plan.slots, *maps.shape[1:])
        slots[self._slots(leaving, maps.device)] = maps
        slots[self._slots(begun, maps.device), ..., value_dim:] = 0
        return slots

    def forward(self, maps: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Maps [leaving, H, K, V + K], E before M -> states [entering, H, K, V]."""
        value_dim = maps.shape[-1] - maps.shape[-2]
        slots = self._filled(maps, value_dim)
        gathered = self._start(slots, "the exchange of KDA states")

        def wait() -> torch.Tensor:
            segments = gathered()
            affine = [(x[..., value_dim:], x[..., :value_dim]) for x in segments]
            states, _ = fold(affine, torch.zeros_like(affine[0][1]))
            return self._held(states)[self._slots(self.plan.entering, maps.device)]

        return wait

    def backward(self, direct: torch.Tensor, maps: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Gradients of states [entering, H, K, V] and the maps -> [leaving, H, K, V]."""
        value_dim = direct.shape[-1]
        slots = self._filled(maps, value_dim)
        slots[..., :value_dim] = 0
        slots[self._slots(self.plan.entering, maps.device), ..., :value_dim] = direct
        gathered = self._start(slots, "the exchange of KDA states' gradients")

        def wait() -> torch.Tensor:
            segments = gathered()
            affine = [(x[..., value_dim:], x[..., :value_dim]) for x in segments]
            own = [e for _, e in affine]
            gradients, _ = fold_backward(affine, own, torch.zeros_like(own[0]))
            return self._held(gradients)[self._slots(self.plan.leaving, maps.device)]

        return wait

    def _start(self, slots: torch.Tensor, what: str) -> Callable[[], list[torch.Tensor]]:
        """Starts to gather [slots, ...]; the result waits, and gives G tensors [B, ...]."""
        layout, ranks = self.plan.layout, self.group.size()
        gathered = slots.new_empty(ranks * slots.shape[0], *slots.shape[1:])
        with exchange(what, self.group):
            work = torch.distributed.all_gather_into_tensor(
                gathered, slots, group=self.group, async_op=True
            )

        def wait() -> list[torch.Tensor]:
            with exchange(what, self.group):
                work.wait()
            by_row = gathered.unflatten(0, (ranks, -1, layout.per_rank))
            return list(layout.restore(by_row.transpose(1, 2)).unbind(0))

        return wait

    def _held(self, segments: Sequence[torch.Tensor]) -> torch.Tensor:
        """Of G tensors [B, ...], those of this rank's segments, by slot."""
        held = self.plan.layout.held(self.plan.rank)
        return torch.stack([segments[segment] for segment in held], 1).flatten(0, 1)


def _of_pieces(
    initial_state: torch.Tensor | None, plan: ContextPlan, mine: slice
) -> torch.Tensor | None:
    """The states before this rank's pieces: zero for those that enter, which get theirs later."""
    if initial_state is None:
        return None
    begins = [n for n, piece in enumerate(plan.pieces) if not piece.enters]
    documents = [plan.pieces[n].document for n in begins]
    states = initial_state[documents][:, mine]
    start = states.new_zeros(len(plan.pieces), *states.shape[1:])
    return start.index_copy(0, torch.tensor(begins, dtype=torch.long, device=start.device), states)


def _of_documents(
    states: torch.Tensor,
    initial_state: torch.Tensor | None,
    plan: ContextPlan,
    context: ContextParallel,
    heads: int,
    mine: slice,
) -> torch.Tensor:
    """The states after all documents and heads, from those after the pieces of every rank."""
    bounds = plan.documents.bounds
    whole = states.new_zeros(len(bounds) - 1, heads, *states.shape[2:])
    ends = [n for n, piece in enumerate(plan.pieces) if not piece.leaves]
    places = torch.tensor([plan.pieces[n].document for n in ends], dtype=torch.long)
    own = states.new_zeros(len(bounds) - 1, *states.shape[1:])
    own = own.index_copy(0, places.to(states.device), states[ends])
    if initial_state is not None and plan.rank == 0:
        empty = [n for n in range(len(bounds) - 1) if bounds[n] == bounds[n + 1]]
        numbers = torch.tensor(empty, dtype=torch.long, device=states.device)
        own = own.index_add(0, numbers, initial_state[empty][:, mine])
    whole = torch.cat([whole[:, : mine.start], own, whole[:, mine.stop :]], 1)
    return whole if context.group is None else _SumOverRanks.apply(whole, context.group)


class _SumOverRanks(torch.autograd.Function):
    """The sum of all ranks' tensors, on all ranks; its gradient is the sum of all ranks'."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return _SumOverRanks._sum(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _SumOverRanks._sum(dtotal, ctx.group), None

    @staticmethod
    def _sum(x: torch.Tensor, group: Group) -> torch.Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        with exchange("the sum of KDA's final states", group):
            torch.distributed.all_reduce(total, group=group)
        return total


# ------------------------------------------------------------------ convolution


def _convolved(
    tensors: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    cu_seqlens: torch.Tensor | None,
    plan: ContextPlan,
    context: ContextParallel,
    backend: str | None,
) -> list[torch.Tensor]:
    """Short convolution and SiLU of q, k and v, across segments."""
    flat = [x.flatten(2) for x in tensors]
    halos: Sequence[torch.Tensor | None] = [None] * len(flat)
    if plan.linked and context.state_group is not None:
        halos = halo(flat, weights[0].shape[1] - 1, plan, context.state_group)
    convolved = []
    for x, weight, state, old in zip(flat, weights, halos, tensors, strict=True):
        y, _ = short_conv(x, weight, initial_state=state, cu_seqlens=cu_seqlens, backend=backend)
        convolved.append(y.unflatten(-1, old.shape[2:]))
    return convolved


def halo(
    tensors: Sequence[torch.Tensor], width: int, plan: ContextPlan, group: Group
) -> tuple[torch.Tensor, ...]:
    """The `width` tokens before each piece, of its own document; zero where there are none.

    They come from the segments before in global order, from several where segments are shorter than
    `width`. Differentiable; one collective each way for all tensors.

    Args:
        tensors: [1, B*S, D] each, of one dtype.

    Returns:
        For each tensor [pieces, D, width], as `short_conv` takes its initial state.
    """
    length = plan.layout.segment_length(plan.documents.tokens)
    kept = min(width, length)
    tails = [x[0].unflatten(0, (plan.slots, length))[:, length - kept :] for x in tensors]
    before = _Halo.apply(torch.cat(tails, -1).contiguous(), width, plan, group)
    return before.split([x.shape[-1] for x in tensors], 1)


class _Halo(torch.autograd.Function):
    """Last tokens of this rank's segments [slots, t, D] -> [pieces, D, w]."""

    @staticmethod
    def forward(
        ctx: Any, tails: torch.Tensor, width: int, plan: ContextPlan, group: Group
    ) -> torch.Tensor:
        slots, kept, channels = tails.shape
        gathered = tails.new_empty(group.size() * slots, kept, channels)
        with exchange("the exchange of convolution halos", group):
            torch.distributed.all_gather_into_tensor(gathered, tails, group=group)
        sources = _halo_sources(plan, width, kept)
        index = index_tensor(sources, tails.device).view(-1, width)
        pieces = index_tensor(plan.entering, tails.device)
        ctx.save_for_backward(index, pieces)
        ctx.group, ctx.shape = group, tails.shape
        before = tails.new_zeros(len(plan.pieces), width, channels)
        tokens = gathered.flatten(0, 1)[index.clamp_min(0)] * (index >= 0).unsqueeze(-1)
        return before.index_copy(0, pieces, tokens).transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dbefore: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        index, pieces = ctx.saved_tensors
        slots, kept, channels = ctx.shape
        ranks = ctx.group.size()
        # A sum over pieces and ranks, so in fp32.
        dtype = torch.promote_types(dbefore.dtype, torch.float32)
        dtokens = dbefore.transpose(1, 2)[pieces].to(dtype)
        # One row more than there are tokens, for gradients that belong to none. Two pieces never
        # read the same token at the same place, so that nothing is added twice in one statement.
        dgathered = dtokens.new_zeros(ranks * slots * kept + 1, channels)
        for place in range(index.shape[1]):
            source = index[:, place]
            present = (source >= 0).unsqueeze(-1)
            dgathered[source] += dtokens[:, place] * present
        dtails = dtokens.new_empty(slots * kept, channels)
        with exchange("the exchange of convolution halos' gradients", ctx.group):
            torch.distributed.reduce_scatter_tensor(dtails, dgathered[:-1], group=ctx.group)
        return dtails.view(ctx.shape).to(dbefore.dtype), None, None, None


def _halo_sources(plan: ContextPlan, width: int, kept: int) -> tuple[int, ...]:
    """Which of the gathered tokens lie before each piece that enters.

    Returns:
        For each of these pieces `width` places among the ranks' tails, [rank, row, place, token]
        flattened, or -1 for none.
    """
    layout, documents = plan.layout, plan.documents
    length = layout.segment_length(documents.tokens)
    sources = []
    for n in plan.entering:
        piece = plan.pieces[n]
        row, place = divmod(piece.segment, layout.per_rank)
        segment = layout.held(plan.rank)[place]
        # The tails of a row one after the other: a stream without gaps where it matters, because
        # they are whole segments as soon as segments are shorter than the halo.
        for position in range(segment * kept - width, segment * kept):
            source, offset = divmod(position, kept)
            token = row * documents.tokens + source * length + length - kept + offset
            if position < 0 or token < piece.document_start:
                sources.append(-1)
                continue
            rank, held = layout.owner(source)
            slot = (rank * documents.rows + row) * layout.per_rank + held
            sources.append(slot * kept + offset)
    return tuple(sources)
