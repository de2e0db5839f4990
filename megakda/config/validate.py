"""Rules between settings, checked before any process group exists."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from megakda.config.layout import chunk_layers
from megakda.config.pattern import layer_kinds
from megakda.config.resolve import resolve
from megakda.config.schema import Config, MoEConfig
from megakda.config.stages import StageSettings, read_stages, unread_settings, whole_number
from megakda.config.timetable import Timetable
from megakda.errors import ConfigError

RECOMPUTE_MODULES = ("core_attn", "layernorm", "mlp", "moe", "shared_experts")


@dataclass(frozen=True)
class Derived:
    """Numbers that follow from the config and the number of ranks."""

    world_size: int
    data_parallel: int
    expert_data_parallel: int
    micro_batches: int  # per rank, in the first step
    tokens_per_step: int  # in the first step
    total_tokens: int  # of the whole run
    timetable: Timetable

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return self.timetable.steps

    def lines(self, config: Config) -> list[str]:
        """How each number came about, one line each, for the start of a run."""
        p, t = config.parallel, config.train
        lines = [
            f"ranks {self.world_size} = tensor {p.tensor} x pipeline {p.pipeline} x context "
            f"{p.context} x data {self.data_parallel}",
            f"experts: expert {p.expert} x expert-tensor {p.expert_tensor} x expert-data "
            f"{self.expert_data_parallel} per pipeline stage",
        ]
        if config.schedule.stages is None:
            lines += [
                f"micro-batches {self.micro_batches} = global batch {t.global_batch} / "
                f"(micro-batch {t.micro_batch} x data {self.data_parallel})",
                f"tokens per step {self.tokens_per_step:,} = global batch {t.global_batch} x "
                f"context {t.context:,}",
                f"tokens in all {self.total_tokens:,} = {self.tokens_per_step:,} x "
                f"{self.steps:,} steps",
            ]
        else:
            for row in self.timetable.rows():
                facts = (f"{name} {value}" for name, value in row.items())
                lines.append(f"{', '.join(facts)}")
            lines.append(f"tokens in all {self.total_tokens:,} in {self.steps:,} steps")
            unread = unread_settings(config)
            lines += [f"note: {unread}"] if unread else []
        for context in dict.fromkeys(stage.context for stage in self.timetable.stages):
            if p.context > 1:
                segments = 2 if p.context_layout == "zigzag" else 1
                length = context // (p.context * segments)
                lines.append(
                    f"tokens per context-parallel rank {segments * length:,} = {segments} x "
                    f"{length:,} ({p.context_layout}); KDA by {p.context_mode}, MLA by "
                    f"{p.context_attention}"
                )
        return lines


def validate(config: Config, world_size: int) -> Derived:
    """Checks every rule that does not need data or hardware.

    Args:
        world_size: number of ranks the run has.

    Raises:
        ConfigError: names the key, the value, the rule and the remedy.
    """
    _check_choices(config, "")
    _check_ranges(config)
    _check_model(config)
    _check_parallel(config)
    for stage in read_stages(config):
        _check_choices(stage.data, f"{stage.key('data')}.")
        _check_context(config, stage.key("context"), stage.context)
        _check_packing(stage)
        if "expert_bias_rate" in stage.given and config.model.ffn != "moe":
            raise ConfigError(
                f"{stage.key('expert_bias_rate')}={stage.expert_bias_rate:g} with model.ffn="
                f"{config.model.ffn}: there are no experts to balance; remove it from the stage"
            )
    _check_optimizer(config)
    if config.runtime.attention == "flash_attn" and config.precision != "bf16":
        raise ConfigError(
            f"runtime.attention=flash_attn with precision={config.precision}: flash-attn takes "
            "half precision only; set precision=bf16, or runtime.attention=torch"
        )
    return derive(config, world_size)


def derive(config: Config, world_size: int) -> Derived:
    """The numbers that depend on `world_size`.

    Raises:
        ConfigError: the ranks or the batch cannot be shared as the config asks.
    """
    p, t = config.parallel, config.train
    if world_size < 1:
        raise ConfigError(f"{world_size} ranks: a run needs at least 1")
    model_ranks = p.tensor * p.pipeline * p.context
    if world_size % model_ranks:
        raise ConfigError(
            f"{world_size} ranks cannot be shared by parallel.tensor={p.tensor} x parallel.pipeline"
            f"={p.pipeline} x parallel.context={p.context} = {model_ranks}: start a multiple of "
            f"{model_ranks} ranks (torchrun --nproc-per-node) or lower one of them"
        )
    expert_ranks = p.expert * p.expert_tensor * p.pipeline
    if world_size % expert_ranks:
        raise ConfigError(
            f"{world_size} ranks cannot be shared by parallel.expert={p.expert} x "
            f"parallel.expert_tensor={p.expert_tensor} x parallel.pipeline={p.pipeline} = "
            f"{expert_ranks}: start a multiple of {expert_ranks} ranks or lower one of them"
        )
    data_parallel = world_size // model_ranks
    interleave = p.pipeline if p.virtual_pipeline > 1 else 1
    stages = read_stages(config)
    for stage in stages:
        _check_batch(stage, data_parallel, interleave)
    timetable = resolve(stages, t, config.optim.lr, data_parallel, interleave)
    first = timetable.at(0)
    return Derived(
        world_size=world_size,
        data_parallel=data_parallel,
        expert_data_parallel=world_size // expert_ranks,
        micro_batches=first.micro_batches,
        tokens_per_step=first.global_batch * first.context,
        total_tokens=timetable.tokens,
        timetable=timetable,
    )


def _check_batch(stage: StageSettings, data_parallel: int, interleave: int) -> None:
    """Every rank gets whole micro-batches, as many as the pipeline wants."""
    key, micro_key = stage.key("batch"), stage.key("micro_batch")
    per_micro_step = data_parallel * stage.micro_batch
    first, last = stage.batch
    sizes = {key: first} if first == last else {f"{key}.from": first, f"{key}.to": last}
    if stage.batch_by is not None:
        sizes[f"{key}.by"] = stage.batch_by
    for name, size in sizes.items():
        if size % per_micro_step:
            down = max(1, size // per_micro_step) * per_micro_step
            raise ConfigError(
                f"{name}={size} must be a multiple of data-parallel ranks x {micro_key} = "
                f"{data_parallel} x {stage.micro_batch} = {per_micro_step}: use {name}={down} or "
                f"another {micro_key}"
            )
        micro_batches = size // per_micro_step
        if micro_batches % interleave:
            rounded_up = -(-micro_batches // interleave) * interleave
            raise ConfigError(
                f"interleaved pipelines need micro-batches in multiples of parallel.pipeline="
                f"{interleave}, but {name}={size} makes {micro_batches} per rank: use {name}="
                f"{rounded_up * per_micro_step} or parallel.virtual_pipeline=1"
            )


def _check_choices(node: Any, prefix: str) -> None:
    for item in fields(node):
        value, key = getattr(node, item.name), f"{prefix}{item.name}"
        if is_dataclass(value):
            _check_choices(value, f"{key}.")
        choices = item.metadata.get("choices")
        if choices and value not in choices:
            raise ConfigError(f"{key}={value}: must be one of {', '.join(choices)}")


def _check_ranges(config: Config) -> None:
    m, p, t, o = config.model, config.parallel, config.train, config.optim
    positive = {
        "model.hidden_size": m.hidden_size,
        "model.num_layers": m.num_layers,
        "model.num_heads": m.num_heads,
        "model.vocab_size": m.vocab_size,
        "model.dense_ffn": m.dense_ffn,
        "model.moe.num_groups": m.moe.num_groups,
        "parallel.tensor": p.tensor,
        "parallel.pipeline": p.pipeline,
        "parallel.virtual_pipeline": p.virtual_pipeline,
        "parallel.context": p.context,
        "parallel.expert": p.expert,
        "parallel.expert_tensor": p.expert_tensor,
        "train.steps": 1 if t.steps is None else t.steps,
        "train.context": t.context,
        "train.global_batch": t.global_batch,
        "train.micro_batch": t.micro_batch,
        "train.guard.max_bad_steps": t.guard.max_bad_steps,
        "checkpoint.keep_last": config.checkpoint.keep_last,
        "logging.every": config.logging.every,
        "optim.lr": o.lr,
        "optim.eps": o.eps,
    }
    for key, value in positive.items():
        if not value > 0:
            raise ConfigError(f"{key}={value}: must be positive")
    if t.tokens is not None:
        whole_number("train.tokens", t.tokens)
    not_negative = {
        "data.num_workers": config.data.num_workers,
        "train.save_every": t.save_every,
        "train.eval_every": t.eval_every,
        "train.eval_batches": t.eval_batches,
        "schedule.warmup_steps": config.schedule.warmup_steps,
        "schedule.decay_steps": config.schedule.decay_steps,
        "schedule.min_lr": config.schedule.min_lr,
        "optim.weight_decay": o.weight_decay,
        "optim.clip_grad": o.clip_grad,
    }
    for key, value in not_negative.items():
        if value < 0:
            raise ConfigError(f"{key}={value}: must not be negative")
    s = config.schedule
    if s.min_lr > o.lr:
        raise ConfigError(f"schedule.min_lr={s.min_lr}: must not exceed optim.lr={o.lr}")
    if s.style == "wsd" and not s.decay_steps and s.min_lr != o.lr and s.min_lr > 0:
        raise ConfigError(
            f"schedule.style=wsd with schedule.min_lr={s.min_lr} but schedule.decay_steps=0 never "
            "decays: set schedule.decay_steps, or schedule.style=constant"
        )


def _check_model(config: Config) -> None:
    m = config.model
    kinds = layer_kinds(m.pattern, m.num_layers, m.last_layer_full)
    if "linear" in kinds:
        conv = m.linear.conv_kernel
        if conv != 0 and not 2 <= conv <= 8:
            raise ConfigError(
                f"model.linear.conv_kernel={conv}: must be 2 to 8 taps, or 0 for no convolution"
            )
        bound = m.linear.gate_lower_bound
        if m.linear.gate == "bounded" and not -5.0 <= bound < 0.0:
            raise ConfigError(f"model.linear.gate_lower_bound={bound}: must be in [-5, 0)")
    if m.mla.rope and m.mla.qk_shared_head_dim % 2:
        raise ConfigError(
            f"model.mla.qk_shared_head_dim={m.mla.qk_shared_head_dim}: must be even to be rotated "
            "(model.mla.rope=true)"
        )
    if m.mla.q_lora_rank is not None and m.mla.q_lora_rank < 1:
        raise ConfigError(
            f"model.mla.q_lora_rank={m.mla.q_lora_rank}: must be positive, or null for queries "
            "without a latent of their own"
        )
    if m.ffn == "moe":
        if not 0 < m.moe.top_k <= m.moe.num_experts:
            raise ConfigError(
                f"model.moe.top_k={m.moe.top_k}: must be between 1 and model.moe.num_experts="
                f"{m.moe.num_experts}"
            )
        _check_expert_groups(m.moe)
        if m.moe.first_dense_layers >= m.num_layers:
            raise ConfigError(
                f"model.moe.first_dense_layers={m.moe.first_dense_layers} leaves no MoE layer of "
                f"model.num_layers={m.num_layers}: lower it, or set model.ffn=dense"
            )


def _check_expert_groups(moe: MoEConfig) -> None:
    """Group-limited routing: groups of equal size, enough of them for top_k experts."""
    if moe.num_experts % moe.num_groups:
        raise ConfigError(
            f"model.moe.num_groups={moe.num_groups} must divide model.moe.num_experts="
            f"{moe.num_experts}; 1 switches groups off"
        )
    size = moe.num_experts // moe.num_groups
    if moe.num_groups > 1 and size < 2:
        raise ConfigError(
            f"model.moe.num_groups={moe.num_groups} leaves groups of {size} expert, and a group is "
            "judged by its two best: lower model.moe.num_groups"
        )
    if not 1 <= moe.top_groups <= moe.num_groups:
        raise ConfigError(
            f"model.moe.top_groups={moe.top_groups} must be in 1..model.moe.num_groups="
            f"{moe.num_groups}"
        )
    if moe.top_k > moe.top_groups * size:
        raise ConfigError(
            f"model.moe.top_k={moe.top_k} exceeds the {moe.top_groups * size} experts of "
            f"model.moe.top_groups={moe.top_groups} groups: raise model.moe.top_groups"
        )


def _check_context(config: Config, key: str, tokens: int) -> None:
    """How the tokens of a sequence are shared."""
    p = config.parallel
    segments = p.context * (2 if p.context_layout == "zigzag" and p.context > 1 else 1)
    if tokens % segments:
        other = (
            ", or parallel.context_layout=contiguous"
            if segments > p.context and tokens % p.context == 0
            else ""
        )
        raise ConfigError(
            f"{key}={tokens} must be a multiple of {segments}, the segments that parallel."
            f"context={p.context} with parallel.context_layout={p.context_layout} cuts a sequence "
            f"into: use {key}={_nearest(tokens, segments)}{other}"
        )
    own = tokens // p.context
    if p.tensor > 1 and p.sequence and own % p.tensor:
        raise ConfigError(
            f"{key}={tokens} / parallel.context={p.context} = {own} tokens must be a "
            f"multiple of parallel.tensor={p.tensor}: use {key}="
            f"{_nearest(tokens, math.lcm(segments, p.context * p.tensor))}, or set "
            "parallel.sequence=false"
        )


def _check_context_heads(config: Config) -> None:
    """Among which ranks heads are exchanged."""
    m, p = config.model, config.parallel
    if p.context_mode != "two_level":
        if p.context_heads is not None:
            raise ConfigError(
                f"parallel.context_heads={p.context_heads} with parallel.context_mode="
                f"{p.context_mode}: only parallel.context_mode=two_level reads it; set it to null"
            )
    elif p.context_heads is None or p.context_heads < 1 or p.context % p.context_heads:
        raise ConfigError(
            f"parallel.context_heads={p.context_heads} must divide parallel.context={p.context} "
            "with parallel.context_mode=two_level: set it to the number of context-parallel ranks "
            "in one node, or choose parallel.context_mode=state or heads"
        )
    key, exchange = _heads_exchanged(config)
    heads = m.num_heads // p.tensor
    linear = "linear" in layer_kinds(m.pattern, m.num_layers, m.last_layer_full)
    if linear and heads % exchange:
        raise ConfigError(
            f"model.num_heads={m.num_heads} / parallel.tensor={p.tensor} = {heads} heads must be a "
            f"multiple of {key}={exchange} with parallel.context_mode={p.context_mode}, which "
            "shares the heads of a rank among them: use parallel.context_mode=state, which needs "
            "no division of heads"
        )


def _heads_exchanged(config: Config) -> tuple[str, int]:
    """Among how many ranks KDA shares the heads of one, and the setting that says so."""
    p = config.parallel
    if p.context_mode == "two_level":
        return "parallel.context_heads", p.context_heads or 1
    return "parallel.context", p.context if p.context_mode == "heads" else 1


def _check_packing(stage: StageSettings) -> None:
    data, key = stage.data, stage.key("data")
    if data.packing == "best_fit" and data.overlong == "carry":
        raise ConfigError(
            f"{key}.overlong=carry with {key}.packing=best_fit: best fit has no open row that a "
            f"longer document could begin in; set {key}.overlong=split, or {key}.packing=documents"
        )
    if data.packing == "none" and data.loss == "answers":
        raise ConfigError(
            f"{key}.loss=answers with {key}.packing=none: only rows of whole documents know which "
            f"of their tokens are answers; set {key}.packing=best_fit (or documents), or "
            f"{key}.loss=all"
        )
    if data.packing != "none" and stage.context < 2:
        context = stage.key("context")
        raise ConfigError(
            f"{context}={stage.context} with {key}.packing={data.packing}: every token would be a "
            f"document of its own; raise {context} to 2 or more, or set {key}.packing=none"
        )


def _check_optimizer(config: Config) -> None:
    optim, heads = config.optim, config.model.num_heads
    muon = optim.muon
    if optim.qk_clip is not None and not optim.qk_clip > 0:
        raise ConfigError(
            f"optim.qk_clip={optim.qk_clip}: the bound of attention logits must be positive (the "
            "report's is 100), inf to record logits without clipping, or null for neither"
        )
    if not 0 <= muon.momentum < 1:
        raise ConfigError(f"optim.muon.momentum={muon.momentum}: must be in [0, 1)")
    if muon.newton_schulz_steps < 1:
        raise ConfigError(
            f"optim.muon.newton_schulz_steps={muon.newton_schulz_steps}: must be at least 1"
        )
    if not muon.update_rms > 0:
        raise ConfigError(f"optim.muon.update_rms={muon.update_rms}: must be positive")
    if muon.heads_per_matrix < 0 or (muon.heads_per_matrix and heads % muon.heads_per_matrix):
        raise ConfigError(
            f"optim.muon.heads_per_matrix={muon.heads_per_matrix}: must divide model.num_heads="
            f"{heads}, or be 0 for one matrix of all heads"
        )


def _nearest(value: int, step: int) -> int:
    return max(step, round(value / step) * step)


def _check_parallel(config: Config) -> None:
    m, p = config.model, config.parallel

    def divisible(key: str, value: int, by: str, divisor: int, remedy: str) -> None:
        if value % divisor:
            raise ConfigError(f"{key}={value} must be a multiple of {by}={divisor}: {remedy}")

    tensor = "lower parallel.tensor, or change the model"
    divisible("model.num_heads", m.num_heads, "parallel.tensor", p.tensor, tensor)
    divisible("model.vocab_size", m.vocab_size, "parallel.tensor", p.tensor, tensor)
    divisible("model.dense_ffn", m.dense_ffn, "parallel.tensor", p.tensor, tensor)
    chunk_layers(m, p)
    if p.virtual_pipeline > 1 and p.pipeline == 1:
        raise ConfigError(
            f"parallel.virtual_pipeline={p.virtual_pipeline} needs parallel.pipeline > 1: set it "
            "to 1, or add pipeline stages"
        )
    _check_context_heads(config)
    if m.ffn == "moe":
        experts = "lower it, or change model.moe"
        divisible("model.moe.num_experts", m.moe.num_experts, "parallel.expert", p.expert, experts)
        divisible(
            "model.moe.expert_ffn",
            m.moe.expert_ffn,
            "parallel.expert_tensor",
            p.expert_tensor,
            experts,
        )
        if m.moe.num_shared_experts:
            shared = m.moe.num_shared_experts * m.moe.expert_ffn
            divisible("shared expert width", shared, "parallel.tensor", p.tensor, tensor)
        width = m.moe.expert_ffn // p.expert_tensor
        if config.precision == "bf16" and (width % 8 or m.hidden_size % 8):
            raise ConfigError(
                f"model.hidden_size={m.hidden_size} and model.moe.expert_ffn / parallel."
                f"expert_tensor={width} must be multiples of 8 with precision=bf16: grouped matrix "
                "products need rows of whole 16-byte words"
            )
        if p.tensor > 1 and not p.sequence:
            raise ConfigError(
                f"parallel.sequence=false with parallel.tensor={p.tensor} and model.ffn=moe: every "
                "tensor-parallel rank would route all tokens again; set parallel.sequence=true, or "
                "model.ffn=dense"
            )
    elif p.expert > 1 or p.expert_tensor > 1:
        raise ConfigError(
            f"parallel.expert={p.expert}, parallel.expert_tensor={p.expert_tensor} with "
            "model.ffn=dense: there are no experts to split; set both to 1"
        )
    groups = p.recompute_head_groups
    if groups and p.recompute != "full":
        raise ConfigError(
            f"parallel.recompute_head_groups={groups} with parallel.recompute={p.recompute}: only "
            "parallel.recompute=full reads it; set it to 0 (parallel.recompute_modules=[core_attn] "
            "recomputes the core with parallel.recompute=selective)"
        )
    _, exchange = _heads_exchanged(config)
    per_rank = m.num_heads // p.tensor
    if groups and (groups < 0 or per_rank % groups or per_rank // groups % exchange):
        raise ConfigError(
            f"parallel.recompute_head_groups={groups} must cut the {per_rank} heads of a rank "
            f"(model.num_heads={m.num_heads} / parallel.tensor={p.tensor}) into equal groups"
            + (f" of a multiple of {exchange} heads, which KDA exchanges" if exchange > 1 else "")
        )
    unknown = set(p.recompute_modules) - set(RECOMPUTE_MODULES)
    if p.recompute == "selective" and (unknown or not p.recompute_modules):
        raise ConfigError(
            f"parallel.recompute_modules={list(p.recompute_modules)}: must be some of "
            f"{', '.join(RECOMPUTE_MODULES)}"
        )
    if config.precision == "bf16" and not p.distributed_optimizer:
        raise ConfigError(
            "precision=bf16 with parallel.distributed_optimizer=false: megatron-core's plain "
            "optimizer cannot save a model that keeps some parameters in fp32; set "
            "parallel.distributed_optimizer=true (it works on one rank too)"
        )
    if p.overlap_param_gather and not (p.distributed_optimizer and p.overlap_grad_reduce):
        raise ConfigError(
            "parallel.overlap_param_gather=true needs parallel.distributed_optimizer=true and "
            "parallel.overlap_grad_reduce=true"
        )
