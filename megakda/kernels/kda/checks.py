"""What the KDA operators accept: their options, and the checks before any work starts."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from megakda.kernels.kda.gate import check_lower_bound

CHUNK_SIZES = (16, 32, 64, 128)
TRITON_CHUNK_SIZES = (16, 32, 64)
HEAD_SIZES = range(16, 257)
_INTEGERS = (torch.int32, torch.int64)

Inputs = tuple[torch.Tensor, ...]  # q, k, v, g, beta


@dataclass(frozen=True, eq=False)
class Options:
    """The arguments of the operators besides the five sequences."""

    A_log: torch.Tensor | None = None
    dt_bias: torch.Tensor | None = None
    scale: float | None = None
    initial_state: torch.Tensor | None = None
    output_final_state: bool = False
    use_qk_l2norm_in_kernel: bool = False
    use_gate_in_kernel: bool = False
    use_beta_sigmoid_in_kernel: bool = False
    allow_neg_eigval: bool = False
    safe_gate: bool = False
    lower_bound: float | None = None
    cu_seqlens: torch.Tensor | None = None
    state_v_first: bool = False
    chunk_size: int = 64
    backend: str | None = None
    return_intermediate_states: bool = False
    delta_rule: bool = True


def check_options(options: Options) -> None:
    """What can be judged without the sequences."""
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


def check_inputs(inputs: Inputs) -> None:
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
    if tokens == 0 or batch == 0 or heads == 0 or value_heads == 0:
        raise ValueError(f"q, v: shapes {list(q.shape)}, {list(v.shape)} must not be empty")
    for name, size in (("K", key_dim), ("V", v.shape[3])):
        if size not in HEAD_SIZES:
            raise ValueError(
                f"{'q' if name == 'K' else 'v'}: {name} = {size} must be in "
                f"{HEAD_SIZES[0]}..{HEAD_SIZES[-1]}"
            )
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


def sequence_bounds(inputs: Inputs, cu_seqlens: torch.Tensor | None) -> list[int] | None:
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


def check_initial_state(inputs: Inputs, options: Options, bounds: list[int] | None) -> None:
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


def check_gate_parameters(inputs: Inputs, options: Options) -> None:
    """A_log and dt_bias against the gate's shape."""
    g = inputs[3]
    value_heads, channels = g.shape[2:]
    sizes = (
        ("A_log", options.A_log, value_heads, "one per head"),
        ("dt_bias", options.dt_bias, value_heads * channels, "one per head and channel"),
    )
    for name, x, size, meaning in sizes:
        if x is None:
            continue
        if x.numel() != size:
            raise ValueError(
                f"{name}: {list(x.shape)} has {x.numel()} elements, must have {size}: {meaning} "
                f"of the gate {list(g.shape)}"
            )
        if not x.is_floating_point():
            raise ValueError(f"{name}: dtype {x.dtype} must be a floating dtype")
        if x.device != g.device:
            raise ValueError(f"{name}: on {x.device}, must be on g's device {g.device}")


def check_triton(inputs: Inputs, options: Options, recurrent: bool) -> None:
    """What only the Triton kernels refuse."""
    for name, x in zip(("q", "k", "v", "g", "beta"), inputs, strict=True):
        if x.dtype == torch.float64:
            raise ValueError(
                f"{name}: dtype {x.dtype}, but backend='triton' works in fp32 at most; "
                "backend='torch' takes float64"
            )
    if options.chunk_size not in TRITON_CHUNK_SIZES:
        raise ValueError(
            f"chunk_size: {options.chunk_size} must be one of {TRITON_CHUNK_SIZES} with "
            "backend='triton'"
        )
    if recurrent and torch.is_grad_enabled():
        tensors = (*inputs, options.A_log, options.dt_bias, options.initial_state)
        if any(x is not None and x.requires_grad for x in tensors):
            raise ValueError(
                "backend: 'triton' has no backward pass of the recurrent form; use chunk_kda, or "
                "call under torch.no_grad()"
            )
