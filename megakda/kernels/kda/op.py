"""The public KDA operators: argument checks, activations, packed sequences, choice of backend.

Names and meaning of the arguments are those of `fla.ops.kda` 0.6 (flash-linear-attention), so that
either can stand in for the other; what is not supported raises instead of being ignored.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from megakda.kernels.backend import BACKENDS, choose_backend
from megakda.kernels.kda.checks import (
    Inputs,
    Options,
    check_gate_parameters,
    check_initial_state,
    check_inputs,
    check_options,
    check_triton,
    sequence_bounds,
)
from megakda.kernels.kda.chunk_packed import packed_kda_torch
from megakda.kernels.kda.chunk_torch import chunk_kda_torch
from megakda.kernels.kda.gate import kda_gate
from megakda.kernels.kda.peers import chunk_kda_fla, chunk_kda_flash
from megakda.kernels.kda.plan import ChunkPlan, Fused, chunks_per_range, plan_chunks
from megakda.kernels.kda.recurrent import recurrent_kda_torch
from megakda.kernels.kda.reference import kda_recurrence

L2_NORM_EPS = 1e-6
PEERS = {"fla": chunk_kda_fla, "flash_kda": chunk_kda_flash}
"""Backends of `chunk_kda` to compare with: other packages, where they are installed."""

# (q, k, v, g, beta, scale, initial_state), activations applied, sequences of equal length T >= 1 ->
# (o, final_state, and perhaps the state before each chunk)
_Implementation = Callable[..., tuple[Any, ...]]


def chunk_kda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    state_v_first: bool = False,
    chunk_size: int = 64,
    return_intermediate_states: bool = False,
    backend: str | None = None,
) -> tuple[Any, ...]:
    """Kimi Delta Attention over whole sequences, chunk-parallel (arXiv 2510.26692, section 3).

    Per head, with the state S in R^{K x V}:

        S <- Diag(exp g_t) S,   S <- S + k_t (beta_t (v_t - S^T k_t))^T,   o_t = scale * S^T q_t

    Gradients flow to q, k, v, g, beta, A_log, dt_bias and initial_state, from o and final_state.
    The arithmetic is fp32 whatever the dtype of the inputs, and exact for every g <= 0.

    Arguments after `beta` are keyword-only: fla's two operators order them differently.

    Args:
        q: [B, T, H, K], any floating dtype.
        k: [B, T, H, K], dtype of q.
        v: [B, T, HV, V], dtype of q; HV a multiple of H, query/key heads are shared by HV/H heads.
        g: [B, T, HV, K], or [B, T, HV, 1] for one decay per head (Gated DeltaNet). The decay in
            log space, <= 0; with `use_gate_in_kernel` the raw input of the gate.
        beta: [B, T, HV], step size of the delta rule; with `use_beta_sigmoid_in_kernel` its logit.
        A_log: HV elements, log decay rate; only with `use_gate_in_kernel`. May be left out there
            if `lower_bound` is given: a rate of 1.
        dt_bias: HV*K elements (HV for g [B, T, HV, 1]), added to g before the gate's activation;
            only with `use_gate_in_kernel`.
        scale: of the output, K^-1/2 by default.
        initial_state: fp32 [N, HV, K, V], N = B or the number of packed sequences; zero by default.
        output_final_state: whether to return the state after the last token.
        use_qk_l2norm_in_kernel: divide q and k by sqrt(sum of squares + 1e-6) over K, in fp32.
        use_gate_in_kernel: apply `kda_gate` to g.
        use_beta_sigmoid_in_kernel: apply the sigmoid to beta.
        allow_neg_eigval: beta = 2 * sigmoid(beta), in (0, 2): the step I - beta k k^T may then
            have a negative eigenvalue, in (-1, 1). Only with `use_beta_sigmoid_in_kernel`, because
            a beta computed outside can be doubled there.
        safe_gate: with `use_gate_in_kernel`, ask for the bounded gate, which needs `lower_bound`.
            Without it a promise that g >= lower_bound, which this implementation does not need.
        lower_bound: of the bounded gate, in [-5, 0); only with `use_gate_in_kernel` or `safe_gate`.
        cu_seqlens: integer [N + 1], B = 1: sequence n is the tokens cu_seqlens[n] up to, not
            including, cu_seqlens[n + 1]. Sequences may be empty; those pass their state through.
            However many there are, the cost is that of one sequence of their total length, besides
            the reading and writing of states. (With backend "reference", and on the torch path with
            `return_intermediate_states`, they are worked on one after the other.)
        state_v_first: states are [..., V, K] instead of [..., K, V].
        chunk_size: 16, 32, 64 or 128 tokens; changes speed and memory, not the result beyond
            rounding.
        return_intermediate_states: also return the state before each chunk. Gradients must be off.
        backend: "torch" (chunk-parallel PyTorch), "triton" (GPU kernels), "reference" (float64,
            token by token, slow); None is "triton" for tensors on a GPU, otherwise "torch". To
            compare with, where installed: "fla" (flash-linear-attention), "flash_kda" (FlashKDA).

    Returns:
        o [B, T, HV, V] in the dtype of v; final_state fp32 [N, HV, K, V], or None unless
        `output_final_state`; and with `return_intermediate_states` the states [B, NT, HV, K, V] in
        the dtype of v, NT the number of chunks of the sequence, or of all packed sequences.

    Raises:
        ValueError: a shape, dtype or value that breaks the rules above, or arguments that
            contradict each other.
    """
    options = Options(
        A_log=A_log,
        dt_bias=dt_bias,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_gate_in_kernel=use_gate_in_kernel,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        safe_gate=safe_gate,
        lower_bound=lower_bound,
        cu_seqlens=cu_seqlens,
        state_v_first=state_v_first,
        chunk_size=chunk_size,
        return_intermediate_states=return_intermediate_states,
        backend=backend,
    )
    return run_kda((q, k, v, g, beta), options)


def fused_recurrent_kda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    state_v_first: bool = False,
    chunk_size: int = 64,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Kimi Delta Attention token by token, for decoding; arguments as in `chunk_kda`.

    Every token reads and writes the whole state: the cheapest form for one token, far slower than
    `chunk_kda` for a prompt. Differentiable, at the price of keeping every state. `chunk_size` has
    no effect here; it is accepted so that one operator can stand in for the other.

    Returns:
        o [B, T, HV, V] in the dtype of v; final_state fp32 [N, HV, K, V] ([N, HV, V, K] with
        `state_v_first`), or None unless `output_final_state`. initial_state is not written to.

    Raises:
        ValueError: as `chunk_kda`.
    """
    options = Options(
        A_log=A_log,
        dt_bias=dt_bias,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_gate_in_kernel=use_gate_in_kernel,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        safe_gate=safe_gate,
        lower_bound=lower_bound,
        cu_seqlens=cu_seqlens,
        state_v_first=state_v_first,
        chunk_size=chunk_size,
        backend=backend,
    )
    o, final_state = run_kda((q, k, v, g, beta), options, recurrent=True)
    return o, final_state


