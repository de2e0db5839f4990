"""Other implementations of KDA behind the arguments of `chunk_kda`: to compare with, nothing else.

They are no dependency: each is imported by name when it is first called. What a peer cannot do
raises instead of being ignored. Arguments are expected as `checks` lets them through.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

import torch

from megakda.kernels.kda.checks import Inputs, Options

PACKAGES = {"fla": "fla-core", "flash_kda": "flash_kda (github.com/MoonshotAI/FlashKDA)"}
"""What to install for each peer; its module has the key's name."""

_FLASH_SIZE = 128
_DEFAULT_CHUNK_SIZE = 64


def available() -> tuple[str, ...]:
    """The peers that can run here."""
    return tuple(name for name in PACKAGES if why_not(name) is None)


def why_not(peer: str) -> str | None:
    """What keeps a peer from running here, or None.

    Raises:
        ValueError: an unknown peer.
    """
    if peer not in PACKAGES:
        raise ValueError(f"peer: {peer!r} must be one of {tuple(PACKAGES)}")
    if importlib.util.find_spec(peer) is None:
        return f"the package {PACKAGES[peer]} is not installed"
    if not torch.cuda.is_available():
        return "there is no GPU"
    if peer == "flash_kda" and torch.cuda.get_device_capability()[0] < 9:
        return f"it needs sm_90 or later, this is {torch.cuda.get_device_name()}"
    return None


def chunk_kda_fla(inputs: Inputs, options: Options) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`chunk_kda` of flash-linear-attention (fla-core 0.6): Triton kernels, with gradients.

    Args:
        inputs: q, k, v, g and beta, as in `megakda.kernels.kda.op.chunk_kda`.
        options: the other arguments.

    Returns:
        o [B, T, HV, V] and the final state, fp32 [N, HV, K, V], or None.

    Raises:
        ValueError: fla cannot run here, or has no such option.
    """
    q, _, _, g, _ = inputs
    _refuse_common(options, "fla")
    if g.shape[-1] == 1:
        raise ValueError("g: one decay per head; fla's chunk_kda has one per channel alone")
    if q.dtype == torch.float64:
        raise ValueError(f"q: dtype {q.dtype}, but backend='fla' works in fp32 at most")
    if options.chunk_size not in (32, 64):
        raise ValueError(f"chunk_size: {options.chunk_size} must be 32 or 64 with backend='fla'")
    _check_device("fla", q)
    # Where FlashKDA is installed, fla would hand over to it, and be compared with itself.
    os.environ.setdefault("FLA_FLASH_KDA", "0")
    o, final_state = _load("fla", "fla.ops.kda").chunk_kda(
        *inputs,
        A_log=_flat(options.A_log),
        dt_bias=_flat(options.dt_bias),
        scale=options.scale,
        initial_state=options.initial_state,
        output_final_state=options.output_final_state,
        use_qk_l2norm_in_kernel=options.use_qk_l2norm_in_kernel,
        use_gate_in_kernel=options.use_gate_in_kernel,
        use_beta_sigmoid_in_kernel=options.use_beta_sigmoid_in_kernel,
        allow_neg_eigval=options.allow_neg_eigval,
        safe_gate=options.safe_gate,
        lower_bound=options.lower_bound,
        cu_seqlens=options.cu_seqlens,
        state_v_first=options.state_v_first,
        chunk_size=options.chunk_size,
    )
    return o, final_state


def chunk_kda_flash(inputs: Inputs, options: Options) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`flash_kda.fwd` of FlashKDA: the forward pass alone, CUTLASS, sm_90 and later.

    It has one form: bf16, K = V = 128, as many value heads as query heads, the bounded gate, norm
    and sigmoid all inside.

    Args:
        inputs: q, k, v, g and beta, as in `megakda.kernels.kda.op.chunk_kda`.
        options: the other arguments.

    Returns:
        o [B, T, H, V] and the final state, fp32 [N, H, K, V], or None.

    Raises:
        ValueError: FlashKDA cannot run here, or has no such option.
    """
    _refuse_common(options, "flash_kda")
    _check_flash(inputs, options)
    _check_device("flash_kda", inputs[0])
    q, k, v, g, beta = (x.contiguous() for x in inputs)
    heads = v.shape[2]
    sequences = q.shape[0] if options.cu_seqlens is None else len(options.cu_seqlens) - 1
    initial, final = options.initial_state, None
    if initial is not None:
        initial = (initial if options.state_v_first else initial.mT).contiguous()
    if options.output_final_state:
        final = v.new_empty(sequences, heads, _FLASH_SIZE, _FLASH_SIZE, dtype=torch.float32)
    rate = v.new_zeros(heads) if options.A_log is None else options.A_log
    bias = v.new_zeros(heads * _FLASH_SIZE) if options.dt_bias is None else options.dt_bias
    packed: dict[str, Any] = {}
    if options.cu_seqlens is not None:
        packed = {"cu_seqlens": options.cu_seqlens.to(v.device, torch.int64)}
    o = torch.empty_like(v)
    _load("flash_kda", "flash_kda").fwd(
        q,
        k,
        v,
        g,
        beta,
        _FLASH_SIZE**-0.5 if options.scale is None else options.scale,
        o,
        rate.float().reshape(heads).contiguous(),
        bias.float().reshape(heads, _FLASH_SIZE).contiguous(),
        options.lower_bound,
        initial_state=initial,
        final_state=final,
        **packed,
    )
    if final is not None and not options.state_v_first:
        final = final.mT.contiguous()
    return o, final


