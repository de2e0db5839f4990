"""A run divided down keeps what makes it itself, and works at its few ranks whatever it was."""

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megakda.config import compose, to_yaml, validate
from megakda.config.pattern import layer_kinds
from megakda.config.scale import _shares, scaled
from megakda.config.schema import ScaleConfig, ScheduleConfig
from megakda.config.stages import read_stages
from megakda.errors import ConfigError

PRETRAIN = "experiment=pretrain/kimi_linear_48b"
SMALL = ScaleConfig(
    steps=20, ranks=2, layers=4, width=24, heads=8, head_dim=8, experts=32, context=256, batch=4
)


def kinds(model):
    return layer_kinds(model.pattern, model.num_layers, model.last_layer_full)


def test_full_changes_nothing():
    config = compose([PRETRAIN])
    assert config == compose([PRETRAIN, "scale=full"])
    assert scaled(config) is config


def test_the_recipe_is_what_these_tests_scale_by():
    from omegaconf import OmegaConf

    from megakda.config import recipes_dir

    written = OmegaConf.to_container(OmegaConf.load(recipes_dir() / "scale" / "smoke.yaml"))
    assert ScaleConfig(**written) == SMALL


def test_a_scaled_run_says_in_full_what_it_is():
    """Its config.yaml is not scaled again, and composes without the recipe."""
    from omegaconf import OmegaConf

    from megakda.config.compose import from_tree
    from megakda.config.schema import Config

    config = compose([PRETRAIN, "scale=smoke"])
    assert config.scale == ScaleConfig()
    tree = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(to_yaml(config)))
    assert from_tree(tree) == config


def test_the_48b_model():
    config, full = compose([PRETRAIN, "scale=smoke"]), compose([PRETRAIN])
    validate(config, 2)
    model = config.model
    assert (
        kinds(model) == (*["linear"] * 3, "full", *["linear"] * 2, "full") == kinds(full.model)[-7:]
    )
    assert (model.hidden_size, model.num_heads, model.vocab_size) == (96, 4, 320)
    assert (model.linear.head_dim_k, model.mla.kv_lora_rank, model.mla.q_lora_rank) == (
        16,
        64,
        None,
    )
    assert (model.moe.num_experts, model.moe.top_k, model.moe.first_dense_layers) == (8, 2, 1)
    same = ("pattern", "last_layer_full", "ffn", "norm_eps", "init_std", "name")
    assert all(getattr(model, key) == getattr(full.model, key) for key in same)
    assert (config.optim, config.precision) == (full.optim, full.precision)
    assert (config.parallel.pipeline, config.parallel.pipeline_layers) == (2, [4, 3])
    assert config.parallel.recompute == full.parallel.recompute
    assert config.train.out == "runs/smoke/kimi_linear_48b"
    assert not config.logging.wandb and full.logging.wandb
    assert (config.data.paths, config.data.prepare) == (["data/stdlib/stdlib"], "stdlib")


def test_every_stage_keeps_its_kind_target_and_place():
    config, full = compose([PRETRAIN, "scale=smoke"]), compose([PRETRAIN])
    ours, theirs = validate(config, 2).timetable.stages, validate(full, 64).timetable.stages
    assert [s.steps for s in ours] == [2, 9, 5, 2, 2]
    for mine, other in zip(ours, theirs, strict=True):
        for key in ("kind", "lr_from", "lr_to", "expert_bias_rate"):
            assert getattr(mine, key) == getattr(other, key)
        assert other.context / mine.context == 128
    assert [s.batch for s in ours] == [4, 4, 4, 4, 1]


@pytest.mark.parametrize(
    ("experiment", "layout"),
    [
        ("pretrain/kimi_linear_48b", (1, 2, 1, 1)),
        ("long_context/128k", (1, 1, 2, 2)),
        ("ladder/653m_mla", (1, 1, 1, 2)),
        ("quickstart", (1, 1, 1, 1)),
    ],
)
def test_the_layout_keeps_its_most_telling_part(experiment, layout):
    p = compose([f"experiment={experiment}", "scale=smoke"]).parallel
    assert (p.tensor, p.pipeline, p.context, p.expert) == layout