def run_kda(inputs: Inputs, options: Options, recurrent: bool = False) -> tuple[Any, ...]:
    """Checks everything, chooses the implementation, and runs it: see `chunk_kda`."""
    check_options(options)
    check_inputs(inputs)
    check_gate_parameters(inputs, options)
    bounds = sequence_bounds(inputs, options.cu_seqlens)
    check_initial_state(inputs, options, bounds)
    known = BACKENDS if recurrent or not options.delta_rule else (*BACKENDS, *PEERS)
    backend = choose_backend(options.backend, inputs[0].device, known)
    if backend in PEERS:
        return PEERS[backend](inputs, options)
    if backend == "triton":
        check_triton(inputs, options, recurrent)
        if recurrent:
            return _recurrent_triton(inputs, options)
        return _chunk_triton(inputs, options, bounds)

    dtype = inputs[2].dtype
    implementation: _Implementation
    delta_rule, chunk_size = options.delta_rule, options.chunk_size
    if backend == "reference":
        implementation = partial(kda_recurrence, delta_rule=delta_rule)
        inputs = tuple(x.double() for x in inputs)
    elif recurrent:
        implementation = partial(recurrent_kda_torch, delta_rule=delta_rule, bounds=bounds)
        bounds = None
    elif bounds is None or options.return_intermediate_states:
        implementation = partial(chunk_kda_torch, chunk_size=chunk_size, delta_rule=delta_rule)
    else:
        implementation = partial(
            packed_kda_torch,
            bounds=bounds,
            output_final_state=options.output_final_state,
            chunk_size=chunk_size,
            delta_rule=delta_rule,
        )
        bounds = None
    # Autocast would run the fp32 matrix products in half precision.
    with torch.autocast(inputs[0].device.type, enabled=False):
        o, final_state, *states = _run(implementation, activate(inputs, options), options, bounds)
    if not options.output_final_state:
        final_state = None
    elif options.state_v_first:
        final_state = final_state.mT.contiguous()
    if final_state is not None:
        final_state = final_state.float()
    states = [(x.mT.contiguous() if options.state_v_first else x).to(dtype) for x in states]
    return o.to(dtype).contiguous(), final_state, *states


