"""The decode step of Kimi Delta Attention: a few new tokens per sequence, states updated in place.

Where the states live is the caller's choice: one row per sequence, a pool of rows (continuous
batching), or a row per token of a draft, so that a rejected draft can be taken back (speculative
decoding).
"""

from __future__ import annotations

from typing import Any

import torch

from megakda.kernels.backend import choose_backend
from megakda.kernels.kda.gate import check_lower_bound, kda_gate
from megakda.kernels.l2_norm import l2_norm

_INTEGERS = (torch.int32, torch.int64)
_Inputs = tuple[torch.Tensor, ...]  # q, k, v, g, beta


def kda_decode_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    *,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_indices: torch.Tensor | None = None,
    num_accepted: torch.Tensor | None = None,
    delta_rule: bool = True,
    state_v_first: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """S new tokens of each of N sequences, through `state`, which is updated in place.

    Per token and head, with the state S in R^{K x V} (Kimi Linear, arXiv 2510.26692, equation 1):

        S <- Diag(exp g) S,   S <- S + k (beta (v - S^T k))^T,   o = scale * S^T q

    The arithmetic is fp32 whatever the dtype of the inputs. There are no gradients. With Triton it
    is one launch, which never waits for the device: a CUDA graph can capture it.

    Which rows of `state` are read and written:

    - By default row n holds the state of sequence n, N rows in all.
    - With `state_indices` [N], `state` is a pool of P rows, and sequence n has row
      state_indices[n]. No row may be named twice. A negative index is padding: no row is read or
      written, and the output is zero, whatever the inputs hold.
    - With `state_indices` [N, S] and `num_accepted` [N] (speculative decoding), sequence n has S
      rows, a different one for each new token. The state to begin with is read from
      state_indices[n, num_accepted[n] - 1], and the state after new token s is written to
      state_indices[n, s]. So the caller passes the same indices step after step, and as
      num_accepted the number of tokens, 1 to S, that the step before has kept: the first token,
      which was no guess, and the accepted part of the draft. After a prompt the state goes to
      state_indices[n, 0], and num_accepted is 1. The row read from is one of those written; the
      state is read before any row is written, so the result is as if they were apart. No row may
      be named twice, by one sequence or by two. In padding all S indices are negative, and
      num_accepted may be anything.

    On a CPU the values of `state_indices` and `num_accepted` are checked. On a GPU that would have
    to wait for the device: there an index of P or more, a row named twice or a num_accepted out of
    range reads or writes wrong memory, or leaves either sequence's result.

    Args:
        q: [N, S, H, K], any floating dtype (not float64 with Triton); S = 1 in plain decoding.
        k: [N, S, H, K], dtype of q.
        v: [N, S, HV, V], dtype of q; HV a multiple of H, query/key heads serve HV/H heads each.
        g: [N, S, HV, K], or [N, S, HV, 1] for one decay per head (Gated DeltaNet): log-space decay
            <= 0; with `use_gate_in_kernel` the raw input of the gate.
        beta: [N, S, HV], step size; with `use_beta_sigmoid_in_kernel` its logit.
        state: fp32 [N or P, HV, K, V], or [N or P, HV, V, K] with `state_v_first`. Rows may be any
            distance apart, but each must be contiguous.
        A_log: HV elements, log decay rate; only with `use_gate_in_kernel`, where it may be left
            out if `lower_bound` is given: a rate of 1.
        dt_bias: HV*K elements (HV for g [N, S, HV, 1]); only with `use_gate_in_kernel`.
        scale: of the output, K^-1/2 by default.
        use_qk_l2norm_in_kernel: divide q and k by sqrt(sum of squares + 1e-6) over K.
        use_gate_in_kernel: apply `kda_gate` to g.
        use_beta_sigmoid_in_kernel: apply the sigmoid to beta.
        allow_neg_eigval: beta = 2 * sigmoid(beta); only with `use_beta_sigmoid_in_kernel`.
        lower_bound: of the bounded gate, in [-5, 0); only with `use_gate_in_kernel`.
        state_indices: int32 or int64, [N], or [N, S] with `num_accepted`.
        num_accepted: int32 or int64 [N]; only with `state_indices` [N, S].
        delta_rule: False for gated linear attention, S <- Diag(exp g) S + k (beta v)^T.
        state_v_first: rows of the state are [HV, V, K].
        backend: "torch", "triton", "reference" (float64, slow); None chooses by device.

    Returns:
        o [N, S, HV, V] in the dtype of v.

    Raises:
        ValueError: a shape, dtype or value that breaks the rules above, arguments that contradict
            each other, or an input that requires a gradient while gradients are on.
    """
    inputs = (q, k, v, g, beta)
    backend = choose_backend(backend, q.device)
    _check_inputs(inputs)
    switches: dict[str, Any] = {
        "A_log": A_log,
        "dt_bias": dt_bias,
        "use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel,
        "use_gate_in_kernel": use_gate_in_kernel,
        "use_beta_sigmoid_in_kernel": use_beta_sigmoid_in_kernel,
        "allow_neg_eigval": allow_neg_eigval,
        "lower_bound": lower_bound,
    }
    _check_switches(g, switches)
    sizes = (k.shape[-1], v.shape[-1])
    row = (v.shape[2], *(reversed(sizes) if state_v_first else sizes))
    check_state("state", state, None if state_indices is not None else q.shape[0], row, q.device)
    check_rows(state_indices, num_accepted, q.shape[:2], len(state), q.device)
    check_no_gradient(q=q, k=k, v=v, g=g, beta=beta, state=state, A_log=A_log, dt_bias=dt_bias)
    scale = k.shape[-1] ** -0.5 if scale is None else scale

    if backend == "triton":
        from megakda.kernels.kda.recurrent_triton import launch_recurrent

        return launch_recurrent(
            inputs,
            scale,
            state,
            state,
            state_indices=state_indices,
            num_accepted=num_accepted,
            delta_rule=delta_rule,
            state_v_first=state_v_first,
            **switches,
        )
    states = state.mT if state_v_first else state
    return decode_unchecked(
        inputs, switches, scale, states, state_indices, num_accepted, delta_rule, backend
    )


