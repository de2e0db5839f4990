"""The short convolution's kernels: blocks, strides, packing at random, bytes moved."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from megakda.kernels.launch import force, launch_config
from megakda.kernels.short_conv import short_conv, short_conv_step
from megakda.kernels.verify.traffic import record_traffic
from tests.kernels.helpers import assert_close, outputs_and_gradients

FP32 = 1e-6


def blocks(tokens: int, channels: int, unrolled: int) -> dict[str, dict[str, int]]:
    """Launch configurations; the backward pass walks as far for its shorter strips."""
    config = {"BD": channels, "U": unrolled, "num_warps": 1}
    return {
        "short_conv_forward": {"BT": tokens, **config},
        "short_conv_backward": {"BT": tokens + 3, **config},
    }


def make_inputs(batch: int, tokens: int, channels: int, sequences: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(batch, tokens, channels, generator=generator),
        "weight": torch.randn(channels, 4, generator=generator),
        "initial_state": torch.randn(sequences, channels, 3, generator=generator),
    }


def run(inputs: dict[str, torch.Tensor], backend: str, **options: Any) -> dict[str, torch.Tensor]:
    dtype = torch.float64 if backend == "reference" else None
    return outputs_and_gradients(
        lambda **x: short_conv(**x, output_final_state=True, backend=backend, **options),
        inputs,
        dtype,
    )


def test_results_do_not_depend_on_blocks() -> None:
    """All but dweight, which is added up strip by strip, to the bit."""
    inputs = make_inputs(batch=2, tokens=10, channels=9, sequences=2)
    results = []
    for size in (blocks(16, 16, 8), blocks(5, 4, 2), blocks(3, 8, 1)):
        with force("sm_90", **size):
            results.append(run(inputs, "triton"))
    for other in results[1:]:
        assert_close({"dweight": other.pop("dweight")}, {"dweight": results[0]["dweight"]}, FP32)
        for name, value in other.items():
            assert torch.equal(value, results[0][name]), name


@pytest.mark.parametrize("seed", range(6))
def test_packed_at_random(seed: int) -> None:
    """Sequences of 0 to 9 tokens on strips of 4: empty, shorter than the halo, several strips."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 10, (5,), generator=generator)
    lengths[seed % 5] = max(1, int(lengths[seed % 5]))
    bounds = torch.cat((torch.zeros(1, dtype=torch.long), lengths.cumsum(0)))
    inputs = make_inputs(batch=1, tokens=int(bounds[-1]), channels=5, sequences=5)
    with force("sm_90", **blocks(4, 8, 3)):
        got = run(inputs, "triton", cu_seqlens=bounds)
    assert_close(got, run(inputs, "reference", cu_seqlens=bounds), FP32)


def test_packed_equals_each_sequence_alone() -> None:
    bounds = [0, 2, 2, 9, 10]
    inputs = make_inputs(batch=1, tokens=10, channels=5, sequences=4)
    x, weight, state = inputs.values()
    with force("sm_90", **blocks(4, 8, 4)):
        y, final = short_conv(x, weight, state, True, torch.tensor(bounds), backend="triton")
        for n, (start, end) in enumerate(pairwise(bounds)):
            if start == end:
                assert torch.equal(final[n], state[n])
                continue
            alone = short_conv(x[:, start:end], weight, state[n : n + 1], True, backend="triton")
            assert torch.equal(y[:, start:end], alone[0])
            assert torch.equal(final[n : n + 1], alone[1])


