"""Triton kernels of the short convolution: forward, backward, and the decode step.

A program walks a strip: up to BT tokens of one sequence, BD channels wide. It keeps the last W-1
inputs in registers, so each input is loaded once, plus W-1 before the strip's first token (and in
the backward pass W-1 behind its last). U tokens are loaded before the first of them is used, which
keeps enough loads under way. A strip never crosses the end of a sequence, so packed sequences
differ only in where strips begin; an empty sequence has one strip without tokens, which passes its
state and the state's gradient through.
"""

# mypy: disable-error-code=assignment
# (In kernels, tuples grow in unrolled loops.)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from megakda.kernels.launch import launch_config

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOG2E = tl.constexpr(1.4426950408889634)  # exp2 is an instruction, exp is not


def short_conv_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    initial_state: torch.Tensor | None,
    output_final_state: bool,
    bounds: list[int] | None,
    activation: str | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`short_conv` with checked arguments; `bounds` are the values of cu_seqlens.

    Raises:
        ValueError: x is not fp32, bf16 or fp16.
    """
    _check_dtype(x)
    return _ShortConv.apply(x, weight, initial_state, output_final_state, bounds, activation)


class _ShortConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        initial_state: torch.Tensor | None,
        output_final_state: bool,
        bounds: list[int] | None,
        activation: str | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        x, weight = _unit_channel_stride(x), weight.contiguous()
        if initial_state is not None:
            initial_state = initial_state.contiguous()
        batch, tokens, channels = x.shape
        taps = weight.shape[1]
        sequences = batch if bounds is None else len(bounds) - 1
        config = launch_config("short_conv_forward", x.device, W=taps)
        count, table = _strips(bounds, batch, tokens, config["BT"], x.device)
        y = torch.empty((batch, tokens, channels), dtype=x.dtype, device=x.device)
        final = x.new_empty(sequences, channels, taps - 1) if output_final_state else None
        short_conv_forward_kernel[(count * triton.cdiv(channels, config["BD"]),)](
            x,
            weight,
            initial_state,
            y,
            final,
            table,
            x.stride(0),
            x.stride(1),
            tokens,
            channels,
            W=taps,
            SILU=activation == "silu",
            HAS_INITIAL=initial_state is not None,
            HAS_FINAL=output_final_state,
            PACKED=bounds is not None,
            **config,
        )
        ctx.save_for_backward(x, weight, initial_state)
        ctx.bounds, ctx.activation = bounds, activation
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dy: torch.Tensor | None, dfinal: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        x, weight, initial_state = ctx.saved_tensors
        batch, tokens, channels = x.shape
        taps = weight.shape[1]
        dy = x.new_zeros(x.shape) if dy is None else _unit_channel_stride(dy)
        dfinal = None if dfinal is None else dfinal.contiguous()
        config = launch_config("short_conv_backward", x.device, W=taps)
        # The table counts the tokens walked over, W-1 more than a strip has.
        config["BT"] -= taps - 1
        # In shorter strips, others than a sequence's first would write dinitial.
        assert config["BT"] >= taps - 1, config
        count, table = _strips(ctx.bounds, batch, tokens, config["BT"], x.device)
        dx = torch.empty((batch, tokens, channels), dtype=x.dtype, device=x.device)
        dinitial = None if initial_state is None else torch.empty_like(initial_state)
        partial = torch.empty((count, taps, channels), dtype=torch.float32, device=x.device)
        short_conv_backward_kernel[(count * triton.cdiv(channels, config["BD"]),)](
            x,
            weight,
            initial_state,
            dy,
            dfinal,
            dx,
            partial,
            dinitial,
            table,
            x.stride(0),
            x.stride(1),
            dy.stride(0),
            dy.stride(1),
            tokens,
            channels,
            W=taps,
            SILU=ctx.activation == "silu",
            HAS_INITIAL=initial_state is not None,
            HAS_DFINAL=dfinal is not None,
            PACKED=ctx.bounds is not None,
            **config,
        )
        dweight = partial.sum(0).t().to(weight.dtype, memory_format=torch.contiguous_format)
        return dx, dweight, dinitial, None, None, None


def short_conv_step_triton(
    x: torch.Tensor,
    state: torch.Tensor,
    weight: torch.Tensor,
    activation: str | None,
    state_indices: torch.Tensor | None,
    rollback: torch.Tensor | None,
) -> torch.Tensor:
    """`short_conv_step` with checked arguments; x [N, S, D].

    Raises:
        ValueError: x is not fp32, bf16 or fp16.
    """
    _check_dtype(x)
    x, weight = _unit_channel_stride(x), weight.contiguous()
    rows, steps, channels = x.shape
    config = launch_config("short_conv_step", x.device, W=weight.shape[1])
    y = torch.empty((rows, steps, channels), dtype=x.dtype, device=x.device)
    short_conv_step_kernel[(rows * triton.cdiv(channels, config["BD"]),)](
        x,
        state,
        weight,
        y,
        None if state_indices is None else state_indices.contiguous(),
        None if rollback is None else rollback.contiguous(),
        x.stride(0),
        x.stride(1),
        state.stride(0),
        state.stride(1),
        state.stride(2),
        state.shape[0],
        channels,
        S=steps,
        L=state.shape[2],
        W=weight.shape[1],
        SILU=activation == "silu",
        HAS_INDICES=state_indices is not None,
        HAS_ROLLBACK=rollback is not None,
        **config,
    )
    return y


def _check_dtype(x: torch.Tensor) -> None:
    if x.dtype not in DTYPES:
        raise ValueError(
            f"x: {x.dtype} must be float32, bfloat16 or float16 with backend='triton'; "
            "backend='torch' takes every floating dtype"
        )


def _unit_channel_stride(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _strips(
    bounds: list[int] | None, batch: int, tokens: int, size: int, device: torch.device
) -> tuple[int, torch.Tensor | None]:
    """Number of strips of up to `size` tokens, and for packed sequences a table of them.

    The table is int32 [strips, 4]: number of the sequence, its first token in the row, its length,
    and the position in it where the strip begins.
    """
    if bounds is None:
        return batch * triton.cdiv(tokens, size), None
    starts = torch.tensor(bounds)
    lengths = starts.diff()
    counts = ((lengths + size - 1) // size).clamp(min=1)
    sequence = torch.repeat_interleave(torch.arange(len(counts)), counts)
    before = counts.cumsum(0) - counts
    first = (torch.arange(len(sequence)) - before[sequence]) * size
    table = torch.stack((sequence, starts[sequence], lengths[sequence], first), dim=1)
    return len(sequence), table.int().to(device, non_blocking=True)


@triton.jit
def _strip(p_strips, i_s, T, BT: tl.constexpr, PACKED: tl.constexpr):
    """Of strip i_s: its sequence, the row and token where that begins, its length, and the strip's
    first position in it."""
    if PACKED:
        i_n = tl.load(p_strips + i_s * 4)
        i_b = i_n * 0
        start = tl.load(p_strips + i_s * 4 + 1)
        length = tl.load(p_strips + i_s * 4 + 2)
        first = tl.load(p_strips + i_s * 4 + 3)
    else:
        i_n = i_s // tl.cdiv(T, BT)
        i_b = i_n
        start = i_n * 0
        length = T
        first = (i_s % tl.cdiv(T, BT)) * BT
    return i_n.to(tl.int64), i_b.to(tl.int64), start.to(tl.int64), length, first


@triton.jit
def _load_taps(p_weight, o_d, D, W: tl.constexpr):
    """The W taps of each channel, [BD] fp32 each."""
    taps = ()
    for j in tl.static_range(W):
        taps += (tl.load(p_weight + o_d * W + j, mask=o_d < D, other=0.0).to(tl.float32),)
    return taps


@triton.jit
def _load_input(
    p_x, stride_xt, p_initial, i_n, position, o_d, D, W: tl.constexpr, HAS_INITIAL: tl.constexpr
):
    """The input at a position in the sequence that p_x points to, -(W-1) or later: [BD] fp32."""
    # One limit instead of two masks: all channels, or none.
    m_inside = o_d < tl.where(position >= 0, D, 0)
    b_x = tl.load(p_x + position.to(tl.int64) * stride_xt + o_d, mask=m_inside, other=0.0)
    b_x = b_x.to(tl.float32)
    if HAS_INITIAL:
        m_before = o_d < tl.where(position < 0, D, 0)
        p_state = p_initial + (i_n * D + o_d) * (W - 1) + (position + W - 1)
        b_state = tl.load(p_state, mask=m_before, other=0.0).to(tl.float32)
        b_x = tl.where(m_before, b_state, b_x)
    return b_x


@triton.jit
def _convolve(b_w, window, W: tl.constexpr):
    """The sum over taps, oldest input first: the same order, so the same bits, in every kernel."""
    b_y = b_w[0] * window[0]
    for j in tl.static_range(1, W):
        b_y += b_w[j] * window[j]
    return b_y


@triton.jit(do_not_specialize=["T"])
def short_conv_forward_kernel(
    p_x,
    p_weight,
    p_initial,
    p_y,
    p_final,
    p_strips,
    stride_xb,
    stride_xt,
    T,
    D,
    W: tl.constexpr,
    SILU: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_FINAL: tl.constexpr,
    PACKED: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    U: tl.constexpr,
):
    # Channels vary fastest, so that neighbouring programs read neighbouring memory.
    i_d = tl.program_id(0) % tl.cdiv(D, BD)
    i_s = tl.program_id(0) // tl.cdiv(D, BD)
    i_n, i_b, start, length, first = _strip(p_strips, i_s, T, BT, PACKED)
    end = tl.minimum(first + BT, length)
    o_d = i_d * BD + tl.arange(0, BD)
    p_x += i_b * stride_xb + start * stride_xt
    p_y += (i_b * T + start) * D

    b_w = _load_taps(p_weight, o_d, D, W)
    window = ()
    for j in tl.static_range(W - 1):
        position = first - (W - 1) + j
        window += (_load_input(p_x, stride_xt, p_initial, i_n, position, o_d, D, W, HAS_INITIAL),)
    for i in range(first, end, U):
        rows = ()
        for u in tl.static_range(U):
            m_row = o_d < tl.where(i + u < end, D, 0)
            p_row = p_x + (i + u).to(tl.int64) * stride_xt
            rows += (tl.load(p_row + o_d, mask=m_row, other=0.0),)
        for u in tl.static_range(U):
            window += (rows[u].to(tl.float32),)
            b_y = _convolve(b_w, window, W)
            if SILU:
                b_y /= 1.0 + tl.exp2(b_y * -LOG2E)
            m_row = o_d < tl.where(i + u < end, D, 0)
            tl.store(p_y + (i + u).to(tl.int64) * D + o_d, b_y, mask=m_row)
            window = window[1:]

    if HAS_FINAL:  # noqa: SIM102 (decided when compiling)
        if end == length:
            for j in tl.static_range(W - 1):
                position = length - (W - 1) + j
                b_x = _load_input(p_x, stride_xt, p_initial, i_n, position, o_d, D, W, HAS_INITIAL)
                tl.store(p_final + (i_n * D + o_d) * (W - 1) + j, b_x, mask=o_d < D)


@triton.jit(do_not_specialize=["T"])
def short_conv_backward_kernel(
    p_x,
    p_weight,
    p_initial,
    p_dy,
    p_dfinal,
    p_dx,
    p_dweight,
    p_dinitial,
    p_strips,
    stride_xb,
    stride_xt,
    stride_dyb,
    stride_dyt,
    T,
    D,
    W: tl.constexpr,
    SILU: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_DFINAL: tl.constexpr,
    PACKED: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    U: tl.constexpr,
):
    """dx and dinitial of a strip, and its part of dweight [strips, W, D].

    An input is met by its own token and the W-1 after it: its gradient is complete W-1 tokens
    later, and the walk goes on for W-1 tokens into the next strip.
    """
    i_d = tl.program_id(0) % tl.cdiv(D, BD)
    i_s = tl.program_id(0) // tl.cdiv(D, BD)
    i_n, i_b, start, length, first = _strip(p_strips, i_s, T, BT, PACKED)
    end = tl.minimum(first + BT, length)
    o_d = i_d * BD + tl.arange(0, BD)
    p_x += i_b * stride_xb + start * stride_xt
    p_dy += i_b * stride_dyb + start * stride_dyt
    p_dx += (i_b * T + start) * D
    o_state = (i_n * D + o_d) * (W - 1)

    b_w = _load_taps(p_weight, o_d, D, W)
    window, dwindow, b_dw = (), (), ()  # inputs, gradients before the activation, of weights
    for j in tl.static_range(W - 1):
        position = first - (W - 1) + j
        window += (_load_input(p_x, stride_xt, p_initial, i_n, position, o_d, D, W, HAS_INITIAL),)
        dwindow += (tl.zeros([BD], dtype=tl.float32),)
    for _j in tl.static_range(W):
        b_dw += (tl.zeros([BD], dtype=tl.float32),)

    for i in range(first, end + W - 1, U):
        rows, drows = (), ()
        for u in tl.static_range(U):
            m_row = o_d < tl.where(i + u < length, D, 0)
            p_row = p_x + (i + u).to(tl.int64) * stride_xt
            rows += (tl.load(p_row + o_d, mask=m_row, other=0.0),)
            p_drow = p_dy + (i + u).to(tl.int64) * stride_dyt
            drows += (tl.load(p_drow + o_d, mask=m_row, other=0.0),)
        for u in tl.static_range(U):
            window += (rows[u].to(tl.float32),)
            b_dpre = drows[u].to(tl.float32)
            if SILU:
                b_pre = _convolve(b_w, window, W)
                b_sigmoid = 1.0 / (1.0 + tl.exp2(b_pre * -LOG2E))
                b_dpre *= b_sigmoid * (1.0 + b_pre * (1.0 - b_sigmoid))
            # The next strip counts its own tokens.
            b_counted = tl.where(i + u < end, b_dpre, 0.0)
            sums = ()
            for j in tl.static_range(W):
                sums += (b_dw[j] + b_counted * window[j],)
            b_dw = sums

            dwindow += (b_dpre,)
            position = i + u - (W - 1)
            b_dx = b_w[W - 1] * dwindow[0]
            for j in tl.static_range(1, W):
                b_dx += b_w[W - 1 - j] * dwindow[j]
            if HAS_DFINAL:
                place = position - length + (W - 1)
                m_final = o_d < tl.where((place >= 0) & (place < W - 1), D, 0)
                b_dx += tl.load(p_dfinal + o_state + place, mask=m_final, other=0.0).to(tl.float32)
            m_dx = o_d < tl.where((position >= first) & (position < end), D, 0)
            tl.store(p_dx + position.to(tl.int64) * D + o_d, b_dx, mask=m_dx)
            if HAS_INITIAL:
                m_initial = o_d < tl.where(position < 0, D, 0)
                tl.store(p_dinitial + o_state + (position + W - 1), b_dx, mask=m_initial)
            window, dwindow = window[1:], dwindow[1:]

    for j in tl.static_range(W):
        tl.store(p_dweight + (i_s.to(tl.int64) * W + j) * D + o_d, b_dw[j], mask=o_d < D)


@triton.jit
def short_conv_step_kernel(
    p_x,
    p_state,
    p_weight,
    p_y,
    p_indices,
    p_rollback,
    stride_xn,
    stride_xs,
    stride_sp,
    stride_sd,
    stride_sl,
    P,
    D,
    S: tl.constexpr,
    L: tl.constexpr,
    W: tl.constexpr,
    SILU: tl.constexpr,
    HAS_INDICES: tl.constexpr,
    HAS_ROLLBACK: tl.constexpr,
    BD: tl.constexpr,
):
    i_d = tl.program_id(0) % tl.cdiv(D, BD)
    i_n = (tl.program_id(0) // tl.cdiv(D, BD)).to(tl.int64)
    slot = i_n
    if HAS_INDICES:
        slot = tl.load(p_indices + i_n).to(tl.int64)
    kept = tl.full((), L, tl.int32)
    if HAS_ROLLBACK:
        kept -= tl.load(p_rollback + i_n).to(tl.int32)
    o_d = i_d * BD + tl.arange(0, BD)
    # A slot outside the pool is padding: nothing of it is read or written.
    limit = tl.where((slot >= 0) & (slot < P), D, 0)
    p_state += slot * stride_sp + o_d.to(tl.int64) * stride_sd

    b_w = _load_taps(p_weight, o_d, D, W)
    # What the state will hold: inputs `kept + S - L` to `kept + S` of those kept and the new ones.
    held = ()
    for j in tl.static_range(L):
        place = kept + S - L + j
        m_old = o_d < tl.where((place >= 0) & (place < kept) & (place < L), limit, 0)
        m_new = o_d < tl.where((place >= kept) & (place < kept + S), limit, 0)
        b_old = tl.load(p_state + place * stride_sl, mask=m_old, other=0.0).to(tl.float32)
        p_new = p_x + i_n * stride_xn + (place - kept) * stride_xs + o_d
        b_new = tl.load(p_new, mask=m_new, other=0.0).to(tl.float32)
        held += (tl.where(m_new, b_new, b_old),)
    window = ()
    for j in tl.static_range(W - 1):
        place = kept - (W - 1) + j
        m_old = o_d < tl.where((place >= 0) & (place < L), limit, 0)
        window += (tl.load(p_state + place * stride_sl, mask=m_old, other=0.0).to(tl.float32),)
    # Loads and stores may divide the channels among threads differently.
    tl.debug_barrier()
    for j in tl.static_range(L):
        tl.store(p_state + j * stride_sl, held[j], mask=o_d < limit)
    for i in tl.static_range(S):
        b_x = tl.load(p_x + i_n * stride_xn + i * stride_xs + o_d, mask=o_d < limit, other=0.0)
        window += (b_x.to(tl.float32),)
        b_y = _convolve(b_w, window, W)
        if SILU:
            b_y /= 1.0 + tl.exp2(b_y * -LOG2E)
        tl.store(p_y + (i_n * S + i) * D + o_d, b_y, mask=o_d < D)
        window = window[1:]
