"""The decay gate against its float64 formulas: values, gradients, layouts, tails, errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megakda.kernels.kda import kda_gate
from megakda.kernels.kda.gate import kda_gate_reference
from megakda.kernels.launch import force
from megakda.kernels.verify.memory import checked_memory
from tests.kernels.helpers import assert_close, outputs_and_gradients

BACKENDS = ["torch", "triton", "reference"]
# torch's sigmoid takes its slope from 1 - sigmoid(x), which has few digits where x is large.
FP32 = {"torch": 1e-5, "triton": 1e-6, "reference": 1e-6}
BOUNDS = [None, -5.0, -0.5]
# Three ranges of tokens for the backward pass, in blocks of four tokens and 16 columns.
FEW_PROGRAMS = {"kda_gate_backward": {"BLOCK": 64, "programs": 3, "num_warps": 4}}


@pytest.fixture(autouse=True)
def checked() -> Iterator[None]:
    with checked_memory():
        yield


def make_inputs(
    *shape: int, rate: bool = True, bias: bool = True, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    heads, key_dim = shape[-2:]
    inputs = {"raw": (4 * torch.randn(shape, generator=generator)).to(dtype)}
    if rate:
        inputs["A_log"] = torch.rand(heads, generator=generator)
    if bias:
        inputs["dt_bias"] = torch.randn(heads * key_dim, generator=generator)
    return inputs


def check(
    inputs: dict[str, torch.Tensor], tolerance: float, backend: str, lower_bound: float | None
) -> dict[str, torch.Tensor]:
    """Compares outputs and gradients with the reference, and returns them."""

    def run(function: Any, dtype: torch.dtype | None = None, **options: Any) -> Any:
        def outputs(
            raw: torch.Tensor,
            A_log: torch.Tensor | None = None,
            dt_bias: torch.Tensor | None = None,
        ) -> Any:
            return [function(raw, A_log, dt_bias, lower_bound, **options)]

        return outputs_and_gradients(outputs, inputs, dtype)

    got = run(kda_gate, backend=backend)
    assert got["output 0"].dtype == torch.float32
    assert_close(got, run(kda_gate_reference, torch.float64), tolerance)
    return got


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lower_bound", BOUNDS)
@pytest.mark.parametrize("rate", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_matches_reference(backend: str, lower_bound: float | None, rate: bool, bias: bool) -> None:
    check(make_inputs(3, 5, 2, 8, rate=rate, bias=bias), FP32[backend], backend, lower_bound)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lower_bound", BOUNDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_computes_in_fp32(
    backend: str, lower_bound: float | None, dtype: torch.dtype
) -> None:
    got = check(make_inputs(2, 9, 3, 16, dtype=dtype), 4e-3, backend, lower_bound)
    # raw's gradient alone is rounded.
    assert {name for name, x in got.items() if x.dtype == dtype} == {"draw"}


@pytest.mark.parametrize("lower_bound", [None, -5.0])
@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 1), (7, 2, 1), (300, 5, 1), (3, 11, 3, 50), (2, 4, 128), (9, 1, 256)]
)
def test_triton_shapes(shape: tuple[int, ...], lower_bound: float | None) -> None:
    # dA_log of a single head is one sum of both signs, which may come out small.
    check(make_inputs(*shape), 1e-5, "triton", lower_bound)


@pytest.mark.parametrize("tokens", [1, 4, 12, 13, 30])
@pytest.mark.parametrize("heads", [1, 2, 9])
def test_triton_programs_stride_over_tokens(tokens: int, heads: int) -> None:
    """Fewer programs than blocks, as many, and more; with last blocks that are not full."""
    inputs = make_inputs(tokens, heads, 16)
    with force("sm_90", **FEW_PROGRAMS):
        first = check(inputs, 1e-6, "triton", None)
        again = check(inputs, 1e-6, "triton", None)
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lower_bound", [None, -5.0])
def test_relative_accuracy(backend: str, lower_bound: float | None) -> None:
    """Of every single value and slope, in the tails too, where a sum over many would hide it."""
    values = [-80.0, -30.0, -20.0, -15.0, -10.0, -3.0, -1e-3, 0.0, 1e-3, 3.0, 20.0, 80.0, 100.0]
    raw = torch.tensor(values).view(-1, 1, 1).requires_grad_()
    g = kda_gate(raw, torch.zeros(1), lower_bound=lower_bound, backend=backend)
    (slope,) = torch.autograd.grad(g.sum(), raw)
    exact = raw.detach().double().requires_grad_()
    exact_g = kda_gate_reference(exact, torch.zeros(1), lower_bound=lower_bound)
    (exact_slope,) = torch.autograd.grad(exact_g.sum(), exact)
    assert ((g.double() - exact_g) / exact_g).abs().max() < 1e-6
    error = ((slope.double() - exact_slope) / exact_slope).abs().flatten()
    if lower_bound is not None:
        # torch: see FP32. The others: the slope at 100 is 1e-43, where fp32 has few digits.
        error = error[raw.flatten() < (3 if backend == "torch" else 100)]
    assert error.max() < 1e-6


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("lower_bound", [None, -5.0])
def test_finite_where_it_saturates(backend: str, lower_bound: float | None) -> None:
    raw = torch.tensor([-1e30, -1e4, -200.0, 0.0, 200.0, 1e4, 1e30]).view(-1, 1, 1)
    raw.requires_grad_()
    A_log = torch.tensor([2.7], requires_grad=True)
    g = kda_gate(raw, A_log, lower_bound=lower_bound, backend=backend)
    assert g.isfinite().all() and (g <= 0).all()
    for gradient in torch.autograd.grad(g.exp().sum(), (raw, A_log)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lower_bound", [None, -5.0])
def test_nan_stays_nan(backend: str, lower_bound: float | None) -> None:
    raw = torch.tensor([float("nan"), 1.0]).view(2, 1, 1)
    g = kda_gate(raw, None, lower_bound=lower_bound, backend=backend)
    assert g.isnan().flatten().tolist() == [True, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend: str) -> None:
    """Columns of something wider, transposed, every second channel, expanded."""
    inputs = make_inputs(3, 4, 4, 32)
    inputs["raw"] = inputs["raw"][:, :, :2]

    def run(function: Any, **options: Any) -> Any:
        def outputs(raw: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor) -> Any:
            flat = raw.flatten(2)
            views = [
                flat[..., 8:40].unflatten(-1, (2, 16)),
                raw.transpose(0, 1)[..., :16],
                raw[..., ::2],
                raw[:1, ..., :16].expand(3, 4, 2, 16),
            ]
            return [function(v, A_log[::2], dt_bias[::4], -5.0, **options) for v in views]

        return outputs

    got = outputs_and_gradients(run(kda_gate, backend=backend), inputs)
    reference = outputs_and_gradients(run(kda_gate_reference), inputs, torch.float64)
    assert_close(got, reference, FP32[backend])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "dg",
    [
        torch.ones(()).expand(6, 2, 16),
        torch.linspace(-1, 1, 192).view(2, 6, 16).transpose(0, 1),
        torch.linspace(-1, 1, 300).view(6, 50)[:, 9:41].unflatten(-1, (2, 16)),
    ],
    ids=["expanded", "transposed", "columns"],
)
def test_strided_gradient(backend: str, dg: torch.Tensor) -> None:
    inputs = make_inputs(6, 2, 16)

    def gradients(function: Any, dtype: torch.dtype, **options: Any) -> dict[str, torch.Tensor]:
        leaves = {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}
        g = function(**leaves, **options)
        grads = torch.autograd.grad(g, list(leaves.values()), dg.to(g.dtype))
        return dict(zip(leaves, grads, strict=True))

    got = gradients(kda_gate, torch.float32, backend=backend)
    assert_close(got, gradients(kda_gate_reference, torch.float64), FP32[backend])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shaped", [(1, 1, 2, 1), (2,)])
def test_parameters_keep_their_shape_and_dtype(backend: str, shaped: tuple[int, ...]) -> None:
    inputs = make_inputs(3, 2, 8)
    inputs["A_log"] = inputs["A_log"].view(shaped).bfloat16()
    inputs["dt_bias"] = inputs["dt_bias"].view(2, 8)
    got = check(inputs, 4e-3, backend, None)
    assert got["dA_log"].shape == shaped and got["dA_log"].dtype == torch.bfloat16
    assert got["ddt_bias"].shape == (2, 8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("parameters", [True, False])
def test_no_tokens(backend: str, parameters: bool) -> None:
    inputs = make_inputs(4, 0, 2, 8, rate=parameters, bias=parameters)
    inputs = {"A_log": None} | {name: x.requires_grad_() for name, x in inputs.items()}
    g = kda_gate(**inputs, backend=backend)
    assert g.shape == (4, 0, 2, 8) and g.dtype == torch.float32
    leaves = [x for x in inputs.values() if x is not None]
    for gradient, x in zip(torch.autograd.grad(g.sum(), leaves), leaves, strict=True):
        assert gradient.shape == x.shape and not gradient.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"raw": torch.zeros(8)}, "raw: torch.float32"),
        ({"raw": torch.zeros(3, 2, 4, dtype=torch.int32)}, "raw: torch.int32"),
        ({"A_log": torch.zeros(3)}, "A_log: .* must have 2"),
        ({"dt_bias": torch.zeros(2)}, "dt_bias: .* must have 8"),
        ({"lower_bound": -5.5}, "lower_bound: -5.5"),
        ({"backend": "cuda"}, "backend: 'cuda'"),
        ({"raw": torch.zeros(3, 2, 4).double(), "backend": "triton"}, "raw: .*not torch.float64"),
        ({"A_log": torch.zeros(2).double(), "backend": "triton"}, "A_log: .*not torch.float64"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    good = {"raw": torch.zeros(3, 2, 4), "A_log": torch.zeros(2)}
    kda_gate(**good)
    with pytest.raises(ValueError, match=message):
        kda_gate(**(good | change))
