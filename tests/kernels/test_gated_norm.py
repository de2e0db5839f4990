"""Gated RMSNorm against its float64 formula: values, gradients, extremes, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megakda.kernels.gated_norm import gated_rms_norm, gated_rms_norm_reference
from tests.kernels.helpers import assert_close, outputs_and_gradients

CASES = [("sigmoid", True), ("swish", True), ("sigmoid", False), (None, False)]


def make_inputs(gated: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "x": torch.randn(2, 5, 3, 32, generator=generator),
        "weight": torch.randn(32, generator=generator),
        "gate": 4 * torch.randn(2, 5, 3, 32, generator=generator),
    }
    return inputs if gated else {name: inputs[name] for name in ("x", "weight")}


@pytest.mark.parametrize(("activation", "gated"), CASES)
@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_matches_reference(activation: str | None, gated: bool, eps: float) -> None:
    options: dict[str, Any] = {"activation": activation, "eps": eps}
    inputs = make_inputs(gated)
    got = outputs_and_gradients(lambda **x: [gated_rms_norm(**x, **options)], inputs)
    reference = outputs_and_gradients(
        lambda **x: [gated_rms_norm_reference(**x, **options)], inputs, torch.float64
    )
    assert_close(got, reference, 1e-6)


@pytest.mark.parametrize(("activation", "gated"), CASES)
def test_bfloat16_computes_in_fp32(activation: str | None, gated: bool) -> None:
    inputs = {name: x.bfloat16() for name, x in make_inputs(gated).items()}
    got = outputs_and_gradients(lambda **x: [gated_rms_norm(**x, activation=activation)], inputs)
    assert {x.dtype for x in got.values()} == {torch.bfloat16}
    reference = outputs_and_gradients(
        lambda **x: [gated_rms_norm_reference(**x, activation=activation)], inputs, torch.float64
    )
    # Only the results, and the gradients handed in, are rounded: 2^-8 at the most each.
    assert_close(got, reference, 4e-3)


def test_finite_at_extremes() -> None:
    x = torch.tensor([[0.0, 0.0], [1e-30, -1e-30], [1e15, -1e15]], requires_grad=True)
    weight = torch.ones(2, requires_grad=True)
    for activation in ("sigmoid", "swish"):
        for value in (-1e4, 0.0, 1e4):
            gate = torch.full_like(x, value).requires_grad_()
            y = gated_rms_norm(x, weight, gate, activation)
            for result in (y, *torch.autograd.grad(y.sum(), (x, weight, gate))):
                assert result.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 4, dtype=torch.int32)}, "x: torch.int32"),
        ({"weight": torch.zeros(5)}, "weight: "),
        ({"weight": torch.zeros(3, 4)}, "weight: "),
        ({"activation": "gelu"}, "activation: 'gelu'"),
        ({"gate": torch.zeros(3, 4), "activation": None}, "activation: None"),
        ({"gate": torch.zeros(3, 1)}, "gate: shape"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    good = {"x": torch.zeros(3, 4), "weight": torch.zeros(4)}
    gated_rms_norm(**good)
    with pytest.raises(ValueError, match=message):
        gated_rms_norm(**(good | change))
