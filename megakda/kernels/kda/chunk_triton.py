"""Chunked KDA on a GPU: which kernels run, on what, in which order.

Forward: `intra_triton` for all chunks at once, then the walk of `state_triton`. Backward: both
again, the second time keeping the state before each chunk and the residuals r, the walk back, and
`grad_triton` for all chunks at once. Nothing but the inputs is saved in between.

Where there are too few sequences and heads to fill the GPU, sequences are split into ranges: a walk
over each computes its affine map, a fold of the maps gives the state before each range, and the
walk proper runs over all ranges at once. The way back does the same with the adjoint maps.

Letters in shapes: B batch, T tokens, N sequences, R ranges, C chunks in all, H query/key heads, HV
value heads, K and V sizes of a head, W columns of the state (V, or V + K for a map).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from megakda.kernels.kda.grad_triton import kda_grad_kernel
from megakda.kernels.kda.intra_triton import kda_intra_kernel
from megakda.kernels.kda.plan import ChunkPlan, Fused, Split
from megakda.kernels.kda.state_triton import (
    kda_fold_kernel,
    kda_state_grad_kernel,
    kda_state_kernel,
)
from megakda.kernels.launch import launch_config

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass
class Intra:
    """What pass 1 leaves, head by head so that a tile is contiguous: see `intra_triton`."""

    q_in: torch.Tensor | None  # [HV, B*T, K]
    k_in: torch.Tensor | None  # [HV, B*T, K]
    k_out: torch.Tensor  # [HV, B*T, K]
    inverse: torch.Tensor | None  # [HV, B*T, BT]
    scores: torch.Tensor | None  # [HV, B*T, BT]
    total: torch.Tensor  # fp32 [HV, C, K]

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        return self.q_in, self.k_in, self.k_out, self.inverse, self.scores, self.total


def chunk_kda_triton(
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
    output_final_state: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gated delta rule over the sequences of `plan`, differentiable.

    Args:
        q: [B, T, H, K]; k likewise; v: [B, T, HV, V], all of one dtype.
        g: [B, T, HV, K] or [B, T, HV, 1]; beta: [B, T, HV].
        A_log: [HV] and dt_bias [HV*K] or [HV], where the gate wants them.
        initial_state: fp32 [N, HV, K, V] or None.

    Returns:
        o [B, T, HV, V] in the dtype of v and the final state, fp32 [N, HV, K, V], or None.
    """
    return _ChunkKDA.apply(
        q, k, v, g, beta, A_log, dt_bias, initial_state, plan, fused, output_final_state
    )


def intermediate_states(
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    A_log: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    plan: ChunkPlan,
    fused: Fused,
) -> torch.Tensor:
    """The state before each chunk, [C, HV, K, V] in the dtype of v; no gradient."""
    k, v, g, beta = (x.contiguous() for x in (k, v, g, beta))
    intra = run_intra(None, k, g, beta, A_log, dt_bias, plan, fused)
    maps = range_maps(intra, v, plan, fused)
    states, _ = states_and_residuals(intra, maps, v, initial_state, plan, fused)
    return states.transpose(0, 1)


def range_state_triton(
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    A_log: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    plan: ChunkPlan,
    fused: Fused,
) -> torch.Tensor:
    """[E | M] of each sequence, fp32 [N, HV, K, V + K]: it takes a state S to M S + E."""
    return _RangeState.apply(k, v, g, beta, A_log, dt_bias, plan, fused)


