"""Short convolution against the float64 loop: values, gradients, states, packing, errors."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from megakda.kernels.short_conv import short_conv, short_conv_reference
from tests.kernels.helpers import assert_close, outputs_and_gradients, rms_error

FP32 = 1e-6
CHANNELS = 12


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


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("taps", [2, 3, 4, 8])
@pytest.mark.parametrize("tokens", [1, 2, 5, 40])
def test_matches_reference(tokens: int, taps: int, activation: str | None) -> None:
    inputs = make_inputs(tokens, taps)
    for names in (("x", "weight"), ("x", "weight", "initial_state")):
        some = {name: inputs[name] for name in names}
        got = outputs_and_gradients(
            lambda **x: short_conv(**x, output_final_state=True, activation=activation), some
        )
        reference = outputs_and_gradients(
            lambda **x: short_conv_reference(**x, activation=activation), some, torch.float64
        )
        assert_close(got, reference, FP32)


@pytest.mark.parametrize("bounds", [[0, 0, 1, 1, 3, 30, 40, 40], [0, 40]])
def test_packed_sequences(bounds: list[int]) -> None:
    inputs = make_inputs(40, taps=4, batch=1, sequences=len(bounds) - 1)

    def reference(x: torch.Tensor, weight: torch.Tensor, initial_state: torch.Tensor) -> Any:
        outputs, states = [], []
        for n, (start, end) in enumerate(pairwise(bounds)):
            state = initial_state[n : n + 1]
            if start < end:
                y, state = short_conv_reference(x[:, start:end], weight, state)
                outputs.append(y)
            states.append(state)
        return torch.cat(outputs, 1), torch.cat(states)

    got = outputs_and_gradients(
        lambda **x: short_conv(**x, output_final_state=True, cu_seqlens=torch.tensor(bounds)),
        inputs,
    )
    assert_close(got, outputs_and_gradients(reference, inputs, torch.float64), FP32)
    assert got["output 1"].shape == inputs["initial_state"].shape


@pytest.mark.parametrize("cut", [1, 2, 17])
def test_chaining_states_equals_one_pass(cut: int) -> None:
    inputs = make_inputs(40, taps=4)
    y, state = short_conv(**inputs, output_final_state=True)
    x, weight = inputs["x"], inputs["weight"]
    first, middle = short_conv(x[:, :cut], weight, inputs["initial_state"], True)
    second, last = short_conv(x[:, cut:], weight, middle, True)
    # Not to the bit: vectorised and leftover elements of SiLU round differently.
    assert rms_error(torch.cat((first, second), 1), y) < FP32
    assert torch.equal(last, state)


def test_causal_to_the_bit() -> None:
    inputs = make_inputs(20, taps=4)
    y, _ = short_conv(**inputs)
    inputs["x"][:, 11:] = 1e6
    assert torch.equal(short_conv(**inputs)[0][:, :11], y[:, :11])


def test_bfloat16_accumulates_in_fp32() -> None:
    inputs = {name: x.bfloat16() for name, x in make_inputs(40, taps=8).items()}
    got = outputs_and_gradients(lambda **x: short_conv(**x, output_final_state=True), inputs)
    assert {x.dtype for x in got.values()} == {torch.bfloat16}
    # Only the results, and the gradients handed in, are rounded: 2^-8 at the most each.
    assert_close(got, outputs_and_gradients(short_conv_reference, inputs, torch.float64), 4e-3)


def test_final_state_is_optional() -> None:
    assert short_conv(**make_inputs(5, taps=4))[1] is None


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
        ({"x": torch.zeros(2, 5, CHANNELS), "cu_seqlens": torch.tensor([0, 5])}, "batch size 1"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    good = {"x": torch.zeros(1, 5, CHANNELS), "weight": torch.zeros(CHANNELS, 4)}
    short_conv(**good)
    with pytest.raises(ValueError, match=message):
        short_conv(**(good | change))
