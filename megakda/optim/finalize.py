"""What happens to gradients between the last micro-batch and the optimizer."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from megakda.models.kimi_linear import routers
from megakda.models.sharding import ModelChunk


class GradFinalizer:
    """megatron-core's `finalize_model_grads`, and what it leaves out.

    It sums gradients of replicated weights over the tensor-parallel group only where sequence
    parallelism marks them. A weight that all heads share (KDA's output norm) has a partial gradient
    on every rank with sequence parallelism on and off; layers mark such weights with
    `partial_over_tensor_parallel`, and they are summed here.

    It also hands out the expert loads that megatron-core clears at this point.
    """

    def __init__(self, chunks: list[ModelChunk]):
        self._partial = [
            param
            for chunk in chunks
            for param in chunk.parameters()
            if getattr(param, "partial_over_tensor_parallel", False)
        ]
        self._routers = [router for chunk in chunks for router in routers(chunk)]
        self.tokens = 0  # real tokens of the global batch that was finalised last
        self.expert_loads: torch.Tensor | None = None  # [MoE layers here, experts], same batch

    def __call__(self, chunks: list[ModelChunk], num_tokens: torch.Tensor, **kwargs: Any) -> None:
        """Called by the pipeline schedules after the last backward pass of a step.

        Gradients come out as the mean over all real tokens of the global batch.

        Args:
            num_tokens: int, this rank's tokens; overwritten with the global count.
        """
        loads = [router.local_tokens_per_expert.clone() for router in self._routers]
        finalize_model_grads(chunks, num_tokens, **kwargs)
        self.tokens = int(num_tokens)
        if loads:
            self.expert_loads = torch.stack(loads)
            torch.distributed.all_reduce(
                self.expert_loads,
                group=parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True),
            )
        group = parallel_state.get_tensor_model_parallel_group()
        if group.size() > 1 and self._partial:
            grads = [param.main_grad for param in self._partial]  # type: ignore[attr-defined]
            joint = _flatten_dense_tensors(grads)
            torch.distributed.all_reduce(joint, group=group)
            for grad, total in zip(grads, _unflatten_dense_tensors(joint, grads), strict=True):
                grad.copy_(total)

    @torch.no_grad()
    def update_expert_biases(self, rate: float) -> None:
        """Moves every expert bias against its load: b += rate * (sign(e) - mean(sign(e))).

        e = mean load - load (auxiliary-loss-free balancing, arXiv 2408.15664, with the centring of
        Moonlight, arXiv 2502.16982, that keeps the mean bias at zero). Called after a step that
        was not skipped.
        """
        if self.expert_loads is None:
            return
        error = self.expert_loads.mean(dim=-1, keepdim=True) - self.expert_loads
        sign = error.sign()
        update = rate * (sign - sign.mean(dim=-1, keepdim=True))
        for router, delta in zip(self._routers, update, strict=True):
            router.expert_bias.add_(delta)

    def expert_metrics(self) -> dict[str, float]:
        """Sums over this rank's MoE layers, for averaging over the pipeline."""
        if self.expert_loads is None:
            return {"layers": 0.0, "max_over_mean": 0.0, "bias_square": 0.0}
        loads = self.expert_loads
        ratio = loads.amax(dim=-1) / loads.mean(dim=-1).clamp_min(1.0)
        squares = sum(float(router.expert_bias.square().sum()) for router in self._routers)
        return {
            "layers": float(len(self._routers)),
            "max_over_mean": float(ratio.sum()),
            "bias_square": squares,
        }