class _ChunkKDA(torch.autograd.Function):
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
        output_final_state: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        q, k, v, g, beta = (x.contiguous() for x in (q, k, v, g, beta))
        intra = run_intra(q, k, g, beta, A_log, dt_bias, plan, fused)
        maps = range_maps(intra, v, plan, fused)
        initial, table = range_starts(maps, initial_state, plan)
        o = torch.empty_like(v)
        final_state = None
        if output_final_state:
            final_state = state_like(v, len(plan.sequences), k.shape[-1], v.shape[-1])
        walk(intra, v, table, initial, fused, o=o, final_state=final_state)
        ctx.save_for_backward(q, k, v, g, beta, A_log, dt_bias, initial_state)
        ctx.plan, ctx.fused = plan, fused
        ctx.set_materialize_grads(False)
        return o, final_state

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, do: torch.Tensor | None, dfinal: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        q, k, v, g, beta, A_log, dt_bias, initial_state = ctx.saved_tensors
        plan, fused = ctx.plan, ctx.fused
        do = torch.zeros_like(v) if do is None else do.contiguous()
        dfinal = None if dfinal is None else dfinal.contiguous()

        intra = run_intra(q, k, g, beta, A_log, dt_bias, plan, fused)
        maps = range_maps(intra, v, plan, fused)
        states, residuals = states_and_residuals(intra, maps, v, initial_state, plan, fused)
        dv, dstates = torch.empty_like(v), torch.empty_like(states)
        dafter, table = range_ends(intra, maps, do, dfinal, plan, fused)
        dbefore = None
        if initial_state is not None and ctx.needs_input_grad[7]:
            dbefore = state_like(v, len(table), k.shape[-1], v.shape[-1])
        walk_back(intra, do, table, dafter, fused, dv, dstates, dbefore)
        if dbefore is not None and plan.split is not None:
            dbefore = dbefore.index_select(0, plan.split.first[:-1])
        del intra
        dq, *others = gradients(
            q, k, g, beta, A_log, dt_bias, do, residuals, dv, states, dstates, plan, fused
        )
        dk, dg, dbeta, dA_log, ddt_bias = others
        return dq, dk, dv, dg, dbeta, dA_log, ddt_bias, dbefore, None, None, None


class _RangeState(torch.autograd.Function):
    """The walk with K more columns of state that begin as the identity and where v is zero."""

    @staticmethod
    def forward(
        ctx: Any,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        A_log: torch.Tensor | None,
        dt_bias: torch.Tensor | None,
        plan: ChunkPlan,
        fused: Fused,
    ) -> torch.Tensor:
        k, v, g, beta = (x.contiguous() for x in (k, v, g, beta))
        intra = run_intra(None, k, g, beta, A_log, dt_bias, plan, fused)
        ctx.save_for_backward(k, v, g, beta, A_log, dt_bias)
        ctx.plan, ctx.fused = plan, fused
        return maps_of(intra, v, plan.sequences, fused)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dmaps: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        k, v, g, beta, A_log, dt_bias = ctx.saved_tensors
        plan, fused = ctx.plan, ctx.fused
        intra = run_intra(None, k, g, beta, A_log, dt_bias, plan, fused)
        columns = v.shape[-1] + k.shape[-1]
        states = _chunk_states(v, plan, k.shape[-1], columns)
        residuals = v.new_empty(*v.shape[:-1], columns)
        walk(
            intra, v, plan.sequences, None, fused, residuals=residuals, states=states, identity=True
        )
        if not fused.delta:
            residuals = torch.nn.functional.pad(v, (0, k.shape[-1]))
        dv, dstates = torch.empty_like(residuals), torch.empty_like(states)
        walk_back(intra, None, plan.sequences, dmaps.contiguous(), fused, dv, dstates, None)
        _, *others = gradients(
            None, k, g, beta, A_log, dt_bias, None, residuals, dv, states, dstates, plan, fused
        )
        dk, dg, dbeta, dA_log, ddt_bias = others
        return dk, dv[..., : v.shape[-1]], dg, dbeta, dA_log, ddt_bias, None, None


# ------------------------------------------------------------------ ranges


def range_maps(intra: Intra, v: torch.Tensor, plan: ChunkPlan, fused: Fused) -> torch.Tensor | None:
    """The maps of the ranges, if sequences are split."""
    return None if plan.split is None else maps_of(intra, v, plan.split.maps, fused)


