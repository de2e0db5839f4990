"""Every recipe, found by itself: composes, is valid, builds at full size, and trains divided down.

`make test` trains each for a step of every stage; `make test-recipes` for all 20 steps.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import asdict
from functools import cache
from pathlib import Path

import pytest

from megakda.config import Config, compose, recipes_dir, validate
from megakda.config.layout import least_ranks
from megakda.config.stages import read_stages
from megakda.models.params import count_layers, count_parameters
from tests import jobs

REFERENCE = json.loads((Path(__file__).parent / "reference" / "kimi_linear_paper.json").read_text())
LADDER = {row["printed_active"].lower(): row for row in REFERENCE["scaling_ladder"]["rows"]}
ABLATIONS = {row["name"]: row for row in REFERENCE["ablations_ppl"]["rows"]}
LONG_CONTEXT = (recipes_dir() / "experiment" / "long_context" / "32k.yaml").read_text()
EXPERIMENTS = sorted(
    str(path.relative_to(recipes_dir() / "experiment").with_suffix(""))
    for path in (recipes_dir() / "experiment").rglob("*.yaml")
)


@cache
def recipe(experiment: str, *overrides: str) -> Config:
    return compose([f"experiment={experiment}", *overrides])


def test_the_recipes_that_the_readme_promises_are_there():
    ladder = {f"ladder/{row}_{mixer}" for row in LADDER for mixer in ("kimi_linear", "mla")}
    models = ("kimi_linear_48b", "mla_48b", "gdn_h_48b")
    assert ladder | {f"pretrain/{model}" for model in models} | {"sft/chat"} <= set(EXPERIMENTS)
    assert len([name for name in EXPERIMENTS if name.startswith("ablation/")]) > len(ABLATIONS)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_composes_and_is_valid_at_its_smallest_world(experiment):
    config = recipe(experiment)
    derived = validate(config, least_ranks(config.parallel))
    if config.train.tokens is not None:
        per_step = config.train.global_batch * config.train.context
        assert derived.total_tokens == pytest.approx(config.train.tokens, abs=per_step)
    text = (recipes_dir() / "experiment" / f"{experiment}.yaml").read_text()
    assert text.startswith("# @package _global_\n# ") and len(text.splitlines()) <= 60


def test_every_experiment_has_a_folder_of_its_own():
    folders = [recipe(experiment).train.out for experiment in EXPERIMENTS]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("mixer", ["kimi_linear", "mla"])
@pytest.mark.parametrize("row", LADDER)
def test_ladder_is_the_reports(row, mixer):
    config, facts = recipe(f"ladder/{row}_{mixer}"), LADDER[row]
    count = count_parameters(config.model)
    if mixer == "kimi_linear":
        assert count.active == pytest.approx(facts["active"], abs=0.05e6)
        assert count.total == pytest.approx(facts["total"], abs=0.005e9)
        assert count_layers(config.model)["full"] == facts["mla_layers"]
    else:
        assert count.active == pytest.approx(facts["active_mla_variant"], abs=0.05e6)
        assert config.model.mla.rope and count_layers(config.model)["linear"] == 0
    train = config.train
    assert (train.context, train.global_batch) == (4096, facts["batch"])
    assert (train.tokens, config.optim.lr) == (facts["tokens"], facts["lr"])
    assert (config.optim.name, config.optim.qk_clip) == ("muon", 100.0)


@pytest.mark.parametrize("model", ["kimi_linear_48b", "mla_48b", "gdn_h_48b"])
def test_pretraining_is_the_reports(model):
    config, facts = recipe(f"pretrain/{model}"), REFERENCE["pretrain_recipe"]
    stages = facts["proportional_stage_proposal_for_1.4T"]
    timetable = validate(config, least_ranks(config.parallel)).timetable
    kinds = [(stage.kind, stage.context) for stage in timetable.stages]
    assert kinds == [
        *(("warmup", 4096), ("constant", 4096), ("cosine", 4096)),
        *(("linear", 4096), ("constant", 32768)),
    ]
    warmup, constant, cosine, anneal, activation = timetable.stages
    per_step = config.train.global_batch * config.train.context
    assert per_step == pytest.approx(facts["global_batch_tokens"], rel=0.01)
    assert warmup.steps == facts["warmup_steps"] and warmup.lr_to == facts["lr"]
    assert warmup.tokens + constant.tokens == pytest.approx(stages["constant_tokens"], abs=per_step)
    assert cosine.tokens == pytest.approx(stages["cosine_tokens"], abs=per_step)
    assert cosine.first_token + cosine.tokens == pytest.approx(facts["tokens"], abs=per_step)
    assert cosine.lr_to == stages["cosine_to_lr"]
    for stage, said in zip((anneal, activation), stages["anneal"], strict=True):
        assert stage.context == said["context"]
        assert stage.tokens == pytest.approx(said["tokens"], abs=stage.context * stage.batch)
    assert activation.lr_to == stages["final_lr"]
    assert activation.expert_bias_rate == 0.0
    # A run of its own begins where annealing ends, as its recipe says.
    assert f"step_{activation.first_step:08d}" in LONG_CONTEXT
    alone = validate(recipe("long_context/32k"), 8).timetable
    assert {stage.expert_bias_rate for stage in alone.stages} == {0.0}
    assert alone.at(alone.steps).lr == activation.lr_to
    assert config.optim.weight_decay == facts["weight_decay"]
    exact = REFERENCE["model_48b"]["params_exact"]
    count = count_parameters(config.model)
    if model == "kimi_linear_48b":
        assert count.total == exact["trainable"]
        assert count.active == exact["active_excluding_input_embedding"]
    # The three differ in nothing but the mixer.
    base = asdict(recipe("pretrain/kimi_linear_48b"))
    differ = {key for key, value in asdict(config).items() if value != base[key]}
    assert differ <= {"model", "train"}


DIFFERENCES = {
    "hybrid_ratio": ("3:1", {}),
    "hybrid_0_1": ("0:1", {"pattern": "0:1", "mla": {"rope": True}}),
    "hybrid_1_1": ("1:1", {"pattern": "1:1"}),
    "hybrid_7_1": ("7:1", {"pattern": "7:1"}),
    "hybrid_15_1": ("15:1", {"pattern": "15:1"}),
    "no_output_gate": ("no output gate", {"linear": {"output_gate": "none"}}),
    "swish_output_gate": ("swish output gate", {"linear": {"output_gate": "swish"}}),
    "no_convolution": ("no convolution", {"linear": {"conv_kernel": 0}}),
    "rope": (None, {"mla": {"rope": True}}),
}


@pytest.mark.parametrize(
    "name", [name.removeprefix("ablation/") for name in EXPERIMENTS if "ablation/" in name]
)
def test_ablation_changes_one_thing_and_quotes_the_report(name):
    row, expected = DIFFERENCES[name]
    base, config = asdict(recipe("ladder/653m_kimi_linear")), asdict(recipe(f"ablation/{name}"))
    model, other = config.pop("model"), base.pop("model")
    assert model.pop("name") != other.pop("name")
    assert model == {
        key: {**value, **expected[key]}
        if isinstance(expected.get(key), dict)
        else expected.get(key, value)
        for key, value in other.items()
    }
    config["train"].pop("out"), base["train"].pop("out")
    assert config == base
    if row is not None:
        text = " ".join(
            line.lstrip("# ")
            for line in (recipes_dir() / f"experiment/ablation/{name}.yaml")
            .read_text()
            .splitlines()
        )
        facts = ABLATIONS[row]
        assert f"{facts['train']:.2f} in training, {facts['valid']:.2f} in validation" in text


def test_a_sweep_over_the_hybrid_ratio():
    for pattern, full in {"3:1": 4, "1:1": 8, "7:1": 2}.items():
        config = recipe("ablation/hybrid_ratio", f"model.pattern={pattern}")
        assert count_layers(config.model)["full"] == full
        validate(config, least_ranks(config.parallel))


BUILD = """
import json, sys
import megakda.runtime
megakda.runtime.install("cpu")
from megakda.config import compose
from megakda.models.dry_run import count_over_stages
for experiment, world in json.load(sys.stdin):
    total, ranks = count_over_stages(compose([f"experiment={experiment}"]), world)
    layers = sorted(sum((rank.layers for rank in ranks), ()))
    print(json.dumps([experiment, total, layers]), flush=True)
