"""The decay gate in Triton: element-wise helpers for fused kernels, and the gate on its own.

Gradients of A_log and dt_bias are summed in two stages in a fixed order: each program adds up a
range of tokens, and one sum over programs follows. There are no atomics, so bits repeat.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from megakda.kernels.l2_norm_triton import as_rows, check_triton_input
from megakda.kernels.launch import launch_config

MAX_BLOCK_COLUMNS = 128
"""Columns (heads times channels) of one program."""


def kda_gate_triton(
    raw: torch.Tensor,
    A_log: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    lower_bound: float | None,
) -> torch.Tensor:
    """`kda_gate` of checked arguments; differentiable in raw, A_log and dt_bias."""
    for name, tensor in (("raw", raw), ("A_log", A_log), ("dt_bias", dt_bias)):
        if tensor is not None:
            check_triton_input(name, tensor)
    return _Gate.apply(raw, A_log, dt_bias, lower_bound)


@triton.jit
def softplus_sigmoid(b_x):
    """(log(1 + exp x), sigmoid x) of fp32 x, both with small relative error everywhere."""
    b_e = tl.exp(-tl.abs(b_x))  # in [0, 1]: cannot overflow
    # log(1 + e) = 2 atanh(s) with s = e / (2 + e) <= 1/3, by its series: no digits of a small e
    # are lost to the 1, as log(1 + e) would lose them. The terms left out are 2e-8 of the sum.
    b_s = b_e / (2.0 + b_e)
    b_z = b_s * b_s
    b_p = 1.0 / 11.0 + b_z * (1.0 / 13.0)
    b_p = 1.0 / 9.0 + b_z * b_p
    b_p = 1.0 / 7.0 + b_z * b_p
    b_p = 1.0 / 5.0 + b_z * b_p
    b_p = 1.0 / 3.0 + b_z * b_p
    b_softplus = tl.maximum(b_x, 0.0) + 2.0 * (b_s + b_s * b_z * b_p)
    b_sigmoid = tl.where(b_x >= 0, 1.0, b_e) / (1.0 + b_e)
    return b_softplus, b_sigmoid


@triton.jit
def sigmoid_derivative(b_x):
    """(sigmoid x, its derivative) of fp32 x, both with small relative error everywhere."""
    b_e = tl.exp(-tl.abs(b_x))
    b_r = 1.0 / (1.0 + b_e)
    return tl.where(b_x >= 0, b_r, b_e * b_r), b_e * b_r * b_r


@triton.jit
def gate_value(b_x, b_rate, BOUNDED: tl.constexpr, lower_bound):
    """g in natural log units, fp32. b_x: raw + bias, fp32; b_rate: exp(A_log), broadcast to it.

    `lower_bound` is read only if BOUNDED.
    """
    if BOUNDED:
        b_sigmoid, _ = sigmoid_derivative(b_rate * b_x)
        b_g = lower_bound * b_sigmoid
    else:
        b_softplus, _ = softplus_sigmoid(b_x)
        b_g = -b_rate * b_softplus
    return b_g


@triton.jit
def gate_derivatives(b_x, b_rate, BOUNDED: tl.constexpr, lower_bound):
    """(g, dg/d(raw + bias), dg/dA_log), element by element; arguments as `gate_value`."""
    if BOUNDED:
        b_sigmoid, b_slope = sigmoid_derivative(b_rate * b_x)
        b_g = lower_bound * b_sigmoid
        b_dx = lower_bound * b_rate * b_slope
        b_da = b_dx * b_x
    else:
        b_softplus, b_sigmoid = softplus_sigmoid(b_x)
        b_g = -b_rate * b_softplus
        b_dx = -b_rate * b_sigmoid
        b_da = b_g
    return b_g, b_dx, b_da


@triton.jit
def load_gate_input(
    raw, A_log, dt_bias, o_n, o_c, m_nc, stride_raw, C: tl.constexpr, K: tl.constexpr
):
    """raw + bias [BN, BC] and the rates [1, BC]; column c is channel c % K of head c // K."""
    b_x = tl.load(raw + o_n[:, None] * stride_raw + o_c[None, :], mask=m_nc, other=0.0)
    b_x = b_x.to(tl.float32)
    b_rate = tl.full(o_c.shape, 1.0, tl.float32)
    if dt_bias is not None:
        b_x += tl.load(dt_bias + o_c, mask=o_c < C, other=0.0).to(tl.float32)[None, :]
    if A_log is not None:
        b_rate = tl.exp(tl.load(A_log + o_c // K, mask=o_c < C, other=0.0).to(tl.float32))
    return b_x, b_rate[None, :]


@triton.jit(do_not_specialize=["N"])
def kda_gate_forward_kernel(
    raw, A_log, dt_bias, g, N, stride_raw, lower_bound,
    C: tl.constexpr, K: tl.constexpr, BOUNDED: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_nc = (o_n < N)[:, None] & (o_c < C)[None, :]
    b_x, b_rate = load_gate_input(raw, A_log, dt_bias, o_n, o_c, m_nc, stride_raw, C, K)
    b_g = gate_value(b_x, b_rate, BOUNDED, lower_bound)
    tl.store(g + o_n[:, None] * C + o_c[None, :], b_g, mask=m_nc)


@triton.jit(do_not_specialize=["N"])
def kda_gate_backward_kernel(
    raw, A_log, dt_bias, dg, draw, dA, dbias, N, stride_raw, stride_dg, lower_bound,
    C: tl.constexpr, K: tl.constexpr, BOUNDED: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dA and dbias: [programs, C] fp32, one row from each program along axis 0."""
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_c = o_c < C
    b_dA = tl.zeros([BN, BC], dtype=tl.float32)
    b_dbias = tl.zeros([BN, BC], dtype=tl.float32)
    for i_block in range(tl.program_id(0), tl.cdiv(N, BN), tl.num_programs(0)):
        o_n = tl.cast(i_block, tl.int64) * BN + tl.arange(0, BN)
        m_nc = (o_n < N)[:, None] & m_c[None, :]
        b_x, b_rate = load_gate_input(raw, A_log, dt_bias, o_n, o_c, m_nc, stride_raw, C, K)
        p_dg = dg + o_n[:, None] * stride_dg + o_c[None, :]
        b_dg = tl.load(p_dg, mask=m_nc, other=0.0).to(tl.float32)
        _, b_dx, b_da = gate_derivatives(b_x, b_rate, BOUNDED, lower_bound)
        b_dx *= b_dg
        tl.store(draw + o_n[:, None] * C + o_c[None, :], b_dx, mask=m_nc)
        if dA is not None:
            b_dA += b_dg * b_da
        if dbias is not None:
            b_dbias += b_dx
    if dA is not None:
        tl.store(dA + tl.program_id(0) * C + o_c, tl.sum(b_dA, axis=0), mask=m_c)
    if dbias is not None:
        tl.store(dbias + tl.program_id(0) * C + o_c, tl.sum(b_dbias, axis=0), mask=m_c)


class _Gate(torch.autograd.Function):
    """Saves the inputs alone: g takes more memory than `raw`, and little time to make again."""

    @staticmethod
    def forward(
        ctx: Any,
        raw: torch.Tensor,
        A_log: torch.Tensor | None,
        dt_bias: torch.Tensor | None,
        lower_bound: float | None,
    ) -> torch.Tensor:
        g = torch.empty(raw.shape, dtype=torch.float32, device=raw.device)
        if raw.numel():
            rows, options, blocks, _ = _layout("kda_gate_forward", raw)
            kda_gate_forward_kernel[blocks](
                rows,
                None if A_log is None else A_log.contiguous(),
                None if dt_bias is None else dt_bias.contiguous(),
                g,
                len(rows),
                rows.stride(0),
                0.0 if lower_bound is None else lower_bound,
                BOUNDED=lower_bound is not None,
                **options,
            )
        ctx.save_for_backward(raw, A_log, dt_bias)
        ctx.lower_bound = lower_bound
        return g

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dg: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        raw, A_log, dt_bias = ctx.saved_tensors
        lower_bound = ctx.lower_bound
        draw = torch.empty_like(raw, memory_format=torch.contiguous_format)
        if not raw.numel():
            zeros = (None if x is None else torch.zeros_like(x) for x in (A_log, dt_bias))
            return draw, *zeros, None
        rows, options, (row_blocks, column_blocks), most = _layout("kda_gate_backward", raw)
        dg_rows = as_rows(dg, rows.shape[1])
        programs = min(row_blocks, max(1, most // column_blocks))
        dA, dbias = (
            None
            if x is None
            else torch.empty(programs, rows.shape[1], dtype=torch.float32, device=raw.device)
            for x in (A_log, dt_bias)
        )
        kda_gate_backward_kernel[(programs, column_blocks)](
            rows,
            None if A_log is None else A_log.contiguous(),
            None if dt_bias is None else dt_bias.contiguous(),
            dg_rows,
            draw,
            dA,
            dbias,
            len(rows),
            rows.stride(0),
            dg_rows.stride(0),
            0.0 if lower_bound is None else lower_bound,
            BOUNDED=lower_bound is not None,
            **options,
        )
        if A_log is not None and dA is not None:
            dA = dA.sum(0).view(raw.shape[-2:]).sum(1).view(A_log.shape).to(A_log.dtype)
        if dt_bias is not None and dbias is not None:
            dbias = dbias.sum(0).view(dt_bias.shape).to(dt_bias.dtype)
        return draw, dA, dbias, None


def _layout(
    kernel: str, raw: torch.Tensor
) -> tuple[torch.Tensor, dict[str, int], tuple[int, int], int]:
    """raw as rows [N, H*K], launch options, the grid, and the most programs a kernel may have."""
    heads, key_dim = raw.shape[-2:]
    rows = as_rows(raw, heads * key_dim)
    config = launch_config(kernel, raw.device, K=key_dim)
    block, most = config.pop("BLOCK"), config.pop("programs", 0)
    columns = min(MAX_BLOCK_COLUMNS, triton.next_power_of_2(heads * key_dim))
    tile = {"BC": columns, "BN": max(1, block // columns)}
    grid = (triton.cdiv(len(rows), tile["BN"]), triton.cdiv(heads * key_dim, columns))
    return rows, config | tile | {"C": heads * key_dim, "K": key_dim}, grid, most
