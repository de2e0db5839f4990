"""L2 norm against its float64 formula: values, gradients, layouts, extremes, errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megakda.kernels.l2_norm import l2_norm, l2_norm_reference
from megakda.kernels.verify.memory import checked_memory
from tests.kernels.helpers import assert_close, outputs_and_gradients

BACKENDS = ["torch", "triton", "reference"]


@pytest.fixture(autouse=True)
def checked() -> Iterator[None]:
    with checked_memory():
        yield


def make_x(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def check(x: torch.Tensor, tolerance: float, backend: str, **options: Any) -> None:
    got = outputs_and_gradients(lambda x: [l2_norm(x, **options, backend=backend)], {"x": x})
    assert {value.dtype for value in got.values()} == {x.dtype}
    reference = outputs_and_gradients(
        lambda x: [l2_norm_reference(x, **options)], {"x": x}, torch.float64
    )
    assert_close(got, reference, tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(16,), (4, 2), (70, 17), (2, 5, 3, 128), (1, 3, 1000)])
@pytest.mark.parametrize("eps", [1e-6, 10.0])
def test_matches_reference(backend: str, shape: tuple[int, ...], eps: float) -> None:
    check(make_x(*shape), 1e-6, backend, eps=eps)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_computes_in_fp32(backend: str, dtype: torch.dtype) -> None:
    check(make_x(3, 7, 64).to(dtype), 4e-3, backend)


@pytest.mark.parametrize("width", [1, 8192, 16384])
def test_narrowest_and_widest_rows(width: int) -> None:
    # A row of one element with a small eps is +-1, and its gradient a difference of equals.
    check(make_x(2, width), 1e-6, "triton", eps=1.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend: str) -> None:
    """Columns of something wider, transposed, every second channel, expanded."""

    def views(x: torch.Tensor) -> list[torch.Tensor]:
        columns = x[..., 5:37]
        return [columns, columns.transpose(0, 1), x[..., ::2], x[:, :1].expand(3, 4, 64)]

    inputs = {"x": make_x(3, 4, 64)}
    got = outputs_and_gradients(lambda x: [l2_norm(v, backend=backend) for v in views(x)], inputs)
    reference = outputs_and_gradients(
        lambda x: [l2_norm_reference(v) for v in views(x)], inputs, torch.float64
    )
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
    x = make_x(6, 32).requires_grad_()
    exact = x.detach().double().requires_grad_()
    got = torch.autograd.grad(l2_norm(x, backend=backend), x, dy)
    reference = torch.autograd.grad(l2_norm_reference(exact), exact, dy.double())
    assert_close({"dx": got[0]}, {"dx": reference[0]}, 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_extremes(backend: str) -> None:
    """Zero stays zero, with a gradient; rows that do not fill a block divide nothing by zero."""
    x = torch.tensor([[0.0, 0.0], [1e-30, -1e-30], [1e15, -1e15]], requires_grad=True)
    y = l2_norm(x, backend=backend)
    assert torch.equal(y[0], torch.zeros(2)) and y[2].abs().allclose(torch.tensor(0.5).sqrt())
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.isfinite().all()
    assert gradient[0].allclose(torch.tensor(1e3))
    check(make_x(3, 5), 1e-6, backend, eps=0.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend: str) -> None:
    x = torch.zeros(4, 0, 32, requires_grad=True)
    y = l2_norm(x, backend=backend)
    assert y.shape == x.shape
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.shape == x.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 4, dtype=torch.int32)}, "x: torch.int32"),
        ({"x": torch.tensor(1.0)}, "x: torch.float32"),
        ({"eps": -1.0}, "eps: -1.0"),
        ({"backend": "cuda"}, "backend: 'cuda'"),
        ({"x": torch.zeros(3, 4).double(), "backend": "triton"}, "x: .*not torch.float64"),
        ({"x": torch.zeros(1, 16385), "backend": "triton"}, "x: .*1 to 16384, not 16385"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"x": torch.zeros(3, 4)}
    l2_norm(**good)
    with pytest.raises(ValueError, match=message):
        l2_norm(**(good | change))
