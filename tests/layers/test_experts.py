"""Stacked experts: the grouped product against plain loops in float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from megakda.config import compose
from megakda.layers.experts import StackedExperts, grouped_linear
from megakda.models.kimi_linear import transformer_config
from tests.jobs import SMALL

IN, OUT = 24, 16
COUNTS = {
    "uneven": [3, 1, 7, 2],
    "empty_experts": [0, 5, 0, 8],
    "one_expert_takes_all": [0, 0, 13, 0],
    "no_tokens": [0, 0, 0, 0],
}
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8}
"""Relative, and absolute too, of sums over up to 24 products of numbers around 1."""


@pytest.fixture(autouse=True)
def poisoned_memory():
    """New tensors hold NaN until they are written: zero gradients have to be written, too."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


def make(counts: list[int], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """x, weight and the gradient of the output, all contiguous."""
    generator = torch.Generator().manual_seed(0)
    shapes = (sum(counts), IN), (len(counts), OUT, IN), (sum(counts), OUT)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def outputs(function, x, weight, counts, grad_out) -> dict[str, torch.Tensor]:
    x, weight = (t.detach().clone().requires_grad_() for t in (x, weight))
    out = function(x, weight, torch.tensor(counts))
    grads = torch.autograd.grad(out, (x, weight), grad_out)
    return {"out": out.detach(), "x": grads[0], "weight": grads[1]}


def plain(x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Row by row in float64: x[n] @ weight[expert of n]^T."""
    expert = torch.repeat_interleave(torch.arange(len(counts)), counts)
    return torch.einsum("ni,noi->no", x.double(), weight.double()[expert])


def grouped_mm(x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """What `grouped_linear` does on a GPU."""
    offsets = counts.cumsum(0).to(torch.int32)
    return F.grouped_mm(x, weight.transpose(1, 2), offs=offsets)


def assert_close(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    limit = TOLERANCE[dtype]
    for name, value in expected.items():
        assert found[name].dtype == dtype
        torch.testing.assert_close(found[name].double(), value.double(), rtol=limit, atol=limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_grouped_linear_is_the_plain_product(counts, dtype):
    x, weight, grad_out = make(counts, dtype)
    found = outputs(grouped_linear, x, weight, counts, grad_out)
    expected = outputs(plain, x, weight, counts, grad_out.double())
    assert_close(found, expected, dtype)
    for expert, count in enumerate(counts):
        if count == 0:
            assert torch.equal(found["weight"][expert], torch.zeros(OUT, IN, dtype=dtype))


def test_any_layout_of_the_gradient_will_do():
    """`sum().backward()` hands over an expanded gradient, a transposed product a strided one."""
    counts = COUNTS["empty_experts"]
    x, weight, grad_out = make(counts, torch.float32)
    for grad in (torch.ones(()).expand(sum(counts), OUT), grad_out.t().contiguous().t()):
        assert not grad.is_contiguous()
        found = outputs(grouped_linear, x, weight, counts, grad)
        assert_close(found, outputs(plain, x, weight, counts, grad.double()), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_the_loop_and_the_grouped_kernel_agree(counts, dtype):
    """The CPU's loop stands for what runs on a GPU."""
    x, weight, grad_out = make(counts, dtype)
    try:
        found = outputs(grouped_mm, x, weight, counts, grad_out)
    except NotImplementedError as error:
        pytest.skip(f"this build of torch has no grouped_mm for CPU tensors: {error}")
    assert_close(found, outputs(grouped_linear, x, weight, counts, grad_out), dtype)


def stacked_experts(precision: str = "fp32") -> StackedExperts:
    """Three experts of the small model, with weights drawn at random."""
    config = compose(SMALL)
    one = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    experts = StackedExperts(
        3,
        transformer_config(config.model, config.parallel, precision),
        SimpleNamespace(ep=one, expt_tp=one, expt_dp=one),
    )
    generator = torch.Generator().manual_seed(1)
    for param in experts.parameters():
        param.data = torch.randn(param.shape, generator=generator).to(param.dtype) * 0.3
    return experts


def test_stacked_experts_are_swiglu_experts():
    """Each expert alone, in float64, times its tokens' routing weights; values and gradients."""
    experts = stacked_experts()
    width, hidden = experts.config.moe_ffn_hidden_size, experts.config.hidden_size
    assert experts.gate_up.shape == (3, 2, width, hidden)
    assert experts.down.shape == (3, hidden, width)
    counts = torch.tensor([4, 0, 5])
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(9, hidden, generator=generator, requires_grad=True)
    probs = torch.rand(9, generator=generator, requires_grad=True)
    grad_out = torch.randn(9, hidden, generator=generator)

    out, bias = experts(x, counts, probs)
    assert bias is None
    inputs = [x, probs, experts.gate_up, experts.down]
    grads = torch.autograd.grad(out, inputs, grad_out)

    exact = [t.detach().double().requires_grad_() for t in inputs]
    rows = []
    for n, expert in enumerate([0] * 4 + [2] * 5):
        gate, up = (exact[2][expert, i] @ exact[0][n] for i in (0, 1))
        rows.append(exact[1][n] * (exact[3][expert] @ (gate * torch.sigmoid(gate) * up)))
    expected = torch.stack(rows)
    expected_grads = torch.autograd.grad(expected, exact, grad_out.double())
    for mine, theirs in zip((out, *grads), (expected, *expected_grads), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5)


def test_stacked_experts_without_tokens():
    experts = stacked_experts("bf16")
    x = torch.empty(0, experts.config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    out, _ = experts(x, torch.tensor([0, 0, 0]), torch.empty(0))
    assert (out.shape, out.dtype) == (x.shape, torch.bfloat16)
    out.sum().backward()
    for param in experts.parameters():
        assert torch.equal(param.grad, torch.zeros_like(param))


def test_expert_gradients_are_reduced_over_their_own_group():
    for param in stacked_experts().parameters():
        assert param.allreduce is False
        assert param.tensor_model_parallel and param.partition_dim == 2
