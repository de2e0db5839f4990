"""A model made ready to generate on ranks of its own: the same parameters, less around them.

One new token is little work, and what megatron-core does around it for training (autograd
functions, dispatchers, joining of weights) takes longer than the work itself. Here modules that are
whole on their rank get plain forward passes. Nothing of this changes a parameter's value or name.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.moe.moe_layer import MoELayer

from megakda.layers.kda import KimiDeltaAttention
from megakda.layers.linear import join_weights, lean


def make_lean(chunk: torch.nn.Module) -> None:
    """Prepares a chunk in eval mode that will never be trained; in place."""
    for module in chunk.modules():
        if isinstance(module, KimiDeltaAttention):
            join_weights(module.joint_projections)
        elif isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
            if module.tp_group.size() == 1:
                lean(module)
        elif isinstance(module, MoELayer):
            experts = module.experts
            if experts.ep_group.size() == experts.tp_group.size() == module.tp_group.size() == 1:
                _lean_experts(module)


def _lean_experts(layer: MoELayer) -> None:
    """All experts are here, so that tokens are sorted by expert and need not travel."""

    def forward(hidden: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        """[s, b, h] -> ([s, b, h], no bias)."""
        tokens = hidden.flatten(0, 1)
        weights, chosen = layer.router.choose(layer.router.gating(tokens).sigmoid())
        count, top_k = chosen.shape
        order = chosen.flatten().argsort(stable=True)
        per_expert = chosen.flatten().bincount(minlength=layer.num_local_experts)
        sorted_weights = weights.float().flatten()[order]
        out, _ = layer.experts(tokens[order // top_k], per_expert, sorted_weights)
        restored = torch.empty_like(out)
        restored[order] = out
        mixed = restored.view(count, top_k, -1).sum(1).view(hidden.shape)
        if layer.use_shared_expert:
            mixed = mixed + layer.shared_experts(hidden)
        return mixed, None

    layer.forward = forward
