"""Plans of the 48B model, and the search for its best layouts."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from megakda.config import compose, validate
from megakda.errors import ConfigError
from megakda.models.params import count_parameters
from megakda.plan import meta_device, report
from megakda.plan.cluster import load_cluster
from megakda.plan.meta_device import GPU
from megakda.plan.planner import make_plan
from megakda.plan.probe import probe
from megakda.plan.recorder import OTHER, Operation
from megakda.plan.search import check_built, search

RECIPE = "experiment=pretrain/kimi_linear_48b"


def test_search_on_the_48b_model_at_1024_gpus():
    config, cluster = compose([RECIPE]), load_cluster("h200x1024")
    began = time.process_time()
    found = search(config, cluster)
    seconds = time.process_time() - began
    assert seconds < 60
    assert len(found.proposals) == 10 and found.tried > 100
    rates = [proposal.plan.seconds for proposal in found.proposals]
    assert rates == sorted(rates)
    assert len({proposal.overrides for proposal in found.proposals}) == 10
    # A layout for 64 GPUs and up is not the best for 1024.
    assert found.given.config == config and found.given.seconds > rates[0]
    for proposal in found.proposals:
        # Composed anew from the overrides, as a person would: the trainer's own validation.
        again = compose([RECIPE, *proposal.overrides])
        assert again.parallel == proposal.plan.config.parallel
        derived = validate(again, 1024)
        assert derived.timetable == proposal.plan.derived.timetable
        assert proposal.plan.fits and proposal.plan.bytes <= 0.9 * cluster.memory
        assert "memory" in proposal.reason
    check_built(found.proposals[0].plan)
    check_built(found.proposals[-1].plan)


@pytest.fixture(scope="module")
def plan():
    return make_plan(compose([RECIPE]), load_cluster("h200x1024"))


def test_a_plan_covers_the_whole_run(plan):
    check_built(plan)
    assert sum(phase.steps for phase in plan.phases) == plan.derived.steps
    assert sum(phase.tokens for phase in plan.phases) == plan.derived.total_tokens
    assert [phase.context for phase in plan.phases] == [4096, 32768]
    for phase in plan.phases:
        assert sum(phase.time.breakdown.values()) == pytest.approx(phase.time.seconds)
        assert 0.02 < phase.mfu < 0.6
        assert phase.hardware_flops > phase.model_flops  # recomputes
        ranks = 1024 // 4
        total = sum(m.parameters for m in phase.memory)
        assert total < count_parameters(plan.config.model).total < total * ranks
    first = plan.phases[0]
    assert [m.activations.in_flight for m in first.memory] == [4, 3, 2, 1]
    assert plan.gpu_hours == pytest.approx(plan.seconds * 1024 / 3600)
    assert plan.price is None
    priced = replace(plan, cluster=replace(plan.cluster, price_per_gpu_hour=2.0))
    assert priced.price == pytest.approx(2 * plan.gpu_hours)


def test_the_report_names_units_the_biggest_term_and_what_is_assumed(plan):
    text = report.describe(plan)
    for expected in (
        "49,122,675,072",
        "GiB",
        "GB/s",
        "Biggest on stage",
        "Expected time of a step",
        "GPU-hours",
        "Assumed, never measured (recipes/cluster/h200.yaml)",
        "KDA's states before each chunk",
        "context 32,768",
    ):
        assert expected in text
    assert max(len(line) for line in text.splitlines()) < 400


def test_recomputation_saves_memory_and_costs_flops():
    sizes, flops = [], []
    for recompute in ("none", "selective", "full"):
        config = compose([RECIPE, f"parallel.recompute={recompute}"])
        unit = probe(config, GPU).units["kda+moe"]
        # Each gradient is added to the main one, in fp32, and read for it.
        for weight in unit.weights:
            adding = Operation(OTHER, 0, weight.elements * (weight.element_bytes + 8))
            assert unit.backward.operations[adding] >= 1
        sizes.append(unit.saved)
        flops.append(unit.backward.flops())
    assert sizes == sorted(sizes, reverse=True) and flops == sorted(flops)
    # A checkpointed layer keeps its input alone: tokens x hidden in bf16, over two ranks.
    assert sizes[-1] < 1.2 * (4096 * 2304 * 2 // 2) + 2**22


def test_gpu_layers_save_what_the_triton_operators_save():
    """Derived by hand from what the autograd functions of KDA, its convolutions, norms and
    projections keep: bf16, one rank, without recomputation."""
    alone = ["parallel.tensor=1", "parallel.expert=1", "parallel.recompute=none"]
    config = compose([RECIPE, *alone, "model.ffn=dense"])
    model, tokens = config.model, config.train.context
    hidden, heads = model.hidden_size, model.num_heads
    keys = heads * model.linear.head_dim_k
    rank = model.linear.gate_rank
    mixer = (
        2 * hidden  # the layer's input, for the norm, and the normed one, for the projections
        + (3 * keys + heads)  # their joint output, which the convolutions start from, and beta
        + 3 * keys  # convolved q, k and v
        + 2 * rank + 2 * keys  # decay and output gate, after each of their two products
        + 2 * keys  # KDA's output, for its norm, and the gated one, for the output projection
    )  # fmt: skip
    # Gate and up, silu(gate), up plus megatron-core's offset of 0, and their product.
    dense = 2 * hidden + 5 * model.dense_ffn
    joint_weight = (3 * keys + heads) * hidden  # of the projections, a copy in every forward pass
    saved = probe(config, GPU).units["kda+dense"].saved
    assert saved == pytest.approx(2 * (tokens * (mixer + dense) + joint_weight), rel=0.01)


def test_flash_attn_need_not_be_there_but_triton_has_to(monkeypatch):
    config = compose([RECIPE, "runtime.attention=flash_attn"])
    plan = make_plan(config, load_cluster("h200x1024"))
    assert plan.fits
    monkeypatch.setattr(meta_device.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install 'triton"):
        make_plan(config, load_cluster("h200x1024"))


def test_nothing_fits_says_how_much_is_missing():
    config = compose([RECIPE, "train.global_batch=64", "schedule.stages=null", "train.steps=10"])
    with pytest.raises(ConfigError) as caught:
        search(replace(config, train=replace(config.train, tokens=None)), load_cluster("h100x8"))
    for text in ("h100x8", "fits", "GiB", "use more GPUs"):
        assert text in str(caught.value)
