"""From a layer pattern to megatron-core layer specs: which modules each layer is built from."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)

from megakda.config.schema import ModelConfig
from megakda.layers.context_parallel import ALONE, ContextParallel
from megakda.layers.experts import StackedExperts
from megakda.layers.kda import KimiDeltaAttention
from megakda.layers.mla import MultiLatentAttention
from megakda.layers.norm import RMSNorm
from megakda.layers.router import SigmoidRouter


def block_spec(
    model: ModelConfig,
    kinds: Sequence[str],
    first_layer: int,
    context: ContextParallel = ALONE,
    attention_backend: str | None = None,
    head_groups: int = 0,
) -> TransformerBlockSubmodules:
    """The layers of one pipeline chunk.

    Args:
        model: widths of every module.
        kinds: "linear" or "full" for each layer of the chunk.
        first_layer: 0-based number of the chunk's first layer in the whole model.
        context: how sequences are shared by ranks, the same for all layers.
        attention_backend: of packed and shared sequences, see `megakda.kernels.tile_attention`.
        head_groups: of KDA's recomputation, see `KimiDeltaAttention`.
    """
    layers = [
        layer_spec(model, kind, first_layer + i, context, attention_backend, head_groups)
        for i, kind in enumerate(kinds)
    ]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


def layer_spec(
    model: ModelConfig,
    kind: str,
    layer: int,
    context: ContextParallel = ALONE,
    attention_backend: str | None = None,
    head_groups: int = 0,
) -> ModuleSpec:
    """Pre-norm token mixer of `kind`, then pre-norm feed-forward; `layer` is 0-based."""
    common = {"num_heads": model.num_heads, "context": context}
    if kind == "linear":
        own = {"linear": model.linear, "head_groups": head_groups}
        mixer = ModuleSpec(KimiDeltaAttention, params={**common, **own})
    else:
        own = {"mla": model.mla, "attention_backend": attention_backend}
        mixer = ModuleSpec(MultiLatentAttention, params={**common, **own})
    is_moe = model.ffn == "moe" and layer >= model.moe.first_dense_layers
    return ModuleSpec(
        TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=mixer,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=_moe_spec(model) if is_moe else ModuleSpec(MLP, submodules=_MLP),
            mlp_bda=get_bias_dropout_add,
        ),
    )


_MLP = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)


def _moe_spec(model: ModelConfig) -> ModuleSpec:
    shared = ModuleSpec(SharedExpertMLP, submodules=_MLP) if model.moe.num_shared_experts else None
    return ModuleSpec(
        MoELayer,
        submodules=MoESubmodules(
            router=SigmoidRouter, experts=StackedExperts, shared_experts=shared
        ),
    )