@pytest.mark.parametrize("layout", ["[T, B, D]", "part of wider rows", "[B, D, T]"])
def test_strides(layout: str) -> None:
    """The same bits from inputs, and gradients handed in, that are views."""
    inputs = make_inputs(batch=2, tokens=6, channels=5, sequences=2)
    x, dy = inputs["x"], torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(1))

    def view(values: torch.Tensor) -> torch.Tensor:
        if layout == "[T, B, D]":
            return values.transpose(0, 1).contiguous().transpose(0, 1)
        if layout == "[B, D, T]":
            return values.transpose(1, 2).contiguous().transpose(1, 2)
        return torch.stack((values, values + 1), 2).flatten(2)[:, :, :5]

    def gradients(x: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves = [x.requires_grad_(), inputs["weight"].clone().requires_grad_()]
        y, _ = short_conv(*leaves, backend="triton")
        return (y.detach(), *torch.autograd.grad(y, leaves, dy))

    with force("sm_90", **blocks(4, 8, 4)):
        expected = gradients(x.clone(), dy)
        assert not view(x).is_contiguous()
        for got, value in zip(gradients(view(x), view(dy)), expected, strict=True):
            assert torch.equal(got, value)


def test_gradient_of_the_final_state_alone() -> None:
    inputs = make_inputs(batch=2, tokens=5, channels=5, sequences=2)

    def final(backend: str, **x: torch.Tensor) -> list[torch.Tensor]:
        return [short_conv(**x, output_final_state=True, backend=backend)[1]]

    with force("sm_90", **blocks(4, 8, 4)):
        got = outputs_and_gradients(lambda **x: final("triton", **x), inputs)
    assert_close(
        got,
        outputs_and_gradients(lambda **x: final("reference", **x), inputs, torch.float64),
        FP32,
    )
    # The last three inputs are handed through.
    assert not got["dx"][:, :2].any() and got["dx"][:, 2:].all()


def test_only_some_gradients_are_wanted() -> None:
    x, weight, state = make_inputs(batch=1, tokens=5, channels=5, sequences=1).values()
    state.requires_grad_()
    with force("sm_90", **blocks(4, 8, 4)):
        short_conv(x, weight, state, backend="triton")[0].sum().backward()
    assert state.grad is not None and state.grad.isfinite().all() and state.grad.any()
    assert x.grad is None and weight.grad is None


def test_extreme_inputs_stay_finite() -> None:
    """SiLU and its slope far out, where the exponential overflows: y = x or 0, slope 1 or 0."""
    x = torch.tensor([1e4, -1e4, 1e30, -1e30]).view(1, 4, 1).requires_grad_()
    weight = torch.tensor([[0.0, 1.0]])
    with force("sm_90", **blocks(4, 8, 4)):
        y, _ = short_conv(x, weight, backend="triton")
        y.sum().backward()
    assert y.flatten().tolist() == pytest.approx([1e4, 0, 1e30, 0])
    assert x.grad is not None and x.grad.flatten().tolist() == [1, 0, 1, 0]


def test_each_input_is_read_once() -> None:
    """Beyond the inputs and outputs: W-1 tokens before (and behind) each strip, and dweight."""
    batch, tokens, channels, taps = 1, 15, 8, 4
    x = torch.randn(batch, tokens, channels, requires_grad=True)
    weight = torch.randn(channels, taps, requires_grad=True)
    with force("sm_90", **blocks(5, 8, 4)), record_traffic() as launches:
        y, _ = short_conv(x, weight, backend="triton")
        y.sum().backward()
    forward, backward = launches
    row, strips = 4 * channels, tokens // 5
    everything = tokens * row
    assert forward.unique_loaded == everything + taps * row
    assert forward.stored == everything
    halo = (strips - 1) * (taps - 1) * row
    assert forward.loaded == everything + halo + strips * taps * row
    assert backward.unique_loaded == 2 * everything + taps * row
    assert backward.stored == everything + strips * taps * row
    # x before and behind, dy behind.
    assert backward.loaded == 2 * everything + 3 * halo + strips * taps * row


def test_a_step_moves_the_state_once() -> None:
    rows, channels = 2, 8
    x, state = torch.randn(rows, channels), torch.randn(rows, channels, 3)
    with record_traffic() as launches:
        short_conv_step(x, state, torch.randn(channels, 4), backend="triton")
    (step,) = launches
    assert step.unique_stored == step.stored == 4 * rows * channels * (3 + 1)
    assert step.unique_loaded == 4 * channels * (rows * (3 + 1) + 4)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("taps", [2, 4, 5, 8])
def test_table_has_strips_longer_than_the_halo(architecture: str, taps: int) -> None:
    with force(architecture):
        config = launch_config("short_conv_backward", torch.device("cpu"), W=taps)
    assert config["BT"] - (taps - 1) >= taps - 1