@torch.no_grad()
def decode_unchecked(
    inputs: _Inputs,
    switches: dict[str, Any],
    scale: float,
    states: torch.Tensor,
    state_indices: torch.Tensor | None,
    num_accepted: torch.Tensor | None,
    delta_rule: bool,
    backend: str,
) -> torch.Tensor:
    """`kda_decode_step` of backend "torch" or "reference"; states [P, HV, K, V]."""
    reference = backend == "reference"
    decode = _decode_reference if reference else _decode_torch
    dtype = torch.float64 if reference else torch.float32
    # Autocast would run the fp32 matrix products in half precision.
    with torch.autocast(states.device.type, enabled=False):
        activated = _activate(tuple(x.to(dtype) for x in inputs), switches, backend)
        o = decode(activated, scale, states, state_indices, num_accepted, delta_rule)
    return o.to(inputs[2].dtype)


def _activate(inputs: _Inputs, switches: dict[str, Any], backend: str) -> _Inputs:
    """Norm, gate and beta where asked for; q and k repeated for every value head."""
    q, k, v, g, beta = inputs
    if switches["use_qk_l2norm_in_kernel"]:
        q, k = l2_norm(torch.stack((q, k)), backend=backend)
    if switches["use_gate_in_kernel"]:
        A_log, dt_bias, lower_bound = (switches[n] for n in ("A_log", "dt_bias", "lower_bound"))
        g = kda_gate(g, A_log, dt_bias, lower_bound, backend=backend)
    if switches["use_beta_sigmoid_in_kernel"]:
        beta = torch.sigmoid(beta) * (2 if switches["allow_neg_eigval"] else 1)
    if q.shape[2] != v.shape[2]:
        q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], dim=2) for x in (q, k))
    return q, k, v, g, beta


