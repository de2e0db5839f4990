"""`linked_kda` on a GPU: the passes of `chunk_triton` with an exchange in the middle of each way.

    forward    keys' part of `intra` and the walks of the maps   | exchange starts
               `intra` with queries                              | exchange awaited, the walk
    backward   `intra`, the walks back of the entering pieces    | exchange starts
               the walk forward for states and residuals         | exchange awaited, the walk back,
               and the gradients of all chunks

Letters in shapes as in `chunk_triton`; N pieces, E of them enter and L leave.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from megakda.kernels.kda import chunk_triton as passes
from megakda.kernels.kda.linked import Links, with_initial_states
from megakda.kernels.kda.plan import ChunkPlan, Fused


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
        intra = passes.run_intra(None, k, g, beta, A_log, dt_bias, plan, fused)
        range_maps = passes.range_maps(intra, v, plan, fused)
        maps = with_initial_states(
            _leaving_maps(intra, range_maps, v, plan, fused, links), initial_state, links
        )
        wait = links.exchange.forward(maps)
        intra = passes.run_intra(q, k, g, beta, A_log, dt_bias, plan, fused)

        key_dim, value_dim = k.shape[-1], v.shape[-1]
        start = _starts(wait(), initial_state, len(plan.sequences), links)
        initial, table = passes.range_starts(range_maps, start, plan)
        o, final_state = torch.empty_like(v), None
        if output_final_state:
            final_state = passes.state_like(v, len(plan.sequences), key_dim, value_dim)
        passes.walk(intra, v, table, initial, fused, o=o, final_state=final_state)
        ctx.save_for_backward(q, k, v, g, beta, A_log, dt_bias, start, maps)
        ctx.plan, ctx.fused, ctx.links = plan, fused, links
        ctx.has_initial = initial_state is not None
        ctx.set_materialize_grads(False)
        return o, final_state

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, do: torch.Tensor | None, dfinal: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        q, k, v, g, beta, A_log, dt_bias, start, maps = ctx.saved_tensors
        plan, fused, links = ctx.plan, ctx.fused, ctx.links
        do = torch.zeros_like(v) if do is None else do.contiguous()
        key_dim, value_dim = k.shape[-1], v.shape[-1]
        if dfinal is None:
            dfinal = passes.state_like(v, len(plan.sequences), key_dim, value_dim).zero_()

        intra = passes.run_intra(q, k, g, beta, A_log, dt_bias, plan, fused)
        range_maps = passes.range_maps(intra, v, plan, fused)
        direct = _entering_gradients(intra, range_maps, do, dfinal.contiguous(), plan, fused, links)
        wait = links.exchange.backward(direct, maps)
        states, residuals = passes.states_and_residuals(intra, range_maps, v, start, plan, fused)

        dfinal = dfinal.clone()
        dfinal[list(links.leaving)] += wait()
        dv, dstates = torch.empty_like(v), torch.empty_like(states)
        dafter, table = passes.range_ends(intra, range_maps, do, dfinal, plan, fused)
        dbefore = None
        if ctx.has_initial and ctx.needs_input_grad[7]:
            dbefore = passes.state_like(v, len(table), key_dim, value_dim)
        passes.walk_back(intra, do, table, dafter, fused, dv, dstates, dbefore)
        if dbefore is not None:
            if plan.split is not None:
                dbefore = dbefore.index_select(0, plan.split.first[:-1])
            dbefore[list(links.entering)] = 0
        del intra
        dq, *others = passes.gradients(
            q, k, g, beta, A_log, dt_bias, do, residuals, dv, states, dstates, plan, fused
        )
        dk, dg, dbeta, dA_log, ddt_bias = others
        return dq, dk, dv, dg, dbeta, dA_log, ddt_bias, dbefore, None, None, None, None


def _starts(
    states: torch.Tensor, initial_state: torch.Tensor | None, pieces: int, links: Links
) -> torch.Tensor:
    """The states before all pieces [N, HV, K, V], those that have arrived among them."""
    if initial_state is None:
        start = states.new_zeros(pieces, *states.shape[1:])
    else:
        start = initial_state.clone()
    start[list(links.entering)] = states
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
    leaving, value_dim = list(links.leaving), v.shape[-1]
    if not leaving:
        key_dim = intra.k_out.shape[-1]
        return passes.state_like(v, 0, key_dim, value_dim + key_dim)
    if plan.split is None:
        return passes.maps_of(intra, v, _renumbered(plan.sequences, leaving), fused)
    assert range_maps is not None
    first = plan.split.first_on_host
    return torch.stack([_composed(range_maps[first[n] : first[n + 1]]) for n in leaving])


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
    do: torch.Tensor,
    dfinal: torch.Tensor,
    plan: ChunkPlan,
    fused: Fused,
    links: Links,
) -> torch.Tensor:
    """The gradients of the states before the pieces that enter, as far as known [E, HV, K, V]."""
    entering, key_dim = list(links.entering), intra.k_out.shape[-1]
    found = passes.state_like(do, len(entering), key_dim, do.shape[-1])
    if not entering:
        return found
    if plan.split is None:
        table = _renumbered(plan.sequences, entering)
        passes.walk_back(intra, do, table, dfinal[entering], fused, None, None, found)
        return found
    assert range_maps is not None
    split = plan.split
    before = passes.state_like(do, len(range_maps), key_dim, do.shape[-1])
    passes.walk_back(intra, do, split.maps, None, fused, None, None, before)
    # The fold gives gradients after ranges; one step more gives that before the first.
    after = passes.fold_ranges(range_maps, before, dfinal, split)
    first = [split.first_on_host[n] for n in entering]
    return range_maps[first][..., do.shape[-1] :].mT @ after[first] + before[first]


def _renumbered(table: torch.Tensor, numbers: list[int]) -> torch.Tensor:
    """The rows of some sequences, their slots counted afresh."""
    rows = table[numbers].clone()
    rows[:, 3:] = torch.arange(len(numbers), dtype=table.dtype, device=table.device)[:, None]
    return rows.contiguous()
