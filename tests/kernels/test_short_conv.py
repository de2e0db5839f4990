"""Short convolution against the float64 loop: values, gradients, states, decoding, errors."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch

from megakda.kernels.launch import force
from megakda.kernels.short_conv import short_conv, short_conv_reference, short_conv_step
from tests.kernels.helpers import assert_close, outputs_and_gradients, rms_error

BACKENDS = ["torch", "triton"]
FP32 = 1e-6
CHANNELS = 12
# Strips of a few tokens, so that short sequences have several; 12 channels do not fill a block.
BLOCKS = {
    "short_conv_forward": {"BT": 8, "BD": 16, "U": 4, "num_warps": 1},
    "short_conv_backward": {"BT": 16, "BD": 16, "U": 4, "num_warps": 1},
    "short_conv_step": {"BD": 16, "num_warps": 1},
}


@pytest.fixture(autouse=True)
def small_blocks() -> Iterator[None]:
    with force("sm_90", **BLOCKS):
        yield


def make_inputs(
    tokens: int, taps: int, batch: int = 2, sequences: int | None = None
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = {
        "x": (batch, tokens, CHANNELS),
        "weight": (CHANNELS, taps),
        "initial_state": (sequences or batch, CHANNELS, taps - 1),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def packed_reference(
    bounds: list[int], x: torch.Tensor, weight: torch.Tensor, initial_state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    outputs, states = [], []
    for n, (start, end) in enumerate(pairwise(bounds)):
        state = initial_state[n : n + 1]
        if start < end:
            y, state = short_conv_reference(x[:, start:end], weight, state)
            outputs.append(y)
        states.append(state)
    return torch.cat(outputs, 1), torch.cat(states)


def check_against_reference(
    inputs: dict[str, torch.Tensor], activation: str | None, backend: str
) -> None:
    got = outputs_and_gradients(
        lambda **x: short_conv(
            **x, output_final_state=True, activation=activation, backend=backend
        ),
        inputs,
    )
    reference = outputs_and_gradients(
        lambda **x: short_conv_reference(**x, activation=activation), inputs, torch.float64
    )
    assert_close(got, reference, FP32)


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("taps", [2, 3, 4, 8])
@pytest.mark.parametrize("tokens", [1, 2, 5, 40])
def test_matches_reference(tokens: int, taps: int, activation: str | None) -> None:
    inputs = make_inputs(tokens, taps)
    for names in (("x", "weight"), ("x", "weight", "initial_state")):
        check_against_reference({name: inputs[name] for name in names}, activation, "torch")


@pytest.mark.parametrize(
    ("tokens", "taps", "activation", "with_state"),
    [
        (1, 2, "silu", False),
        (1, 4, "silu", True),
        (2, 8, None, True),
        (5, 3, None, False),
        (8, 4, "silu", False),  # strips are full
        (17, 4, "silu", True),
        (17, 4, None, False),
        (21, 5, "silu", True),
        (21, 7, None, True),
        (20, 8, "silu", True),
    ],
)
def test_triton_matches_reference(
    tokens: int, taps: int, activation: str | None, with_state: bool
) -> None:
    inputs = make_inputs(tokens, taps)
    if not with_state:
        del inputs["initial_state"]
    check_against_reference(inputs, activation, "triton")


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("bounds", [[0, 0, 1, 1, 3, 17, 22, 22], [0, 22]])
def test_packed_sequences(bounds: list[int], backend: str) -> None:
    inputs = make_inputs(22, taps=4, batch=1, sequences=len(bounds) - 1)
    got = outputs_and_gradients(
        lambda **x: short_conv(
            **x, output_final_state=True, cu_seqlens=torch.tensor(bounds), backend=backend
        ),
        inputs,
    )
    reference = outputs_and_gradients(
        lambda **x: packed_reference(bounds, **x), inputs, torch.float64
    )
    assert_close(got, reference, FP32)
    assert got["output 1"].shape == inputs["initial_state"].shape
    # States are copies of inputs.
    assert torch.equal(got["output 1"], reference["output 1"].float())


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences_do_not_see_each_other(backend: str) -> None:
    """One sequence full of NaN leaves the bits of its neighbours, and of their gradients, alone."""
    bounds = torch.tensor([0, 3, 5, 12], dtype=torch.int32)
    inputs = make_inputs(12, taps=4, batch=1, sequences=3)

    def run() -> list[torch.Tensor]:
        leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
        y, state = short_conv(**leaves, output_final_state=True, cu_seqlens=bounds, backend=backend)
        dx, dinitial = torch.autograd.grad(
            y.sum() + state.sum(), (leaves["x"], leaves["initial_state"])
        )
        others = [torch.cat((tokens[:, :3], tokens[:, 5:]), 1) for tokens in (y, dx)]
        return others + [states[[0, 2]] for states in (state, dinitial)]

    expected = run()
    inputs["x"][:, 3:5] = torch.nan
    inputs["initial_state"][1] = torch.nan
    for got, value in zip(run(), expected, strict=True):
        assert torch.equal(got, value)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cut", [1, 2, 17])
def test_chaining_states_equals_one_pass(cut: int, backend: str) -> None:
    inputs = make_inputs(24, taps=4)
    y, state = short_conv(**inputs, output_final_state=True, backend=backend)
    x, weight = inputs["x"], inputs["weight"]
    first, middle = short_conv(x[:, :cut], weight, inputs["initial_state"], True, backend=backend)
    second, last = short_conv(x[:, cut:], weight, middle, True, backend=backend)
    joined = torch.cat((first, second), 1)
    if backend == "triton":  # PyTorch rounds vectorised and leftover elements of SiLU differently
        assert torch.equal(joined, y)
    assert rms_error(joined, y) < FP32
    assert torch.equal(last, state)


@pytest.mark.parametrize("backend", BACKENDS)
def test_causal_to_the_bit(backend: str) -> None:
    inputs = make_inputs(20, taps=4)
    y, _ = short_conv(**inputs, backend=backend)
    inputs["x"][:, 11:] = 1e6
    assert torch.equal(short_conv(**inputs, backend=backend)[0][:, :11], y[:, :11])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_accumulates_in_fp32(dtype: torch.dtype, backend: str) -> None:
    inputs = {name: x.to(dtype) for name, x in make_inputs(20, taps=8).items()}
    got = outputs_and_gradients(
        lambda **x: short_conv(**x, output_final_state=True, backend=backend), inputs
    )
    assert {x.dtype for x in got.values()} == {dtype}
    # Only the results, and the gradients handed in, are rounded: 2^-8 at the most each.
    assert_close(got, outputs_and_gradients(short_conv_reference, inputs, torch.float64), 4e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_result_has_its_inputs_dtype(backend: str) -> None:
    inputs = make_inputs(9, taps=4)
    inputs["x"] = inputs["x"].bfloat16()
    got = outputs_and_gradients(
        lambda **x: short_conv(**x, output_final_state=True, backend=backend), inputs
    )
    half = {"output 0", "output 1", "dx"}
    assert {name for name, x in got.items() if x.dtype == torch.bfloat16} == half
    assert_close(got, outputs_and_gradients(short_conv_reference, inputs, torch.float64), 4e-3)


def test_final_state_is_optional() -> None:
    assert short_conv(**make_inputs(5, taps=4))[1] is None


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("taps", [2, 4])
@pytest.mark.parametrize("activation", ["silu", None])
def test_steps_continue_a_sequence(
    activation: str | None, taps: int, tokens: int, backend: str
) -> None:
    inputs = make_inputs(11, taps)
    x, weight = inputs["x"], inputs["weight"]
    y, last = short_conv(**inputs, output_final_state=True, activation=activation, backend=backend)
    _, state = short_conv(
        x[:, :5], weight, inputs["initial_state"], True, activation=activation, backend=backend
    )
    assert state is not None
    for t in range(5, 11, tokens):
        new = x[:, t] if tokens == 1 else x[:, t : t + tokens]
        got = short_conv_step(new, state, weight, activation, backend=backend)
        assert got.shape == new.shape
        expected = y[:, t : t + tokens].reshape(got.shape)
        # Triton's two kernels add in the same order.
        assert (
            torch.equal(got, expected) if backend == "triton" else rms_error(got, expected) < FP32
        )
    assert torch.equal(state, last)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("layout", ["[P, D, L]", "[P, L, D]"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_on_a_pool_of_states(dtype: torch.dtype, layout: str, backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, CHANNELS, generator=generator).to(dtype)
    weight = torch.randn(CHANNELS, 4, generator=generator)
    before = torch.randn(6, CHANNELS, 3, generator=generator).to(dtype)
    pool = before.clone()
    if layout == "[P, L, D]":  # with room between states, as in a shared buffer
        pool = torch.empty(6, 5, CHANNELS, dtype=dtype)[:, 1:4].transpose(1, 2).copy_(before)
    slots = torch.tensor([4, -1, 0, 5], dtype=torch.int32)
    y = short_conv_step(x, pool, weight, state_indices=slots, backend=backend)
    assert y.dtype == dtype
    for n, slot in enumerate(slots.tolist()):
        if slot < 0:
            assert torch.equal(y[n], torch.zeros(CHANNELS, dtype=dtype))
            continue
        expected, state = short_conv_reference(x[n][None, None], weight, before[slot][None])
        assert rms_error(y[n], expected[0, 0]) < (FP32 if dtype == torch.float32 else 4e-3)
        assert torch.equal(pool[slot], state[0].to(dtype))
    assert torch.equal(pool[1:4], before[1:4])  # nobody's


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("drafts", [1, 3])
def test_rejected_drafts_are_rolled_back(drafts: int, backend: str) -> None:
    """Speculative decoding of two sequences, of which each call accepts a different number."""
    taps, tokens = 4, drafts + 1
    inputs = make_inputs(20, taps)
    x, weight = inputs["x"], inputs["weight"]
    y, _ = short_conv(**inputs, backend=backend)
    state = torch.cat((torch.full((2, CHANNELS, tokens), 1e6), inputs["initial_state"]), 2)
    done, rollback = [0, 0], torch.zeros(2, dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        accepted = torch.randint(1, tokens + 1, (2,), generator=generator)
        new = torch.full((2, tokens, CHANNELS), 1e6)  # what a wrong draft puts in
        for n in range(2):
            new[n, : accepted[n]] = x[n, done[n] : done[n] + accepted[n]]
        got = short_conv_step(new, state, weight, rollback=rollback, backend=backend)
        for n in range(2):
            expected = y[n, done[n] : done[n] + accepted[n]]
            assert rms_error(got[n, : accepted[n]], expected) < FP32
            done[n] += int(accepted[n])
        rollback = tokens - accepted


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("dropped", [0, 1, 2, 5])
def test_rollback_by_more_than_a_step(dropped: int, backend: str) -> None:
    """What is left of the old inputs moves to its place behind zeros."""
    old = torch.arange(1.0, 9).expand(1, CHANNELS, 8)
    state = old.clone()
    x = torch.full((1, 2, CHANNELS), 9.0)
    weight = torch.randn(CHANNELS, 4, generator=torch.Generator().manual_seed(0))
    y = short_conv_step(x, state, weight, None, None, torch.tensor([dropped]), backend)
    known = [0.0] * dropped + old[0, 0, : 8 - dropped].tolist() + [9.0, 9.0]
    assert state[0, 3].tolist() == known[2:]
    window = torch.tensor(known[-5:]).unfold(0, 4, 1)
    assert rms_error(y[0], window @ weight.t()) < FP32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 0, CHANNELS)}, "x: .* S >= 1"),
        ({"x": torch.zeros(CHANNELS)}, "x: "),
        ({"weight": torch.zeros(CHANNELS, 9)}, "weight: .* W in 2..8"),
        ({"activation": "relu"}, "activation: 'relu'"),
        ({"state": torch.zeros(3, CHANNELS, 2)}, "state: .* L >= W-1 = 3"),
        ({"state": torch.zeros(3, CHANNELS + 1, 3)}, "state: "),
        ({"state": torch.zeros(3, CHANNELS, 3).double()}, "state: torch.float64"),
        ({"state": torch.zeros(1, CHANNELS, 3)}, "state: 1 states for 2"),
        ({"state": torch.zeros(3, CHANNELS, 3, device="meta")}, "state: on meta"),
        ({"state_indices": torch.tensor([0, 3])}, "state_indices: .* below P = 3"),
        ({"state_indices": torch.tensor([1, 1])}, "state_indices: .* distinct"),
        ({"state_indices": torch.tensor([0.0, 1.0])}, "state_indices: torch.float32"),
        ({"state_indices": torch.tensor([0])}, "state_indices: "),
        ({"rollback": torch.tensor([0, 1])}, r"rollback: \[0, 1\] must lie in"),
        ({"rollback": torch.tensor([0])}, "rollback: "),
        ({"weight": torch.zeros(CHANNELS, 4, requires_grad=True)}, "no gradients"),
    ],
)
def test_bad_arguments_of_a_step(change: dict[str, Any], message: str) -> None:
    good = {
        "x": torch.zeros(2, CHANNELS),
        "state": torch.zeros(3, CHANNELS, 3),
        "weight": torch.zeros(CHANNELS, 4),
    }
    short_conv_step(**good)
    with pytest.raises(ValueError, match=message):
        short_conv_step(**(good | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(5, CHANNELS)}, "x: "),
        ({"x": torch.zeros(1, 0, CHANNELS)}, "x: .* T >= 1"),
        ({"x": torch.zeros(1, 5, CHANNELS, dtype=torch.int32)}, "x: torch.int32"),
        ({"weight": torch.zeros(CHANNELS, 1)}, "weight: .* W in 2..8"),
        ({"weight": torch.zeros(CHANNELS + 1, 4)}, "weight: "),
        ({"activation": "gelu"}, "activation: 'gelu'"),
        ({"initial_state": torch.zeros(1, CHANNELS, 4)}, "initial_state: "),
        ({"initial_state": torch.zeros(2, CHANNELS, 3)}, "initial_state: "),
        ({"cu_seqlens": torch.tensor([0, 4, 3, 5])}, "cu_seqlens: "),
        ({"cu_seqlens": torch.tensor([0, 4])}, "cu_seqlens: "),
        ({"cu_seqlens": torch.tensor([0])}, "cu_seqlens: "),
        ({"cu_seqlens": torch.tensor([1, 5])}, "cu_seqlens: "),
        ({"cu_seqlens": torch.tensor([0.0, 5.0])}, "cu_seqlens: torch.float32"),
        ({"cu_seqlens": torch.tensor([0, 5], device="meta")}, "cu_seqlens: .* with values"),
        ({"weight": torch.zeros(CHANNELS, 4, device="meta")}, "weight: on meta"),
        ({"backend": "cuda"}, "backend: 'cuda'"),
        ({"backend": "triton", "x": torch.zeros(1, 5, CHANNELS).double()}, "x: torch.float64"),
        ({"x": torch.zeros(2, 5, CHANNELS), "cu_seqlens": torch.tensor([0, 5])}, "batch size 1"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    good = {"x": torch.zeros(1, 5, CHANNELS), "weight": torch.zeros(CHANNELS, 4)}
    short_conv(**good)
    with pytest.raises(ValueError, match=message):
        short_conv(**(good | change))
