"""`linked_kda` on a GPU: the passes of `chunk_triton` with an exchange in the middle of each way.

    forward    keys' part of `intra` and the walks of the maps   | exchange starts
               `intra` with queries                              | exchange awaited, the walk
    backward   `intra`, the walks back of the entering pieces    | exchange starts
               the walk forward for states and residuals         | exchange awaited, the walk back,
               and the gradients of all chunks

Letters in shapes as in `chunk_triton`; N pieces, E of them enter and L leave.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from megakda.kernels.kda import chunk_triton as passes
from megakda.kernels.kda.linked import Links, with_initial_states
from megakda.kernels.kda.plan import ChunkPlan, Fused, index_tensor


def linked_kda_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    A_log: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    plan: ChunkPlan,
    fused: Fused,
    links: Links,
    output_final_state: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See `linked.linked_kda`; arguments as in `chunk_triton.chunk_kda_triton`."""
    return _LinkedKDA.apply(
        q, k, v, g, beta, A_log, dt_bias, initial_state, plan, fused, links, output_final_state
    )


class _LinkedKDA(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        A_log: torch.Tensor | None,
        dt_bias: torch.Tensor | None,
        initial_state: torch.Tensor | None,
        plan: ChunkPlan,
        fused: Fused,
        links: Links,
        output_final_state: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        q, k, v, g, beta = (x.contiguous() for x in (q, k, v, g, beta))
        compact = plan.split is None and initial_state is None and not output_final_state
        if compact:
            plan = _with_linked_slots(plan, links.entering, links.leaving)
        intra = passes.run_intra(None, k, g, beta, A_log, dt_bias, plan, fused)
        range_maps = passes.range_maps(intra, v, plan, fused)
        maps = with_initial_states(
            _leaving_maps(intra, range_maps, v, plan, fused, links), initial_state, links
        )
        wait = links.exchange.forward(maps)
        intra = passes.run_intra(q, k, g, beta, A_log, dt_bias, plan, fused)

        start = wait()
        if not compact:
            start = _starts(start, initial_state, len(plan.sequences), links)
        initial, table = passes.range_starts(range_maps, start, plan)
        o, final_state = torch.empty_like(v), None
        if output_final_state:
            final_state = passes.state_like(v, len(plan.sequences), *start.shape[-2:])
        passes.walk(intra, v, table, initial, fused, o=o, final_state=final_state)
        ctx.save_for_backward(q, k, v, g, beta, A_log, dt_bias, start, maps)
        ctx.constants = plan, fused, links, compact, initial_state is not None
        ctx.set_materialize_grads(False)
        return o, final_state

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, do: torch.Tensor | None, dfinal: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        q, k, v, g, beta, A_log, dt_bias, start, maps = ctx.saved_tensors
        plan, fused, links, compact, has_initial = ctx.constants
        do = torch.zeros_like(v) if do is None else do.contiguous()
        sizes = start.shape[-2:]
        if dfinal is None and not compact:
            dfinal = passes.state_like(v, len(plan.sequences), *sizes).zero_()

        intra = passes.run_intra(q, k, g, beta, A_log, dt_bias, plan, fused)
        range_maps = passes.range_maps(intra, v, plan, fused)
        before = None
        if plan.split is not None:
            before = passes.range_gradients(intra, do, plan.split, fused)
        direct = _entering_gradients(intra, range_maps, before, do, dfinal, plan, fused, links)
        wait = links.exchange.backward(direct, maps)
        states, residuals = passes.states_and_residuals(intra, range_maps, v, start, plan, fused)

        if compact:
            dfinal = wait()
        else:
            assert dfinal is not None
            dfinal = dfinal.clone()
            dfinal[index_tensor(links.leaving, v.device)] += wait()
        dv, dstates = torch.empty_like(v), torch.empty_like(states)
        dafter, table = passes.range_ends(intra, range_maps, do, dfinal, plan, fused, before)
        dbefore = None
        if has_initial and ctx.needs_input_grad[7]:
            dbefore = passes.state_like(v, len(table), *sizes)
        passes.walk_back(intra, do, table, dafter, fused, dv, dstates, dbefore)
        if dbefore is not None:
            if plan.split is not None:
                dbefore = dbefore.index_select(0, plan.split.first[:-1])
            dbefore[index_tensor(links.entering, v.device)] = 0
        del intra
        dq, *others = passes.gradients(
            q, k, g, beta, A_log, dt_bias, do, residuals, dv, states, dstates, plan, fused
        )
        dk, dg, dbeta, dA_log, ddt_bias = others
        return dq, dk, dv, dg, dbeta, dA_log, ddt_bias, dbefore, None, None, None, None


@lru_cache(maxsize=64)
def _with_linked_slots(
    plan: ChunkPlan, entering: tuple[int, ...], leaving: tuple[int, ...]
) -> ChunkPlan:
    """The plan with slots for the states of linked pieces alone.

    Most pieces of short documents begin and end here, and a state for each of them would take more
    memory than their tokens.
    """
    table = plan.sequences.clone()
    for column, numbers in ((3, entering), (4, leaving)):
        table[:, column] = -1
        slots = torch.arange(len(numbers), dtype=table.dtype, device=table.device)
        table[index_tensor(numbers, table.device), column] = slots
    return replace(plan, sequences=table)


def _starts(
    states: torch.Tensor, initial_state: torch.Tensor | None, pieces: int, links: Links
) -> torch.Tensor:
    """The states before all pieces [N, HV, K, V], those that have arrived among them."""
    if initial_state is None:
        start = states.new_zeros(pieces, *states.shape[1:])
    else:
        start = initial_state.clone()
    start[index_tensor(links.entering, start.device)] = states
    return start


def _leaving_maps(
    intra: passes.Intra,
    range_maps: torch.Tensor | None,
    v: torch.Tensor,
    plan: ChunkPlan,
    fused: Fused,
    links: Links,
) -> torch.Tensor:
    """[E | M] of the pieces that leave, fp32 [L, HV, K, V + K]."""
    if not links.leaving:
        key_dim = intra.k_out.shape[-1]
        return passes.state_like(v, 0, key_dim, v.shape[-1] + key_dim)
    if plan.split is None:
        return passes.maps_of(intra, v, _rows(plan.sequences, links.leaving), fused)
    assert range_maps is not None
    first = plan.split.first_on_host
    return torch.stack([_composed(range_maps[first[n] : first[n + 1]]) for n in links.leaving])


def _composed(maps: torch.Tensor) -> torch.Tensor:
    """The map of ranges that follow each other, [R, HV, K, V + K] -> [HV, K, V + K]."""
    key_dim = maps.shape[2]
    total = maps[0]
    for later in maps[1:]:
        e, m = later[..., :-key_dim], later[..., -key_dim:]
        total = m @ total
        total[..., :-key_dim] += e
    return total


def _entering_gradients(
    intra: passes.Intra,
    range_maps: torch.Tensor | None,
    before: torch.Tensor | None,
    do: torch.Tensor,
    dfinal: torch.Tensor | None,
    plan: ChunkPlan,
    fused: Fused,
    links: Links,
) -> torch.Tensor:
    """The gradients of the states before the pieces that enter, as far as known [E, HV, K, V]."""
    found = passes.state_like(do, len(links.entering), intra.k_out.shape[-1], do.shape[-1])
    if not links.entering:
        return found
    if plan.split is None:
        table = _rows(plan.sequences, links.entering)
        if dfinal is not None:
            dfinal = dfinal[index_tensor(links.entering, do.device)]
        passes.walk_back(intra, do, table, dfinal, fused, None, None, found)
        return found
    assert range_maps is not None and before is not None
    # The fold gives gradients after ranges; one step more gives that before the first.
    after = passes.fold_ranges(range_maps, before, dfinal, plan.split)
    numbers = tuple(plan.split.first_on_host[n] for n in links.entering)
    first = index_tensor(numbers, do.device)
    return range_maps[first][..., do.shape[-1] :].mT @ after[first] + before[first]


def _rows(table: torch.Tensor, numbers: tuple[int, ...]) -> torch.Tensor:
    """The rows of some sequences, their slots counted afresh."""
    rows = table[index_tensor(numbers, table.device)]
    rows[:, 3:] = torch.arange(len(numbers), dtype=table.dtype, device=table.device)[:, None]
    return rows
