"""Depthwise causal convolution over a few tokens, with state, for the inputs of linear attention.

Channel d of token t sees the last W inputs of its own sequence, the newest with the last weight:

    y[t, d] = activation( sum_j weight[d, j] * x[t - (W - 1) + j, d] )

Inputs before a sequence's first token come from its initial state, or are zero. `short_conv` takes
whole sequences; `short_conv_step` takes the next token of each, or the next few, and keeps a pool
of states up to date.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from megakda.kernels.backend import choose_backend

TAPS = range(2, 9)
INTEGERS = (torch.int32, torch.int64)


def short_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    activation: str | None = "silu",
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Short causal convolution with fp32 accumulation; differentiable in x, weight, initial_state.

    Gradients flow from y and from the final state. They are deterministic: no atomics.

    Args:
        x: [B, T, D], any floating dtype; fp32, bf16 or fp16 with Triton. Batch and tokens may have
            any stride.
        weight: [D, W], W in 2..8; the last tap meets the current token.
        initial_state: [N, D, W-1], the last W-1 inputs before each sequence, oldest first; zero by
            default. N = B or the number of packed sequences.
        output_final_state: whether to return the last W-1 inputs of each sequence.
        cu_seqlens: integer [N + 1], B = 1: bounds of packed sequences, some of which may be empty.
            Its values are read here, so on a GPU it makes the host wait; on the CPU it does not.
        activation: "silu" or None.
        backend: "torch", "triton", "reference" (float64, token by token, slow), or None: "triton"
            on a GPU and "torch" elsewhere.

    Returns:
        y [B, T, D] and the final state [N, D, W-1] or None, both in the dtype of x. A sequence
        shorter than W-1 leaves part of its initial state in its final state.

    Raises:
        ValueError: a shape, dtype, device or value that breaks the rules above.
    """
    backend = choose_backend(backend, x.device)
    bounds = _check(x, weight, initial_state, cu_seqlens, activation)
    if backend == "triton":
        from megakda.kernels.short_conv_triton import short_conv_triton

        return short_conv_triton(x, weight, initial_state, output_final_state, bounds, activation)
    run = _short_conv_torch if backend == "torch" else _short_conv_float64
    y, final = run(x, weight, initial_state, bounds, activation)
    return y.to(x.dtype), final.to(x.dtype) if output_final_state else None