def _decode_torch(
    inputs: _Inputs,
    scale: float,
    states: torch.Tensor,
    state_indices: torch.Tensor | None,
    num_accepted: torch.Tensor | None,
    delta_rule: bool,
) -> torch.Tensor:
    """All sequences at once in fp32, one token after the other; states [P, HV, K, V]."""
    o = torch.zeros_like(inputs[2])
    rows: torch.Tensor | slice = slice(None)  # that are no padding
    if state_indices is None:
        current = states
    else:
        table = state_indices.long().view(len(o), -1)  # [N, 1], or [N, S] with num_accepted
        if bool((table[:, 0] < 0).any()):
            rows = (table[:, 0] >= 0).nonzero().flatten()
            table, inputs = table[rows], tuple(x[rows] for x in inputs)
        if num_accepted is None:
            current = states[table[:, 0]]
        else:
            first = num_accepted[rows].long() - 1
            current = states[table.gather(1, first.unsqueeze(1)).squeeze(1)]
    q, k, v, g, beta = inputs
    q, k, v = (x.unsqueeze(-2) for x in (q, k, v))  # [n, S, HV, 1, ...]
    decay, beta = g.exp().unsqueeze(-1), beta[..., None, None]
    for s in range(o.shape[1]):
        current.mul_(decay[:, s])
        new = v[:, s] - k[:, s] @ current if delta_rule else v[:, s]
        current.addcmul_(k[:, s].mT, beta[:, s] * new)
        o[rows, s] = scale * (q[:, s] @ current).squeeze(-2)
        if num_accepted is not None:
            states[table[:, s]] = current
    if state_indices is not None and num_accepted is None:
        states[table[:, 0]] = current
    return o


def _decode_reference(
    inputs: _Inputs,
    scale: float,
    states: torch.Tensor,
    state_indices: torch.Tensor | None,
    num_accepted: torch.Tensor | None,
    delta_rule: bool,
) -> torch.Tensor:
    """Sequence by sequence and token by token in float64; states [P, HV, K, V]."""
    o = torch.zeros_like(inputs[2])
    for n in range(len(o)):
        if state_indices is None:
            first, targets = n, [n] * o.shape[1]
        elif num_accepted is None:
            first = int(state_indices[n])
            targets = [first] * o.shape[1]
        else:
            targets = state_indices[n].tolist()
            first = targets[int(num_accepted[n]) - 1] if targets[0] >= 0 else -1
        if first < 0:
            continue
        state = states[first].double()
        for s, target in enumerate(targets):
            q, k, v, g, beta = (x[n, s] for x in inputs)
            state = g.exp().unsqueeze(-1) * state
            found = torch.einsum("hkv,hk->hv", state, k) if delta_rule else 0.0
            state = state + torch.einsum("hk,hv->hkv", k, beta.unsqueeze(-1) * (v - found))
            o[n, s] = scale * torch.einsum("hkv,hk->hv", state, q)
            states[target] = state.to(states.dtype)
    return o


# ------------------------------------------------------------------ argument checks


def _check_inputs(inputs: _Inputs) -> None:
    """Shapes, dtypes and devices of q, k, v, g and beta."""
    q, k, v, g, beta = inputs
    if q.ndim != 4 or 0 in q.shape:
        raise ValueError(f"q: shape {list(q.shape)} must be [N, S, H, K], none of them 0")
    size, tokens, heads, key_dim = q.shape
    if v.ndim != 4 or v.shape[:2] != q.shape[:2] or 0 in v.shape or v.shape[2] % heads:
        raise ValueError(
            f"v: shape {list(v.shape)} must be [{size}, {tokens}, HV, V] with HV a multiple of "
            f"q's {heads} heads"
        )
    value_heads = v.shape[2]
    if list(g.shape) not in ([*v.shape[:3], key_dim], [*v.shape[:3], 1]):
        raise ValueError(
            f"g: shape {list(g.shape)} must be {[size, tokens, value_heads, key_dim]}, or with "
            "last dimension 1 for one decay per head"
        )
    for name, x, shape in (("k", k, q.shape), ("beta", beta, v.shape[:3])):
        if x.shape != shape:
            raise ValueError(f"{name}: shape {list(x.shape)} must be {list(shape)}")
    for name, x in zip(("q", "k", "v", "g", "beta"), inputs, strict=True):
        check_floating(name, x, q.device)
        if name in ("k", "v") and x.dtype != q.dtype:
            raise ValueError(f"{name}: dtype {x.dtype} must be q's {q.dtype}")


