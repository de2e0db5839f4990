"""From a recipe's model, parallel and precision settings to megatron-core model chunks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig

from megakda.config.layout import chunk_layers, chunk_layers_of_rank
from megakda.config.pattern import layer_kinds
from megakda.config.schema import ModelConfig, ParallelConfig
from megakda.layers.context_layout import ContextLayout
from megakda.layers.context_parallel import ALONE, ContextParallel
from megakda.layers.specs import block_spec
from megakda.models.sharding import ModelChunk


def transformer_config(
    model: ModelConfig, parallel: ParallelConfig, precision: str
) -> TransformerConfig:
    """megatron-core's configuration of the same model and layout.

    Weights are left as they are allocated: `megakda.models.init` fills them.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    interleaved = parallel.virtual_pipeline > 1

    def leave(weight: torch.Tensor) -> torch.Tensor:
        return weight

    settings: dict[str, Any] = dict(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads,
        ffn_hidden_size=model.dense_ffn,
        gated_linear_unit=True,
        activation_func=F.silu,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method=leave,
        output_layer_init_method=leave,
        embedding_init_method=leave,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=precision == "bf16",
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.sequence and parallel.tensor > 1,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if interleaved else None,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        # Interleaved schedules with batched point-to-point calls mix up messages on gloo; the
        # unbatched, overlapped calls are right on every backend.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        calculate_per_token_loss=True,
        # Fusions that need Apex or TransformerEngine kernels
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
    )
    if parallel.pipeline > 1:
        settings["pipeline_model_parallel_layout"] = _pipeline_layout(model, parallel)
    if parallel.recompute == "full":
        settings.update(
            recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1
        )
    elif parallel.recompute == "selective":
        settings.update(
            recompute_granularity="selective", recompute_modules=list(parallel.recompute_modules)
        )
    if model.ffn == "moe":
        moe = model.moe
        settings.update(
            num_moe_experts=moe.num_experts,
            moe_router_topk=moe.top_k,
            moe_ffn_hidden_size=moe.expert_ffn,
            moe_shared_expert_intermediate_size=(moe.num_shared_experts * moe.expert_ffn) or None,
            moe_layer_freq=[
                int(layer >= moe.first_dense_layers) for layer in range(model.num_layers)
            ],
            moe_router_score_function="sigmoid",
            moe_router_enable_expert_bias=True,
            # `megakda.optim.finalize` moves the biases, after a step is known to be good.
            moe_router_bias_update_rate=0.0,
            moe_router_topk_scaling_factor=moe.routed_scaling_factor,
            moe_router_num_groups=moe.num_groups if moe.num_groups > 1 else None,
            moe_router_group_topk=moe.top_groups if moe.num_groups > 1 else None,
            moe_router_load_balancing_type="none",
            moe_router_dtype=moe.router_dtype,
            moe_token_dispatcher_type="alltoall",
        )
    return TransformerConfig(**settings)


def build_chunks(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: str,
    context: int,
    attention_backend: str | None = None,
) -> list[GPTModel]:
    """This rank's pipeline chunks, one per virtual stage, with uninitialised weights.

    Args:
        context: tokens per sequence.
        attention_backend: `runtime.attention`.
    """
    sharing = context_parallel(parallel)
    config = transformer_config(model, parallel, precision)
    kinds = layer_kinds(model.pattern, model.num_layers, model.last_layer_full)
    interleaved = parallel.virtual_pipeline > 1
    chunks = []
    ranges = chunk_layers_of_rank(
        model, parallel, parallel_state.get_pipeline_model_parallel_rank()
    )
    for stage, (first, last) in enumerate(ranges):
        vp_stage = stage if interleaved else None
        where = dict(ignore_virtual=not interleaved, vp_stage=vp_stage)
        chunk = GPTModel(
            config,
            block_spec(
                model,
                kinds[first:last],
                first,
                sharing,
                attention_backend,
                parallel.recompute_head_groups,
            ),
            vocab_size=model.vocab_size,
            max_sequence_length=context,
            pre_process=parallel_state.is_pipeline_first_stage(**where),
            post_process=parallel_state.is_pipeline_last_stage(**where),
            position_embedding_type="none",
            share_embeddings_and_output_weights=False,
            vp_stage=vp_stage,
        )
        for router in routers(chunk):
            # Routing decisions are made in fp32 from fp32 weights, whatever the model's dtype.
            router.weight.data = router.weight.data.float()
        chunks.append(chunk)
    return chunks


def context_parallel(parallel: ParallelConfig) -> ContextParallel:
    """How this rank shares sequences with others, over megatron-core's groups."""
    if parallel.context == 1:
        return ALONE
    group = parallel_state.get_context_parallel_group()
    if parallel.context_mode == "two_level":
        heads, state = parallel_state.get_hierarchical_context_parallel_groups()
    else:
        heads, state = (None, group) if parallel.context_mode == "state" else (group, None)
    return ContextParallel(
        ContextLayout(parallel.context_layout, parallel.context),
        group,
        heads_group=heads if heads and heads.size() > 1 else None,
        state_group=state if state and state.size() > 1 else None,
        attention=parallel.context_attention,
    )


def routers(chunk: ModelChunk) -> list[TopKRouter]:
    """The MoE routers of a chunk, in layer order."""
    return [module for module in chunk.modules() if isinstance(module, TopKRouter)]


def _pipeline_layout(model: ModelConfig, parallel: ParallelConfig) -> list[list[str]]:
    layout = [["decoder"] * count for count in chunk_layers(model, parallel)]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    return layout