def short_conv_step(
    x: torch.Tensor,
    state: torch.Tensor,
    weight: torch.Tensor,
    activation: str | None = "silu",
    state_indices: torch.Tensor | None = None,
    rollback: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """The next token, or the next S tokens, of each sequence; updates `state` in place.

    A state holds the last L inputs of its sequence, the newest at the end, L >= W-1. Each call
    reads the last W-1, and moves all L on by S places. The final state of `short_conv` is such a
    state with L = W-1, and belongs at the end of a longer one.

    For speculative decoding make states longer, L = W-1 + the largest S: then the inputs that a
    rejected token displaced are still there. Where the last r of the S tokens given to the
    previous call were rejected (r = S - the number accepted), pass rollback = r with the next: the
    r newest inputs are dropped from the state before anything else. Up to S inputs can be taken
    back after each call; places at the front for which no input is left become zero.

    Has no gradients. With L, S and W fixed it may be captured in a CUDA graph.

    Args:
        x: [N, D], or [N, S, D] for S tokens of each sequence; dtypes as in `short_conv`.
        state: [P, D, L] in the dtype of x or fp32, any strides. P >= N without `state_indices`.
        weight: [D, W], W in 2..8.
        activation: "silu" or None.
        state_indices: integer [N], which state belongs to each sequence; by default the first N.
            Distinct, except that a negative one marks a row of padding: its y is zero and no state
            is touched.
        rollback: integer [N], how many inputs to drop, in 0..L-(W-1); zero by default.
        backend: as in `short_conv`.

    Returns:
        y, shape and dtype of x.

    Raises:
        ValueError: a shape, dtype, device or value that breaks the rules above. The values of
            `state_indices` and `rollback` are checked on the CPU only, since on a GPU that would
            make the host wait: there, an index beyond the pool counts as padding, and the result
            of a rollback out of range is undefined. Neither reaches memory outside the pool.
    """
    backend = choose_backend(backend, x.device)
    _check_step(x, state, weight, activation, state_indices, rollback)
    tokens = x if x.ndim == 3 else x.unsqueeze(1)
    if backend == "triton":
        from megakda.kernels.short_conv_triton import short_conv_step_triton

        y = short_conv_step_triton(tokens, state, weight, activation, state_indices, rollback)
    else:
        if state_indices is None:
            state_indices = torch.arange(len(x), device=x.device)
        run = _step_torch if backend == "torch" else _step_float64
        with torch.no_grad():
            y = run(tokens, state, weight, activation, state_indices.long(), rollback)
    return y.to(x.dtype).view(x.shape)


def short_conv_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    activation: str | None = "silu",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`short_conv` token by token in float64, for sequences of equal length.

    Args:
        x: [B, T, D].
        weight: [D, W].
        initial_state: [B, D, W-1], zero by default.
        activation: "silu" or None.

    Returns:
        y [B, T, D] and the final state [B, D, W-1], both float64.
    """
    x, weight = x.double(), weight.double()
    if initial_state is None:
        window = x.new_zeros(x.shape[0], *weight.shape)
    else:
        window = F.pad(initial_state.double(), (1, 0))  # [B, D, W], the oldest about to leave
    outputs = []
    for t in range(x.shape[1]):
        window = torch.cat((window[:, :, 1:], x[:, t].unsqueeze(-1)), dim=-1)
        y = (window * weight).sum(-1)
        outputs.append(F.silu(y) if activation == "silu" else y)
    return torch.stack(outputs, dim=1), window[:, :, 1:]


def _short_conv_torch(
    x: torch.Tensor,
    weight: torch.Tensor,
    initial_state: torch.Tensor | None,
    bounds: list[int] | None,
    activation: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """W shifted multiply-adds over the whole sequence.

    On a CPU that is 1.5 times as fast forward, and 4 times as fast forward and backward, as a
    grouped `conv1d`, which also wants the channels before the tokens.
    """
    taps = weight.shape[1]
    inputs = x.to(torch.promote_types(x.dtype, torch.float32))
    if initial_state is None:
        sequences = x.shape[0] if bounds is None else len(bounds) - 1
        history = inputs.new_zeros(sequences, taps - 1, x.shape[2])
    else:
        history = initial_state.to(inputs.dtype).transpose(1, 2)  # [N, W-1, D]

    # Every sequence with its history before it: [B, T + W-1, D], or one row of all of them.
    if bounds is None:
        extended = torch.cat((history, inputs), dim=1)
        y = _CausalConv.apply(extended, weight)
        final = extended[:, extended.shape[1] - (taps - 1) :]
    else:
        pieces = [
            torch.cat((history[n], inputs[0, start:end]))
            for n, (start, end) in enumerate(pairwise(bounds))
        ]
        y = _CausalConv.apply(torch.cat(pieces).unsqueeze(0), weight)
        # y[i] belongs to the input W-1 places after i, so sequence n, which stands behind n + 1
        # histories, begins at its start plus n of them. The W-1 outputs between two sequences mix
        # the two and are left out.
        kept = [
            y[:, start + n * (taps - 1) : end + n * (taps - 1)]
            for n, (start, end) in enumerate(pairwise(bounds))
        ]
        y = torch.cat(kept, dim=1)
        final = torch.stack([piece[len(piece) - (taps - 1) :] for piece in pieces])

    if activation == "silu":
        y = F.silu(y)
    return y, final.transpose(1, 2).contiguous()


class _CausalConv(torch.autograd.Function):
    """Convolution without padding: x [B, T + W-1, D], weight [D, W] -> [B, T, D], dtype of x."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        taps = weight.to(x.dtype).t().contiguous()  # [W, D]
        tokens = x.shape[1] - (len(taps) - 1)
        y = x[:, :tokens] * taps[0]
        for j in range(1, len(taps)):
            y.addcmul_(x[:, j : j + tokens], taps[j])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight = ctx.saved_tensors
        taps = weight.to(x.dtype).t().contiguous()
        tokens = dy.shape[1]
        dx, dtaps = torch.zeros_like(x), torch.empty_like(taps)
        for j in range(len(taps)):
            dx[:, j : j + tokens].addcmul_(dy, taps[j])
            torch.sum(dy * x[:, j : j + tokens], dim=(0, 1), out=dtaps[j])
        return dx, dtaps.t().to(weight.dtype)


def _short_conv_float64(
    x: torch.Tensor,
    weight: torch.Tensor,
    initial_state: torch.Tensor | None,
    bounds: list[int] | None,
    activation: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`short_conv_reference`, sequence by sequence where they are packed."""
    if bounds is None:
        return short_conv_reference(x, weight, initial_state, activation)
    if initial_state is None:
        initial_state = x.new_zeros(len(bounds) - 1, x.shape[2], weight.shape[1] - 1)
    outputs, states = [], []
    for n, (start, end) in enumerate(pairwise(bounds)):
        state = initial_state[n : n + 1].double()
        if start < end:
            y, state = short_conv_reference(x[:, start:end], weight, state, activation)
            outputs.append(y)
        states.append(state)
    return torch.cat(outputs, dim=1), torch.cat(states)


def _step_torch(
    x: torch.Tensor,
    state: torch.Tensor,
    weight: torch.Tensor,
    activation: str | None,
    slots: torch.Tensor,
    rollback: torch.Tensor | None,
) -> torch.Tensor:
    length, taps = state.shape[2], weight.shape[1]
    inputs = x.to(torch.promote_types(x.dtype, torch.float32))
    held = state[slots.clamp(min=0)].to(inputs.dtype)  # [N, D, L]
    if rollback is not None:
        source = torch.arange(length, device=x.device) - rollback.unsqueeze(1)
        source = source.unsqueeze(1).expand_as(held)
        held = held.gather(2, source.clamp(min=0)).masked_fill(source < 0, 0)
    extended = torch.cat((held, inputs.transpose(1, 2)), dim=2)  # [N, D, L + S]
    windows = extended[:, :, length - (taps - 1) :].unfold(2, taps, 1)  # [N, D, S, W]
    y = (windows * weight.to(inputs.dtype).unsqueeze(1)).sum(3).transpose(1, 2)
    if activation == "silu":
        y = F.silu(y)
    used = slots >= 0
    state[slots[used]] = extended[used, :, x.shape[1] :].to(state.dtype)
    return y.masked_fill(~used[:, None, None], 0).contiguous()


def _step_float64(
    x: torch.Tensor,
    state: torch.Tensor,
    weight: torch.Tensor,
    activation: str | None,
    slots: torch.Tensor,
    rollback: torch.Tensor | None,
) -> torch.Tensor:
    length, taps = state.shape[2], weight.shape[1]
    y = torch.zeros_like(x, dtype=torch.float64, memory_format=torch.contiguous_format)
    dropped = [0] * len(x) if rollback is None else rollback.tolist()
    for n, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        known = state[slot, :, : length - dropped[n]].double()
        window = known[:, known.shape[1] - (taps - 1) :].unsqueeze(0)
        y[n] = short_conv_reference(x[n : n + 1], weight, window, activation)[0][0]
        known = F.pad(torch.cat((known, x[n].t()), dim=1), (length, 0))
        state[slot] = known[:, known.shape[1] - length :].to(state.dtype)
    return y


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    activation: str | None,
) -> list[int] | None:
    """Raises ValueError, or returns cu_seqlens as a list."""
    if x.ndim != 3 or not x.is_floating_point() or x.shape[1] == 0:
        raise ValueError(f"x: {x.dtype} {list(x.shape)} must be floating, [B, T, D] with T >= 1")
    _check_weight(weight, x.shape[2], activation)
    bounds = None
    sequences = x.shape[0]
    if cu_seqlens is not None:
        if x.shape[0] != 1:
            raise ValueError(f"cu_seqlens: needs batch size 1, got {x.shape[0]}")
        if cu_seqlens.dtype not in INTEGERS or cu_seqlens.ndim != 1 or cu_seqlens.is_meta:
            raise ValueError(
                f"cu_seqlens: {cu_seqlens.dtype} {list(cu_seqlens.shape)} on {cu_seqlens.device} "
                "must be int32 or int64, [N + 1], with values"
            )
        bounds = cu_seqlens.tolist()
        sequences = len(bounds) - 1
        rising = all(start <= end for start, end in pairwise(bounds))
        if sequences < 1 or bounds[0] != 0 or bounds[-1] != x.shape[1] or not rising:
            raise ValueError(
                f"cu_seqlens: {bounds} must rise from 0 to T = {x.shape[1]} (equal neighbours for "
                "an empty sequence)"
            )
    state_shape = (sequences, x.shape[2], weight.shape[1] - 1)
    if initial_state is not None and (
        initial_state.shape != state_shape or not initial_state.is_floating_point()
    ):
        raise ValueError(
            f"initial_state: {initial_state.dtype} {list(initial_state.shape)} must be floating, "
            f"[N, D, W-1] = {list(state_shape)}"
        )
    _check_device(x, weight=weight, initial_state=initial_state)
    return bounds


def _check_step(
    x: torch.Tensor,
    state: torch.Tensor,
    weight: torch.Tensor,
    activation: str | None,
    state_indices: torch.Tensor | None,
    rollback: torch.Tensor | None,
) -> None:
    if x.ndim not in (2, 3) or not x.is_floating_point() or (x.ndim == 3 and x.shape[1] == 0):
        raise ValueError(
            f"x: {x.dtype} {list(x.shape)} must be floating, [N, D] or [N, S, D] with S >= 1"
        )
    _check_weight(weight, x.shape[-1], activation)
    kept = weight.shape[1] - 1
    if state.ndim != 3 or state.shape[1] != x.shape[-1] or state.shape[2] < kept:
        raise ValueError(
            f"state: shape {list(state.shape)} must be [P, D, L] with D = {x.shape[-1]} and "
            f"L >= W-1 = {kept}"
        )
    if state.dtype not in (x.dtype, torch.float32):
        raise ValueError(f"state: {state.dtype} must be that of x, {x.dtype}, or float32")
    if state_indices is None and len(state) < len(x):
        raise ValueError(f"state: {len(state)} states for {len(x)} sequences")
    spare = state.shape[2] - kept
    for name, numbers in {"state_indices": state_indices, "rollback": rollback}.items():
        if numbers is not None and (numbers.dtype not in INTEGERS or numbers.shape != (len(x),)):
            raise ValueError(
                f"{name}: {numbers.dtype} {list(numbers.shape)} must be int32 or int64, "
                f"[N] = [{len(x)}]"
            )
    _check_device(x, state=state, weight=weight, state_indices=state_indices, rollback=rollback)
    if state_indices is not None and state_indices.device.type == "cpu":
        used = [slot for slot in state_indices.tolist() if slot >= 0]
        if len(set(used)) < len(used) or any(slot >= len(state) for slot in used):
            raise ValueError(
                f"state_indices: {state_indices.tolist()} must be distinct, below P = "
                f"{len(state)}, or negative for padding"
            )
    if rollback is not None and rollback.device.type == "cpu":
        dropped = rollback.tolist()
        if not all(0 <= count <= spare for count in dropped):
            raise ValueError(f"rollback: {dropped} must lie in 0..L-(W-1) = {spare}")
    differentiable = x.requires_grad or state.requires_grad or weight.requires_grad
    if differentiable and torch.is_grad_enabled():
        raise ValueError(
            "x, state, weight: short_conv_step has no gradients; call it under torch.no_grad(), or "
            "use short_conv"
        )


def _check_weight(weight: torch.Tensor, channels: int, activation: str | None) -> None:
    if (
        weight.ndim != 2
        or not weight.is_floating_point()
        or weight.shape[0] != channels
        or weight.shape[1] not in TAPS
    ):
        raise ValueError(
            f"weight: {weight.dtype} {list(weight.shape)} must be floating, [D, W] with "
            f"D = {channels} and W in {TAPS[0]}..{TAPS[-1]}"
        )
    if activation not in ("silu", None):
        raise ValueError(f"activation: {activation!r} must be 'silu' or None")


def _check_device(x: torch.Tensor, **others: torch.Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name}: on {tensor.device}, must be on the device of x, {x.device}")
