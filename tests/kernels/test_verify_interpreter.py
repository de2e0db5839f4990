"""Interpreted kernels compute what a GPU would, bf16 bit by bit as torch does."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from megakda.kernels.verify import interpreter, rounding

N = 512


@triton.jit
def binary(p_x, p_y, p_out, OP: tl.constexpr, N: tl.constexpr):
    o_i = tl.arange(0, N)
    b_x, b_y = tl.load(p_x + o_i), tl.load(p_y + o_i)
    if OP == "add":
        b_out = b_x + b_y
    elif OP == "sub":
        b_out = b_x - b_y
    elif OP == "mul":
        b_out = b_x * b_y
    elif OP == "div":
        b_out = (b_x / b_y).to(tl.bfloat16)
    elif OP == "max":
        b_out = tl.maximum(b_x, b_y)
    elif OP == "min":
        b_out = tl.minimum(b_x, b_y)
    elif OP == "neg":
        b_out = -b_x
    elif OP == "abs":
        b_out = tl.abs(b_x)
    elif OP == "less":
        b_out = (b_x < b_y).to(tl.bfloat16)
    elif OP == "where":
        b_out = tl.where(b_x == b_y, b_x, b_y)
    elif OP == "constants":
        b_out = b_x * 0.3 + 1.7
    elif OP == "clamp":
        b_out = tl.clamp(b_x, -0.5, 0.75)
    elif OP == "fma":
        b_out = tl.fma(b_x, b_y, b_y)
    tl.store(p_out + o_i, b_out)


def some_bf16(seed: int) -> torch.Tensor:
    """Numbers of all sizes, with zeros of both signs, subnormals, infinities and NaN."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, generator=generator) * 10.0 ** torch.randint(
        -4, 4, (N,), generator=generator
    )
    special = torch.tensor(
        [0.0, -0.0, 1e-40, -1e-40, 3e38, -3e38, torch.inf, -torch.inf, torch.nan]
    )
    x[: len(special)] = special[torch.randperm(len(special), generator=generator)]
    return x.bfloat16()


def bits(x: torch.Tensor) -> torch.Tensor:
    """Bit patterns, all NaN alike."""
    return torch.where(x.isnan(), torch.nan, x).view(torch.int16)


@pytest.mark.parametrize(
    ("op", "expected"),
    {
        "add": torch.add,
        "sub": torch.sub,
        "mul": torch.mul,
        "div": torch.div,
        "max": torch.fmax,
        "min": torch.fmin,
        "neg": lambda x, y: -x,
        "abs": lambda x, y: x.abs(),
        "less": lambda x, y: (x < y).bfloat16(),
        "where": lambda x, y: torch.where(x == y, x, y),
        "constants": lambda x, y: x * torch.tensor(0.3).bfloat16() + torch.tensor(1.7).bfloat16(),
        "clamp": lambda x, y: x.fmax(torch.tensor(-0.5).bfloat16()).clamp(max=0.75),
        "fma": lambda x, y: torch.addcmul(y.double(), x.double(), y.double()).float().bfloat16(),
    }.items(),
)
def test_bf16_operations_give_the_bits_of_torch(op, expected):
    x, y = some_bf16(0), some_bf16(1)
    if op == "neg":  # triton 3.6 subtracts from zero, which makes -0 of nothing
        x = torch.where(x == 0, 1.0, x)
    y[20:40] = x[20:40]
    out = torch.empty_like(x)
    binary[(1,)](x, y, out, op, N)
    assert bits(out).equal(bits(expected(x, y)))


@triton.jit
def convert(p_x, p_out, ONE_BY_ONE: tl.constexpr, N: tl.constexpr):
    o_i = tl.arange(0, N)
    b_x = tl.load(p_x + o_i)
    if ONE_BY_ONE:
        b_x = b_x.to(p_out.dtype.element_ty)
    tl.store(p_out + o_i, b_x)


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.int32])
def test_casts_to_and_from_bf16_give_the_bits_of_torch(dtype, explicit):
    generator = torch.Generator().manual_seed(2)
    x = (torch.randn(N, generator=generator) * 300).to(dtype)
    if dtype == torch.float32:  # halfway between two bf16 numbers: ties go to even
        x[:100] = (x[:100].bfloat16().view(torch.int16).int() << 16 | 0x8000).view(torch.float32)
        x[100:105] = torch.tensor([torch.nan, torch.inf, 3.4e38, 1e-40, -0.0])
    out = torch.empty(N, dtype=torch.bfloat16)
    convert[(1,)](x, out, explicit, N)
    assert bits(out).equal(bits(x.bfloat16()))
    back = torch.empty(N, dtype=dtype)
    finite = x.bfloat16().nan_to_num(0, 0, 0)
    convert[(1,)](finite, back, explicit, N)
    assert back.equal(finite.to(dtype))


@triton.jit
def reduce(p_x, p_out, N: tl.constexpr):
    o_i = tl.arange(0, N)
    b_x = tl.load(p_x + o_i)
    tl.store(p_out, tl.sum(b_x, 0))
    tl.store(p_out + 1, tl.max(b_x, 0))
    tl.store(p_out + 2, tl.min(b_x, 0))
    tl.store(p_out + 3 + o_i, tl.cumsum(b_x, 0))


