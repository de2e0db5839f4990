"""`config.json` of a Hugging Face folder <-> `ModelConfig`, and what has no published format."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

from megakda import __version__
from megakda.checkpoint.folders import read_json
from megakda.checkpoint.hf_map import DEEPSEEK_V3, KIMI_LINEAR, family
from megakda.checkpoint.hf_settings import ARCHITECTURES, KV_NORM_EPS, Settings
from megakda.config.pattern import FULL, LINEAR, layer_kinds
from megakda.config.schema import (
    Config,
    LinearAttentionConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
)
from megakda.config.validate import validate
from megakda.errors import CheckpointError, ConfigError

CONFIG, GENERATION = "config.json", "generation_config.json"
_OWN = "megakda"  # our own section of config.json, which others leave alone


def check_publishable(model: ModelConfig) -> None:
    """Refuses what no published architecture can say.

    Raises:
        ConfigError: names the setting, its value and the reason.
    """
    kinds = layer_kinds(model.pattern, model.num_layers, model.last_layer_full)
    linear, mla, moe = model.linear, model.mla, model.moe

    def need(right: bool, key: str, why: str) -> None:
        if not right:
            value = reduce(getattr, key.split("."), model)
            raise ConfigError(
                f"model.{key}={value} cannot be published in a Hugging Face folder: {why}"
            )

    if LINEAR in kinds:
        need(
            linear.mixer == "kda",
            "linear.mixer",
            "there is no published format of Gated DeltaNet together with MLA",
        )
        need(linear.gate == "softplus", "linear.gate", "kimi_linear has the softplus gate")
        need(
            linear.output_gate == "sigmoid",
            "linear.output_gate",
            "kimi_linear has the sigmoid output gate",
        )
        need(linear.conv_kernel > 0, "linear.conv_kernel", "kimi_linear has short convolutions")
        need(
            linear.norm_eps == model.norm_eps,
            "linear.norm_eps",
            f"kimi_linear has one epsilon for all norms, and model.norm_eps={model.norm_eps}",
        )
        for name in ("head_dim_v", "gate_rank", "output_gate_rank"):
            need(
                getattr(linear, name) == linear.head_dim_k,
                f"linear.{name}",
                "kimi_linear has one head_dim for keys, values and the ranks of both gates, and "
                f"model.linear.head_dim_k={linear.head_dim_k}",
            )
    if FULL in kinds:
        need(
            mla.kv_norm_eps == KV_NORM_EPS,
            "mla.kv_norm_eps",
            f"the published architectures fix it at {KV_NORM_EPS}",
        )
        need(
            not mla.rope or LINEAR not in kinds,
            "mla.rope",
            "kimi_linear has no positions beside KDA layers",
        )
    if model.ffn == "moe":
        need(
            moe.num_shared_experts > 0,
            "moe.num_shared_experts",
            "the published architectures have a shared expert in every MoE layer",
        )


def write(
    model: ModelConfig,
    dtype: str,
    context: int,
    bos: int | None = None,
    eos: int | list[int] | None = None,
    pad: int | None = None,
) -> dict[str, Any]:
    """The contents of `config.json`.

    Besides the published settings it has a section `megakda` with those that change nothing about
    the numbers (the model's name, how its pattern is spelled, the rate of the routing biases), so
    that a model comes back with the settings it left with.

    Args:
        dtype: of the bulk of the weights, float32 or bfloat16.
        context: the longest sequence that the model is meant for, in tokens.
        bos, eos, pad: ids of special tokens.

    Raises:
        ConfigError: no published format.
    """
    check_publishable(model)
    config = {
        "architectures": [ARCHITECTURES[family(model)]],
        **_published(model),
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": pad,
        "dtype": dtype,
        _CONTEXT[family(model)]: context,
        _OWN: {"version": __version__, "model": dataclasses.asdict(model)},
    }
    return dict(sorted(config.items()))


_CONTEXT = {KIMI_LINEAR: "model_max_length", DEEPSEEK_V3: "max_position_embeddings"}


def _published(model: ModelConfig) -> dict[str, Any]:
    """What the published settings say of a model."""
    kinds = layer_kinds(model.pattern, model.num_layers, model.last_layer_full)
    linear, mla, moe = model.linear, model.mla, model.moe
    dense = moe.first_dense_layers if model.ffn == "moe" else model.num_layers
    common = {
        "model_type": family(model),
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.dense_ffn,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_heads,
        "q_lora_rank": mla.q_lora_rank,
        "kv_lora_rank": mla.kv_lora_rank,
        "qk_nope_head_dim": mla.qk_nope_head_dim,
        "qk_rope_head_dim": mla.qk_shared_head_dim,
        "v_head_dim": mla.v_head_dim,
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": model.norm_eps,
        "initializer_range": model.init_std,
        "tie_word_embeddings": False,
        "use_cache": True,
        "first_k_dense_replace": dense,
        "moe_layer_freq": 1,
        "moe_intermediate_size": moe.expert_ffn,
        "routed_scaling_factor": moe.routed_scaling_factor,
        "topk_group": moe.top_groups,
        "num_nextn_predict_layers": 0,
    }
    # A single expert's weight is its score, not renormalised to 1.
    renormalize = moe.top_k > 1
    if family(model) == DEEPSEEK_V3:
        return {
            **common,
            "n_routed_experts": moe.num_experts,
            "num_experts_per_tok": moe.top_k,
            "n_shared_experts": moe.num_shared_experts,
            "n_group": moe.num_groups,
            "norm_topk_prob": renormalize,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "rope_theta": mla.rope_base,
            "rope_interleave": True,
        }
    return {
        **common,
        "linear_attn_config": {
            "kda_layers": [i for i, kind in enumerate(kinds, 1) if kind == LINEAR],
            "full_attn_layers": [i for i, kind in enumerate(kinds, 1) if kind == FULL],
            "num_heads": model.num_heads,
            "head_dim": linear.head_dim_k,
            "short_conv_kernel_size": linear.conv_kernel,
        },
        "num_experts": moe.num_experts,
        "num_experts_per_token": moe.top_k,
        "num_shared_experts": moe.num_shared_experts,
        "num_expert_group": moe.num_groups,
        "use_grouped_topk": True,
        "moe_renormalize": renormalize,
        "moe_router_activation_func": "sigmoid",
        "mla_use_nope": True,
        "rope_theta": mla.rope_base,
        # transformers 5.23 cannot count the tokens in a cache without an attention layer.
        "use_cache": FULL in kinds,
    }


def load(folder: Path) -> dict[str, Any]:
    """`config.json` as it stands.

    Raises:
        CheckpointError: not there, or not a JSON object.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(
            f"{path} cannot be read, there is no such file: name a Hugging Face folder, with "
            f"{CONFIG} and *.safetensors"
        )
    return read_json(path)


def read(folder: Path) -> ModelConfig:
    """The model that a Hugging Face folder holds.

    Raises:
        CheckpointError: no `config.json`, another architecture, or a setting that megakda's model
            has not; names the setting, its value and what is supported.
    """
    reader = Settings(folder / CONFIG, load(folder))
    model = reader.model()
    try:
        validate(Config(model=model), world_size=1)
        check_publishable(model)
    except ConfigError as error:
        raise CheckpointError(f"{reader.path}: {error}") from error
    return _with_own_settings(model, reader.config.get(_OWN))


def precision(folder: Path) -> str:
    """The precision that fits a Hugging Face folder's weights: "bf16" or "fp32".

    Raises:
        CheckpointError: no `config.json`.
    """
    config = load(folder)
    return "bf16" if config.get("dtype", config.get("torch_dtype")) == "bfloat16" else "fp32"


def context(folder: Path) -> int:
    """The longest sequence that a Hugging Face folder's model is meant for, in tokens.

    Raises:
        CheckpointError: no `config.json`, or one that does not say.
    """
    settings, names = Settings(folder / CONFIG, load(folder)), tuple(_CONTEXT.values())
    found = settings.whole(*names)
    if found < 1:
        raise settings.wrong(names[0], found, "at least 1")
    return found


def generation_config(folder: Path) -> dict[str, Any]:
    """`generation_config.json`; {} where there is none.

    Raises:
        CheckpointError: it cannot be read.
    """
    path = folder / GENERATION
    return read_json(path) if path.is_file() else {}


def end_tokens(folder: Path) -> set[int]:
    """Ids that end an answer, as `config.json` and `generation_config.json` name them.

    Raises:
        CheckpointError: one of them cannot be read.
    """
    configs = (load(folder), generation_config(folder))
    return ids_in(*(config.get("eos_token_id") for config in configs))


def ids_in(*values: Any) -> set[int]:
    """The ids in settings that hold one, a list of them, or null."""
    found: set[int] = set()
    for ids in values:
        found |= set(ids if isinstance(ids, list) else [] if ids is None else [ids])
    return found


def model_of(settings: dict[str, Any]) -> ModelConfig:
    """The model settings of a manifest; what an older one lacks is at its default.

    Raises:
        TypeError: not settings of a model, or of a newer version.
    """
    groups: dict[str, Callable[..., Any]] = {
        "linear": LinearAttentionConfig,
        "mla": MLAConfig,
        "moe": MoEConfig,
    }
    return ModelConfig(
        **{key: groups[key](**v) if key in groups else v for key, v in settings.items()}
    )


def _with_own_settings(model: ModelConfig, section: Any) -> ModelConfig:
    """`model` as megakda spelled it when it wrote the folder, where that is the same model."""
    try:
        own = model_of(section["model"])
        same = _published(own) == _published(model)
    except (AttributeError, ConfigError, KeyError, TypeError):
        return model  # written by others, or by another version: the published settings say it all
    return own if same else model
