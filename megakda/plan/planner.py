"""Everything about one run on one cluster: what `tools/plan.py` prints."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megakda.config import Config, Derived, validate
from megakda.models.flops import flops_per_token, mfu
from megakda.plan.cluster import Cluster
from megakda.plan.memory import StageMemory, stage_chunks, stage_memory
from megakda.plan.meta_device import GPU
from megakda.plan.network import Network
from megakda.plan.probe import Probe, Unit, probe
from megakda.plan.timing import Clock, StepTime, step_time


@dataclass(frozen=True)
class Phase:
    """A part of the run with one context length and one batch size.

    Attributes:
        stages: of the schedule, 1-based, that are like it.
        context, micro_batch, global_batch, micro_batches: as in `megakda.config.timetable`.
        steps, tokens: of all of them.
        memory: of each pipeline stage.
        time: of a step.
        model_flops: of a step, on all GPUs; hardware_flops: with recomputation and what attention
            computes again.
        mfu: share of the GPUs' peak that `model_flops` fill.
        units: the layers of each kind, with one micro-batch.
    """

    stages: tuple[int, ...]
    context: int
    micro_batch: int
    global_batch: int
    micro_batches: int
    steps: int
    tokens: int
    memory: tuple[StageMemory, ...]
    time: StepTime
    model_flops: float
    hardware_flops: float
    mfu: float
    units: dict[str, Unit]

    @property
    def fullest(self) -> StageMemory:
        """The pipeline stage that needs the most memory."""
        return max(self.memory, key=lambda m: m.total)


@dataclass(frozen=True)
class RunPlan:
    """A run on a cluster.

    Attributes:
        phases: in the order of the schedule.
        bytes: the most that a GPU needs, in any phase.
        seconds: of the whole run, without validation and saving.
    """

    config: Config
    derived: Derived
    cluster: Cluster
    phases: tuple[Phase, ...]

    @property
    def bytes(self) -> int:
        return max(phase.fullest.total for phase in self.phases)

    @property
    def fits(self) -> bool:
        """Whether that leaves the headroom free."""
        return self.bytes <= self.cluster.usable

    @property
    def seconds(self) -> float:
        return sum(phase.steps * phase.time.seconds for phase in self.phases)

    @property
    def longest_phase(self) -> Phase:
        """The part of the run that takes most of its time."""
        return max(self.phases, key=lambda phase: phase.steps * phase.time.seconds)

    @property
    def gpu_hours(self) -> float:
        return self.seconds * self.cluster.gpus / 3600

    @property
    def price(self) -> float | None:
        """In the currency of the cluster's file; None where it names no price."""
        per_hour = self.cluster.price_per_gpu_hour
        return None if per_hour is None else per_hour * self.gpu_hours


def make_plan(config: Config, cluster: Cluster, clock: Clock | None = None) -> RunPlan:
    """Plans every part of a run.

    Args:
        clock: of the same cluster, to reuse.

    Raises:
        ConfigError: what `validate` refuses, or no way to plan for GPUs here.
    """
    derived = validate(config, cluster.gpus)
    clock = clock or Clock(cluster)
    network = Network(config, derived, cluster)
    phases = [_phase(config, derived, clock, network, part) for part in parts_of(derived)]
    return RunPlan(config, derived, cluster, tuple(phases))


@dataclass(frozen=True)
class Part:
    """Steps of one context length and one batch size; attributes as of `Phase`."""

    stages: tuple[int, ...]
    context: int
    micro_batch: int
    global_batch: int
    steps: int


def parts_of(derived: Derived) -> list[Part]:
    """The parts of a run that differ in size, in the order of the schedule."""
    steps: dict[tuple[int, int, int], int] = {}
    stages: dict[tuple[int, int, int], set[int]] = {}
    for stage in derived.timetable.stages:
        for size in stage.sizes:
            key = (stage.context, stage.micro_batch, size.global_batch)
            steps[key] = steps.get(key, 0) + size.steps
            stages.setdefault(key, set()).add(stage.number)
    return [Part(tuple(sorted(stages[key])), *key, steps[key]) for key in steps]


def main_part(derived: Derived) -> Part:
    """The part with the most tokens."""
    return max(parts_of(derived), key=lambda p: p.steps * p.context * p.global_batch)


def part_config(config: Config, part: Part | Phase) -> Config:
    """The config with the sizes of a part."""
    train = replace(
        config.train,
        context=part.context,
        micro_batch=part.micro_batch,
        global_batch=part.global_batch,
    )
    return replace(config, train=train)


def _phase(config: Config, derived: Derived, clock: Clock, network: Network, part: Part) -> Phase:
    config = part_config(config, part)
    micro_batches = part.global_batch // (derived.data_parallel * part.micro_batch)
    found = probe(config, GPU)
    time = step_time(config, derived, found, micro_batches, clock, network)
    memory = tuple(
        stage_memory(config, derived, found, stage, micro_batches)
        for stage in range(config.parallel.pipeline)
    )
    per_token = flops_per_token(config.model, part.context).training
    tokens = part.global_batch * part.context
    # Of one rank per stage; as many ranks of each stage as there are GPUs over stages.
    hardware = _hardware_flops(config, found) * micro_batches
    return Phase(
        stages=part.stages,
        context=part.context,
        micro_batch=part.micro_batch,
        global_batch=part.global_batch,
        micro_batches=micro_batches,
        steps=part.steps,
        tokens=part.steps * tokens,
        memory=memory,
        time=time,
        model_flops=per_token * tokens,
        hardware_flops=hardware * derived.world_size / config.parallel.pipeline,
        mfu=mfu(tokens / time.seconds, per_token, derived.world_size, clock.cluster.peak),
        units=found.units,
    )


def _hardware_flops(config: Config, found: Probe) -> float:
    """Of one micro-batch on one rank of every pipeline stage, forward and backward."""
    return sum(
        work.flops()
        for stage in range(config.parallel.pipeline)
        for chunk in stage_chunks(config, found, stage)
        for unit in chunk.units
        for work in (unit.forward, unit.backward)
    )
