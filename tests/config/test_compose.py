"""Recipes compose, and mistakes are answered with the key, the value, the rule and the remedy."""

import subprocess
import sys
import time

import pytest

from megakda.config import compose, recipes_dir, to_yaml, validate
from megakda.errors import ConfigError


def test_every_recipe_of_every_group_composes():
    for path in sorted(recipes_dir().rglob("*.yaml")):
        group = path.parent.relative_to(recipes_dir())
        if str(group) not in (".", "cluster"):  # clusters are read by the planner alone
            name = path.relative_to(recipes_dir() / group.parts[0]).with_suffix("")
            compose([f"{group.parts[0]}={name}"])


def test_contract_names_can_be_overridden():
    config = compose(
        [
            "experiment=quickstart",
            "model=tiny",
            "data=stdlib",
            "model.pattern=1:1",
            "model.num_layers=8",
            "model.hidden_size=64",
            "model.num_heads=2",
            "model.ffn=dense",
            "parallel.tensor=2",
            "parallel.sequence=false",
            "parallel.pipeline=2",
            "parallel.virtual_pipeline=2",
            "parallel.context=1",
            "parallel.expert=1",
            "parallel.expert_tensor=1",
            "train.steps=4",
            "train.seed=7",
            "train.context=32",
            "train.global_batch=8",
            "train.micro_batch=2",
            "train.out=/tmp/x",
            "train.save_every=2",
            "train.resume=none",
            "precision=bf16",
            "schedule.warmup_steps=0",
            "schedule.decay_steps=0",
        ]
    )
    derived = validate(config, world_size=4)
    assert config.model.pattern == "1:1"
    assert (derived.data_parallel, derived.micro_batches, derived.tokens_per_step) == (1, 4, 256)


def test_explicit_pattern_from_the_command_line():
    config = compose(["model.pattern=[linear,full,kda,mla]"])
    assert config.model.pattern == ["linear", "full", "kda", "mla"]
    validate(config, world_size=1)