"""


def test_every_model_builds_at_full_size_with_the_parameters_of_the_closed_form():
    """One process for all: it has the process groups of a large run to itself."""
    jobs_by_build = {}  # recipes that share a model and a layout share a build
    for experiment in EXPERIMENTS:
        config = recipe(experiment)
        model = {key: value for key, value in asdict(config.model).items() if key != "name"}
        key = json.dumps([model, asdict(config.parallel), config.precision])
        jobs_by_build.setdefault(key, (experiment, least_ranks(config.parallel)))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BUILD],
        input=json.dumps(list(jobs_by_build.values())),
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(rows) == len(jobs_by_build)
    for experiment, total, layers in rows:
        model = recipe(experiment).model
        assert total == count_parameters(model).total, experiment
        assert layers == list(range(1, model.num_layers + 1)), experiment


@pytest.fixture(scope="module")
def corpora(corpus, tmp_path_factory):
    """Small data sets of the kinds that `scale=smoke` would make, by `data.prepare`."""
    from megakda.data.chat_corpus import prepare_stdlib_chat

    chat = prepare_stdlib_chat(tmp_path_factory.mktemp("chat"), max_bytes=1_000_000)
    return {"stdlib": str(corpus), "stdlib_chat": str(chat)}


def smoke(ranks, corpora, out, experiment, *overrides):
    """Trains a recipe divided down; its rows of metrics."""
    overrides = [f"experiment={experiment}", "scale=smoke", *overrides]
    found = ranks.run(2, jobs.fit_recipe, overrides, corpora, str(out))
    steps, stages = compose(overrides).train.steps, read_stages(compose(overrides))
    assert [row["step"] for row in found[0]] == list(range(1, steps + 1))
    assert all(math.isfinite(row["loss"]) for row in found[0])
    assert not any(row["skipped_steps"] for row in found[0])
    assert sum(stage.steps for stage in stages) == steps
    return found[0]


QUICK = ("scale.batch=2", "train.eval_batches=0")


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_trains_a_step_of_every_stage(ranks, corpora, tmp_path, experiment):
    stages = len(read_stages(recipe(experiment)))
    rows = smoke(ranks, corpora, tmp_path, experiment, f"scale.steps={max(2, stages)}", *QUICK)
    assert rows[0]["loss"] == pytest.approx(math.log(320), rel=0.1)  # a random model's


@pytest.mark.parametrize("experiment", ["pretrain/kimi_linear_48b", "ladder/653m_mla"])
def test_learns_in_twenty_steps(ranks, corpora, tmp_path, experiment):
    rows = smoke(ranks, corpora, tmp_path, experiment)
    assert len(rows) == 20
    assert rows[-1]["loss"] < 0.95 * rows[0]["loss"]


@pytest.mark.recipes
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_trains_twenty_steps(ranks, corpora, tmp_path, experiment):
    smoke(ranks, corpora, tmp_path, experiment)
