"""Gated RMSNorm in Triton, forward and backward in one pass over the rows each.

The backward pass has a bounded number of programs that stride over the blocks of rows. Each keeps
its share of the weight's gradient in registers and writes it once; one sum over programs follows.
There are no atomics, so bits repeat.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from megakda.kernels.kda.gate_triton import sigmoid_derivative
from megakda.kernels.l2_norm_triton import as_rows, check_triton_input, check_width, row_options


def gated_rms_norm_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    gate: torch.Tensor | None,
    activation: str | None,
    eps: float,
) -> torch.Tensor:
    """`gated_rms_norm` of checked arguments; differentiable in x, weight and gate."""
    check_width("x", x)
    for name, tensor in (("x", x), ("weight", weight), ("gate", gate)):
        if tensor is not None:
            check_triton_input(name, tensor)
    return _GatedRMSNorm.apply(x, weight, gate, activation, eps)


@triton.jit
def activate(b_gate, SWISH: tl.constexpr):
    """(activation, its derivative) of the gate."""
    b_a, b_da = sigmoid_derivative(b_gate)
    if SWISH:
        b_da = b_a + b_gate * b_da
        b_a = b_gate * b_a
    return b_a, b_da


@triton.jit
def normalise(b_x, m_n, eps, D: tl.constexpr):
    """(x / rms, 1 / rms), zero for rows past the end even where eps = 0."""
    b_r = tl.rsqrt(tl.where(m_n, tl.sum(b_x * b_x, axis=1) / D + eps, 1.0))[:, None]
    return b_x * b_r, b_r


@triton.jit(do_not_specialize=["N"])
def gated_norm_forward_kernel(
    x, weight, gate, y, N, stride_x, stride_gate, eps,
    SWISH: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    o_d = tl.arange(0, BD)
    m_n, m_d = o_n < N, o_d < D
    m_nd = m_n[:, None] & m_d[None, :]
    b_w = tl.load(weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    p_x = x + o_n[:, None] * stride_x + o_d[None, :]
    b_x = tl.load(p_x, mask=m_nd, other=0.0).to(tl.float32)
    b_y, _ = normalise(b_x, m_n, eps, D)
    b_y *= b_w[None, :]
    if gate is not None:
        p_gate = gate + o_n[:, None] * stride_gate + o_d[None, :]
        b_a, _ = activate(tl.load(p_gate, mask=m_nd, other=0.0).to(tl.float32), SWISH)
        b_y *= b_a
    tl.store(y + o_n[:, None] * D + o_d[None, :], b_y, mask=m_nd)


@triton.jit(do_not_specialize=["N"])
def gated_norm_backward_kernel(
    x, weight, gate, dy, dx, dgate, dweight, N, stride_x, stride_gate, stride_dy, eps,
    SWISH: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dweight: [programs, D] fp32, one row from each program."""
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    b_w = tl.load(weight + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    b_dw = tl.zeros([BN, BD], dtype=tl.float32)
    for i_block in range(tl.program_id(0), tl.cdiv(N, BN), tl.num_programs(0)):
        o_n = tl.cast(i_block, tl.int64) * BN + tl.arange(0, BN)
        m_n = o_n < N
        m_nd = m_n[:, None] & m_d[None, :]
        p_x = x + o_n[:, None] * stride_x + o_d[None, :]
        p_dy = dy + o_n[:, None] * stride_dy + o_d[None, :]
        b_x = tl.load(p_x, mask=m_nd, other=0.0).to(tl.float32)
        b_dy = tl.load(p_dy, mask=m_nd, other=0.0).to(tl.float32)
        b_unit, b_r = normalise(b_x, m_n, eps, D)
        if gate is not None:
            p_gate = gate + o_n[:, None] * stride_gate + o_d[None, :]
            b_gate = tl.load(p_gate, mask=m_nd, other=0.0).to(tl.float32)
            b_a, b_da = activate(b_gate, SWISH)
            p_dgate = dgate + o_n[:, None] * D + o_d[None, :]
            tl.store(p_dgate, b_dy * b_unit * b_w * b_da, mask=m_nd)
            b_dy *= b_a
        b_dw += b_dy * b_unit
        # unit = r x with r = (mean x^2 + eps)^(-1/2), dr/dx = -r^3 x / D.
        b_du = b_dy * b_w
        b_dx = b_r * (b_du - b_unit * (tl.sum(b_du * b_unit, axis=1) / D)[:, None])
        tl.store(dx + o_n[:, None] * D + o_d[None, :], b_dx, mask=m_nd)
    p_dw = dweight + tl.program_id(0) * D + o_d
    tl.store(p_dw, tl.sum(b_dw, axis=0), mask=m_d)


class _GatedRMSNorm(torch.autograd.Function):
    """Saves the inputs alone: the root mean square is a sum over what the backward pass loads."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        gate: torch.Tensor | None,
        activation: str | None,
        eps: float,
    ) -> torch.Tensor:
        width = x.shape[-1]
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        rows, gate_rows = as_rows(x, width), None if gate is None else as_rows(gate, width)
        if x.numel():
            options = row_options("gated_norm_forward", x.device, width)
            gated_norm_forward_kernel[(triton.cdiv(len(rows), options["BN"]),)](
                rows,
                weight.contiguous(),
                gate_rows,
                y,
                len(rows),
                rows.stride(0),
                _row_stride(gate_rows),
                eps,
                SWISH=activation == "swish",
                **options,
            )
        ctx.save_for_backward(x, weight, gate)
        ctx.activation, ctx.eps = activation, eps
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, gate = ctx.saved_tensors
        width = x.shape[-1]
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        dgate = None
        if gate is not None:
            dgate = torch.empty_like(gate, memory_format=torch.contiguous_format)
        if not x.numel():
            return dx, torch.zeros_like(weight), dgate, None, None
        rows, dy_rows = as_rows(x, width), as_rows(dy, width)
        gate_rows = None if gate is None else as_rows(gate, width)
        options = row_options("gated_norm_backward", x.device, width)
        programs = min(options.pop("programs"), triton.cdiv(len(rows), options["BN"]))
        dweight = torch.empty(programs, width, dtype=torch.float32, device=x.device)
        gated_norm_backward_kernel[(programs,)](
            rows,
            weight.contiguous(),
            gate_rows,
            dy_rows,
            dx,
            dgate,
            dweight,
            len(rows),
            rows.stride(0),
            _row_stride(gate_rows),
            dy_rows.stride(0),
            ctx.eps,
            SWISH=ctx.activation == "swish",
            **options,
        )
        return dx, dweight.sum(0).to(weight.dtype), dgate, None, None


def _row_stride(rows: torch.Tensor | None) -> int:
    return 0 if rows is None else rows.stride(0)