@pytest.mark.parametrize(("pattern", "layers"), [("0:1", 4), ("1:1", 4), ("7:1", 8), ("15:1", 16)])
def test_patterns_keep_a_whole_period(pattern, layers):
    base = ["experiment=ablation/hybrid_ratio", f"model.pattern={pattern}"]
    assert kinds(compose([*base, "scale=smoke"]).model) == kinds(compose(base).model)[:layers]


def test_a_pattern_by_name_keeps_its_layers():
    model = compose(["model.pattern=[linear,full,full,linear]", "scale=smoke"]).model
    assert kinds(model) == ("linear", "full", "full", "linear")


STAGES = (
    "schedule.stages=["
    "{kind: warmup, tokens: 1e6, batch: {from: 64, to: 512}},"
    "{kind: constant, steps: 900, context: 8192, batch: 256, micro_batch: 4},"
    "{kind: linear, to: 0.0, data: {paths: [a, b], weights: [1, 2], packing: documents}}]"
)


def test_ramps_and_data_of_stages():
    base = [
        STAGES,
        "train.global_batch=512",
        "train.steps=1000",
        "train.context=64",
        "data=indexed",
    ]
    small = ["scale=smoke", "scale.batch=16"]
    stages = compose([*base, *small]).schedule.stages
    assert [stage["batch"] for stage in stages] == [{"from": 2, "to": 16}, 8, 16]
    assert [stage["micro_batch"] for stage in stages] == [1, 2, 1]
    assert [stage["context"] for stage in stages] == [16, 256, 16]
    assert [stage.get("data") for stage in stages] == [None, None, {"packing": "documents"}]
    assert sum(stage["steps"] for stage in stages) == 20


def test_weights_are_not_used_and_a_run_can_be_repeated():
    with pytest.warns(UserWarning, match=r"train\.weights=runs/before is not used"):
        config = compose([PRETRAIN, "scale=smoke", "train.weights=runs/before"])
    assert (config.train.weights, config.train.resume) == (None, "auto")
    assert compose(["scale=smoke", "train.resume=none"]).train.resume == "none"


def test_the_short_form_becomes_stages():
    schedule = compose(["schedule=cosine", "schedule.warmup_steps=5", "scale=smoke"]).schedule
    assert [stage["kind"] for stage in schedule.stages] == ["warmup", "cosine"]
    assert replace(schedule, stages=None) == ScheduleConfig()
    beside = compose([PRETRAIN, "schedule=cosine", "scale=smoke"]).schedule
    assert beside.style == "cosine"


def test_prepared_data_get_the_tokenizer_that_the_vocabulary_has_room_for():
    data = compose(["scale=smoke", "data.tokenizer=hf:somewhere"]).data
    assert (data.prepare, data.tokenizer) == ("stdlib", "byte")


def test_answers_are_learned_from_conversations():
    data = compose(["experiment=sft/chat", "scale=smoke"]).data
    assert (data.paths, data.loss) == (["data/stdlib/stdlib_chat"], "answers")
    assert (data.prepare, data.packing) == ("stdlib_chat", "best_fit")


def test_what_is_smaller_stays_as_it_is():
    config = compose(["scale=smoke", "train.steps=3", "train.context=32", "train.global_batch=2"])
    assert (config.train.steps, config.train.context, config.train.global_batch) == (3, 32, 2)
    for out in ("/tmp/mine", "", "runs_of_mine/a"):
        assert compose(["scale=smoke", f"train.out={out}"]).train.out == out


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["scale.ranks=0"], ["scale.ranks=0", "positive"]),
        (["scale.steps=0"], ["scale.steps=0", "scale=full"]),
        ([PRETRAIN, "scale.steps=4"], ["scale.steps=4", "5 stages"]),
        (["model.pattern=3-1"], ["model.pattern='3-1'", "a:b"]),
        (["scale=smok"], ["scale=smok", "did you mean smoke"]),
        # What the real run refuses, at its own sizes
        *(
            ([f"{key}=0"], [f"{key}=0", "positive"])
            for key in (
                *("train.context", "train.global_batch", "train.micro_batch"),
                *("model.moe.num_groups", "parallel.context", "parallel.expert_tensor"),
            )
        ),
        (["parallel.tensor=-2"], ["parallel.tensor=-2", "positive"]),
        (
            ["parallel.pipeline=2", "parallel.virtual_pipeline=0"],
            ["parallel.virtual_pipeline=0", "positive"],
        ),
        (
            ["experiment=ladder/653m_kimi_linear", "train.steps=3"],
            ["train.steps=3", "train.tokens=38,800,000,000", "scale.steps=20"],
        ),
        ([PRETRAIN, "train.micro_batch=7"], ["train.global_batch=7808", "multiple of"]),
        ([PRETRAIN, "parallel.pipeline_layers=null"], ["model.num_layers=27", "[7,7,7,6]"]),
    ],
)
def test_errors(overrides, expected):
    with pytest.raises(ConfigError) as caught:
        compose(["scale=smoke", *overrides] if "scale=smok" not in overrides else overrides)
    for text in expected:
        assert text in str(caught.value)