def test_saved_config_composes_to_itself(tmp_path):
    from omegaconf import OmegaConf

    from megakda.config.compose import from_tree
    from megakda.config.schema import Config

    config = compose(["model=kimi_linear_48b", "parallel=tp2"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    loaded = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(tmp_path / "config.yaml"))
    assert from_tree(loaded) == config


COMPOSE_ERRORS = {
    "mistyped key": (
        ["model.hiden_size=3"],
        ["model.hiden_size", "did you mean model.hidden_size"],
    ),
    "mistyped top key": (["precission=bf16"], ["precission", "did you mean precision"]),
    "appended key": (["+model.color=red"], ["model.color", "no such setting"]),
    "mistyped group": (["modle=tiny"], ["modle", "did you mean model"]),
    "unknown recipe": (["model=tinny"], ["model=tinny", "did you mean tiny", "kimi_linear_48b"]),
    "unknown experiment": (["experiment=pretrain/nope"], ["experiment=pretrain/nope"]),
    "wrong type": (["model.num_layers=many"], ["model.num_layers", "many", "Integer"]),
    "unparsable": (["train.steps=="], ["train.steps==", "key=value"]),
    "a stage of no stages": (
        ["schedule.stages.0.kind=cosine"],
        ["schedule.stages.0.kind=cosine", "null", "'schedule.stages=[{kind"],
    ),
    "a stage that is not there": (
        ["experiment=pretrain/kimi_linear_48b", "schedule.stages.5.steps=3"],
        ["schedule.stages.5.steps=3", "has 5 stages", "schedule.stages.4", "whole list"],
    ),
    "a stage without a number": (
        ["experiment=pretrain/kimi_linear_48b", "schedule.stages.last.steps=3"],
        ["schedule.stages.last.steps=3", "has 5 stages"],
    ),
    "an entry of no list": (["+data.weights.0=3"], ["+data.weights.0=3", "null"]),
}


@pytest.mark.parametrize("case", COMPOSE_ERRORS)
def test_composition_errors_name_key_value_and_remedy(case):
    overrides, expected = COMPOSE_ERRORS[case]
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    for text in expected:
        assert text in str(caught.value)


@pytest.mark.parametrize("sign", ["", "+", "++"])
def test_a_part_of_a_stage_that_the_recipe_leaves_out(sign):
    said = ["schedule.stages.1.tokens=861.0e9", "schedule.stages.4.data={packing: best_fit}"]
    stages = compose(["experiment=pretrain/kimi_linear_48b", *(sign + o for o in said)])
    expected = compose(["experiment=pretrain/kimi_linear_48b"]).schedule.stages
    expected[1]["tokens"] = 861.0e9
    expected[4]["data"] = {"packing": "best_fit"}
    assert stages.schedule.stages == expected


# case: overrides, ranks, what the message must say
RULES = {
    "heads by TP": (["parallel.tensor=3"], 3, ["model.num_heads=4", "parallel.tensor=3"]),
    "vocabulary by TP": (
        ["parallel.tensor=4", "model.vocab_size=322"],
        4,
        ["model.vocab_size=322", "parallel.tensor=4"],
    ),
    "layers by PP": (
        ["parallel.pipeline=3"],
        3,
        ["model.num_layers=4", "parallel.pipeline=3", "parallel.pipeline_layers=[1,2,1]"],
    ),
    "layers by PP x VPP": (
        ["parallel=pp2_vpp2", "model.num_layers=6"],
        2,
        ["model.num_layers=6", "parallel.virtual_pipeline=2"],
    ),
    "pipeline_layers sum": (
        ["parallel.pipeline=2", "parallel.pipeline_layers=[1,2]"],
        2,
        ["parallel.pipeline_layers=[1, 2]", "model.num_layers=4"],
    ),
    "more chunks than layers": (["parallel.pipeline=8"], 8, ["fewer pipeline stages"]),
    "VPP without PP": (["parallel.virtual_pipeline=2"], 1, ["parallel.virtual_pipeline=2"]),
    "experts by EP": (["parallel.expert=3"], 3, ["model.moe.num_experts=8", "parallel.expert=3"]),
    "expert width by expert TP": (
        ["parallel.expert_tensor=5"],
        5,
        ["model.moe.expert_ffn=96", "parallel.expert_tensor=5"],
    ),
    "experts in a dense model": (
        ["model.ffn=dense", "parallel.expert=2"],
        2,
        ["parallel.expert=2", "model.ffn=dense"],
    ),
    "batch by DP x micro-batch": (
        ["train.global_batch=6", "train.micro_batch=2"],
        2,
        ["train.global_batch=6", "2 x 2 = 4", "train.global_batch=4"],
    ),
    "micro-batches by PP when interleaved": (
        ["parallel=pp2_vpp2", "train.global_batch=3"],
        2,
        ["train.global_batch=3", "train.global_batch=4"],
    ),
    "ranks by model parallelism": (
        ["parallel.tensor=2"],
        3,
        ["3 ranks", "parallel.tensor=2", "torchrun"],
    ),
    "ranks by expert parallelism": (["parallel.expert=4"], 2, ["2 ranks", "parallel.expert=4"]),
    "MoE under TP without SP": (
        ["parallel.tensor=2", "parallel.sequence=false"],
        2,
        ["parallel.sequence=false", "model.ffn=moe"],
    ),
    "context by TP with SP": (
        ["parallel.tensor=2", "train.context=33"],
        2,
        ["train.context=33", "parallel.sequence=false"],
    ),
    "context by segments": (
        ["parallel.context=2", "train.context=34"],
        2,
        ["train.context=34", "multiple of 4", "parallel.context_layout=zigzag", "contiguous"],
    ),
    "share of the context by TP with SP": (
        ["parallel.tensor=2", "parallel.context=2", "train.context=66"]
        + ["parallel.context_layout=contiguous"],
        4,
        ["train.context=66 / parallel.context=2 = 33", "parallel.tensor=2", "train.context=6"],
    ),
    "heads by CP": (
        ["parallel.context=3", "parallel.context_mode=heads", "train.context=48"],
        3,
        ["model.num_heads=4", "parallel.context=3", "parallel.context_mode=state"],
    ),
    "two levels without a size": (
        ["parallel.context=4", "parallel.context_mode=two_level", "train.context=64"],
        4,
        ["parallel.context_heads=None", "parallel.context=4", "in one node"],
    ),
    "two levels that do not divide": (
        [
            "parallel.context=4",
            "parallel.context_mode=two_level",
            "parallel.context_heads=3",
            "train.context=64",
        ],
        4,
        ["parallel.context_heads=3", "parallel.context=4"],
    ),
    "a size of heads groups without two levels": (
        ["parallel.context=2", "parallel.context_heads=2", "train.context=64"],
        2,
        ["parallel.context_heads=2", "parallel.context_mode=state", "null"],
    ),
    "unknown layout": (["parallel.context_layout=zig"], 1, ["parallel.context_layout=zig"]),
    "flash-attn in fp32": (
        ["runtime.attention=flash_attn"],
        1,
        ["runtime.attention=flash_attn", "precision=fp32", "precision=bf16"],
    ),
    "head groups without recomputation": (
        ["parallel.recompute_head_groups=2"],
        1,
        ["parallel.recompute_head_groups=2", "parallel.recompute=none", "parallel.recompute=full"],
    ),
    "head groups that do not divide": (
        ["parallel.recompute=full", "parallel.recompute_head_groups=3"],
        1,
        ["parallel.recompute_head_groups=3", "4 heads", "model.num_heads=4"],
    ),
    "best fit that carries over": (
        ["data.packing=best_fit", "data.overlong=carry"],
        1,
        ["data.overlong=carry", "data.packing=best_fit", "data.overlong=split"],
    ),
    "documents of one token": (
        ["data.packing=documents", "train.context=1"],
        1,
        ["train.context=1", "data.packing=documents"],
    ),
    "unquoted pattern": (["model.pattern=181"], 1, ["model.pattern", "181", "quote"]),
    "pattern length": (["model.pattern=[full,full]"], 1, ["model.pattern", "4"]),
    "choice": (["model.linear.output_gate=relu"], 1, ["model.linear.output_gate=relu", "swish"]),
    "bounded gate range": (
        ["model.linear.gate=bounded", "model.linear.gate_lower_bound=-9"],
        1,
        ["model.linear.gate_lower_bound=-9", "[-5, 0)"],
    ),
    "conv taps": (["model.linear.conv_kernel=1"], 1, ["model.linear.conv_kernel=1"]),
    "top-k": (["model.moe.top_k=9"], 1, ["model.moe.top_k=9", "num_experts=8"]),
    "q-latent": (["model.mla.q_lora_rank=0"], 1, ["model.mla.q_lora_rank=0", "null"]),
    "groups": (["model.moe.num_groups=3"], 1, ["model.moe.num_groups=3", "num_experts=8"]),
    "group-of-one": (["model.moe.num_groups=8"], 1, ["model.moe.num_groups=8", "groups of 1"]),
    "top-groups": (
        ["model.moe.num_groups=4", "model.moe.top_groups=5"],
        1,
        ["model.moe.top_groups=5", "model.moe.num_groups=4"],
    ),
    "groups-too-few": (
        ["model.moe.num_groups=4", "model.moe.top_k=3"],
        1,
        ["model.moe.top_k=3", "2 experts", "raise model.moe.top_groups"],
    ),
    "no MoE layer left": (["model.moe.first_dense_layers=4"], 1, ["first_dense_layers=4"]),
    "warmup longer than the run": (
        ["schedule=cosine", "schedule.warmup_steps=10", "train.steps=5"],
        1,
        ["schedule.warmup_steps=10 and a step of schedule.style=cosine", "train.steps=5"],
    ),
    "warmup longer than the budget": (
        ["schedule.warmup_steps=10", "schedule.decay_steps=5", "train.steps=null"]
        + ["train.context=64", "train.global_batch=8", "train.tokens=5120"],
        1,
        [
            "schedule.warmup_steps=10 and schedule.decay_steps=5 do not fit in the 10 steps that "
            "train.tokens=5,120 come to"
        ],
    ),
    "a budget below a step": (
        ["train.steps=null", "train.tokens=1000"],
        1,
        ["train.tokens=1,000", "less than half a step", "8 x train.context=4096 = 32,768"],
    ),
    "a budget without end": (["train.tokens=inf"], 1, ["train.tokens=inf", "whole number"]),
    "a fraction of a token": (["train.tokens=1000000.5"], 1, ["train.tokens=1000000.5", "whole"]),
    "workers": (["data.num_workers=-1"], 1, ["data.num_workers=-1", "not be negative"]),
    "no ranks": ([], 0, ["0 ranks", "at least 1"]),
    "fewer ranks than none": ([], -2, ["-2 ranks", "at least 1"]),
    "tau of zero": (["optim.qk_clip=0"], 1, ["optim.qk_clip=0", "positive", "null"]),
    "negative tau": (["optim.qk_clip=-3"], 1, ["optim.qk_clip=-3", "positive"]),
    "tau is no number": (["optim.qk_clip=nan"], 1, ["optim.qk_clip=nan", "positive"]),
    "momentum": (["optim.muon.momentum=1.0"], 1, ["optim.muon.momentum=1.0", "[0, 1)"]),
    "newton-schulz": (
        ["optim.muon.newton_schulz_steps=0"],
        1,
        ["optim.muon.newton_schulz_steps=0", "at least 1"],
    ),
    "update size": (["optim.muon.update_rms=0"], 1, ["optim.muon.update_rms=0", "positive"]),
    "groups of heads": (
        ["optim.muon.heads_per_matrix=3"],
        1,
        ["optim.muon.heads_per_matrix=3", "model.num_heads=4"],
    ),
    "recompute module": (
        ["parallel.recompute=selective", "parallel.recompute_modules=[attn]"],
        1,
        ["attn", "core_attn"],
    ),
    "bf16 with the plain optimizer": (
        ["precision=bf16", "parallel.distributed_optimizer=false"],
        1,
        ["precision=bf16", "parallel.distributed_optimizer=true"],
    ),
    "bf16 expert width": (
        ["precision=bf16", "model.moe.expert_ffn=100"],
        1,
        ["parallel.expert_tensor=100", "multiples of 8"],
    ),
    "overlap without its parts": (
        ["parallel.overlap_param_gather=true"],
        1,
        ["parallel.overlap_grad_reduce=true"],
    ),
    "not positive": (["train.micro_batch=0"], 1, ["train.micro_batch=0", "positive"]),
}


@pytest.mark.parametrize("case", RULES)
def test_rules_between_settings(case):
    overrides, ranks, expected = RULES[case]
    with pytest.raises(ConfigError) as caught:
        validate(compose(overrides), ranks)
    for text in expected:
        assert text in str(caught.value)


def test_uneven_pipeline_of_the_48b_model():
    config = compose(["model=kimi_linear_48b", "parallel.pipeline=4"])
    with pytest.raises(ConfigError, match=r"parallel\.pipeline_layers=\[7,7,7,6\]"):
        validate(config, 4)
    config = compose(
        ["model=kimi_linear_48b", "parallel.pipeline=4", "parallel.pipeline_layers=[6,7,7,7]"]
    )
    validate(config, 4)


@pytest.mark.parametrize(
    "override", ["model.hiden_size=3", "model=tinny", "parallel.tensor=3", "train.global_batch=7"]
)
def test_the_command_line_fails_fast_without_process_groups(override, tmp_path):
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "megakda.train", override, f"train.out={tmp_path / 'run'}"],
        env={"PATH": "", "WORLD_SIZE": "2", "RANK": "0", "PYTHONPATH": str(recipes_dir().parent)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert override.split("=")[0] in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
    # A rank alone in a world of two would wait for the other for minutes.
    assert time.monotonic() - started < 30
