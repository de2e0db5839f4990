"""L2 norm in Triton: one program per block of rows, each row whole in registers."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from megakda.kernels.launch import launch_config

MAX_WIDTH = 16384
"""The widest row that stays in the registers of one program."""


def l2_norm_triton(x: torch.Tensor, eps: float) -> torch.Tensor:
    """`l2_norm` of checked arguments; differentiable in x."""
    check_triton_input("x", x)
    check_width("x", x)
    return _L2Norm.apply(x, eps)


def check_triton_input(name: str, x: torch.Tensor) -> None:
    """Raises ValueError unless x is fp32, bf16 or fp16: kernels compute in fp32."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"{name}: the triton backend computes in fp32 and takes fp32, bf16 or fp16, "
            f"not {x.dtype}; backend='torch' takes it"
        )


def check_width(name: str, x: torch.Tensor) -> None:
    """Raises ValueError unless one row of x fits one program."""
    if not 1 <= x.shape[-1] <= MAX_WIDTH:
        raise ValueError(
            f"{name}: the triton backend takes a last dimension of 1 to {MAX_WIDTH}, "
            f"not {x.shape[-1]}; backend='torch' takes it"
        )


def as_rows(x: torch.Tensor, width: int) -> torch.Tensor:
    """x as [rows, width] whose rows are dense, a view where its strides allow that."""
    x = x.reshape(-1, width)
    return x if x.stride(1) == 1 else x.contiguous()


@triton.jit
def inverse_norm(b_x, m_n, eps):
    """1 / norm of each row, 1 for rows past the end even where eps = 0."""
    return tl.rsqrt(tl.where(m_n, tl.sum(b_x * b_x, axis=1) + eps, 1.0))[:, None]


@triton.jit(do_not_specialize=["N"])
def l2_norm_forward_kernel(
    x, y, N, stride_x, eps, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr
):
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    o_d = tl.arange(0, BD)
    m_n = o_n < N
    m_nd = m_n[:, None] & (o_d < D)[None, :]
    p_x = x + o_n[:, None] * stride_x + o_d[None, :]
    b_x = tl.load(p_x, mask=m_nd, other=0.0).to(tl.float32)
    b_y = b_x * inverse_norm(b_x, m_n, eps)
    tl.store(y + o_n[:, None] * D + o_d[None, :], b_y, mask=m_nd)


@triton.jit(do_not_specialize=["N"])
def l2_norm_backward_kernel(
    x, dy, dx, N, stride_x, stride_dy, eps, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr
):
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    o_d = tl.arange(0, BD)
    m_n = o_n < N
    m_nd = m_n[:, None] & (o_d < D)[None, :]
    p_x = x + o_n[:, None] * stride_x + o_d[None, :]
    p_dy = dy + o_n[:, None] * stride_dy + o_d[None, :]
    b_x = tl.load(p_x, mask=m_nd, other=0.0).to(tl.float32)
    b_dy = tl.load(p_dy, mask=m_nd, other=0.0).to(tl.float32)
    # y = r x with r = (sum x^2 + eps)^(-1/2), dr/dx = -r^3 x, hence dx = r (dy - y sum(dy y)).
    b_r = inverse_norm(b_x, m_n, eps)
    b_y = b_x * b_r
    b_dx = b_r * (b_dy - b_y * tl.sum(b_dy * b_y, axis=1)[:, None])
    tl.store(dx + o_n[:, None] * D + o_d[None, :], b_dx, mask=m_nd)


def row_options(kernel: str, device: torch.device, width: int) -> dict[str, int]:
    """Launch options of a kernel on rows: BN rows of `width` elements padded to BD, and the table's
    other entries.
    """
    padded = triton.next_power_of_2(width)
    config = launch_config(kernel, device, BD=padded)
    rows = max(1, config.pop("BLOCK") // padded)
    return config | {"D": width, "BD": padded, "BN": rows}


class _L2Norm(torch.autograd.Function):
    """Saves x alone: the norm is a sum over what the backward pass loads anyway."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, eps: float) -> torch.Tensor:
        width = x.shape[-1]
        rows, y = as_rows(x, width), torch.empty_like(x, memory_format=torch.contiguous_format)
        if x.numel():
            options = row_options("l2_norm_forward", x.device, width)
            l2_norm_forward_kernel[(triton.cdiv(len(rows), options["BN"]),)](
                rows, y, len(rows), rows.stride(0), eps, **options
            )
        ctx.save_for_backward(x)
        ctx.eps = eps
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        width = x.shape[-1]
        rows, dy_rows = as_rows(x, width), as_rows(dy, width)
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        if x.numel():
            options = row_options("l2_norm_backward", x.device, width)
            l2_norm_backward_kernel[(triton.cdiv(len(rows), options["BN"]),)](
                rows,
                dy_rows,
                dx,
                len(rows),
                rows.stride(0),
                dy_rows.stride(0),
                ctx.eps,
                **options,
            )
        return dx, None
