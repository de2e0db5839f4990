"""The optimizer: megatron-core's, around AdamW or Muon."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core import parallel_state
from megatron.core.optimizer import (
    ChainedOptimizer,
    OptimizerConfig,
    ParamKey,
    get_megatron_optimizer,
)
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer_config import ParamPredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride

from megakda.config.pattern import layer_kinds
from megakda.config.schema import Config
from megakda.models.sharding import ModelChunk
from megakda.optim.matrices import Assignment, assign
from megakda.optim.muon import Muon
from megakda.optim.shards import shards

NO_DECAY = {
    # Norm weights, A_log and dt_bias: pulling a scale or a rate towards zero is not regularisation.
    ParamKey(
        predicate=ParamPredicate(name="one_dimensional", fn=lambda param: param.dim() == 1)
    ): ParamGroupOverride(wd_mult=0.0)
}


def build_optimizer(
    config: Config, chunks: list[ModelChunk], assignments: Sequence[Assignment]
) -> ChainedOptimizer:
    """AdamW or Muon over fp32 main parameters, sharded over data-parallel ranks where asked.

    Matrices, embeddings and convolution kernels decay; one-dimensional parameters do not.

    Args:
        chunks: model chunks wrapped in megatron-core's DistributedDataParallel.
        assignments: of all their parameters, see `assign_parameters`.
    """
    optim, parallel = config.optim, config.parallel
    settings = OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        min_lr=0.0,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_eps=optim.eps,
        clip_grad=optim.clip_grad,
        bf16=config.precision == "bf16",
        params_dtype=torch.bfloat16 if config.precision == "bf16" else torch.float32,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    optimizer = get_megatron_optimizer(settings, chunks, config_overrides=NO_DECAY)
    if optim.name == "muon":
        by_param = {assignment.param: assignment for assignment in assignments}
        stage = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        for assignment in assignments:
            assignment.param.momentum_only = bool(assignment.blocks)  # type: ignore[attr-defined]
        for part in optimizer.chained_optimizers:
            # megatron-core has set up the shards; the optimizer that updates them is ours.
            part.optimizer = Muon(part.optimizer.param_groups, shards(part), by_param, optim, stage)
    return optimizer


def assign_parameters(config: Config, chunks: list[ModelChunk]) -> list[Assignment]:
    """Which optimizer each parameter of this rank has; each is there once."""
    model, optim = config.model, config.optim
    return assign(
        chunks,
        layer_kinds(model.pattern, model.num_layers, model.last_layer_full),
        muon=optim.name == "muon",
        heads=model.num_heads,
        heads_per_matrix=optim.muon.heads_per_matrix,
    )


def clip_gradients(optimizer: ChainedOptimizer, grad_norm: float, max_norm: float) -> None:
    """Scales all gradients by max_norm / grad_norm where that is below 1; 0 switches it off."""
    if max_norm <= 0:
        return
    for part in optimizer.chained_optimizers:
        params = part.get_parameters()
        if params:
            clip_grad_by_total_norm_fp32(params, max_norm=max_norm, total_norm=grad_norm)
