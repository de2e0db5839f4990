"""config.json of published folders, in both directions."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from megakda.checkpoint import hf_config
from megakda.checkpoint.hf_import import dry_run
from megakda.config import compose
from megakda.errors import CheckpointError, ConfigError
from tests.checkpoint.hf_jobs import TINY, edit

CONFIG_48B = Path(__file__).with_name("kimi_linear_48b_config.json")


def test_the_published_48b_config_is_the_recipe(tmp_path):
    published = json.loads(CONFIG_48B.read_text())
    shutil.copy(CONFIG_48B, tmp_path / "config.json")
    model = hf_config.read(tmp_path)
    recipe = compose(["model=kimi_linear_48b"]).model
    assert model == dataclasses.replace(recipe, name=tmp_path.name)
    again = hf_config.write(model, "bfloat16", 1048576, bos=163584, eos=163586, pad=163839)
    differs = {key for key, value in published.items() if again.get(key) != value}
    # Code to run, and two settings that nothing reads
    assert differs <= {"auto_map", "head_dim", "tokenizer_class", "transformers_version"}
    assert hf_config.precision(tmp_path) == "bf16"
    assert hf_config.end_tokens(tmp_path) == {163586}


def test_moonlights_settings_are_read_as_deepseek_v3(tmp_path):
    """The kind of deepseek_v3 that megakda has: no query compression."""
    config = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": 163840,
        "hidden_size": 2048,
        "intermediate_size": 11264,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "n_shared_experts": 2,
        "n_routed_experts": 64,
        "routed_scaling_factor": 2.446,
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "qk_nope_head_dim": 128,
        "topk_method": "noaux_tc",
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "rms_norm_eps": 1e-5,
        "rope_theta": 50000.0,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = hf_config.read(tmp_path)
    assert (model.pattern, model.mla.rope, model.mla.rope_base) == ("0:1", True, 50000.0)
    assert (model.moe.num_experts, model.moe.top_k, model.moe.num_shared_experts) == (64, 6, 2)
    written = hf_config.write(model, "bfloat16", 8192)
    assert {key: written[key] for key in config} == config


def test_layers_from_the_lists_that_transformers_writes(folder):
    config = hf_config.load(folder)
    section = config.pop("linear_attn_config")
    del config["first_k_dense_replace"]
    config |= {
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        "mlp_layer_types": ["dense"] + ["sparse"] * 3,
        "linear_num_heads": section["num_heads"],
        "linear_head_dim": section["head_dim"],
        "linear_conv_kernel_dim": section["short_conv_kernel_size"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    assert hf_config.read(folder) == compose(TINY).model


def test_an_edited_config_counts_more_than_our_own_section(folder):
    edit(folder, routed_scaling_factor=1.5)
    model = hf_config.read(folder)
    assert model.moe.routed_scaling_factor == 1.5
    assert model.moe.router_dtype == "fp32"  # the section says fp64, of another model


WRONG_SETTINGS = {
    "another architecture": (
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
        ["model_type='llama'", "kimi_linear (KimiLinearForCausalLM)"],
    ),
    "tied": ({"tie_word_embeddings": True}, ["tie_word_embeddings=True"]),
    "biases": ({"attention_bias": True}, ["attention_bias=True"]),
    "softmax": (
        {"moe_router_activation_func": "softmax"},
        ["moe_router_activation_func='softmax'", '"sigmoid"'],
    ),
    "another activation": ({"hidden_act": "gelu"}, ["hidden_act='gelu'"]),
    "rotary hybrid": ({"mla_use_nope": False}, ["mla_use_nope=False"]),
    "sparse experts": ({"moe_layer_freq": 2}, ["moe_layer_freq=2"]),
    "not renormalised": ({"moe_renormalize": False}, ["moe_renormalize=False"]),
    "shared keys": ({"num_key_value_heads": 2}, ["num_key_value_heads=2", "only 4"]),
    "a head for the next tokens": ({"num_nextn_predict_layers": 1}, ["num_nextn_predict_layers=1"]),
    "quantised": ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
    "no such layer": (
        {"layer_types": ["sliding_attention"] * 4},
        ["layer_types=", "linear_attention and full_attention"],
    ),
    "layers that disagree": (
        {"layer_types": ["full_attention"] * 4},
        ["layer_types=", "agree with linear_attn_config"],
    ),
    "experts before dense layers": (
        {"mlp_layer_types": ["sparse", "dense", "sparse", "sparse"]},
        ["mlp_layer_types="],
    ),
    "nothing about a size": ({"hidden_size": None}, ["hidden_size=None must be a whole number"]),
    "groups that do not divide": ({"num_expert_group": 3}, ["model.moe.num_groups=3"]),
}


@pytest.mark.parametrize("case", WRONG_SETTINGS)
def test_settings_that_megakda_has_not(folder, case):
    settings, expected = WRONG_SETTINGS[case]
    edit(folder, **settings)
    with pytest.raises(CheckpointError) as error:
        dry_run(folder)
    for text in [str(folder / "config.json"), *expected]:
        assert text in str(error.value)


def test_settings_of_a_later_kda(folder):
    section = {**hf_config.load(folder)["linear_attn_config"], "gate_lower_bound": -5.0}
    edit(folder, linear_attn_config=section)
    with pytest.raises(CheckpointError, match="gate_lower_bound=-5.0 is not supported"):
        hf_config.read(folder)
    section = {"kda_layers": [1, 2], "full_attn_layers": [4], "num_heads": 4, "head_dim": 16}
    edit(folder, linear_attn_config=section)
    with pytest.raises(CheckpointError, match="each of the layers 1 to 4"):
        hf_config.read(folder)


UNPUBLISHABLE = {
    "model.linear.mixer=gdn": "Gated DeltaNet",
    "model.linear.gate=bounded": "softplus gate",
    "model.linear.output_gate=swish": "sigmoid output gate",
    "model.linear.output_gate=none": "sigmoid output gate",
    "model.linear.conv_kernel=0": "short convolutions",
    "model.linear.head_dim_v=32": "one head_dim",
    "model.linear.gate_rank=8": "one head_dim",
    "model.linear.norm_eps=1e-6": "one epsilon",
    "model.mla.kv_norm_eps=1e-5": "fix it at 1e-06",
    "model.mla.rope=true": "no positions beside KDA",
    "model.moe.num_shared_experts=0": "a shared expert",
}


@pytest.mark.parametrize("setting", UNPUBLISHABLE)
def test_models_without_a_published_format(setting):
    model = compose([*TINY, setting]).model
    with pytest.raises(ConfigError) as error:
        hf_config.write(model, "float32", 96)
    key = setting.split("=")[0]
    assert f"{key}=" in str(error.value) and UNPUBLISHABLE[setting] in str(error.value)
