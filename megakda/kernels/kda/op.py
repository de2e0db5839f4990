"""The public KDA operators: argument checks, activations, packed sequences, choice of backend.

Names and meaning of the arguments are those of `fla.ops.kda` 0.6 (flash-linear-attention), so that
either can stand in for the other; what is not supported raises instead of being ignored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from megakda.kernels.kda.chunk_torch import chunk_kda_torch
from megakda.kernels.kda.gate import check_lower_bound, kda_gate
from megakda.kernels.kda.recurrent import recurrent_kda_torch
from megakda.kernels.kda.reference import kda_recurrence

BACKENDS = ("torch", "reference")
CHUNK_SIZES = (16, 32, 64, 128)
L2_NORM_EPS = 1e-6
_INTEGERS = (torch.int32, torch.int64)

# (q, k, v, g, beta, scale, initial_state), activations applied, sequences of equal length T >= 1 ->
# (o, final_state, and perhaps the state before each chunk)
_Implementation = Callable[..., tuple[torch.Tensor, ...]]
_Inputs = tuple[torch.Tensor, ...]  # q, k, v, g, beta


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
            They are worked on one after the other: exact and simple, and slower than one batched
            pass over the chunks of all sequences would be if there are many short ones.
        state_v_first: states are [..., V, K] instead of [..., K, V].
        chunk_size: 16, 32, 64 or 128 tokens; changes speed and memory, not the result beyond
            rounding.
        return_intermediate_states: also return the state before each chunk. Gradients must be off.
        backend: "torch" (chunk-parallel PyTorch), "reference" (float64, token by token, slow); None
            chooses by device, which today means "torch" on every one.

    Returns:
        o [B, T, HV, V] in the dtype of v; final_state fp32 [N, HV, K, V], or None unless
        `output_final_state`; and with `return_intermediate_states` the states [B, NT, HV, K, V] in
        the dtype of v, NT the number of chunks of the sequence, or of all packed sequences.

    Raises:
        ValueError: a shape, dtype or value that breaks the rules above, or arguments that
            contradict each other.
    """
    options = _Options(
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
    return _kda(partial(chunk_kda_torch, chunk_size=chunk_size), (q, k, v, g, beta), options)


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
    options = _Options(
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
    o, final_state = _kda(recurrent_kda_torch, (q, k, v, g, beta), options)
    return o, final_state


@dataclass(frozen=True, eq=False)
class _Options:
    """The arguments of the operators besides the five sequences."""

    A_log: torch.Tensor | None
    dt_bias: torch.Tensor | None
    scale: float | None
    initial_state: torch.Tensor | None
    output_final_state: bool
    use_qk_l2norm_in_kernel: bool
    use_gate_in_kernel: bool
    use_beta_sigmoid_in_kernel: bool
    allow_neg_eigval: bool
    safe_gate: bool
    lower_bound: float | None
    cu_seqlens: torch.Tensor | None
    state_v_first: bool
    chunk_size: int
    backend: str | None
    return_intermediate_states: bool = False


def _kda(implementation: _Implementation, inputs: _Inputs, options: _Options) -> tuple[Any, ...]:
    """Checks, applies the activations, runs every sequence, and brings the results into shape."""
    _check_options(options)
    _check_inputs(inputs)
    bounds = _sequence_bounds(inputs, options.cu_seqlens)
    _check_initial_state(inputs, options, bounds)
    dtype = inputs[2].dtype
    if options.backend == "reference":
        implementation = kda_recurrence
        inputs = tuple(x.double() for x in inputs)

    # Autocast would run the fp32 matrix products in half precision.
    with torch.autocast(inputs[0].device.type, enabled=False):
        o, final_state, *states = _run(implementation, _activate(inputs, options), options, bounds)
    if options.state_v_first:
        final_state, *states = (x.mT.contiguous() for x in (final_state, *states))
    final = final_state.float() if options.output_final_state else None
    return o.to(dtype).contiguous(), final, *(x.to(dtype) for x in states)


def _activate(inputs: _Inputs, options: _Options) -> _Inputs:
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
    implementation: _Implementation, inputs: _Inputs, options: _Options, bounds: list[int] | None
) -> tuple[torch.Tensor, ...]:
    """o, final state and, where asked for, the states before each chunk; packed sequences one after
    the other.
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


def _empty_sequence(inputs: _Inputs, state: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """No output, no chunk, and the initial state as the final one."""
    _, k, v, _, _ = inputs
    shape = (v.shape[0], v.shape[2], k.shape[-1], v.shape[-1])  # B, HV, K, V
    if state is None:
        state = v.new_zeros(shape, dtype=torch.float32)
    return v, state, state.new_empty(shape[0], 0, *shape[1:])


# ------------------------------------------------------------------ argument checks


def _check_options(options: _Options) -> None:
    """What can be judged without the sequences."""
    if options.backend is not None and options.backend not in BACKENDS:
        raise ValueError(f"backend: {options.backend!r} must be one of {BACKENDS}, or None")
    if options.chunk_size not in CHUNK_SIZES:
        raise ValueError(f"chunk_size: {options.chunk_size} must be one of {CHUNK_SIZES}")
    check_lower_bound(options.lower_bound)
    if options.use_gate_in_kernel:
        if options.A_log is None and options.lower_bound is None:
            raise ValueError("A_log: use_gate_in_kernel=True needs A_log, or lower_bound, or both")
        if options.safe_gate and options.lower_bound is None:
            raise ValueError("lower_bound: None, but safe_gate=True asks for the bounded gate")
    else:
        for name in ("A_log", "dt_bias"):
            if getattr(options, name) is not None:
                raise ValueError(f"{name}: given, but only use_gate_in_kernel=True reads it")
        if options.lower_bound is not None and not options.safe_gate:
            raise ValueError(
                f"lower_bound: {options.lower_bound} given, but only use_gate_in_kernel=True or "
                "safe_gate=True reads it"
            )
    if options.allow_neg_eigval and not options.use_beta_sigmoid_in_kernel:
        raise ValueError(
            "allow_neg_eigval: True needs use_beta_sigmoid_in_kernel=True; a beta computed outside "
            "is doubled outside"
        )
    if options.return_intermediate_states:
        if torch.is_grad_enabled():
            raise ValueError(
                "return_intermediate_states: the states carry no gradient; call under "
                "torch.no_grad() or torch.inference_mode()"
            )
        if options.backend == "reference":
            raise ValueError("return_intermediate_states: backend='reference' has no chunks")


def _check_inputs(inputs: _Inputs) -> None:
    """Shapes, dtypes and devices of q, k, v, g and beta."""
    q, k, v, g, beta = inputs
    for name, x, ndim in (("q", q, 4), ("k", k, 4), ("v", v, 4), ("g", g, 4), ("beta", beta, 3)):
        if x.ndim != ndim:
            raise ValueError(f"{name}: shape {list(x.shape)} must have {ndim} dimensions")
        if not x.is_floating_point():
            raise ValueError(f"{name}: dtype {x.dtype} must be a floating dtype")
        if x.device != q.device:
            raise ValueError(f"{name}: on {x.device}, must be on q's device {q.device}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise ValueError(f"{name}: dtype {x.dtype} must be q's {q.dtype}")
    batch, tokens, heads, key_dim = q.shape
    value_heads = v.shape[2]
    if tokens == 0 or min(q.shape[2:]) == 0 or min(v.shape[2:]) == 0:
        raise ValueError(f"q, v: shapes {list(q.shape)}, {list(v.shape)} must not be empty")
    if k.shape != q.shape:
        raise ValueError(f"k: shape {list(k.shape)} must be q's {list(q.shape)}")
    if v.shape[:2] != (batch, tokens) or value_heads % heads:
        raise ValueError(
            f"v: shape {list(v.shape)} must be [{batch}, {tokens}, HV, V] with HV a multiple of "
            f"q's {heads} heads"
        )
    if g.shape[:3] != v.shape[:3] or g.shape[3] not in (key_dim, 1):
        raise ValueError(
            f"g: shape {list(g.shape)} must be {[batch, tokens, value_heads, key_dim]}, or with "
            "last dimension 1 for one decay per head"
        )
    if beta.shape != v.shape[:3]:
        raise ValueError(f"beta: shape {list(beta.shape)} must be {[batch, tokens, value_heads]}")


def _sequence_bounds(inputs: _Inputs, cu_seqlens: torch.Tensor | None) -> list[int] | None:
    """cu_seqlens as a checked list."""
    if cu_seqlens is None:
        return None
    batch, tokens = inputs[0].shape[:2]
    if batch != 1:
        raise ValueError(f"cu_seqlens: needs batch size 1, the sequences in one row; got {batch}")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype not in _INTEGERS:
        raise ValueError(
            f"cu_seqlens: {cu_seqlens.dtype} {list(cu_seqlens.shape)} must be int32 or int64, "
            "[N + 1] with N >= 1"
        )
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != tokens:
        raise ValueError(
            f"cu_seqlens: runs from {bounds[0]} to {bounds[-1]}, must run from 0 to T = {tokens}"
        )
    for start, end in pairwise(bounds):
        if end < start:
            raise ValueError(f"cu_seqlens: falls from {start} to {end}, must not decrease")
    return bounds


def _check_initial_state(inputs: _Inputs, options: _Options, bounds: list[int] | None) -> None:
    state = options.initial_state
    if state is None:
        return
    _, k, v, _, _ = inputs
    sequences = v.shape[0] if bounds is None else len(bounds) - 1
    sizes = [k.shape[-1], v.shape[-1]]
    shape = [sequences, v.shape[2], *(reversed(sizes) if options.state_v_first else sizes)]
    if list(state.shape) != shape:
        order = "[N, HV, V, K]" if options.state_v_first else "[N, HV, K, V]"
        raise ValueError(f"initial_state: shape {list(state.shape)} must be {order} = {shape}")
    if state.dtype != torch.float32:
        raise ValueError(f"initial_state: dtype {state.dtype} must be torch.float32")
    if state.device != v.device:
        raise ValueError(f"initial_state: on {state.device}, must be on v's device {v.device}")
