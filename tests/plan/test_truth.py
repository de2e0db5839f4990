"""The planner against what small runs really allocate and compute, on CPU ranks."""

from __future__ import annotations

from collections import Counter

import pytest

from megakda.config import compose, validate
from megakda.models.flops import flops_per_token
from megakda.plan.memory import stage_buffers, stage_chunks, stage_memory
from megakda.plan.meta_device import CPU, GPU
from megakda.plan.probe import probe
from megakda.plan.recorder import ATTENTION, DENSE, GROUPED, KDA
from megakda.plan.state import state_of
from tests import jobs
from tests.plan import jobs as plan_jobs

# case: ranks, overrides
LAYOUTS = {
    "data": (2, []),
    "dense, tensor without sequence": (
        2,
        ["model.ffn=dense", "parallel.tensor=2", "parallel.sequence=false"],
    ),
    "tensor and sequence": (2, ["parallel.tensor=2"]),
    "pipeline": (2, ["parallel.pipeline=2", "parallel.distributed_optimizer=false"]),
    "virtual pipeline": (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
    "experts": (2, ["parallel.expert=2", "optim=muon"]),
    "context": (2, ["parallel.context=2"]),
    "context, heads and ring": (
        2,
        ["parallel.context=2", "parallel.context_mode=heads", "parallel.context_attention=ring"],
    ),
    "tensor and pipeline": (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
    "full recomputation": (1, ["parallel.recompute=full"]),
    "full, KDA in groups of heads": (
        1,
        ["parallel.recompute=full", "parallel.recompute_head_groups=2"],
    ),
    "selective recomputation": (1, ["parallel.recompute=selective"]),
    "bf16": (2, ["precision=bf16"]),
    "bf16, tensor, muonclip": (2, ["precision=bf16", "parallel.tensor=2", "optim=muonclip"]),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_memory_is_what_the_allocator_says(ranks, corpus, case):
    world, overrides = LAYOUTS[case]
    batch = 4 if "pipeline" in case else 2
    overrides = [*overrides, "train.micro_batch=1", f"train.global_batch={batch}"]
    measured = ranks.run(world, plan_jobs.measure, overrides, corpus, case in ALONE)
    config = compose([*jobs.SMALL, "data.paths=[x]", *overrides])
    derived, parallel = validate(config, world), config.parallel
    found = probe(config, CPU)
    for rank, real in enumerate(measured):
        stage, within = divmod(rank, world // parallel.pipeline)
        memory = stage_memory(config, derived, found, stage, derived.micro_batches)
        places = within // parallel.tensor, within // (parallel.expert * parallel.expert_tensor)
        state = state_of(stage_buffers(config, derived, found, stage), config, places)
        # No estimate: the same sums as megatron-core's.
        assert state.weights == real["weights"]
        assert state.gradients == real["gradients"]
        assert state.optimizer == real["optimizer"]
        assert memory.activations.peak == pytest.approx(real["activations"], rel=0.1)
        assert memory.state.optimizer >= state.optimizer  # of the rank with the most
    if "pipeline" not in case:
        buffers = stage_buffers(config, derived, found, 0)
        if config.optim.name == "muon":
            check_exchange(measured, buffers)
        if case in ALONE:
            check_messages(measured[0]["calls"], found, config, derived.micro_batches, ALONE[case])


ALONE = {
    "tensor and sequence": ("all_gather", "reduce_scatter"),
}
"""Operations that nothing but layers use, by case."""


def check_exchange(measured, buffers):
    """Muon's real plan, which may also give a matrix to another than its largest holder."""
    planned = 4 * len(measured) * sum(buffer.moved_elements for buffer in buffers)
    for way in (0, 1):
        real = sum(sent[way] for rank in measured for sent in rank["muon"])
        assert 0.99 * planned <= real <= 1.2 * planned


def check_messages(calls, found, config, micro_batches, operations):
    """As many calls of the same bytes as the real layers make on a rank."""
    units = [unit for chunk in stage_chunks(config, found, 0) for unit in chunk.units]
    for operation in operations:
        real = Counter(sent for name, ranks, sent in calls if operation in name and ranks > 1)
        planned: Counter[int] = Counter()
        for unit in units:
            for message, number in (unit.forward.messages + unit.backward.messages).items():
                if message.operation == operation:
                    # Each of two ranks sends half: its own of a gathered tensor, the other's of a
                    # sum.
                    planned[message.bytes // 2] += number * micro_batches
        assert planned
        # Besides, a step gathers small things of its own.
        assert {size: real[size] for size in planned} == planned


@pytest.mark.parametrize("pattern", ["3:1", "0:1"])
def test_flops_are_those_of_a_counted_forward_pass(ranks, corpus, pattern):
    """What `torch.utils.flop_counter` sees of a real forward pass on a CPU, matrix products, is
    what the planner counts; and where there is no KDA, whose core it cannot tell from other
    products, what the closed forms say. torch counts attention above the diagonal too."""
    overrides = [f"model.pattern='{pattern}'"]
    (counted,) = ranks.run(1, plan_jobs.count_forward, overrides, corpus)
    config = compose([*jobs.SMALL, "data.paths=[x]", *overrides])
    assert forward_flops(config, CPU) == pytest.approx(counted, rel=0.03)
    if pattern == "0:1":
        tokens = config.train.context * config.train.micro_batch
        parts = flops_per_token(config.model, config.train.context).components
        expected = sum(parts.values()) + parts["full_attention"]
        assert counted == pytest.approx(tokens * expected, rel=0.03)


def test_flops_of_the_gpu_path_are_the_closed_forms():
    """Kernel by kernel and product by product, for a hybrid at the sizes of the 48B model.

    Rows and heads are enough to fill a GPU; with fewer, KDA splits sequences and computes more.
    """
    rows = 4
    alone = ["parallel.tensor=1", "parallel.recompute=none", f"train.micro_batch={rows}"]
    config = compose(["experiment=pretrain/kimi_linear_48b", *alone])
    parts = flops_per_token(config.model, config.train.context).components
    tokens = rows * config.train.context
    state, attention = parts["linear_state"], parts["full_attention"]
    assert forward_flops(config, GPU, KDA) == pytest.approx(tokens * state, rel=0.03)
    assert forward_flops(config, GPU, ATTENTION) == pytest.approx(tokens * attention, rel=0.03)
    rest = sum(parts.values()) - state - attention
    assert forward_flops(config, GPU, DENSE, GROUPED) == pytest.approx(tokens * rest, rel=0.03)


def forward_flops(config, device, *kinds):
    """Of one rank of every pipeline stage for one micro-batch."""
    found = probe(config, device)
    return sum(
        unit.forward.flops(*kinds)
        for stage in range(config.parallel.pipeline)
        for chunk in stage_chunks(config, found, stage)
        for unit in chunk.units
    )