def _check_switches(g: torch.Tensor, switches: dict[str, Any]) -> None:
    """The activations' arguments: present where needed, absent elsewhere, of the right size."""
    A_log, dt_bias, lower_bound = (switches[n] for n in ("A_log", "dt_bias", "lower_bound"))
    check_lower_bound(lower_bound)
    if not switches["use_gate_in_kernel"]:
        for name in ("A_log", "dt_bias", "lower_bound"):
            if switches[name] is not None:
                raise ValueError(f"{name}: given, but only use_gate_in_kernel=True reads it")
    elif A_log is None and lower_bound is None:
        raise ValueError("A_log: use_gate_in_kernel=True needs A_log, or lower_bound, or both")
    if switches["allow_neg_eigval"] and not switches["use_beta_sigmoid_in_kernel"]:
        raise ValueError(
            "allow_neg_eigval: True needs use_beta_sigmoid_in_kernel=True; a beta computed outside "
            "is doubled outside"
        )
    value_heads, channels = g.shape[2:]
    sizes = (("A_log", A_log, value_heads), ("dt_bias", dt_bias, value_heads * channels))
    for name, x, size in sizes:
        if x is not None:
            check_floating(name, x, g.device)
            if x.numel() != size:
                raise ValueError(f"{name}: {x.numel()} elements, must have {size}")


def check_floating(name: str, x: torch.Tensor, device: torch.device) -> None:
    """Raises ValueError unless x is floating and on `device`."""
    if not x.is_floating_point():
        raise ValueError(f"{name}: dtype {x.dtype} must be a floating dtype")
    if x.device != device:
        raise ValueError(f"{name}: on {x.device}, must be on q's device {device}")


def check_state(
    name: str,
    state: torch.Tensor,
    rows: int | None,
    row: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Raises ValueError unless the state is made of contiguous rows, `rows` of them if not None."""
    if state.shape[1:] != row or len(state) == 0 or rows not in (None, len(state)):
        count = "P" if rows is None else rows
        shape = ", ".join(map(str, (count, *row)))
        raise ValueError(f"{name}: shape {list(state.shape)} must be [{shape}]")
    if state.dtype != dtype:
        raise ValueError(f"{name}: dtype {state.dtype} must be {dtype}")
    if state.device != device:
        raise ValueError(f"{name}: on {state.device}, must be on q's device {device}")
    apart = len(state) == 1 or state.stride(0) >= state[0].numel()
    if not state[0].is_contiguous() or not apart:
        raise ValueError(
            f"{name}: strides {list(state.stride())}, but each of its rows must be contiguous and "
            "apart from the others: it is written in place"
        )


def check_rows(
    state_indices: torch.Tensor | None,
    num_accepted: torch.Tensor | None,
    size: tuple[int, ...],
    rows: int,
    device: torch.device,
) -> None:
    """Raises ValueError unless the indices name rows as `kda_decode_step` says; size: (N, S)."""
    if state_indices is None:
        if num_accepted is not None:
            raise ValueError("num_accepted: given, but only state_indices [N, S] go with it")
        return
    shape = size if num_accepted is not None else size[:1]
    for name, x, wanted in (
        ("state_indices", state_indices, shape),
        ("num_accepted", num_accepted, size[:1]),
    ):
        if x is None:
            continue
        if x.dtype not in _INTEGERS or x.shape != wanted:
            raise ValueError(
                f"{name}: {x.dtype} {list(x.shape)} must be int32 or int64 {list(wanted)} "
                f"({'with' if num_accepted is not None else 'without'} num_accepted)"
            )
        if x.device != device:
            raise ValueError(f"{name}: on {x.device}, must be on q's device {device}")
    if device.type != "cpu":
        return
    table = state_indices.view(size[0], -1)
    live = table[:, 0] >= 0
    if ((table >= 0) != live.unsqueeze(1)).any():
        raise ValueError(
            f"state_indices: {state_indices.tolist()}, of each sequence all must be negative "
            "(padding) or none"
        )
    named = table[live].flatten()
    if (named >= rows).any() or len(named.unique()) != len(named):
        raise ValueError(
            f"state_indices: {state_indices.tolist()} must be below the pool's {rows} rows, and "
            "none named twice"
        )
    if num_accepted is not None:
        accepted = num_accepted[live]
        if (accepted < 1).any() or (accepted > size[1]).any():
            raise ValueError(
                f"num_accepted: {num_accepted.tolist()} must be in 1..{size[1]}, padding apart"
            )


def check_no_gradient(**tensors: torch.Tensor | None) -> None:
    """Raises ValueError where autograd would expect a gradient that this operator does not have."""
    if not torch.is_grad_enabled():
        return
    for name, x in tensors.items():
        if x is not None and x.requires_grad:
            raise ValueError(
                f"{name}: requires a gradient, but a decode step has none; call it under "
                "torch.no_grad() or torch.inference_mode()"
            )
