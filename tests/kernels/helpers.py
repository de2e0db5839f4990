"""What the kernel tests share: random inputs, gradients of outputs, and the error measure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def rms_error(got: torch.Tensor, reference: torch.Tensor) -> float:
    """RMS(got - reference) / RMS(reference); absolute where the reference is zero."""
    got, reference = got.detach().double(), reference.detach().double()
    assert got.shape == reference.shape
    assert got.isfinite().all()
    error, size = ((x.square().mean().sqrt().item()) for x in (got - reference, reference))
    return error / size if size else error


def assert_close(
    got: dict[str, torch.Tensor],
    reference: dict[str, torch.Tensor],
    tolerance: float | dict[str, float],
) -> None:
    """Every entry within its tolerance, as `rms_error`; reports all that are not."""
    assert got.keys() == reference.keys()
    wrong = {}
    for name, value in reference.items():
        limit = tolerance if isinstance(tolerance, float) else tolerance[name]
        error = rms_error(got[name], value)
        if not error <= limit:
            wrong[name] = f"{error:.2e} > {limit:.0e}"
    assert not wrong, wrong


def outputs_and_gradients(
    function: Callable[..., Sequence[torch.Tensor]],
    inputs: dict[str, torch.Tensor],
    dtype: torch.dtype | None = None,
) -> dict[str, torch.Tensor]:
    """Outputs 0, 1, ... of function(**inputs) and d(random weighted sum of them)/d(each input).

    The weights are the same for every function whose outputs have the same shapes. `dtype`
    converts the inputs first.
    """
    leaves = {
        name: (x.detach() if dtype is None else x.detach().to(dtype)).clone().requires_grad_()
        for name, x in inputs.items()
    }
    outputs = function(**leaves)
    generator = torch.Generator().manual_seed(1)
    loss = sum((x * torch.randn(x.shape, generator=generator)).double().sum() for x in outputs)
    gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    named = {f"output {i}": x for i, x in enumerate(outputs)}
    return named | {f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}
