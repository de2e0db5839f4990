"""Any range of tokens acts on the state as an affine map: S_out = M S_in + E.

M [..., K, K] is the product of what the tokens do to the state, the last token leftmost, and
E [..., K, V] what the range makes of a state of zero. Ranges that follow each other compose, so
they can be worked on apart, on other ranks for example, and put together:

    (M2, E2) after (M1, E1) = (M2 M1, M2 E1 + E2)

The adjoint of a range is an affine map, too, and runs backwards. If a loss depends on S_in through
S_out, and besides through what the range's own tokens read of it, then

    dS_in = M^T dS_out + dS_direct

where dS_direct is what the backward pass of the range makes of a dS_out of zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from megakda.kernels.backend import choose_backend
from megakda.kernels.kda.checks import (
    Inputs,
    Options,
    check_gate_parameters,
    check_inputs,
    check_options,
    check_triton,
    sequence_bounds,
)
from megakda.kernels.kda.chunk_packed import packed_kda_torch
from megakda.kernels.kda.chunk_torch import chunk_kda_torch
from megakda.kernels.kda.op import activate, triton_setup

AffineMap = tuple[torch.Tensor, torch.Tensor]  # M [..., K, K], E [..., K, V]


def range_state(
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    cu_seqlens: torch.Tensor | None = None,
    *,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    chunk_size: int = 64,
    delta_rule: bool = True,
    backend: str | None = None,
) -> AffineMap:
    """The affine map of each range of tokens; no query takes part in it.

    It is the state pass over a state of K more columns, the identity to begin with, for which v is
    zero: they end as M, and the other V, which begin as zero, as E. So the gradients, of k, v, g,
    beta, A_log and dt_bias, are those of the state pass.

    Args:
        k: [B, T, H, K], any floating dtype.
        v: [B, T, HV, V], dtype of k; HV a multiple of H.
        g: [B, T, HV, K] or [B, T, HV, 1], decay in log space, <= 0, or the raw input of the gate.
        beta: [B, T, HV], or its logit.
        cu_seqlens: integer [N + 1], B = 1: range n is the tokens cu_seqlens[n] up to, not
            including, cu_seqlens[n + 1]; for an empty one M = I and E = 0. Without cu_seqlens each
            sequence of the batch is a range, N = B.
        delta_rule: False for plain gated linear attention; M is then Diag(exp of the summed g).
        backend: "torch", "triton" or None, as in `chunk_kda`, as all other arguments.

    Returns:
        M [N, HV, K, K] and E [N, HV, K, V], fp32 (float64 where v is float64).

    Raises:
        ValueError: a shape, dtype or value that breaks the rules above.
    """
    options = Options(
        A_log=A_log,
        dt_bias=dt_bias,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_gate_in_kernel=use_gate_in_kernel,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        lower_bound=lower_bound,
        chunk_size=chunk_size,
        delta_rule=delta_rule,
    )
    inputs = (k, k, v, g, beta)  # nothing needs to be read from the state, so any q will do
    check_options(options)
    check_inputs(inputs)
    check_gate_parameters(inputs, options)
    bounds = sequence_bounds(inputs, cu_seqlens)
    if choose_backend(backend, v.device, ("torch", "triton")) == "triton":
        check_triton(inputs, options, recurrent=False)
        return _range_state_triton(inputs, options, bounds)

    key_dim = k.shape[-1]
    dtype = torch.promote_types(v.dtype, torch.float32)
    initial_state = torch.eye(key_dim, key_dim + v.shape[-1], dtype=dtype, device=v.device)
    ranges = v.shape[0] if bounds is None else len(bounds) - 1
    initial_state = initial_state.expand(ranges, v.shape[2], -1, -1)
    settings: dict[str, Any] = {"chunk_size": chunk_size, "delta_rule": delta_rule}
    state_pass: Callable[..., tuple[Any, ...]] = partial(chunk_kda_torch, **settings)
    if bounds is not None:
        state_pass = partial(packed_kda_torch, bounds=bounds, output_final_state=True, **settings)
    # Autocast would run the fp32 matrix products in half precision.
    with torch.autocast(v.device.type, enabled=False):
        _, k, v, g, beta = activate(inputs, options)
        values = F.pad(v, (key_dim, 0))
        _, state, *_ = state_pass(k.detach(), k, values, g, beta, 1.0, initial_state)
    return state[..., :key_dim], state[..., key_dim:]


def _range_state_triton(inputs: Inputs, options: Options, bounds: list[int] | None) -> AffineMap:
    # Triton is an optional dependency where there is no GPU.
    from megakda.kernels.kda.chunk_triton import range_state_triton

    _, k, v, g, beta = inputs
    fused, plan, A_log, dt_bias = triton_setup(inputs, options, bounds)
    maps = range_state_triton(k, v, g, beta, A_log, dt_bias, plan, fused)
    value_dim = v.shape[-1]
    return maps[..., value_dim:], maps[..., :value_dim]


def compose(later: AffineMap, earlier: AffineMap) -> AffineMap:
    """The map of two ranges that follow each other, from theirs."""
    (later_m, later_e), (earlier_m, earlier_e) = later, earlier
    return later_m @ earlier_m, later_m @ earlier_e + later_e


def fold(
    maps: Sequence[AffineMap], initial: torch.Tensor
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The states before each range, and after the last.

    Args:
        maps: of ranges that follow each other, the earliest first.
        initial: state before the first of them [..., K, V].
    """
    before, state = [], initial
    for m, e in maps:
        before.append(state)
        state = m @ state + e
    return before, state


def fold_backward(
    maps: Sequence[AffineMap], direct: Sequence[torch.Tensor], dfinal: torch.Tensor
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The gradients of the states after each range, and of the initial one: the adjoint of `fold`.

    Args:
        maps: as in `fold`.
        direct: for each range, the gradient of the state before it that comes from its own tokens,
            dS_direct [..., K, V].
        dfinal: gradient of the state after the last range [..., K, V], apart from `direct`.
    """
    after, dstate = [], dfinal
    for (m, _), dstate_direct in zip(reversed(maps), reversed(direct), strict=True):
        after.append(dstate)
        dstate = m.mT @ dstate + dstate_direct
    return after[::-1], dstate
