"""Gated RMSNorm against its float64 formula: values, gradients, layouts, extremes, errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megakda.kernels.gated_norm import gated_rms_norm, gated_rms_norm_reference
from megakda.kernels.launch import force
from megakda.kernels.verify.memory import checked_memory
from tests.kernels.helpers import assert_close, outputs_and_gradients

BACKENDS = ["torch", "triton"]
CASES = [("sigmoid", True), ("swish", True), ("sigmoid", False), (None, False)]
# Three programs for the backward pass, which stride over blocks of four rows of 32.
FEW_PROGRAMS = {"gated_norm_backward": {"BLOCK": 128, "programs": 3, "num_warps": 4}}


@pytest.fixture(autouse=True)
def checked() -> Iterator[None]:
    with checked_memory():
        yield


def make_inputs(gated: bool, *shape: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = shape or (2, 5, 3, 32)
    inputs = {
        "x": torch.randn(shape, generator=generator),
        "weight": torch.randn(shape[-1], generator=generator),
        "gate": 4 * torch.randn(shape, generator=generator),
    }
    return inputs if gated else {name: inputs[name] for name in ("x", "weight")}


def check(
    inputs: dict[str, torch.Tensor], tolerance: float, backend: str, **options: Any
) -> dict[str, torch.Tensor]:
    """Compares outputs and gradients with the reference, and returns them."""
    got = outputs_and_gradients(
        lambda **x: [gated_rms_norm(**x, **options, backend=backend)], inputs
    )
    reference = outputs_and_gradients(
        lambda **x: [gated_rms_norm_reference(**x, **options)], inputs, torch.float64
    )
    assert_close(got, reference, tolerance)
    return got


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize(("activation", "gated"), CASES)
@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_matches_reference(backend: str, activation: str | None, gated: bool, eps: float) -> None:
    check(make_inputs(gated), 1e-6, backend, activation=activation, eps=eps)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("activation", "gated"), CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_computes_in_fp32(
    backend: str, activation: str | None, gated: bool, dtype: torch.dtype
) -> None:
    inputs = {name: x.to(dtype) for name, x in make_inputs(gated).items()}
    # Only the results, and the gradients handed in, are rounded: 2^-8 at the most each.
    got = check(inputs, 4e-3, backend, activation=activation)
    assert {x.dtype for x in got.values()} == {dtype}


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_result_has_its_inputs_dtype(backend: str) -> None:
    inputs = make_inputs(True)
    inputs["x"] = inputs["x"].bfloat16()
    inputs["gate"] = inputs["gate"].half()
    got = check(inputs, 4e-3, backend)
    dtypes = {name: x.dtype for name, x in got.items()}
    assert dtypes == {
        "output 0": torch.bfloat16,
        "dx": torch.bfloat16,
        "dweight": torch.float32,
        "dgate": torch.float16,
    }


@pytest.mark.parametrize(
    "shape", [(16,), (3, 2), (33, 17), (2, 1, 100), (5, 7, 128), (3, 2304), (2, 7168), (1, 16384)]
)
def test_triton_shapes(shape: tuple[int, ...]) -> None:
    check(make_inputs(False, *shape), 1e-6, "triton", activation=None)
    check(make_inputs(True, *shape), 1e-6, "triton", activation="swish")


@pytest.mark.parametrize("rows", [1, 4, 12, 13, 30])
def test_triton_programs_stride_over_rows(rows: int) -> None:
    """Fewer programs than blocks, as many, and more; with a last block that is not full."""
    with force("sm_90", **FEW_PROGRAMS):
        first = check(make_inputs(True, rows, 32), 1e-6, "triton")
        again = check(make_inputs(True, rows, 32), 1e-6, "triton")
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_triton_rows_past_the_end_are_left_out() -> None:
    """With eps = 0 a row of padding would be 0 / 0."""
    check(make_inputs(True, 3, 32), 1e-6, "triton", eps=0.0)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend: str, gated: bool) -> None:
    inputs = {name: x.requires_grad_() for name, x in make_inputs(gated, 4, 0, 32).items()}
    y = gated_rms_norm(**inputs, backend=backend)
    assert y.shape == (4, 0, 32)
    gradients = torch.autograd.grad(y.sum(), list(inputs.values()))
    assert [x.shape for x in gradients] == [x.shape for x in inputs.values()]
    assert not gradients[1].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend: str) -> None:
    """Transposed, columns of something wider, expanded, every second channel."""
    inputs = make_inputs(True, 3, 4, 64)
    inputs["weight"] = inputs["weight"][:32]

    def views(x: torch.Tensor, gate: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        yield x[..., :32], gate[..., 7:39]
        yield x.transpose(0, 1)[..., :32], gate.transpose(0, 1)[..., ::2]
        yield x[:1, :, :32].expand(3, 4, 32), gate[..., 32:]

    def run(function: Any, **options: Any) -> Any:
        def outputs(x: torch.Tensor, weight: torch.Tensor, gate: torch.Tensor) -> Any:
            return [function(a, weight, b, **options) for a, b in views(x, gate)]

        return outputs

    got = outputs_and_gradients(run(gated_rms_norm, backend=backend), inputs)
    reference = outputs_and_gradients(run(gated_rms_norm_reference), inputs, torch.float64)
    assert_close(got, reference, 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "dy",
    [
        torch.ones(()).expand(6, 32),
        torch.linspace(-1, 1, 192).view(32, 6).T,
        torch.linspace(-1, 1, 300).view(6, 50)[:, 9:41],
    ],
    ids=["expanded", "transposed", "columns"],
)
def test_strided_gradient(backend: str, dy: torch.Tensor) -> None:
    inputs = make_inputs(True, 6, 32)

    def gradients(function: Any, dtype: torch.dtype, **options: Any) -> dict[str, torch.Tensor]:
        leaves = {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}
        y = function(**leaves, **options)
        return dict(
            zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy.to(dtype)), strict=True)
        )

    got = gradients(gated_rms_norm, torch.float32, backend=backend)
    assert_close(got, gradients(gated_rms_norm_reference, torch.float64), 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_finite_at_extremes(backend: str) -> None:
    x = torch.tensor([[0.0, 0.0], [1e-30, -1e-30], [1e15, -1e15]], requires_grad=True)
    weight = torch.ones(2, requires_grad=True)
    for activation in ("sigmoid", "swish"):
        for value in (-1e4, 0.0, 1e4):
            gate = torch.full_like(x, value).requires_grad_()
            y = gated_rms_norm(x, weight, gate, activation, backend=backend)
            for result in (y, *torch.autograd.grad(y.sum(), (x, weight, gate))):
                assert result.isfinite().all()


def test_same_bits_with_and_without_autograd() -> None:
    """Activation recomputation repeats the forward pass under the other."""
    inputs = make_inputs(True)
    with torch.no_grad():
        without = gated_rms_norm(**inputs, backend="triton")
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    assert torch.equal(gated_rms_norm(**inputs, backend="triton"), without)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 4, dtype=torch.int32)}, "x: torch.int32"),
        ({"weight": torch.zeros(5)}, "weight: "),
        ({"weight": torch.zeros(3, 4)}, "weight: "),
        ({"activation": "gelu"}, "activation: 'gelu'"),
        ({"gate": torch.zeros(3, 4), "activation": None}, "activation: None"),
        ({"gate": torch.zeros(3, 1)}, "gate: shape"),
        ({"eps": -1e-5}, "eps: -1e-05"),
        ({"eps": float("nan")}, "eps: nan"),
        ({"backend": "cuda"}, "backend: 'cuda'"),
        ({"x": torch.zeros(3, 4).double(), "backend": "triton"}, "x: .*not torch.float64"),
        ({"weight": torch.zeros(4).double(), "backend": "triton"}, "weight: .*not torch.float64"),
        (
            {"x": torch.zeros(1, 16385), "weight": torch.zeros(16385), "backend": "triton"},
            "x: .*1 to 16384, not 16385",
        ),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    good = {"x": torch.zeros(3, 4), "weight": torch.zeros(4)}
    gated_rms_norm(**good)
    with pytest.raises(ValueError, match=message):
        gated_rms_norm(**(good | change))
