"""Whether a side computes the right thing: nothing else is worth timing."""

from __future__ import annotations

import torch

from megakda.kernels.verify.bench.sides import Run

_LIMITS = {
    torch.float32: {"o": 1e-4},
    torch.bfloat16: {"o": 0.005, "dq": 0.008, "dk": 0.008, "dv": 0.008},
}
"""Largest RMS(error) / RMS(truth) by dtype and tensor, and below for the rest: in bf16 those of
fla's own tests, in fp32 what plain forms reach that form the decay of a chunk from differences."""

_OTHERS = {torch.float32: 1e-4, torch.bfloat16: 0.02}


def limit(name: str, dtype: torch.dtype) -> float:
    """How far tensor `name` ("o", "dq", "dA_log", ...) may be from the truth."""
    return _LIMITS[dtype].get(name, _OTHERS[dtype])


def results(run: Run, do: torch.Tensor, backward: bool) -> dict[str, torch.Tensor]:
    """o, and with `backward` d(name) of each of the run's leaves."""
    if not backward:
        with torch.no_grad():
            return {"o": run.forward()}
    o = run.forward()
    gradients = torch.autograd.grad(o, list(run.leaves.values()), do.to(o.dtype))
    named = {f"d{name}": x for name, x in zip(run.leaves, gradients, strict=True)}
    return {"o": o.detach(), **named}


def errors(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """RMS(got - expected) / RMS(expected) of the tensors that both have; nan if not finite."""
    found = {}
    for name in got.keys() & expected.keys():
        truth = expected[name].double()
        error = (got[name].double().view(truth.shape) - truth).square().mean().sqrt()
        found[name] = (error / truth.square().mean().sqrt().clamp_min(1e-30)).item()
    return dict(sorted(found.items()))


def too_large(found: dict[str, float], dtype: torch.dtype, slack: float = 1.0) -> list[str]:
    """Sentences on what is beyond `slack` times its limit, or not a number."""
    return [
        f"{name}: error {error:.1e}, at most {slack * limit(name, dtype):.1e} expected"
        for name, error in found.items()
        if not error <= slack * limit(name, dtype)
    ]