def test_reductions_of_bf16():
    x = torch.randint(-9, 9, (N,), generator=torch.Generator().manual_seed(3)).bfloat16()
    out = torch.empty(N + 3)
    reduce[(1,)](x, out, N)
    wide = x.float()
    assert out[:3].tolist() == [wide.sum(), wide.max(), wide.min()]
    assert out[3:].equal(wide.cumsum(0))


@triton.jit
def choose(p_x, p_out, limit, N: tl.constexpr):
    o_i = tl.arange(0, N)
    b_x = tl.load(p_x + o_i)
    m_first = tl.load(p_x) > limit
    m_all = tl.broadcast_to(m_first, (N,)) & (o_i < 3)
    tl.store(p_out + o_i, tl.where(m_all, b_x, 0.25), mask=m_first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_comparisons_of_single_numbers_spread_to_blocks(dtype):
    x, out = torch.tensor([0.75, 0.125, 4.0, 3.0], dtype=dtype), torch.zeros(4)
    choose[(1,)](x, out, 1.0, 4)
    assert out.tolist() == [0, 0, 0, 0]
    choose[(1,)](x, out, 0.5, 4)
    assert out.tolist() == [0.75, 0.125, 4.0, 0.25]


@triton.jit
def multiply(p_a, p_b, p_c, K: tl.constexpr, PRECISION: tl.constexpr):
    o_i, o_k = tl.arange(0, 16), tl.arange(0, K)
    b_a = tl.load(p_a + o_i[:, None] * K + o_k[None, :])
    b_b = tl.load(p_b + o_k[:, None] * 16 + o_i[None, :])
    b_c = tl.zeros((16, 16), tl.float32)
    b_c = tl.dot(b_a, b_b, b_c, input_precision=PRECISION)
    tl.store(p_c + o_i[:, None] * 16 + o_i[None, :], b_c)


def dot_error(dtype: torch.dtype, precision: str | None) -> float:
    generator = torch.Generator().manual_seed(4)
    a, b = (torch.randn(s, generator=generator).to(dtype) for s in ((16, 64), (64, 16)))
    c = torch.empty(16, 16)
    multiply[(1,)](a, b, c, 64, precision)
    exact = a.double() @ b.double()
    return ((c - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_narrow_numbers_are_exact_and_added_in_fp32(dtype):
    assert dot_error(dtype, None) < 2e-7


def test_products_of_fp32_have_the_precision_asked_for():
    assert dot_error(torch.float32, "ieee") < 3e-7
    assert 2e-4 < dot_error(torch.float32, "tf32") < 1e-3
    assert dot_error(torch.float32, None) == dot_error(torch.float32, "tf32")  # as on a GPU
    assert dot_error(torch.float32, "tf32x3") < 1e-6
    assert 1e-6 < dot_error(torch.float32, "bf16x3") < 1e-5
    assert dot_error(torch.float32, "bf16x6") < 3e-7


def test_tf32():
    largest = np.finfo(np.float32).max
    x = np.array([1 + 2**-11, 1 + 2**-10, -(1 + 2**-11 + 2**-12), np.inf, largest], np.float32)
    truncated = [1, 1 + 2**-10, -1, np.inf, 2.0**128 - 2.0**117]
    assert rounding.truncate_to_tf32(x).tolist() == truncated
    rounded = [1 + 2**-10, 1 + 2**-10, -(1 + 2**-10), np.inf, np.inf]
    assert rounding.round_to_tf32(x).tolist() == rounded


@triton.jit
def helper(b_x, i):
    return b_x + i.to(tl.float32)


@triton.jit
def loops(p_out, n, big, STEPS: tl.constexpr):
    b_sum = 0.0
    for i in range(n):
        b_sum = helper(b_sum, i)
    for i in tl.range(2, n, 2, num_stages=2):
        b_sum = helper(b_sum, i)
    for i in tl.static_range(STEPS):
        b_sum += i
    for i in range(n - 1, n):
        if i == 4:
            b_sum += 100.0
    tl.store(p_out, b_sum)
    for i in range(big, big + 1):
        tl.store(p_out + 1, (i * 4).to(tl.float32))


def test_loop_variables_are_tensors():
    out = torch.empty(2)
    loops[(1,)](out, 5, 2**40, 3)
    assert out.tolist() == [10 + 2 + 4 + 3 + 100, 2.0**42]


@triton.jit
def failing(p_x):
    fail(tl.load(p_x))


@triton.jit
def fail(x):
    tl.static_assert(False, "the kernel's own message")


def test_a_kernel_raises_its_own_exception():
    with pytest.raises(AssertionError, match="the kernel's own message"):
        failing[(1,)](torch.zeros(1))


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout + done.stderr


def test_install_wants_the_variable_before_triton():
    install = "from megakda.kernels.verify import interpreter; interpreter.install()"
    late = f"import triton, os; os.environ['TRITON_INTERPRET'] = '1'; {install}"
    assert "before triton is first imported" in run_python(late, TRITON_INTERPRET="0")
    twice = f"{install}; interpreter.install(); print('fine')"
    assert run_python(twice, TRITON_INTERPRET="1").endswith("fine\n")


def test_install_refuses_an_unknown_triton(monkeypatch):
    monkeypatch.delattr(interpreter.stock, "_patch_lang")
    with pytest.raises(RuntimeError, match="has no _patch_lang"):
        interpreter._check_triton()


def test_observers_need_the_installation(monkeypatch):
    monkeypatch.setattr(interpreter, "_installed", False)
    with (
        pytest.raises(RuntimeError, match="must be called first"),
        interpreter.observed_by(interpreter.Observer()),
    ):
        pass
