"""The bytes that a launch moves are counted, each once and with repetitions."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megakda.kernels.verify.traffic import Traffic, record_traffic


@triton.jit
def copy(p_x, p_y, n, BLOCK: tl.constexpr):
    o_i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_y + o_i, tl.load(p_x + o_i, mask=o_i < n), mask=o_i < n)


@triton.jit
def add_bias_in_two_steps(p_x, p_bias, p_y, n, BLOCK: tl.constexpr):
    """Every program reads the same bias, and reads back what it stored."""
    o_i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_i = o_i < n
    tl.store(p_y + o_i, tl.load(p_x + o_i, mask=m_i), mask=m_i)
    b_bias = tl.load(p_bias)
    tl.store(p_y + o_i, tl.load(p_y + o_i, mask=m_i) + b_bias, mask=m_i)


def test_copy():
    x = torch.randn(100).bfloat16()
    with record_traffic() as launches:
        copy[(4,)](x, torch.empty_like(x), 100, 32)
        copy[(2,)](x.float(), x, 50, 32)
    assert launches == [
        Traffic("copy", 4, unique_loaded=200, unique_stored=200, loaded=200, stored=200),
        Traffic("copy", 2, unique_loaded=200, unique_stored=100, loaded=200, stored=100),
    ]
    assert launches[0].unique == 400


def test_repetitions_and_what_a_launch_wrote_itself():
    x, bias = torch.randn(100), torch.randn(1)
    with record_traffic() as launches:
        add_bias_in_two_steps[(4,)](x, bias, torch.empty_like(x), 100, 32)
    assert launches == [
        Traffic(
            "add_bias_in_two_steps",
            4,
            unique_loaded=400 + 4,
            unique_stored=400,
            loaded=800 + 4 * 4,
            stored=800,
        )
    ]


def test_reading_before_writing_counts():
    x = torch.randn(64)
    with record_traffic() as launches:
        copy[(2,)](x, x, 64, 32)
    assert (launches[0].unique_loaded, launches[0].unique_stored) == (256, 256)


def test_views_of_one_storage_with_elements_of_different_size():
    storage = torch.zeros(300, dtype=torch.uint8)
    with record_traffic() as launches:
        copy[(4,)](storage[:200].view(torch.bfloat16), storage[200:], 100, 32)
    assert (launches[0].unique_loaded, launches[0].unique_stored) == (200, 100)
    with record_traffic() as nothing:
        pass
    assert nothing == []