def _refuse_common(options: Options, peer: str) -> None:
    if not options.delta_rule:
        raise ValueError(f"delta_rule: False, but backend={peer!r} has the delta rule alone")
    if options.return_intermediate_states:
        raise ValueError(
            f"return_intermediate_states: True, but backend={peer!r} returns o and the final state"
        )


def _check_flash(inputs: Inputs, options: Options) -> None:
    for name, x in zip(("q", "k", "v", "g", "beta"), inputs, strict=True):
        if x.dtype != torch.bfloat16:
            raise ValueError(f"{name}: dtype {x.dtype} must be torch.bfloat16 with FlashKDA")
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(f"{name}: requires a gradient, but FlashKDA is forward only")
    q, _, v, g, _ = inputs
    for name, shape in (("q", q.shape), ("v", v.shape), ("g", g.shape)):
        if shape[-1] != _FLASH_SIZE:
            raise ValueError(f"{name}: {shape[-1]} channels must be {_FLASH_SIZE} with FlashKDA")
    if v.shape[2] != q.shape[2]:
        raise ValueError(
            f"v: {v.shape[2]} value heads must be as many as the {q.shape[2]} query heads with "
            "FlashKDA"
        )
    if not options.use_gate_in_kernel or options.lower_bound is None:
        raise ValueError(
            "lower_bound: FlashKDA has the bounded gate alone, use_gate_in_kernel=True with "
            f"lower_bound; got use_gate_in_kernel={options.use_gate_in_kernel} with "
            f"lower_bound={options.lower_bound}"
        )
    for name in ("use_qk_l2norm_in_kernel", "use_beta_sigmoid_in_kernel"):
        if not getattr(options, name):
            raise ValueError(f"{name}: False, but FlashKDA always does it")
    if options.allow_neg_eigval:
        raise ValueError("allow_neg_eigval: True, but FlashKDA's beta is in (0, 1)")
    if options.chunk_size != _DEFAULT_CHUNK_SIZE:
        raise ValueError(f"chunk_size: {options.chunk_size}, but FlashKDA has its own, 16")


def _check_device(peer: str, x: torch.Tensor) -> None:
    if x.device.type != "cuda":
        raise ValueError(f"backend: {peer!r} runs on a GPU, and the tensors are on {x.device}")


def _load(peer: str, module: str) -> Any:
    reason = why_not(peer)
    if reason is not None:
        raise ValueError(f"backend: {peer!r} cannot run here: {reason}")
    return importlib.import_module(module)


def _flat(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.reshape(-1)