@given(
    st.lists(st.integers(1, 10**9), min_size=1, max_size=8).flatmap(
        lambda lengths: st.tuples(st.just(lengths), st.integers(len(lengths), 50))
    )
)
def test_shares_of_steps(case):
    lengths, steps = case
    shares = _shares(lengths, steps)
    assert sum(shares) == min(steps, sum(lengths))
    assert all(1 <= share <= length for share, length in zip(shares, lengths, strict=True))
    pairs = zip(lengths, shares, strict=True)
    assert all(a <= b for (m, a), (n, b) in itertools.permutations(pairs, 2) if m < n)


POWERS = st.sampled_from([1, 2, 4, 8])
BASE = compose(["model=kimi_linear_48b"])


@st.composite
def runs(draw):
    """A valid run of any layout, and its number of ranks."""
    tensor, pipeline, context = draw(POWERS), draw(POWERS), draw(POWERS)
    mode = draw(st.sampled_from(["state", "heads", "two_level"]))
    virtual = draw(st.sampled_from([1, 2])) if pipeline > 1 else 1
    expert_tensor = draw(st.sampled_from([1, 2])) if tensor > 1 else 1
    recompute = draw(st.sampled_from(["none", "full"]))
    period = draw(st.sampled_from(["3:1", "0:1", "1:0", "2:1"]))
    world = math.lcm(tensor * pipeline * context, 8 * expert_tensor * pipeline)
    micro = draw(st.sampled_from([1, 2, 4]))
    config = replace(
        BASE,
        model=replace(
            BASE.model,
            pattern=period,
            num_layers=16 + draw(st.sampled_from([0, 16])),
            num_heads=draw(st.sampled_from([64, 128])),
        ),
        parallel=replace(
            BASE.parallel,
            tensor=tensor,
            pipeline=pipeline,
            virtual_pipeline=virtual,
            context=context,
            context_mode=mode,
            context_heads=draw(st.sampled_from([1, context])) if mode == "two_level" else None,
            context_layout=draw(st.sampled_from(["zigzag", "contiguous"])),
            expert=draw(POWERS),
            expert_tensor=expert_tensor,
            recompute=recompute,
            recompute_head_groups=draw(st.sampled_from([0, 1])) if recompute == "full" else 0,
        ),
        train=replace(
            BASE.train,
            steps=draw(st.integers(2, 1000)),
            context=2 ** draw(st.integers(8, 17)),
            global_batch=world * micro * pipeline * draw(st.integers(1, 5)),
            micro_batch=micro,
        ),
    )
    validate(config, world)
    return config


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(runs(), st.sampled_from([1, 2, 4, 8]))
def test_any_valid_run_scales_to_a_valid_one(config, ranks):
    small = scaled(replace(config, scale=replace(SMALL, ranks=ranks)))
    derived = validate(small, ranks)
    assert derived.steps == min(20, config.train.steps)
    assert [s.kind for s in read_stages(small)] == [s.kind for s in read_stages(config)]
    assert kinds(small.model).count("linear") > 0 or "linear" not in kinds(config.model)
    assert small.train.context <= 256 and small.model.hidden_size == 96
