"""AdamW with the interface of Apex's and TransformerEngine's FusedAdam."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

Observer = Callable[[torch.Tensor, torch.Tensor], None]
"""Called with (parameter before its update, update before the learning rate)."""


class AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) whose step count lives in the parameter group.

    That is where megatron-core's distributed optimizer looks for it, saves it and restores it.
    Parameters, gradients and both moments are fp32 (megatron-core hands in the main parameters).

    Args:
        params: parameters or parameter groups.
        lr, weight_decay, betas, eps: as in torch.optim.AdamW.
        adam_w_mode: must be true; L2 regularisation inside the gradient is not offered.

    Attributes:
        observer: sees every update where it is set, which costs a pass over the parameters.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
        adam_w_mode: bool = True,
    ):
        assert adam_w_mode, "decoupled weight decay only"
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, betas=betas, eps=eps))
        self.observer: Observer | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            group["step"] = int(group.get("step", 0)) + 1
            self.update(group, [p for p in group["params"] if p.grad is not None])

    def update(self, group: dict[str, Any], params: list[torch.Tensor]) -> None:
        """AdamW's update of some parameters of `group`, whose step count is that of this update."""
        if not params:
            return
        step, lr, (beta1, beta2) = group["step"], group["lr"], group["betas"]
        grads = gradients(params)
        states = [self._state(p) for p in params]
        exp_avgs = [s["exp_avg"] for s in states]
        exp_avg_sqs = [s["exp_avg_sq"] for s in states]

        torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
        torch._foreach_mul_(exp_avg_sqs, beta2)
        torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
        denominators = torch._foreach_sqrt(exp_avg_sqs)
        torch._foreach_div_(denominators, (1 - beta2**step) ** 0.5)
        torch._foreach_add_(denominators, group["eps"])
        if self.observer is not None:
            for param, exp_avg, denominator in zip(params, exp_avgs, denominators, strict=True):
                self.observer(param, exp_avg / denominator / (1 - beta1**step))
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_addcdiv_(params, exp_avgs, denominators, -lr / (1 - beta1**step))

    def _state(self, param: torch.Tensor) -> dict[str, torch.Tensor]:
        state = self.state[param]
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        return state


def gradients(params: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Of parameters that all have one."""
    found = [param.grad for param in params]
    assert all(grad is not None for grad in found)
    return found  # type: ignore[return-value]
