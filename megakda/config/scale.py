"""A run divided down to a size that a laptop trains: `scale=smoke` with any experiment.

What makes a recipe itself stays: the pattern of layers and its end, the mixers and their gates, the
kind of feed-forward and the dense layers before it, the optimizer and its rates, precision,
recomputation, packing, and every stage of the schedule with its changes of context and batch. Sizes
are divided, by the numbers of `ScaleConfig`; the layout keeps what fits of its most telling kind of
parallelism; and data that only a cluster has give way to the standard library's source text.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, fields, replace
from pathlib import PurePath
from typing import Any

from megakda.config.layout import balanced_layers, least_ranks
from megakda.config.pattern import ratio
from megakda.config.resolve import resolve
from megakda.config.schema import (
    Config,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    ScaleConfig,
    ScheduleConfig,
    TrainConfig,
)
from megakda.config.stages import StageSettings, read_stages
from megakda.config.validate import validate
from megakda.errors import ConfigError

GRAIN = 16
"""Widths and lengths are multiples of it, which every kernel and layout of a few ranks can take."""

BYTE_VOCABULARY = 320
"""Room for the byte-level tokenizer, and divisible by small numbers of ranks."""

MICRO_BATCH = 2
"""The most sequences of a forward pass."""
PLACE = ("paths", "weights", "split", "tokenizer", "prepare", "cache", "num_workers")
"""Settings of data that belong to the machine that has them."""


def scaled(config: Config) -> Config:
    """`config` divided down as `config.scale` says; the result itself has nothing to scale.

    Settings that are smaller than what they would become stay as they are. A run that writes below
    ``runs`` writes below ``runs/smoke``, so that it never meets the checkpoints of the real one.
    Weights to begin with do not fit the small model: it begins with random ones, and warns.

    Raises:
        ConfigError: `config` is not valid on any number of ranks, a number of `scale` is below 1,
            or the schedule has more stages than `scale.steps`.
    """
    scale = config.scale
    if scale.steps is None:
        return config
    for item in fields(scale):
        if getattr(scale, item.name) < 1:
            raise ConfigError(
                f"scale.{item.name}={getattr(scale, item.name)}: must be positive; set scale.steps="
                "null (scale=full) to scale nothing"
            )
    # What does not work on the fewest ranks works on no others.
    try:
        validate(config, least_ranks(config.parallel))
    except ConfigError as error:
        raise ConfigError(
            f"{error} (this is the run that is divided down; how long the small one is, "
            f"scale.steps={scale.steps} says)"
        ) from None
    if config.train.weights is not None:
        warnings.warn(
            f"train.weights={config.train.weights} is not used: a run divided down by scale.steps="
            f"{scale.steps} begins with random weights, since these do not fit its model",
            stacklevel=2,
        )
    model = scaled_model(config.model, scale)
    parallel = scaled_parallel(config.parallel, model, scale.ranks)
    schedule, train = _scaled_run(config, parallel)
    return replace(
        config,
        model=model,
        parallel=parallel,
        data=_stand_in(config.data),
        schedule=schedule,
        train=train,
        logging=replace(config.logging, wandb=False),
        runtime=replace(config.runtime, backend="torch", attention="torch"),
        scale=ScaleConfig(),
    )


def scaled_model(model: ModelConfig, scale: ScaleConfig) -> ModelConfig:
    """The same architecture with fewer layers, heads and experts, all of them narrower."""

    def width(size: int) -> int:
        return _divided(size, scale.width, GRAIN, least=2 * GRAIN)

    def head(size: int) -> int:
        return _divided(size, scale.head_dim, GRAIN)

    linear, mla, moe = model.linear, model.mla, model.moe
    # A group of experts is judged by its two best, and ranks share them.
    several = math.lcm(2 * moe.num_groups, scale.ranks)
    experts = _divided(moe.num_experts, scale.experts, several, least=2 * several)
    return replace(
        model,
        hidden_size=width(model.hidden_size),
        num_layers=_num_layers(model, max(scale.layers, scale.ranks)),
        num_heads=_divided(model.num_heads, scale.heads, math.lcm(2, scale.ranks)),
        vocab_size=min(model.vocab_size, BYTE_VOCABULARY),
        dense_ffn=width(model.dense_ffn),
        linear=replace(
            linear,
            head_dim_k=head(linear.head_dim_k),
            head_dim_v=head(linear.head_dim_v),
            gate_rank=head(linear.gate_rank),
            output_gate_rank=head(linear.output_gate_rank),
        ),
        mla=replace(
            mla,
            q_lora_rank=mla.q_lora_rank and head(mla.q_lora_rank),
            kv_lora_rank=head(mla.kv_lora_rank),
            qk_nope_head_dim=head(mla.qk_nope_head_dim),
            qk_shared_head_dim=head(mla.qk_shared_head_dim),
            v_head_dim=head(mla.v_head_dim),
        ),
        moe=replace(
            moe, num_experts=experts, top_k=min(moe.top_k, 2), expert_ffn=width(moe.expert_ffn)
        ),
    )


def _num_layers(model: ModelConfig, least: int) -> int:
    """Whole periods of the pattern, and the layers that the model has after its last one."""
    if not isinstance(model.pattern, str):
        return model.num_layers  # one name per layer
    period = sum(ratio(model.pattern))
    rest = model.num_layers % period
    least = max(least, model.moe.first_dense_layers + 1)
    periods = max(1, math.ceil((least - rest) / period))
    return min(model.num_layers, periods * period + rest)


def scaled_parallel(parallel: ParallelConfig, model: ModelConfig, ranks: int) -> ParallelConfig:
    """The layout on `ranks` ranks.

    Of context, pipeline and tensor parallelism the first takes what it can, then the next; experts
    are shared among the ranks of a pipeline stage.
    """
    context = math.gcd(parallel.context, ranks)
    pipeline = math.gcd(parallel.pipeline, ranks // context)
    tensor = math.gcd(parallel.tensor, ranks // context // pipeline)
    expert_tensor = math.gcd(parallel.expert_tensor, tensor)
    virtual = 1
    if pipeline > 1:
        virtual = min(parallel.virtual_pipeline, model.num_layers // pipeline)
    chunks = pipeline * virtual
    uneven = model.num_layers % chunks != 0
    groups = parallel.recompute_head_groups
    return replace(
        parallel,
        context=context,
        pipeline=pipeline,
        tensor=tensor,
        virtual_pipeline=virtual,
        pipeline_layers=balanced_layers(model, chunks) if uneven else None,
        expert=math.gcd(parallel.expert, ranks // pipeline // expert_tensor),
        expert_tensor=expert_tensor,
        context_heads=parallel.context_heads and math.gcd(parallel.context_heads, context),
        recompute_head_groups=groups and math.gcd(groups, model.num_heads // tensor),
    )


@dataclass(frozen=True)
class _Proportion:
    """Contexts and batches of a run, each in one proportion."""

    scale: ScaleConfig
    parallel: ParallelConfig
    longest: int  # context of the run
    largest: int  # batch of the run

    def context(self, tokens: int) -> int:
        grain = math.lcm(GRAIN, 2 * self.parallel.context * self.parallel.tensor)
        return _divided(tokens, self.longest / min(self.longest, self.scale.context), grain)

    def batch(self, sequences: int, micro_batch: int) -> int:
        parallel = self.parallel
        unit = micro_batch * (
            self.scale.ranks // (parallel.tensor * parallel.pipeline * parallel.context)
        )
        if parallel.virtual_pipeline > 1:
            unit *= parallel.pipeline
        divisor = self.largest / min(self.largest, self.scale.batch)
        return unit * max(1, round(sequences / divisor / unit))


def _scaled_run(config: Config, parallel: ParallelConfig) -> tuple[ScheduleConfig, TrainConfig]:
    """The stages of the schedule, whichever way it is written, and the run that they make up."""
    scale, train = config.scale, config.train
    settings = read_stages(config)
    proportion = _Proportion(
        scale,
        parallel,
        longest=max(train.context, *(stage.context for stage in settings)),
        largest=max(train.global_batch, *(stage.batch[1] for stage in settings)),
    )
    timetable = resolve(settings, train, config.optim.lr, data_parallel=1)
    steps = _shares([stage.steps for stage in timetable.stages], scale.steps or 1)
    written = config.schedule.stages or [{}] * len(settings)
    stages = [
        _scaled_stage(stage, said, count, proportion)
        for stage, said, count in zip(settings, written, steps, strict=True)
    ]
    micro_batch = min(train.micro_batch, MICRO_BATCH)
    out = PurePath(train.out)
    # The stages stand for the short form, which is no longer there to be read.
    schedule = ScheduleConfig() if config.schedule.stages is None else config.schedule
    return replace(schedule, stages=stages), replace(
        train,
        steps=sum(steps),
        tokens=None,
        context=proportion.context(train.context),
        global_batch=proportion.batch(train.global_batch, micro_batch),
        micro_batch=micro_batch,
        out=str("runs/smoke" / out.relative_to("runs"))
        if out.is_relative_to("runs")
        else train.out,
        save_every=0,
        eval_every=0,
        eval_batches=min(train.eval_batches, 1),
        weights=None,
    )


def _scaled_stage(
    stage: StageSettings, written: dict[str, Any], steps: int, proportion: _Proportion
) -> dict[str, Any]:
    micro_batch = min(stage.micro_batch, MICRO_BATCH)
    first, last = (proportion.batch(size, micro_batch) for size in stage.batch)
    own = {
        "kind": stage.kind,
        "steps": steps,
        "to": stage.to,
        "context": proportion.context(stage.context),
        "batch": first if first == last else {"from": first, "to": last},
        "micro_batch": micro_batch,
        "expert_bias_rate": written.get("expert_bias_rate"),
        "data": {k: v for k, v in (written.get("data") or {}).items() if k not in PLACE} or None,
    }
    return {key: value for key, value in own.items() if value is not None}


def _shares(lengths: list[int], steps: int) -> list[int]:
    """`steps` in proportion to `lengths`, but two for each where there are enough, or one."""
    steps = min(steps, sum(lengths))
    if steps < len(lengths):
        raise ConfigError(
            f"scale.steps={steps} is less than the {len(lengths)} stages of the schedule: set "
            f"it to {len(lengths)} or more"
        )
    least = [min(length, 2 if steps >= 2 * len(lengths) else 1) for length in lengths]
    shares = list(least)
    for _ in range(steps - sum(least)):  # each to the stage that is the most behind
        behind = [length / (share + 1) for length, share in zip(lengths, shares, strict=True)]
        shares[behind.index(max(behind))] += 1
    return shares


def _stand_in(data: DataConfig) -> DataConfig:
    """Data that every machine has: text, or conversations where the loss is on their answers."""
    if data.prepare != "none":
        return replace(data, tokenizer="byte")  # fits BYTE_VOCABULARY
    kind = "stdlib_chat" if data.loss == "answers" else "stdlib"
    return replace(
        data,
        paths=[f"data/stdlib/{kind}"],
        weights=None,
        split=[98.0, 2.0, 0.0],
        tokenizer="byte",
        prepare=kind,
        cache=None,
        num_workers=0,
    )


def _divided(size: int, by: float, multiple: int, least: int = 0) -> int:
    """About ``size / by``: a multiple of `multiple`, at least `least`, and at most `size`."""
    return min(size, max(least, multiple * max(1, round(size / by / multiple))))
