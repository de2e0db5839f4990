"""Small cases for the tests of ahead-of-time compilation; the first one is within its budget."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megakda.kernels.verify.budget import Case, Kernel


@triton.jit
def product(p_a, p_b, p_c, N: tl.constexpr, PRECISION: tl.constexpr):
    o_i = tl.arange(0, N)
    o_ij = o_i[:, None] * N + o_i[None, :]
    b_c = tl.dot(tl.load(p_a + o_ij), tl.load(p_b + o_ij), input_precision=PRECISION)
    tl.store(p_c + o_ij, b_c)


def multiply(dtype: torch.dtype, precision: str, launches: int = 2) -> None:
    a, b, c = (torch.empty(64, 64, dtype=dtype, device="meta") for _ in range(3))
    for _ in range(launches):
        product[(1,)](a, b, c, 64, precision, num_warps=4)


def fail() -> None:
    raise ValueError("q: no")


CASES = [
    Case("narrow", lambda: multiply(torch.bfloat16, "tf32"), (Kernel("product", dot=True),)),
    Case(
        "spilling",
        lambda: multiply(torch.float32, "ieee"),
        (Kernel("product", dot=True, min_warps=64), Kernel("another")),
    ),
    Case("failing", fail, ()),
]
