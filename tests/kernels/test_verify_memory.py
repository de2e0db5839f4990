"""Wrong accesses to memory are found in interpreted kernels, right ones pass."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from megakda.kernels.verify.memory import MemoryAccessError, checked_memory, poisoned_memory

BLOCK = 16


@triton.jit
def shift(p_x, p_y, n_load, n_store, offset, stride_x, BLOCK: tl.constexpr):
    """y[i] = x[i + offset], 0 from `n_load` on."""
    o_i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(p_x + (o_i + offset) * stride_x, mask=o_i < n_load, other=0.0)
    tl.store(p_y + o_i, b_x, mask=o_i < n_store)


@triton.jit
def rotate(p_x, p_y, n, BLOCK: tl.constexpr):
    """Programs store y in reverse order of blocks."""
    o_i = tl.arange(0, BLOCK)
    i_in, i_out = tl.program_id(0) * BLOCK, (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK
    tl.store(p_y + i_out + o_i, tl.load(p_x + i_in + o_i))


@triton.jit
def total(p_x, p_sum, BLOCK: tl.constexpr):
    """All programs store to one address."""
    b_x = tl.load(p_x + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))
    tl.store(p_sum, tl.sum(b_x, 0))


@triton.jit
def twice(p_x, p_y, BLOCK: tl.constexpr):
    """A program reads back what it stored itself."""
    o_i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_y + o_i, tl.load(p_x + o_i))
    tl.store(p_y + o_i, 2.0 * tl.load(p_y + o_i))


def test_clean_kernels_pass():
    x = torch.randn(40)
    with checked_memory():
        y = torch.empty_like(x)
        assert y.isnan().all()
        shift[(3,)](x, y, 40, 40, 0, 1, BLOCK)
        assert y.equal(x)
        twice[(2,)](x[:32], y[:32], BLOCK)
    assert y[:32].equal(2 * x[:32]) and y[32:].equal(x[32:])


def launch_error(*args: object, kernel=shift, grid: int = 3) -> MemoryAccessError:
    with pytest.raises(MemoryAccessError) as caught, checked_memory():
        kernel[(grid,)](*args)
    assert caught.value.kernel == kernel.fn.__name__
    return caught.value


def test_load_past_the_end():
    error = launch_error(torch.randn(40), torch.randn(40), 42, 40, 0, 1, BLOCK)
    assert (error.argument, error.program, error.byte_range) == ("p_x", (2, 0, 0), (160, 168))
    assert "shift: program (2, 0, 0) loads outside" in str(error)


def test_load_before_the_start():
    error = launch_error(torch.randn(40), torch.randn(40), 40, 40, -3, 1, BLOCK)
    assert (error.argument, error.program, error.byte_range) == ("p_x", (0, 0, 0), (-12, 0))


def test_store_past_the_end_of_bf16():
    x = torch.randn(48).bfloat16()
    error = launch_error(x, torch.empty(40).bfloat16(), 48, 41, 0, 1, BLOCK)
    assert (error.argument, error.program, error.byte_range) == ("p_y", (2, 0, 0), (80, 82))
    assert "stores outside" in str(error)


def test_views_end_where_they_end_although_their_storage_goes_on():
    both = torch.randn(2, 40)
    error = launch_error(both[0], torch.empty(40), 41, 40, 0, 1, BLOCK)
    assert (error.argument, error.byte_range) == ("p_x", (160, 164))


def test_one_argument_is_not_reached_through_another():
    both = torch.randn(2, 40)
    error = launch_error(both[0], both[1], 41, 40, 0, 1, BLOCK)
    assert (error.argument, error.byte_range) == ("p_x", (160, 164))


def test_holes_of_strided_views():
    x = torch.randn(40, 3)[:, 0]
    with checked_memory():
        shift[(3,)](x, torch.empty(40), 40, 40, 0, 3, BLOCK)
    error = launch_error(x, torch.empty(40), 40, 40, 0, 1, BLOCK)
    assert (error.argument, error.program, error.byte_range) == ("p_x", (0, 0, 0), (4, 60))
    assert "between the elements" in str(error)


def test_two_programs_store_to_one_address():
    error = launch_error(torch.randn(48), torch.empty(1), BLOCK, kernel=total)
    assert (error.argument, error.program, error.byte_range) == ("p_sum", (1, 0, 0), (0, 4))
    assert "stores where program (0, 0, 0) stored" in str(error)
    with checked_memory():
        total[(1,)](torch.randn(16), torch.empty(1), BLOCK)


def test_a_program_loads_what_another_stored():
    x = torch.randn(64)
    error = launch_error(x, x, 64, BLOCK, kernel=rotate, grid=4)
    assert (error.program, error.byte_range) == ((2, 0, 0), (128, 192))
    assert "loads what program (1, 0, 0) stored" in str(error)


def test_a_program_stores_where_another_loaded():
    x = torch.randn(65)
    error = launch_error(x[:64], x[1:], 64, 64, 0, 1, BLOCK, grid=4)
    assert "loads what program (0, 0, 0) stored" in str(error)
    error = launch_error(x[1:], x[:64], 64, 64, 0, 1, BLOCK, grid=4)
    assert (error.argument, error.program, error.byte_range) == ("p_y", (1, 0, 0), (64, 68))
    assert "stores where program (0, 0, 0) loaded" in str(error)


def test_empty_tensors():
    error = launch_error(torch.randn(0), torch.empty(16), 16, 16, 0, 1, BLOCK, grid=1)
    assert (error.argument, error.byte_range) == ("p_x", (0, 64))


def test_poison_is_taken_back():
    enabled = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    with poisoned_memory():
        assert torch.empty(3, dtype=torch.bfloat16).isnan().all()
        assert torch.empty(3, dtype=torch.int32).eq(2**31 - 1).all()
    assert torch.are_deterministic_algorithms_enabled() == enabled
    assert torch.utils.deterministic.fill_uninitialized_memory == fill
