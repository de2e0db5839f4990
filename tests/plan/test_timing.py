"""Times and messages of steps by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megakda.config import compose, validate
from megakda.optim.newton_schulz import flops as newton_schulz_flops
from megakda.plan import timing
from megakda.plan.cluster import load_cluster
from megakda.plan.network import Network, Transfer
from megakda.plan.recorder import Recorder
from megakda.plan.state import Buffer
from megakda.plan.timing import Clock, StageTime, optimizer_seconds, step_time
from tests import jobs


def weight(elements, matrices=()):
    return SimpleNamespace(elements=elements, matrices=matrices)


def buffer(*weights, bounds, ranks=8, expert=False):
    places, at = [], 0
    for one in weights:
        places.append((one, at))
        at += one.elements
    return Buffer(expert, 2, ranks, tuple(places), tuple(bounds))


NEAR = buffer(weight(1 << 20), bounds=(0, 1 << 20))


@pytest.fixture
def step(monkeypatch):
    """`step_time` of stages that all take `seconds` a micro-batch and hold the same buffers."""

    def run(overrides, micro_batches, seconds=3.0, buffers=(NEAR,), sends=0.0):
        config = compose([*jobs.SMALL, "parallel.overlap_grad_reduce=false", *overrides])
        parallel = config.parallel
        one = StageTime(
            {"matrix products": seconds},
            {},
            Transfer(0, 1, sends),
            parallel.virtual_pipeline > 1,
        )
        monkeypatch.setattr(timing, "stage_chunks", lambda *_: [])
        monkeypatch.setattr(timing, "stage_time", lambda *_: one)
        monkeypatch.setattr(timing, "stage_buffers", lambda *_: list(buffers))
        cluster = load_cluster("h200x8")
        network = Network(config, SimpleNamespace(**RANKS), cluster)
        derived = SimpleNamespace(**RANKS)
        return step_time(config, derived, None, micro_batches, Clock(cluster), network)

    return run


RANKS = {"data_parallel": 8, "expert_data_parallel": 8, "world_size": 8}


def test_the_bubble_is_one_micro_batch_of_the_other_stages(step):
    def passes(overrides, micro_batches):
        found = step(overrides, micro_batches)
        rest = ("awaiting gradients", "awaiting parameters", "optimizer")
        return found.seconds - sum(found.breakdown[name] for name in rest)

    assert passes([], 8) == pytest.approx(8 * 3)
    assert passes(["parallel.pipeline=4"], 8) == pytest.approx((8 + 3) * 3)  # arXiv 2104.04473, 2.2
    interleaved = ["parallel.pipeline=4", "parallel.virtual_pipeline=2"]
    assert passes(interleaved, 8) == pytest.approx((8 + 1.5) * 3)


def test_messages_between_stages_are_awaited_without_virtual_stages(step):
    plain = step(["parallel.pipeline=4"], 8, sends=0.5)
    assert plain.breakdown["awaiting pipeline"] == pytest.approx(8 * 0.5)
    hidden = step(["parallel.pipeline=4", "parallel.virtual_pipeline=2"], 8, sends=0.5)
    assert hidden.breakdown["awaiting pipeline"] == 0
    assert hidden.traffic["pipeline"].network == 8


OVERLAP = ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]


def test_what_travels_beside_work_is_not_awaited(step):
    size = 1 << 30
    one = buffer(weight(size), bounds=(0, size))
    four = buffer(weight(size), bounds=tuple(size // 4 * i for i in range(5)))
    awaited = step([], 1, buffers=[four]).exposed
    reduced, gathered = awaited["gradients"], awaited["parameters"]
    rate = 450e9 * 0.75
    assert reduced == pytest.approx(4 * size * 7 / 8 / rate + 4 * 20e-6)
    assert gathered == pytest.approx(2 * size * 7 / 8 / rate + 4 * 20e-6)

    long = step(OVERLAP, 1, buffers=[four]).exposed  # all but a bucket is hidden
    assert long["gradients"] == pytest.approx(reduced / 4)
    assert long["parameters"] == pytest.approx(gathered / 4)
    short = step(OVERLAP, 1, buffers=[four], seconds=0.003).exposed
    assert short["gradients"] == pytest.approx(reduced - 0.002)
    assert short["parameters"] == pytest.approx(gathered - 0.001)
    whole = step(OVERLAP, 1, buffers=[one]).exposed  # a single bucket has nothing to hide behind
    assert whole["gradients"] == pytest.approx(reduced, rel=0.02)
    assert whole["parameters"] == pytest.approx(gathered, rel=0.02)
    # Later stages reduce while the first still works, but gather when their turn comes.
    later = step([*OVERLAP, "parallel.pipeline=2"], 1, buffers=[one]).exposed
    assert later["parameters"] == pytest.approx(gathered, rel=0.02)


def test_the_optimizers_step_by_hand():
    cluster = load_cluster("h200x8")
    memory, peak = 4800e9 * 0.75, cluster.peak * 0.6
    adamw = compose([*jobs.SMALL, "optim=adamw"])
    flat = buffer(weight(8_000), bounds=(0, 8_064))
    expected = (100 * 8_000 / 8 + 12 * 8_064) / memory
    assert optimizer_seconds([flat], adamw, cluster) == pytest.approx(expected)
    muon = compose([*jobs.SMALL, "optim=muon"])
    # Two matrices of 40 x 100, each in halves on two tensor-parallel ranks.
    halves = buffer(weight(4_000, ((40, 100, 2, 2_000),)), bounds=(0, 4_096))
    work = newton_schulz_flops(40, 100, muon.optim.muon.newton_schulz_steps)
    expected = (84 * 4_000 / 8 + 12 * 4_096) / memory + 2 * (1 / 2) * work / 8 / peak
    assert optimizer_seconds([halves], muon, cluster) == pytest.approx(expected)


def test_only_matrices_across_a_border_travel():
    # Four ranks with 1000 elements each; matrices of 10 x 60 at 0, 600, ..., 3000.
    six = buffer(weight(3_600, ((10, 60, 6, 600),)), bounds=(0, 4_000), ranks=4)
    # 600-1200 is cut at 1000 and 1800-2400 at 2000: 200 leave each; 3000 is a border.
    assert six.moved_elements == pytest.approx((200 + 200) / 4)
    config = compose([*jobs.SMALL, "train.micro_batch=1", "optim=muon"])
    network = Network(config, validate(config, 4), load_cluster("h200x4"))
    assert network.matrices([six]).nvlink == pytest.approx(2 * 2 * 400 / 4)  # there and back, bf16


def test_an_unknown_collective_is_no_free_one():
    def call(name):
        Recorder()._message(SimpleNamespace(_overloadpacket=SimpleNamespace(__name__=name)), ())

    call("barrier")
    with pytest.raises(AssertionError, match="gather_: a collective"):
        call("gather_")
