"""KDA over pieces of sequences whose other pieces are somewhere else, on other ranks for example.

What comes before a piece reaches it through its state alone, and the effect of a piece on the state
is an affine map (`affine.py`). So pieces are worked on apart but for one exchange each way:

    forward    maps of the pieces that go on elsewhere    ->  states before the pieces that began
               [E | M]                                        elsewhere
    backward   gradients that those states get from their ->  gradients of the states after the
               own tokens, and the maps' M                    pieces that go on elsewhere

The exchange is a callback: this module knows nothing of ranks. Both ways it is started as early as
its contents are known, and awaited when the rest of the work that needs no state has been issued.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch.autograd.function import once_differentiable

from megakda.kernels.backend import choose_backend
from megakda.kernels.kda.affine import range_state
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
from megakda.kernels.kda.chunk_torch import initial_state_gradient
from megakda.kernels.kda.op import activate, triton_setup
from megakda.kernels.kda.plan import index_tensor

Wait = Callable[[], torch.Tensor]


class StateExchange(Protocol):
    """Brings the states of pieces together. L pieces leave, E enter; all tensors are fp32."""

    def forward(self, maps: torch.Tensor) -> Wait:
        """Starts the exchange of maps [L, HV, K, V + K], E before M: S -> M S + E.

        What it returns waits, and gives the states before the pieces that enter [E, HV, K, V].
        """
        ...

    def backward(self, direct: torch.Tensor, maps: torch.Tensor) -> Wait:
        """Starts the exchange of gradients.

        Args:
            direct: of the states before the pieces that enter [E, HV, K, V], from those pieces
                alone: from their outputs, and their final states where they do not leave.
            maps: as given to `forward`.

        What it returns waits, and gives the gradients of the states after the pieces that leave
        [L, HV, K, V].
        """
        ...


@dataclass(frozen=True, eq=False)
class Links:
    """Which pieces have neighbours elsewhere: numbers of sequences, rising."""

    entering: tuple[int, ...]
    leaving: tuple[int, ...]
    exchange: StateExchange


def linked_kda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    cu_seqlens: torch.Tensor,
    links: Links,
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
    lower_bound: float | None = None,
    chunk_size: int = 64,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`chunk_kda` over packed pieces, some of which continue or are continued elsewhere.

    Every call runs the exchange once, and so does its backward pass, whatever enters or leaves
    here: others may be waiting.

    Args:
        cu_seqlens: integer [N + 1], B = 1, bounds of the pieces.
        links: which pieces enter and leave, and how to exchange.
        initial_state: fp32 [N, HV, K, V]; what it holds for pieces that enter is not read.
        Others: as in `chunk_kda`; backend "torch" or "triton".

    Returns:
        o [1, T, HV, V] in the dtype of v, and the states after the pieces, fp32 [N, HV, K, V], or
        None. Gradients flow to and from all but the states that the exchange provides.

    Raises:
        ValueError: as `chunk_kda`.
    """
    options = Options(
        A_log=A_log,
        dt_bias=dt_bias,
        scale=k.shape[-1] ** -0.5 if scale is None else scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_gate_in_kernel=use_gate_in_kernel,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        lower_bound=lower_bound,
        cu_seqlens=cu_seqlens,
        chunk_size=chunk_size,
    )
    inputs = (q, k, v, g, beta)
    check_options(options)
    check_inputs(inputs)
    check_gate_parameters(inputs, options)
    bounds = sequence_bounds(inputs, cu_seqlens)
    assert bounds is not None
    check_initial_state(inputs, options, bounds)
    # Autocast would run the fp32 matrix products in half precision, those of the exchange too.
    with torch.autocast(v.device.type, enabled=False):
        if choose_backend(backend, v.device, ("torch", "triton")) == "triton":
            check_triton(inputs, options, recurrent=False)
            # Triton is an optional dependency where there is no GPU.
            from megakda.kernels.kda.linked_triton import linked_kda_triton

            fused, plan, A_log, dt_bias = triton_setup(inputs, options, bounds)
            return linked_kda_triton(
                *inputs, A_log, dt_bias, initial_state, plan, fused, links, output_final_state
            )
        dtype = torch.promote_types(v.dtype, torch.float32)
        active = (x.to(dtype) for x in activate(inputs, options))
        o, final_state = _LinkedKDA.apply(*active, initial_state, options, bounds, links)
    return o.to(v.dtype), final_state if output_final_state else None


