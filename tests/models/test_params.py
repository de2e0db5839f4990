"""Parameter counts, against the published 48B model and the report's scaling ladder."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megakda.config.schema import LinearAttentionConfig, MLAConfig, ModelConfig, MoEConfig
from megakda.errors import ConfigError
from megakda.models.params import (
    count_layers,
    count_parameters,
    full_attention_parameters,
    linear_attention_parameters,
)

REFERENCE = json.loads(
    (Path(__file__).parents[1] / "reference" / "kimi_linear_paper.json").read_text()
)
LADDER = REFERENCE["scaling_ladder"]["rows"]


def model_48b():
    """The published 48B model, every size taken from the reference file."""
    ref = REFERENCE["model_48b"]
    kda, mla, moe = ref["kda"], ref["mla"], ref["moe"]
    assert kda["num_heads"] == ref["num_heads"] and mla["q_lora_rank"] is None
    assert not ref["tied_embeddings"]
    return ModelConfig(
        name="kimi_linear_48b",
        hidden_size=ref["hidden_size"],
        num_layers=ref["num_layers"],
        num_heads=ref["num_heads"],
        vocab_size=ref["vocab_size"],
        pattern="3:1",
        dense_ffn=ref["dense_ffn"],
        linear=LinearAttentionConfig(
            head_dim_k=kda["head_dim_k"],
            head_dim_v=kda["head_dim_v"],
            conv_kernel=kda["short_conv_kernel"],
            gate_rank=kda["gate_low_rank"],
            output_gate_rank=kda["output_gate_low_rank"],
        ),
        mla=MLAConfig(
            kv_lora_rank=mla["kv_lora_rank"],
            qk_nope_head_dim=mla["qk_nope_head_dim"],
            qk_shared_head_dim=mla["qk_shared_head_dim"],
            v_head_dim=mla["v_head_dim"],
        ),
        moe=MoEConfig(
            num_experts=moe["experts"],
            top_k=moe["top_k"],
            expert_ffn=moe["expert_ffn"],
            num_shared_experts=moe["shared_experts"],
            first_dense_layers=ref["first_dense_layers"],
        ),
    )


def ladder_model(row, pattern="3:1"):
    """One row of the scaling ladder: 64 experts, the rest as in the 48B model."""
    base = model_48b()
    return replace(
        base,
        hidden_size=row["hidden"],
        num_layers=row["layers"],
        num_heads=row["heads"],
        pattern=pattern,
        dense_ffn=row["dense_ffn"],
        moe=replace(base.moe, num_experts=64, expert_ffn=row["expert_ffn"]),
    )


def test_48b_exactly():
    count = count_parameters(model_48b())
    exact = REFERENCE["model_48b"]["params_exact"]
    assert count.total == exact["trainable"] == 49_122_675_072
    assert count.active == exact["active_excluding_input_embedding"] == 3_106_965_888
    assert count.embedding == count.lm_head == 163840 * 2304
    # The difference to the count with buffers is one expert bias per expert of each MoE layer.
    assert exact["with_expert_bias_buffers"] - count.total == 26 * 256


def test_config_defaults_are_the_48b_model():
    assert model_48b() == ModelConfig(
        name="kimi_linear_48b",
        hidden_size=2304,
        num_layers=27,
        num_heads=32,
        vocab_size=163840,
        dense_ffn=9216,
    )


@pytest.mark.parametrize("row", LADDER, ids=lambda row: row["printed_active"])
def test_ladder(row):
    count = count_parameters(ladder_model(row))
    assert count.active == pytest.approx(row["active"], abs=0.05e6)
    assert count.total == pytest.approx(row["total"], abs=0.005e9)
    variant = count_parameters(ladder_model(row, pattern="0:1"))
    assert variant.active == pytest.approx(row["active_mla_variant"], abs=0.05e6)
    assert count_layers(ladder_model(row))["full"] == row["mla_layers"]


def test_components_add_up():
    count = count_parameters(model_48b())
    assert sum(count.components.values()) == count.total
    assert sum(count.active_components.values()) == count.active
    assert count.components.keys() == count.active_components.keys()
    differs = {
        name for name, value in count.components.items() if value != count.active_components[name]
    }
    assert differs == {"embedding", "routed_experts"}


SMALL = ModelConfig(
    name="small",
    hidden_size=10,
    num_layers=4,
    num_heads=3,
    vocab_size=7,
    dense_ffn=11,
    linear=LinearAttentionConfig(
        head_dim_k=4, head_dim_v=5, conv_kernel=2, gate_rank=6, output_gate_rank=8
    ),
    mla=MLAConfig(kv_lora_rank=13, qk_nope_head_dim=4, qk_shared_head_dim=2, v_head_dim=5),
    moe=MoEConfig(
        num_experts=9, top_k=2, expert_ffn=12, num_shared_experts=2, first_dense_layers=1
    ),
)


def test_kda_layer_with_all_sizes_different():
    assert linear_attention_parameters(SMALL) == {
        "q_proj": 10 * 12,
        "k_proj": 10 * 12,
        "v_proj": 10 * 15,
        "q_conv1d": 2 * 12,
        "k_conv1d": 2 * 12,
        "v_conv1d": 2 * 15,
        "f_a_proj": 10 * 6,
        "f_b_proj": 6 * 12,
        "b_proj": 10 * 3,
        "A_log": 3,
        "dt_bias": 12,
        "g_a_proj": 10 * 8,
        "g_b_proj": 8 * 15,
        "o_norm": 5,
        "o_proj": 15 * 10,
    }


def test_mla_layer_with_all_sizes_different():
    assert full_attention_parameters(SMALL) == {
        "q_proj": 10 * 3 * 6,
        "kv_a_proj": 10 * 15,
        "kv_a_layernorm": 13,
        "kv_b_proj": 13 * 3 * 9,
        "o_proj": 15 * 10,
    }


def test_queries_with_a_latent_of_their_own():
    latent = replace(SMALL, mla=replace(SMALL.mla, q_lora_rank=7))
    found, plain = full_attention_parameters(latent), full_attention_parameters(SMALL)
    assert found.pop("q_a_proj") == 10 * 7 and found.pop("q_a_layernorm") == 7
    assert found.pop("q_b_proj") == 7 * 3 * 6 and plain.pop("q_proj")
    assert found == plain


def test_gdn_has_one_decay_per_head():
    kda = linear_attention_parameters(SMALL)
    gdn = linear_attention_parameters(replace(SMALL, linear=replace(SMALL.linear, mixer="gdn")))
    assert gdn["a_proj"] == 10 * 3 and gdn["dt_bias"] == 3 and gdn["A_log"] == 3
    changed = {"f_a_proj", "f_b_proj", "a_proj", "dt_bias"}
    assert {k: v for k, v in kda.items() if k not in changed} == {
        k: v for k, v in gdn.items() if k not in changed
    }


def test_switched_off_parts_have_no_parameters():
    kda = linear_attention_parameters(SMALL)
    bare = linear_attention_parameters(
        replace(SMALL, linear=replace(SMALL.linear, output_gate="none", conv_kernel=0))
    )
    assert kda.keys() - bare.keys() == {"g_a_proj", "g_b_proj"}
    assert bare["q_conv1d"] == bare["k_conv1d"] == bare["v_conv1d"] == 0
    swish = replace(SMALL, linear=replace(SMALL.linear, output_gate="swish"))
    assert linear_attention_parameters(swish) == kda


def test_feed_forwards_with_all_sizes_different():
    components = count_parameters(SMALL).components
    assert components["norms"] == 9 * 10
    assert components["dense_ffn"] == 3 * 10 * 11
    assert components["router"] == 3 * 9 * 10
    assert components["routed_experts"] == 3 * 9 * 3 * 10 * 12
    assert components["shared_experts"] == 3 * 2 * 3 * 10 * 12
    assert count_parameters(SMALL).active_components["routed_experts"] == 3 * 2 * 3 * 10 * 12


def test_dense_model_has_no_experts():
    count = count_parameters(replace(SMALL, ffn="dense"))
    assert count.components["dense_ffn"] == 4 * 3 * 10 * 11
    assert count.components["router"] == count.components["routed_experts"] == 0
    assert count.components["shared_experts"] == 0
    assert count.active == count.total - count.embedding


def test_unset_dense_ffn_is_no_matter_without_dense_layers():
    experts_only = ModelConfig(
        name="x",
        hidden_size=10,
        num_layers=2,
        num_heads=2,
        vocab_size=5,
        moe=MoEConfig(first_dense_layers=0),
    )
    assert count_parameters(experts_only).components["dense_ffn"] == 0


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"ffn": "sparse"}, "model.ffn"),
        ({"linear": LinearAttentionConfig(mixer="mamba2")}, "model.linear.mixer"),
        ({"pattern": "3-1"}, "model.pattern"),
    ],
)
def test_unknown_choices_are_refused(change, key):
    with pytest.raises(ConfigError, match=key):
        count_parameters(replace(SMALL, **change))