def range_starts(
    maps: torch.Tensor | None, initial_state: torch.Tensor | None, plan: ChunkPlan
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The states to begin with, and the table of the walks that begin with them."""
    if maps is None or plan.split is None:
        return initial_state, plan.sequences
    return fold_ranges(maps, None, initial_state, plan.split), plan.split.walks


def range_ends(
    intra: Intra,
    maps: torch.Tensor | None,
    do: torch.Tensor,
    dfinal: torch.Tensor | None,
    plan: ChunkPlan,
    fused: Fused,
    before: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The gradients of the states that walks end with, and the table of the walks back.

    Args:
        before: `range_gradients`, if they are there already.
    """
    if maps is None or plan.split is None:
        return dfinal, plan.sequences
    if before is None:
        before = range_gradients(intra, do, plan.split, fused)
    return fold_ranges(maps, before, dfinal, plan.split), plan.split.maps


def range_gradients(intra: Intra, do: torch.Tensor, split: Split, fused: Fused) -> torch.Tensor:
    """What each range's own outputs give the state before it, fp32 [R, HV, K, V]."""
    before = state_like(do, len(split.maps), intra.k_out.shape[-1], do.shape[-1])
    walk_back(intra, do, split.maps, None, fused, None, None, before)
    return before


def maps_of(intra: Intra, v: torch.Tensor, table: torch.Tensor, fused: Fused) -> torch.Tensor:
    """[E | M] of each range, fp32 [R, HV, K, V + K]."""
    key_dim = intra.k_out.shape[-1]
    maps = state_like(v, len(table), key_dim, v.shape[-1] + key_dim)
    walk(intra, v, table, None, fused, final_state=maps, identity=True)
    return maps


def states_and_residuals(
    intra: Intra,
    maps: torch.Tensor | None,
    v: torch.Tensor,
    initial_state: torch.Tensor | None,
    plan: ChunkPlan,
    fused: Fused,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The state before each chunk [HV, C, K, V] and r [B, T, HV, V], in the dtype of v."""
    initial, table = range_starts(maps, initial_state, plan)
    states = _chunk_states(v, plan, intra.k_out.shape[-1], v.shape[-1])
    residuals = torch.empty_like(v) if fused.delta else v
    walk(intra, v, table, initial, fused, residuals=residuals, states=states)
    return states, residuals


def _chunk_states(v: torch.Tensor, plan: ChunkPlan, key_dim: int, columns: int) -> torch.Tensor:
    return v.new_empty(v.shape[2], plan.num_chunks, key_dim, columns)


def state_like(v: torch.Tensor, slots: int, key_dim: int, columns: int) -> torch.Tensor:
    return v.new_empty(slots, v.shape[2], key_dim, columns, dtype=torch.float32)


# ------------------------------------------------------------------ launches


def run_intra(
    q: torch.Tensor | None,
    k: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    A_log: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    plan: ChunkPlan,
    fused: Fused,
) -> Intra:
    batch, tokens, heads, key_dim = k.shape
    value_heads = beta.shape[2]
    rows = (value_heads, batch * tokens)
    intra = Intra(
        q_in=None if q is None else k.new_empty(*rows, key_dim),
        k_in=k.new_empty(*rows, key_dim) if fused.delta else None,
        k_out=k.new_empty(*rows, key_dim),
        inverse=k.new_empty(*rows, fused.chunk_size) if fused.delta else None,
        scores=None if q is None else k.new_empty(*rows, fused.chunk_size),
        total=k.new_empty(value_heads, plan.num_chunks, key_dim, dtype=torch.float32),
    )
    config = launch_config(
        "kda_intra", k.device, K=_padded(key_dim), dtype=_name(k), decays=g.shape[-1]
    )
    config["BK"] = min(config["BK"], _padded(key_dim))
    if plan.num_chunks:
        kda_intra_kernel[(plan.num_chunks, value_heads)](
            q, k, g, beta, A_log, dt_bias, plan.chunks, *intra.tensors,
            fused.scale, fused.lower_bound, batch * tokens, plan.num_chunks,
            H=heads, HV=value_heads, K=key_dim, BT=fused.chunk_size,
            **_common(k), **_switches(q, g, dt_bias, fused), **config,
        )  # fmt: skip
    return intra


def walk(
    intra: Intra,
    v: torch.Tensor,
    table: torch.Tensor,
    initial_state: torch.Tensor | None,
    fused: Fused,
    *,
    o: torch.Tensor | None = None,
    residuals: torch.Tensor | None = None,
    states: torch.Tensor | None = None,
    final_state: torch.Tensor | None = None,
    identity: bool = False,
) -> None:
    """The walk over the ranges of `table`, writing what it is given room for."""
    value_heads, value_dim = v.shape[2:]
    key_dim = intra.k_out.shape[-1]
    columns = value_dim + (key_dim if identity else 0)
    config = _column_blocks("kda_state", v, key_dim, columns)
    kda_state_kernel[(triton.cdiv(columns, config["BV"]) * len(table), value_heads)](
        *intra.tensors, v, table, initial_state, o, residuals, states, final_state,
        intra.k_out.shape[1], intra.total.shape[1],
        HV=value_heads, K=key_dim, KP=_padded(key_dim), V=value_dim, W=columns,
        BT=fused.chunk_size, PRECISION=_precision(v), DELTA=fused.delta, IDENTITY=identity,
        HAS_INITIAL=initial_state is not None, WRITE_O=o is not None,
        WRITE_STATES=states is not None, WRITE_FINAL=final_state is not None, **config,
    )  # fmt: skip


def walk_back(
    intra: Intra,
    do: torch.Tensor | None,
    table: torch.Tensor,
    dfinal: torch.Tensor | None,
    fused: Fused,
    dv: torch.Tensor | None,
    dstates: torch.Tensor | None,
    dinitial: torch.Tensor | None,
) -> None:
    """The walk back over the ranges of `table`; columns as in dv, or else as in do."""
    value_heads, _, key_dim = intra.k_out.shape
    sized = dv if do is None else do
    assert sized is not None
    columns = sized.shape[-1]
    config = _column_blocks("kda_state_grad", sized, key_dim, columns)
    kda_state_grad_kernel[(triton.cdiv(columns, config["BV"]) * len(table), value_heads)](
        *intra.tensors, do, table, dfinal, dv, dstates, dinitial,
        intra.k_out.shape[1], intra.total.shape[1],
        HV=value_heads, K=key_dim, KP=_padded(key_dim), V=columns,
        BT=fused.chunk_size, PRECISION=_precision(sized), DELTA=fused.delta,
        HAS_DO=do is not None, HAS_DFINAL=dfinal is not None,
        WRITE_DSTATES=dstates is not None, WRITE_DINITIAL=dinitial is not None, **config,
    )  # fmt: skip


def fold_ranges(
    maps: torch.Tensor,
    before: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    split: Split,
) -> torch.Tensor:
    """States before (or, given `before`, gradients after) each range: [R, HV, K, V]."""
    ranges, value_heads, key_dim, columns = maps.shape
    value_dim = columns - key_dim
    folded = maps.new_empty(ranges, value_heads, key_dim, value_dim)
    config = _column_blocks("kda_fold", maps, key_dim, value_dim)
    grid = (triton.cdiv(value_dim, config["BV"]) * (len(split.first) - 1), value_heads)
    kda_fold_kernel[grid](
        maps, before, split.first, initial_state, folded,
        HV=value_heads, K=key_dim, KP=_padded(key_dim), V=value_dim,
        HAS_INITIAL=initial_state is not None, BACKWARD=before is not None, **config,
    )  # fmt: skip
    return folded


def gradients(
    q: torch.Tensor | None,
    k: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    A_log: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    do: torch.Tensor | None,
    residuals: torch.Tensor,
    dv: torch.Tensor,
    states: torch.Tensor,
    dstates: torch.Tensor,
    plan: ChunkPlan,
    fused: Fused,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of q, k, g, beta, A_log and dt_bias."""
    batch, tokens, heads, key_dim = k.shape
    value_heads, columns = residuals.shape[2:]
    group = value_heads // heads
    # Heads that share q and k each write a gradient of them; the sum follows.
    per_head = (batch, tokens, value_heads, key_dim)
    kind = k.dtype if group == 1 else torch.float32
    dq = None if q is None else k.new_empty(per_head, dtype=kind)
    dk = k.new_empty(per_head, dtype=kind)
    dg, dbeta = torch.empty_like(g), torch.empty_like(beta)
    dA_log = ddt_bias = None
    if fused.gate != "none" and A_log is not None:
        dA_log = k.new_empty(plan.num_chunks, value_heads, dtype=torch.float32)
    if dt_bias is not None:
        ddt_bias = k.new_empty(plan.num_chunks, value_heads * g.shape[-1], dtype=torch.float32)

    config = launch_config("kda_grad", k.device, K=_padded(key_dim), V=columns, dtype=_name(k))
    config["BV"] = min(config["BV"], _padded(columns))
    config["BK"] = min(config["BK"], _padded(key_dim))
    if plan.num_chunks:
        kda_grad_kernel[(plan.num_chunks, value_heads)](
            q, k, g, beta, A_log, dt_bias, plan.chunks, do, residuals, dv, states, dstates,
            dq, dk, dg, dbeta, dA_log, ddt_bias,
            fused.scale, fused.lower_bound, plan.num_chunks,
            H=heads, HV=value_heads, K=key_dim, V=columns,
            BT=fused.chunk_size, **_common(k), **_switches(q, g, dt_bias, fused), **config,
        )  # fmt: skip
    if group > 1:
        dk = dk.unflatten(2, (heads, group)).sum(3).to(k.dtype)
        if dq is not None:
            dq = dq.unflatten(2, (heads, group)).sum(3).to(k.dtype)
    if dA_log is not None and A_log is not None:
        dA_log = dA_log.sum(0).view_as(A_log).to(A_log.dtype)
    if ddt_bias is not None and dt_bias is not None:
        ddt_bias = ddt_bias.sum(0).view_as(dt_bias).to(dt_bias.dtype)
    return dq, dk, dg, dbeta, dA_log, ddt_bias


def _column_blocks(kernel: str, x: torch.Tensor, key_dim: int, columns: int) -> dict[str, int]:
    config = launch_config(kernel, x.device, K=_padded(key_dim), V=columns, dtype=_name(x))
    config["BV"] = min(config["BV"], _padded(columns))
    return config


def _common(x: torch.Tensor) -> dict[str, Any]:
    return {"DTYPE": _DTYPES[x.dtype], "PRECISION": _precision(x)}


def _precision(x: torch.Tensor) -> str:
    # fp32 operands in three parts, which keeps fp32's digits on tensor cores. Of half precision
    # inputs only the chunk's inverse is a product of fp32 operands, and it is rounded afterwards.
    return "tf32x3" if x.dtype == torch.float32 else "tf32"


def _switches(
    q: torch.Tensor | None, g: torch.Tensor, dt_bias: torch.Tensor | None, fused: Fused
) -> dict[str, Any]:
    midpoint = "always" if fused.gate == "bounded" else "if_it_fits"
    if (q if q is not None else g).dtype == torch.float16:
        midpoint = "never"  # its factors are as large as 2^80
    return {
        "GATE": fused.gate,
        "HAS_BIAS": dt_bias is not None,
        "BETA": fused.beta,
        "L2_NORM": fused.l2_norm,
        "HAS_Q": q is not None,
        "DELTA": fused.delta,
        "SCALAR_DECAY": g.shape[-1] == 1,
        "MIDPOINT": midpoint,
    }


def _name(x: torch.Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _padded(size: int) -> int:
    return max(16, triton.next_power_of_2(size))