class _LinkedKDA(torch.autograd.Function):
    """Inputs are activated. The pass over the pieces is a graph of its own inside: the gradients of
    the states after them are known only in the middle of the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        initial_state: torch.Tensor | None,
        options: Options,
        bounds: list[int],
        links: Links,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = (q, k, v, g, beta)
        settings: dict[str, Any] = {"chunk_size": options.chunk_size}
        maps = _leaving_maps(inputs, initial_state, bounds, links, settings)
        states = links.exchange.forward(maps)()
        dtype = torch.promote_types(v.dtype, torch.float32)
        if initial_state is None:
            start = v.new_zeros(len(bounds) - 1, *states.shape[1:], dtype=dtype)
        else:
            start = initial_state.to(dtype, copy=True)
        start[index_tensor(links.entering, v.device)] = states.to(dtype)
        needs = ctx.needs_input_grad[:6]
        leaves = [x.detach().requires_grad_(n) for x, n in zip(inputs, needs[:5], strict=True)]
        start.requires_grad_(needs[5])
        scale = options.scale
        assert scale is not None
        with torch.set_grad_enabled(any(needs)):
            q, k, v, g, beta = leaves
            o, final_state = packed_kda_torch(
                q, k, v, g, beta, scale, start, bounds, output_final_state=True, **settings
            )
        assert final_state is not None
        if any(needs):
            ctx.inside = (leaves, start, o, final_state)
            ctx.save_for_backward(*inputs, maps)
            ctx.constants = (scale, bounds, links, settings)
        return o.detach(), final_state.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: torch.Tensor, dfinal: torch.Tensor) -> tuple[Any, ...]:
        q, k, v, g, beta, maps = ctx.saved_tensors
        scale, bounds, links, settings = ctx.constants
        if ctx.inside is None:
            raise RuntimeError(
                "linked_kda: the backward pass ran a second time; what it needs is freed after the "
                "first (retain_graph=True is not supported)"
            )
        leaves, start, o, final_state = ctx.inside
        ctx.inside = None
        direct = [
            _direct_gradient((q, k, v, g, beta, do), dfinal, scale, bounds, n, settings)
            for n in links.entering
        ]
        empty = dfinal.new_empty(0, *dfinal.shape[1:])
        wait = links.exchange.backward(torch.cat([empty, *direct]), maps)
        dfinal = dfinal.clone()
        dfinal[index_tensor(links.leaving, v.device)] += wait().to(dfinal.dtype)
        wanted = [x for x in (*leaves, start) if x.requires_grad]
        found = iter(torch.autograd.grad((o, final_state), wanted, (do, dfinal)))
        gradients = [next(found) if x.requires_grad else None for x in (*leaves, start)]
        if gradients[5] is not None:
            gradients[5][index_tensor(links.entering, v.device)] = 0
            gradients[5] = gradients[5].float()
        return *gradients, None, None, None


def _direct_gradient(
    tensors: tuple[torch.Tensor, ...],
    dfinal: torch.Tensor,
    scale: float,
    bounds: Sequence[int],
    n: int,
    settings: dict[str, Any],
) -> torch.Tensor:
    """The gradient of the state before piece n [1, HV, K, V], from that piece alone."""
    q, k, v, g, beta, do = (x[:, bounds[n] : bounds[n + 1]] for x in tensors)
    return initial_state_gradient(q, k, v, g, beta, scale, do, dfinal[n : n + 1], **settings)


def _leaving_maps(
    inputs: Inputs,
    initial_state: torch.Tensor | None,
    bounds: Sequence[int],
    links: Links,
    settings: dict[str, Any],
) -> torch.Tensor:
    """[E | M] of the pieces that leave, fp32 [L, HV, K, V + K]."""
    _, k, v, g, beta = inputs
    sizes = (v.shape[2], k.shape[-1], k.shape[-1] + v.shape[-1])
    dtype = torch.promote_types(v.dtype, torch.float32)
    maps = [v.new_empty(0, *sizes, dtype=dtype)]
    for n, (start, end) in enumerate(pairwise(bounds)):
        if n in links.leaving:
            piece = (x[:, start:end] for x in (k, v, g, beta))
            m, e = range_state(*piece, backend="torch", **settings)
            maps.append(torch.cat([e, m], -1))
    return with_initial_states(torch.cat(maps), initial_state, links)


def with_initial_states(
    maps: torch.Tensor, initial_state: torch.Tensor | None, links: Links
) -> torch.Tensor:
    """Maps of pieces that begin a sequence, from what they make of their initial state.

    The state after such a piece does not depend on what others send: E becomes that state, and M is
    not read.
    """
    if initial_state is None:
        return maps
    value_dim = initial_state.shape[-1]
    begins = tuple(i for i, n in enumerate(links.leaving) if n not in links.entering)
    numbers = tuple(links.leaving[i] for i in begins)
    places = index_tensor(begins, maps.device)
    states = initial_state[index_tensor(numbers, maps.device)].to(maps.dtype)
    maps = maps.clone()
    maps[places, ..., :value_dim] += maps[places, ..., value_dim:] @ states
    return maps
