"""The optimizer and its learning-rate schedule, both megatron-core's."""

from __future__ import annotations

import torch
from megatron.core.optimizer import (
    ChainedOptimizer,
    OptimizerConfig,
    ParamKey,
    get_megatron_optimizer,
)
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer_config import ParamPredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride

from megakda.config.schema import Config, OptimConfig, ScheduleConfig
from megakda.models.sharding import ModelChunk

NO_DECAY = {
    # Norm weights, A_log and dt_bias: pulling a scale or a rate towards zero is not regularisation.
    ParamKey(
        predicate=ParamPredicate(name="one_dimensional", fn=lambda param: param.dim() == 1)
    ): ParamGroupOverride(wd_mult=0.0)
}


def build_optimizer(config: Config, chunks: list[ModelChunk]) -> ChainedOptimizer:
    """AdamW over fp32 main parameters, sharded over data-parallel ranks where asked.

    Matrices, embeddings and convolution kernels decay; one-dimensional parameters do not.

    Args:
        chunks: model chunks wrapped in megatron-core's DistributedDataParallel.
    """
    optim, parallel = config.optim, config.parallel
    settings = OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        min_lr=config.schedule.min_lr,
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
    return get_megatron_optimizer(settings, chunks, config_overrides=NO_DECAY)


def clip_gradients(optimizer: ChainedOptimizer, grad_norm: float, max_norm: float) -> None:
    """Scales all gradients by max_norm / grad_norm where that is below 1; 0 switches it off."""
    if max_norm <= 0:
        return
    for part in optimizer.chained_optimizers:
        params = part.get_parameters()
        if params:
            clip_grad_by_total_norm_fp32(params, max_norm=max_norm, total_norm=grad_norm)


class Schedule:
    """Learning rate and weight decay as a function of the step alone: nothing to save.

    Step 0 trains with the first warmed-up rate, 1/warmup_steps of the peak; the last step of the
    decay trains one notch above `min_lr`.
    """

    def __init__(
        self, optimizer: ChainedOptimizer, optim: OptimConfig, schedule: ScheduleConfig, steps: int
    ):
        styles = {"wsd": "WSD", "cosine": "cosine", "linear": "linear", "constant": "constant"}
        style = styles[schedule.style]
        if style == "WSD" and schedule.decay_steps == 0:
            style = "constant"  # a WSD run that has not come to its decay
        self._optimizer = optimizer
        self._scheduler = OptimizerParamScheduler(
            optimizer,
            init_lr=0.0,
            max_lr=optim.lr,
            min_lr=schedule.min_lr,
            lr_warmup_steps=schedule.warmup_steps,
            lr_decay_steps=max(steps, schedule.warmup_steps) + 1,
            lr_decay_style=style,
            start_wd=optim.weight_decay,
            end_wd=optim.weight_decay,
            wd_incr_steps=steps,
            wd_incr_style="constant",
            wsd_decay_steps=schedule.decay_steps + 1,
            lr_wsd_decay_style=schedule.decay_shape,
        )

    def set(self, step: int) -> float:
        """Sets all parameter groups for 0-based `step`; returns the learning rate."""
        self._scheduler.num_steps = step
        self._scheduler.step(increment=1)
        return next(
            group["lr"] for group in self._optimizer.param_groups if group.get("default_config")
        )
