"""A model made ready to generate on ranks of its own: the same parameters, less around them.

One new token is little work, and what megatron-core does around it for training (autograd
functions, dispatchers, joining of weights) takes longer than the work itself. Here modules that are
whole on their rank get plain forward passes. Nothing of this changes a parameter's value or name.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_layer import TransformerLayer

from megakda.layers.kda import KimiDeltaAttention
from megakda.layers.linear import join_weights
from megakda.layers.norm import RMSNorm

_ROUTER_DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


def make_lean(chunk: torch.nn.Module) -> None:
    """Prepares a chunk in eval mode for generation alone; in place.

    Its weights may change in place afterwards. Not for a chunk that is being trained.
    """
    assert not chunk.training
    for module in list(chunk.modules()):
        if isinstance(module, TransformerLayer):
            module.__class__ = LeanLayer
        elif isinstance(module, RMSNorm):
            module.__class__ = LeanRMSNorm
        elif type(module) is MLP:
            module.__class__ = LeanMLP
        elif isinstance(module, KimiDeltaAttention):
            alone = module.tp_group.size() == 1
            low_rank = module.low_rank_projections if alone else []
            join_weights([*module.joint_projections, *low_rank])
        elif isinstance(module, MoELayer):
            experts = module.experts
            if experts.ep_group.size() == experts.tp_group.size() == module.tp_group.size() == 1:
                module.__class__ = LeanMoELayer
                if module.use_shared_expert:
                    module.shared_experts.__class__ = LeanMLP
        elif isinstance(module, ColumnParallelLinear) and module.tp_group.size() == 1:
            module.__class__ = LeanColumnLinear
        elif isinstance(module, RowParallelLinear) and module.tp_group.size() == 1:
            module.__class__ = LeanRowLinear


class LeanLayer(TransformerLayer):
    """Pre-norm token mixer and feed-forward, nothing else."""

    def forward(
        self, hidden_states: torch.Tensor, packed_seq_params: Any = None, **_: Any
    ) -> tuple[torch.Tensor, None]:
        """[s, b, h] -> ([s, b, h], no context)."""
        mixed, _ = self.self_attention(
            self.input_layernorm(hidden_states), packed_seq_params=packed_seq_params
        )
        hidden = hidden_states + mixed
        out, _ = self.mlp(self.pre_mlp_layernorm(hidden))
        return hidden + out, None


class LeanRMSNorm(RMSNorm):
    """With autograd never on, it need not repeat its bits with it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.float()
        if x.is_cuda:
            return F.rms_norm(y, x.shape[-1:], self.weight.float(), self.eps).to(x.dtype)
        # On a CPU torch's own takes longer than its parts.
        scale = torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (y * scale * self.weight).to(x.dtype)


class LeanMLP(MLP):
    """SwiGLU of two linears, whatever share of them is here; also the shared experts'."""

    def forward(self, hidden: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        gate, up = self.linear_fc1(hidden)[0].chunk(2, dim=-1)
        return self.linear_fc2(F.silu(gate) * up)[0], None


class LeanColumnLinear(ColumnParallelLinear):
    """A bias-free linear that is whole on this rank."""

    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        return F.linear(x, self.weight), None


class LeanRowLinear(RowParallelLinear):
    """A bias-free linear that is whole on this rank."""

    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        return F.linear(x, self.weight), None


class LeanMoELayer(MoELayer):
    """All experts are here, so that tokens are sorted by expert and need not travel."""

    def forward(self, hidden: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        """[s, b, h] -> ([s, b, h], no bias)."""
        tokens = hidden.flatten(0, 1)
        router, dtype = self.router, _ROUTER_DTYPES[self.config.moe_router_dtype]
        logits = F.linear(tokens.to(dtype), router.weight.to(dtype))
        weights, chosen = router.choose(logits.sigmoid())
        count, top_k = chosen.shape
        flat = chosen.flatten()
        order = flat.argsort(stable=True)
        # Not bincount, which waits for a GPU.
        per_expert = flat.new_zeros(self.num_local_experts)
        per_expert.scatter_add_(0, flat, torch.ones_like(flat))
        sorted_weights = weights.float().flatten()[order]
        out, _ = self.experts(tokens[order // top_k], per_expert, sorted_weights)
        restored = torch.empty_like(out)
        restored[order] = out
        mixed = restored.view(count, top_k, -1).sum(1).view(hidden.shape)
        if self.use_shared_expert:
            mixed = mixed + self.shared_experts(hidden)[0]
        return mixed, None
