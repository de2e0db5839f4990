"""The order of passes, and times and messages by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from megakda.config import compose, validate
from megakda.plan.candidates import balance
from megakda.plan.cluster import load_cluster
from megakda.plan.memory import schedule
from megakda.plan.network import Group, Network
from megakda.plan.recorder import DENSE, OTHER, Operation, Work
from megakda.plan.state import buffers, state_of
from megakda.plan.timing import LAUNCH, work_seconds
from tests import jobs


def most_in_flight(order):
    now = most = 0
    for backward, _, _ in order:
        now += -1 if backward else 1
        most = max(most, now)
    return most


@pytest.mark.parametrize(
    ("pipeline", "chunks", "stage", "micro_batches", "expected"),
    [
        (1, 1, 0, 8, 1),
        (4, 1, 0, 8, 4),  # 1F1B: as many as stages are left
        (4, 1, 3, 8, 1),
        (4, 1, 0, 2, 2),  # not more than there are
        (2, 2, 0, 4, 5),  # 2 (stages to come) + stages, and the one at work
        (2, 2, 1, 4, 3),
        (4, 2, 0, 8, 11),
    ],
)
def test_passes_in_flight(pipeline, chunks, stage, micro_batches, expected):
    order = list(schedule(pipeline, chunks, stage, micro_batches))
    assert most_in_flight(order) == expected
    # Every micro-batch goes through every chunk once and back once, and back after forth.
    assert len(set(order)) == len(order) == 2 * chunks * micro_batches
    for place, (backward, chunk, micro_batch) in enumerate(order):
        if backward:
            assert (False, chunk, micro_batch) in order[:place]


def test_an_operation_takes_its_products_or_its_bytes_or_its_launch():
    cluster = load_cluster("h200x8")
    peak, memory = cluster.peak * 0.6, cluster.memory_bandwidth_gbs * 1e9 * 0.75
    work = Work()
    work.operations[Operation(DENSE, int(peak), 1)] = 2  # 1 s each by its products
    work.operations[Operation(OTHER, 0, int(memory))] = 3  # 1 s each by its bytes
    found = work_seconds(work, cluster)
    assert found["matrix products"] == pytest.approx(2)
    assert found["memory-bound operations"] == pytest.approx(3)
    assert found[LAUNCH] == 0
    tiny = Work()
    tiny.operations[Operation(OTHER, 0, 8)] = 1000
    assert sum(work_seconds(tiny, cluster).values()) == pytest.approx(1000 * 5e-6)


def test_groups_lie_where_megatron_puts_them():
    config = compose(["experiment=pretrain/kimi_linear_48b", "parallel.context=2"])
    cluster = load_cluster("h200x64")
    network = Network(config, validate(config, 64), cluster)
    assert network.groups["tensor"] == Group(2, 2)
    assert network.groups["context"] == Group(2, 2)  # ranks 0 and 2
    assert network.groups["data"] == Group(8, 4)  # ranks 0, 2, 4, ..., of 16 per stage
    assert network.groups["expert"] == Group(8, 8)
    assert network.groups["expert_data"] == Group(2, 1)
    assert network.groups["pipeline"] == Group(4, 1)


def test_bytes_by_link():
    config = compose(["model=tiny"])
    cluster = load_cluster("h200x16")
    network = Network(config, validate(config, 8), cluster)
    near, far = Group(4, 4), Group(16, 8)
    gathered = network.transfer("all_gather", near, 400)
    assert (gathered.nvlink, gathered.network) == (300, 0)
    exchanged = network.transfer("all_to_all", far, 1600)
    assert (exchanged.nvlink, exchanged.network) == (700, 800)
    # Half comes from the other node, by all eight adapters, and is passed on.
    summed = network.transfer("reduce_scatter", far, 1600)
    assert (summed.nvlink, summed.network) == (1400, 100)
    assert network.transfer("all_gather", Group(1, 1), 100).seconds == 0
    assert exchanged.seconds == pytest.approx(20e-6 + 800 / (50e9 * 0.75))


def test_layers_go_where_the_slowest_chunk_is_fastest():
    assert balance([1.0] * 8, 4, 0, 0) == [2, 2, 2, 2]
    assert balance([1.0] * 8, 4, 0, 2)[-1] == 1  # the head costs two layers
    assert balance([3.0, 1.0, 1.0, 1.0], 2, 0, 0) == [1, 3]
    with_ends = balance([1.0] * 27, 8, 0.1, 4)
    assert sum(with_ends) == 27 and min(with_ends) == 1 and with_ends[-1] == 1


def test_buckets_and_shares_cover_every_element_once():
    config = compose([*jobs.SMALL, "parallel.overlap_grad_reduce=true"])
    weights = [
        SimpleNamespace(elements=n, element_bytes=4, expert=False, matrices=m)
        for n, m in [(30_000_000, ((6000, 5000, 1, 30_000_000),)), (700, ()), (45_000_000, ())]
    ]
    derived = SimpleNamespace(data_parallel=3, expert_data_parallel=3)
    (buffer,) = buffers(weights, config, derived, first_chunk=True)
    assert len(buffer.bounds) == 3  # buckets of at least 40M elements, from the end
    assert all(bound % math.lcm(3, 128) == 0 for bound in buffer.bounds)
    shares = [buffer.share(rank) for rank in range(3)]
    assert [sum(kind) for kind in zip(*shares, strict=True)] == [0 + 30_000_000, 45_000_700]
    (whole,) = buffers(weights, config, derived, first_chunk=False)
    assert len(whole.bounds) == 2
    moments = sum(state_of([whole], config, (rank, rank)).moments for rank in range(3))
    assert moments == 2 * 4 * 75_000_700
