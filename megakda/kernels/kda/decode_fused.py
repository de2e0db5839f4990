"""One token of a whole KDA mixer, between its input projections and its output projection."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megakda.kernels.backend import choose_backend
from megakda.kernels.gated_norm import gated_rms_norm
from megakda.kernels.kda.decode import (
    check_floating,
    check_no_gradient,
    check_rows,
    check_state,
    decode_unchecked,
)
from megakda.kernels.kda.gate import check_lower_bound

TAPS = range(2, 9)
ACTIVATIONS = ("sigmoid", "swish")
_Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # one each for q, k and v


def kda_decode_fused(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    gate: torch.Tensor,
    conv_states: _Three,
    conv_weights: _Three,
    norm_weight: torch.Tensor,
    state: torch.Tensor,
    *,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    lower_bound: float | None = None,
    allow_neg_eigval: bool = False,
    scale: float | None = None,
    eps: float = 1e-5,
    activation: str = "sigmoid",
    state_indices: torch.Tensor | None = None,
    state_v_first: bool = False,
    backend: str | None = None,
    unchecked: bool = False,
) -> torch.Tensor:
    """One new token of each of N sequences; `state` and `conv_states` are updated in place.

    What `short_conv` with SiLU on q, k and v, `kda_decode_step` with all of its activations, and
    `gated_rms_norm` do one after the other (Kimi Linear, arXiv 2510.26692, section 4), in one
    launch with Triton, and without rounding in between: fp32 up to the output. No gradients.

    Args:
        q: [N, H*K], the projection before its convolution, any floating dtype (not float64 with
            Triton).
        k: [N, H*K], dtype of q.
        v: [N, HV*V], dtype of q; HV a multiple of H.
        g: [N, HV*K], raw input of the decay gate.
        beta: [N, HV], logit of the step size.
        gate: [N, HV*V], output gate before its activation.
        conv_states: for q, k and v the last W-1 inputs of the convolution, oldest first:
            [N or P, D, W-1] with D = H*K, H*K and HV*V, in the dtype of q.
        conv_weights: for q, k and v [D, W], W in 2..8; the last tap meets the new token.
        norm_weight: [V], shared by the heads.
        state: fp32 [N or P, HV, K, V], or [N or P, HV, V, K] with `state_v_first`. K and V at
            most 128 with Triton. Of this and of conv_states each row must be contiguous.
        A_log: HV elements, log decay rate; may be left out if `lower_bound` is given.
        dt_bias: HV*K elements, or None for no bias.
        lower_bound: of the bounded gate, in [-5, 0); None for the softplus gate.
        allow_neg_eigval: beta = 2 * sigmoid(beta).
        scale: of the recurrence's output, K^-1/2 by default.
        eps: of the norm, inside the root, at least 0.
        activation: of the output gate, "sigmoid" or "swish".
        state_indices: int32 or int64 [N], rows of `state` and of each of `conv_states`, as in
            `kda_decode_step`: no row twice, and a negative index is padding, with zero output.
        state_v_first: rows of the state are [HV, V, K].
        backend: "torch", "triton", "reference" (float64, slow); None chooses by device.
        unchecked: for a caller that made every tensor itself and runs without autograd: at one
            token, the checks take as long as the work.

    Returns:
        o [N, HV*V] in the dtype of v, ready for the output projection.

    Raises:
        ValueError: a shape, dtype or value that breaks the rules above, or an input that requires
            a gradient while gradients are on.
    """
    backend = choose_backend(backend, q.device)
    if not unchecked:
        _check(
            (q, k, v, g, beta, gate),
            conv_states,
            conv_weights,
            norm_weight,
            state,
            (A_log, dt_bias, lower_bound),
            eps,
            activation,
            state_indices,
            state_v_first,
        )
    key_dim, value_dim = state.shape[2:][::-1] if state_v_first else state.shape[2:]
    heads, value_heads = q.shape[1] // key_dim, state.shape[1]
    scale = key_dim**-0.5 if scale is None else scale

    if backend == "triton":
        from megakda.kernels.kda.decode_fused_triton import kda_decode_fused_triton

        return kda_decode_fused_triton(
            (q, k, v, g, beta, gate),
            conv_states,
            conv_weights,
            norm_weight,
            state,
            A_log=A_log,
            dt_bias=dt_bias,
            lower_bound=lower_bound,
            allow_neg_eigval=allow_neg_eigval,
            scale=scale,
            eps=eps,
            activation=activation,
            state_indices=state_indices,
            state_v_first=state_v_first,
        )

    dtype = torch.float64 if backend == "reference" else torch.float32
    switches = {
        "A_log": A_log,
        "dt_bias": dt_bias,
        "use_qk_l2norm_in_kernel": True,
        "use_gate_in_kernel": True,
        "use_beta_sigmoid_in_kernel": True,
        "allow_neg_eigval": allow_neg_eigval,
        "lower_bound": lower_bound,
    }
    with torch.no_grad():
        padding = None  # None where no row is padding
        if state_indices is None:
            rows = torch.arange(len(q), device=q.device)
        else:
            rows, negative = state_indices.long(), state_indices < 0
            padding = negative if bool(negative.any()) else None
        new_q, new_k, new_v = (
            _convolve(*x, rows, padding, dtype)
            for x in zip((q, k, v), conv_states, conv_weights, strict=True)
        )
        inputs = (
            new_q.view(-1, 1, heads, key_dim),
            new_k.view(-1, 1, heads, key_dim),
            new_v.view(-1, 1, value_heads, value_dim),
            g.reshape(-1, 1, value_heads, key_dim),
            beta.unsqueeze(1),
        )
        states = state.mT if state_v_first else state
        o = decode_unchecked(inputs, switches, scale, states, state_indices, None, True, backend)
        o = o.view(-1, value_heads, value_dim)
        gate = gate.reshape(o.shape).to(dtype)
        o = gated_rms_norm(o, norm_weight.view(-1), gate, activation, eps, backend=backend)
        if padding is not None:
            o = o.masked_fill(padding.view(-1, 1, 1), 0.0)  # the gate may hold NaN
    return o.flatten(1).to(v.dtype)


def _convolve(
    x: torch.Tensor,
    state: torch.Tensor,
    weight: torch.Tensor,
    rows: torch.Tensor,
    padding: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """SiLU of the convolution at one token [N, D], zero in padding; the state moves on by one."""
    if padding is not None:
        live = ~padding
        y = x.new_zeros(x.shape, dtype=dtype)
        y[live] = _convolve(x[live], state, weight, rows[live], None, dtype)
        return y
    window = torch.cat((state[rows], x.unsqueeze(-1)), dim=-1)  # [N, D, W]
    state[rows] = window[..., 1:]
    return F.silu((window.to(dtype) * weight.to(dtype)).sum(-1))


# ------------------------------------------------------------------ argument checks


def _check(
    inputs: tuple[torch.Tensor, ...],
    conv_states: _Three,
    conv_weights: _Three,
    norm_weight: torch.Tensor,
    state: torch.Tensor,
    gates: tuple[torch.Tensor | None, torch.Tensor | None, float | None],
    eps: float,
    activation: str,
    state_indices: torch.Tensor | None,
    state_v_first: bool,
) -> None:
    """All that `kda_decode_fused` raises; inputs: q, k, v, g, beta, gate."""
    q, k, v, g, beta, gate = inputs
    A_log, dt_bias, lower_bound = gates
    _, value_dim = _check_state_and_inputs(q, k, v, g, beta, gate, state, state_v_first)
    if state_indices is None and len(state) != len(q):
        raise ValueError(f"state: {len(state)} rows, must have {len(q)} without state_indices")
    check_rows(state_indices, None, (len(q), 1), len(state), q.device)
    _check_convolutions((q, k, v), conv_states, conv_weights, len(state))
    if not eps >= 0:
        raise ValueError(f"eps: {eps} must be at least 0")
    _check_parameters(A_log, dt_bias, lower_bound, norm_weight, activation, g, beta, value_dim)
    check_no_gradient(q=q, k=k, v=v, g=g, beta=beta, gate=gate, norm_weight=norm_weight)
    check_no_gradient(A_log=A_log, dt_bias=dt_bias, state=state)
    for x in (*conv_states, *conv_weights):
        check_no_gradient(convolution=x)


def _check_state_and_inputs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    gate: torch.Tensor,
    state: torch.Tensor,
    state_v_first: bool,
) -> tuple[int, int]:
    """Checks them and returns K and V, which only the state tells apart from the heads."""
    if state.ndim != 4 or 0 in state.shape:
        raise ValueError(f"state: shape {list(state.shape)} must have 4 dimensions, none of them 0")
    value_heads = state.shape[1]
    key_dim, value_dim = state.shape[2:][::-1] if state_v_first else state.shape[2:]
    check_state("state", state, None, tuple(state.shape[1:]), q.device)
    if q.ndim != 2 or 0 in q.shape or q.shape[1] % key_dim or value_heads % (q.shape[1] // key_dim):
        raise ValueError(
            f"q: shape {list(q.shape)} must be [N, H*K] with K = {key_dim} and H a divisor of the "
            f"state's {value_heads} heads"
        )
    widths = {
        "q": (q, q.shape[1]),
        "k": (k, q.shape[1]),
        "v": (v, value_heads * value_dim),
        "g": (g, value_heads * key_dim),
        "beta": (beta, value_heads),
        "gate": (gate, value_heads * value_dim),
    }
    for name, (x, width) in widths.items():
        check_floating(name, x, q.device)
        if x.shape != (len(q), width):
            raise ValueError(f"{name}: shape {list(x.shape)} must be {[len(q), width]}")
        if name in ("k", "v") and x.dtype != q.dtype:
            raise ValueError(f"{name}: dtype {x.dtype} must be q's {q.dtype}")
    return key_dim, value_dim


def _check_convolutions(
    inputs: _Three, conv_states: _Three, conv_weights: _Three, rows: int
) -> None:
    for name, three in (("conv_states", conv_states), ("conv_weights", conv_weights)):
        if len(three) != 3:
            raise ValueError(f"{name}: {len(three)} tensors, must be 3: for q, k and v")
    taps = conv_weights[0].shape[-1]
    for i, x in enumerate(inputs):
        weight = conv_weights[i]
        check_floating(f"conv_weights[{i}]", weight, x.device)
        if weight.shape != (x.shape[1], taps) or taps not in TAPS:
            raise ValueError(
                f"conv_weights[{i}]: shape {list(weight.shape)} must be [{x.shape[1]}, W] with the "
                f"same W in {TAPS[0]}..{TAPS[-1]} for q, k and v"
            )
        row = (x.shape[1], taps - 1)
        check_state(f"conv_states[{i}]", conv_states[i], rows, row, x.device, x.dtype)


def _check_parameters(
    A_log: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    lower_bound: float | None,
    norm_weight: torch.Tensor,
    activation: str,
    g: torch.Tensor,
    beta: torch.Tensor,
    value_dim: int,
) -> None:
    check_lower_bound(lower_bound)
    if A_log is None and lower_bound is None:
        raise ValueError("A_log: needed, or lower_bound, or both")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: {activation!r} must be one of {ACTIVATIONS}")
    sizes = {
        "A_log": (A_log, beta.shape[1]),
        "dt_bias": (dt_bias, g.shape[1]),
        "norm_weight": (norm_weight, value_dim),
    }
    for name, (x, size) in sizes.items():
        if x is not None:
            check_floating(name, x, g.device)
            if x.numel() != size:
                raise ValueError(f"{name}: {x.numel()} elements, must have {size}")