def _chunk_triton(
    inputs: Inputs, options: Options, bounds: list[int] | None
) -> tuple[torch.Tensor | None, ...]:
    """o, final state and, where asked for, the states before each chunk."""
    # Triton is an optional dependency where there is no GPU.
    from megakda.kernels.kda.chunk_triton import chunk_kda_triton, intermediate_states

    q, k, v, g, beta = inputs
    fused, plan, A_log, dt_bias = triton_setup(inputs, options, bounds)
    state = options.initial_state
    if state is not None:
        state = (state.mT if options.state_v_first else state).contiguous()
    o, final_state = chunk_kda_triton(
        q, k, v, g, beta, A_log, dt_bias, state, plan, fused, options.output_final_state
    )
    if final_state is not None and options.state_v_first:
        final_state = final_state.mT.contiguous()
    if not options.return_intermediate_states:
        return o, final_state
    states = intermediate_states(k, v, g, beta, A_log, dt_bias, state, plan, fused)
    if options.state_v_first:
        states = states.mT
    return o, final_state, states.unflatten(0, (len(v), -1)).contiguous()


def triton_setup(
    inputs: Inputs, options: Options, bounds: list[int] | None
) -> tuple[Fused, ChunkPlan, torch.Tensor | None, torch.Tensor | None]:
    """What the chunked kernels are to do, and over which chunks; A_log and dt_bias as they read
    them.
    """
    _, k, v, _, _ = inputs
    batch, tokens, value_heads, value_dim = v.shape
    rows = tuple(bounds if bounds is not None else range(0, (batch + 1) * tokens, tokens))
    fused = Fused(
        scale=k.shape[-1] ** -0.5 if options.scale is None else options.scale,
        gate=_gate_kind(options),
        lower_bound=options.lower_bound or 0.0,
        beta=_beta_kind(options),
        l2_norm=options.use_qk_l2norm_in_kernel,
        delta=options.delta_rule,
        chunk_size=options.chunk_size,
    )
    # Heads times blocks of 64 columns, as in the launch tables.
    programs = value_heads * -(-value_dim // 64)
    length = chunks_per_range(rows, fused.chunk_size, programs, _processors(v.device))
    plan = plan_chunks(rows, fused.chunk_size, length, v.device)
    A_log, dt_bias = options.A_log, options.dt_bias
    if A_log is not None:
        A_log = A_log.contiguous()
    elif options.use_gate_in_kernel:
        A_log = v.new_zeros(value_heads, dtype=torch.float32)  # a rate of 1
    return fused, plan, A_log, None if dt_bias is None else dt_bias.contiguous()


def _recurrent_triton(inputs: Inputs, options: Options) -> tuple[torch.Tensor | None, ...]:
    from megakda.kernels.kda.recurrent_triton import recurrent_kda_triton

    q, k, v, g, beta = inputs
    return recurrent_kda_triton(
        q,
        k,
        v,
        g,
        beta,
        k.shape[-1] ** -0.5 if options.scale is None else options.scale,
        options.initial_state,
        output_final_state=options.output_final_state,
        A_log=options.A_log,
        dt_bias=options.dt_bias,
        use_qk_l2norm_in_kernel=options.use_qk_l2norm_in_kernel,
        use_gate_in_kernel=options.use_gate_in_kernel,
        use_beta_sigmoid_in_kernel=options.use_beta_sigmoid_in_kernel,
        allow_neg_eigval=options.allow_neg_eigval,
        lower_bound=options.lower_bound if options.use_gate_in_kernel else None,
        delta_rule=options.delta_rule,
        cu_seqlens=options.cu_seqlens,
        state_v_first=options.state_v_first,
    )


def _gate_kind(options: Options) -> str:
    if not options.use_gate_in_kernel:
        return "none"
    return "softplus" if options.lower_bound is None else "bounded"


def _beta_kind(options: Options) -> str:
    if not options.use_beta_sigmoid_in_kernel:
        return "plain"
    return "double_sigmoid" if options.allow_neg_eigval else "sigmoid"


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 132  # of an H100 or H200, for which kernels are compiled and interpreted here
    return torch.cuda.get_device_properties(device).multi_processor_count


def activate(inputs: Inputs, options: Options) -> Inputs:
    """Norm of q and k, gate and beta, each where asked for, in fp32 (float64 for float64)."""
    q, k, v, g, beta = inputs
    if options.use_qk_l2norm_in_kernel:
        q, k = _l2_norm(q), _l2_norm(k)
    if options.use_gate_in_kernel:
        g = kda_gate(g, options.A_log, options.dt_bias, options.lower_bound)
    if options.use_beta_sigmoid_in_kernel:
        beta = torch.sigmoid(_at_least_fp32(beta))
        if options.allow_neg_eigval:
            beta = 2 * beta
    return q, k, v, g, beta


def _l2_norm(x: torch.Tensor) -> torch.Tensor:
    x = _at_least_fp32(x)
    return x * torch.rsqrt(torch.linalg.vecdot(x, x).unsqueeze(-1) + L2_NORM_EPS)


def _at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _run(
    implementation: _Implementation, inputs: Inputs, options: Options, bounds: list[int] | None
) -> tuple[Any, ...]:
    """o, final state and, where asked for, the states before each chunk; sequences within `bounds`
    one after the other, for implementations that do not take packed ones.
    """
    wanted = 3 if options.return_intermediate_states else 2
    state = options.initial_state
    if state is not None and options.state_v_first:
        state = state.mT.contiguous()
    scale = inputs[1].shape[-1] ** -0.5 if options.scale is None else options.scale
    if bounds is None:
        return implementation(*inputs, scale, state)[:wanted]

    parts = []
    for n, (start, end) in enumerate(pairwise(bounds)):
        state_n = None if state is None else state[n : n + 1]
        sequence = tuple(x[:, start:end] for x in inputs)
        if start == end:
            results = _empty_sequence(sequence, state_n)
        else:
            results = implementation(*sequence, scale, state_n)
        parts.append(results[:wanted])
    o, final_state, *states = zip(*parts, strict=True)
    return torch.cat(o, 1), torch.cat(final_state), *(torch.cat(x, 1) for x in states)


def _empty_sequence(inputs: Inputs, state: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """No output, no chunk, and the initial state as the final one."""
    _, k, v, _, _ = inputs
    shape = (v.shape[0], v.shape[2], k.shape[-1], v.shape[-1])  # B, HV, K, V
    if state is None:
        state = v.new_zeros(shape, dtype=torch.float32)
    return v, state, state.new_empty(shape[0], 0, *shape[1:])
