"""What the settings of a published `config.json` say in megakda's words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megakda.checkpoint.hf_map import DEEPSEEK_V3, KIMI_LINEAR
from megakda.config.pattern import FULL, LINEAR, layer_kinds
from megakda.config.schema import (
    LinearAttentionConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
)
from megakda.errors import CheckpointError

ARCHITECTURES = {KIMI_LINEAR: "KimiLinearForCausalLM", DEEPSEEK_V3: "DeepseekV3ForCausalLM"}
KV_NORM_EPS = 1e-6
"""Of the norms on MLA's latents: written into the published code, not into its settings."""


class Settings:
    """The settings of a `config.json`, under any of their names, with errors that name the file."""

    def __init__(self, path: Path, config: dict[str, Any]):
        self.path, self.config = path, config

    def model(self) -> ModelConfig:
        """The model that they describe.

        Raises:
            CheckpointError: another architecture, or settings that megakda's model has not.
        """
        kind = self.config.get("model_type")
        names = self.config.get("architectures") or [ARCHITECTURES.get(str(kind))]
        if kind not in ARCHITECTURES or ARCHITECTURES[kind] not in names:
            raise CheckpointError(
                f"{self.path}: model_type={kind!r} with architectures={names} is another "
                f"architecture; megakda reads "
                + " and ".join(f"{k} ({a})" for k, a in ARCHITECTURES.items())
            )
        self._refuse_others()
        layers = self.whole("num_hidden_layers")
        heads = self.whole("num_attention_heads")
        kinds = [FULL] * layers
        linear = LinearAttentionConfig()
        if kind == KIMI_LINEAR:
            kinds, linear = self._linear(layers, heads)
        pattern, last_full = _pattern(kinds)
        dense = self._dense_layers(layers)
        return ModelConfig(
            name=self.path.parent.resolve().name,
            hidden_size=self.whole("hidden_size"),
            num_layers=layers,
            num_heads=heads,
            vocab_size=self.whole("vocab_size"),
            pattern=pattern,
            last_layer_full=last_full,
            ffn="dense" if dense == layers else "moe",
            dense_ffn=self.whole("intermediate_size"),
            norm_eps=self.number("rms_norm_eps"),
            init_std=self.number("initializer_range", default=0.02),
            linear=linear,
            mla=MLAConfig(
                q_lora_rank=self.whole("q_lora_rank", default=0) or None,
                kv_lora_rank=self.whole("kv_lora_rank"),
                qk_nope_head_dim=self.whole("qk_nope_head_dim"),
                qk_shared_head_dim=self.whole("qk_rope_head_dim"),
                v_head_dim=self.whole("v_head_dim"),
                kv_norm_eps=KV_NORM_EPS,
                rope=kind == DEEPSEEK_V3,
                rope_base=self._rope_base(),
            ),
            moe=self._experts(dense, layers),
        )

    def _experts(self, dense: int, layers: int) -> MoEConfig:
        default = MoEConfig()
        if dense == layers and self.get("num_experts", "n_routed_experts") is None:
            return default  # a dense model need not say
        top_k = self.whole("num_experts_per_token", "num_experts_per_tok")
        if self.get("moe_renormalize", "norm_topk_prob", default=True) != (top_k > 1):
            raise self.wrong(
                "moe_renormalize",
                self.get("moe_renormalize", "norm_topk_prob"),
                "true with several experts per token, and false with one: megakda renormalises "
                "the weights of several",
            )
        return MoEConfig(
            num_experts=self.whole("num_experts", "n_routed_experts", "num_local_experts"),
            top_k=top_k,
            expert_ffn=self.whole("moe_intermediate_size"),
            num_shared_experts=self.whole("num_shared_experts", "n_shared_experts"),
            first_dense_layers=dense,
            routed_scaling_factor=self.number("routed_scaling_factor"),
            num_groups=self.whole("num_expert_group", "n_group", default=1),
            top_groups=self.whole("topk_group", default=1),
        )

    def _refuse_others(self) -> None:
        """Settings that have one value in megakda."""
        heads = self.config.get("num_attention_heads")
        self.only("num_key_value_heads", heads, "every head has its own keys")
        self.only("hidden_act", "silu", "feed-forwards are SwiGLU")
        self.only("tie_word_embeddings", False, "embedding and output layer are apart")
        self.only("attention_bias", False, "no linear has a bias")
        self.only("moe_layer_freq", 1, "every layer after the first dense ones has experts")
        for key in ("moe_router_activation_func", "scoring_func"):
            self.only(key, "sigmoid", "scores are sigmoids")
        self.only("topk_method", "noaux_tc", "experts are chosen by score and bias")
        for key in ("num_nextn_predict_layers", "num_mtp_layers"):
            self.only(key, 0, "there is no head that predicts further tokens")
        self.only("quantization_config", None, "weights are F32, BF16 or F16")
        if self.config.get("model_type") == KIMI_LINEAR:
            self.only("mla_use_nope", True, "a hybrid has no rotary positions")
            # Of later architectures that keep the model_type
            for key in ("mla_use_output_gate", "routed_expert_hidden_size", "attn_res_block_size"):
                self.only(key, None, "Kimi Linear has no such part")
        else:
            self.only("rope_scaling", None, "rotary positions are not scaled")
            self.only("rope_interleave", True, "DeepSeek-V3 publishes rotated rows in pairs")
        if self.get("num_expert_group", "n_group", default=1) != 1:
            self.only("use_grouped_topk", True, "with more than one group it is in use")

    def _linear(self, layers: int, heads: int) -> tuple[list[str], LinearAttentionConfig]:
        """Kinds of all layers, and the KDA settings."""
        section = self.config.get("linear_attn_config")
        types = self.config.get("layer_types")
        listed = None
        if section is not None:
            if not isinstance(section, dict):
                raise self.wrong("linear_attn_config", section, "a JSON object")
            linear = Settings(self.path, section)
            known = {"kda_layers", "full_attn_layers", "num_heads", "head_dim"}
            for key in sorted(section.keys() - known - {"short_conv_kernel_size"}):
                linear.only(key, None, "Kimi Linear has no such setting")
            names = ("num_heads", "head_dim", "short_conv_kernel_size")
            listed = self._listed(section, layers)
        else:  # as transformers saves a config that it has made itself
            linear = self
            names = ("linear_num_heads", "linear_head_dim", "linear_conv_kernel_dim")
        if types is not None:
            words = {"linear_attention": LINEAR, "full_attention": FULL}
            if not isinstance(types, list) or not set(types) <= words.keys():
                raise self.wrong("layer_types", types, f"a list of {' and '.join(words)}")
            kinds = [words[word] for word in types]
            if len(kinds) != layers or (listed is not None and listed != kinds):
                raise self.wrong(
                    "layer_types", types, f"{layers} entries that agree with linear_attn_config"
                )
        elif listed is not None:
            kinds = listed
        else:
            raise CheckpointError(f"{self.path} has neither linear_attn_config nor layer_types")
        linear.only(names[0], heads, "KDA and MLA have the same number of heads")
        dim = linear.whole(names[1])
        return kinds, LinearAttentionConfig(
            head_dim_k=dim,
            head_dim_v=dim,
            conv_kernel=linear.whole(names[2]),
            gate_rank=dim,
            output_gate_rank=dim,
            norm_eps=self.number("rms_norm_eps"),
        )

    def _listed(self, section: dict[str, Any], layers: int) -> list[str]:
        """Kinds from the two lists of layers, which count from 1."""
        lists = {LINEAR: section.get("kda_layers"), FULL: section.get("full_attn_layers")}
        for name, value in lists.items():
            if not isinstance(value, list):
                raise self.wrong(f"linear_attn_config: {name} layers", value, "a list")
        every = sorted([*(lists[LINEAR] or []), *(lists[FULL] or [])])
        if every != list(range(1, layers + 1)):
            raise self.wrong(
                "linear_attn_config",
                section,
                f"each of the layers 1 to {layers} in kda_layers or full_attn_layers",
            )
        full = set(lists[FULL] or [])
        return [FULL if i in full else LINEAR for i in range(1, layers + 1)]

    def _dense_layers(self, layers: int) -> int:
        """How many layers, from the first, have a dense feed-forward."""
        types = self.config.get("mlp_layer_types")
        if types is None:
            return min(self.whole("first_k_dense_replace"), layers)
        dense = types.count("dense") if isinstance(types, list) else 0
        if types != ["dense"] * dense + ["sparse"] * (layers - dense):
            raise self.wrong("mlp_layer_types", types, f"{layers} entries, dense before sparse")
        self.only("first_k_dense_replace", dense, "as mlp_layer_types says")
        return dense

    def _rope_base(self) -> float:
        section = self.config.get("rope_parameters")  # as transformers 5 writes it
        if not isinstance(section, dict):
            return self.number("rope_theta", default=10000.0)
        inner = Settings(self.path, section)
        inner.only("rope_type", "default", "rotary positions are not scaled")
        return inner.number("rope_theta", default=10000.0)

    def get(self, *names: str, default: Any = None) -> Any:
        """The value under whichever of `names` is there."""
        for name in names:
            if self.config.get(name) is not None:
                return self.config[name]
        return default

    def whole(self, *names: str, default: int | None = None) -> int:
        """A whole number, not negative."""
        value = self.get(*names, default=default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.wrong(names[0], value, "a whole number")
        return value

    def number(self, *names: str, default: float | None = None) -> float:
        value = self.get(*names, default=default)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise self.wrong(names[0], value, "a number")
        return float(value)

    def only(self, name: str, value: Any, why: str) -> None:
        """Raises where a setting is there and says something else than `value`."""
        found = self.config.get(name)
        absent = found is None or (value is None and not found)
        if not absent and found != value:
            raise CheckpointError(
                f"{self.path}: {name}={found!r} is not supported, only {json.dumps(value)}: {why}"
            )

    def wrong(self, name: str, value: Any, rule: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {name}={value!r} must be {rule}")


def _pattern(kinds: Sequence[str]) -> tuple[Any, bool]:
    """The shortest `model.pattern` that gives `kinds`, and its `model.last_layer_full`."""
    kinds, layers = tuple(kinds), len(kinds)
    if FULL not in kinds:
        return "1:0", True
    for last_full in (True, False):
        for period in range(1, layers + 1):
            for linear in range(period):
                pattern = f"{linear}:{period - linear}"
                if layer_kinds(pattern, layers, last_full) == kinds:
                    return pattern, last_full
    return list(kinds), True
