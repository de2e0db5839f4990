"""Layouts for a run on a cluster, best first.

Two rounds, since looking at every layout would take an hour. The first tries tensor, pipeline,
context and expert sizes with selective recomputation and one sequence per micro-batch, and keeps
the promising ways to cut layers. The second tries those with all ways of recomputation and larger
micro-batches. Every candidate goes through `megakda.config.validate`, as a run would, and those
that are proposed are then built on the meta device at full rank count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from megakda.config import Config, Derived, validate
from megakda.config.schema import ParallelConfig
from megakda.config.validate import derive
from megakda.errors import ConfigError
from megakda.models.dry_run import build_rank
from megakda.plan.cluster import Cluster
from megakda.plan.memory import stage_buffers, stage_memory
from megakda.plan.meta_device import GPU
from megakda.plan.network import Network
from megakda.plan.planner import RunPlan, main_part, make_plan, part_config, parts_of
from megakda.plan.probe import EMBEDDING, HEAD, Probe, probe, unit_names
from megakda.plan.state import state_of
from megakda.plan.timing import Clock, step_time

LONG = 16_384
"""Tokens of a sequence from which sharing it among ranks is tried."""

MICRO_BATCHES = (1, 2, 4)

WAYS = 8
"""Ways to cut layers (tensor, context, expert) that get into the second round."""


@dataclass(frozen=True)
class Proposal:
    """A layout that works.

    Attributes:
        overrides: what to add to the command line.
        plan: of the run.
        reason: what makes it good and what bounds it, in words.
    """

    overrides: tuple[str, ...]
    plan: RunPlan
    reason: str


@dataclass(frozen=True)
class Searched:
    """What a search has found.

    Attributes:
        proposals: best first.
        tried: candidates that are valid.
    """

    proposals: tuple[Proposal, ...]
    tried: int


@dataclass(frozen=True)
class _Candidate:
    config: Config
    derived: Derived
    seconds: float  # of the whole run, going by its longest part


def search(config: Config, cluster: Cluster, top: int = 10) -> Searched:
    """The fastest layouts of `config` on `cluster` that fit.

    Only `parallel` and `train.micro_batch` change. With the distributed optimizer and overlapped
    gradients and parameters throughout.

    Raises:
        ConfigError: nothing is valid, or nothing fits.
    """
    clock = Clock(cluster)
    tried = 0
    for tokens in _lengths(config):
        found, rounds = _search(
            config, cluster, clock, list(_layouts(config, cluster, tokens)), top
        )
        tried += sum(r.tried for r in rounds)
        if found:
            return Searched(tuple(found), tried)
    raise ConfigError(_nothing(config, cluster, *rounds))


def _lengths(config: Config) -> list[int]:
    """Tokens of a sequence to share among ranks: those of most of the run; where nothing fits so,
    those of its longest sequences."""
    parts = parts_of(derive(_alone(config), 1))
    usual = max(parts, key=lambda part: part.steps * part.context * part.global_batch).context
    return list(dict.fromkeys([usual, max(part.context for part in parts)]))


def _alone(config: Config) -> Config:
    return replace(config, parallel=ParallelConfig(), train=replace(config.train, micro_batch=1))


def _search(
    config: Config, cluster: Cluster, clock: Clock, layouts: Sequence[ParallelConfig], top: int
) -> tuple[list[Proposal], tuple[_Round, _Round]]:
    """The best of some layouts, and both rounds."""
    # Another way of recomputation may fit where the first round's does not.
    first, second = _Round(cluster, clock, False), _Round(cluster, clock, True)
    for layout in layouts:
        first.add(_with(config, layout, "selective", 1))
    best: dict[tuple[int, ...], float] = {}
    for candidate in first.found:
        way = _way(candidate.config.parallel)
        best[way] = min(candidate.seconds, best.get(way, candidate.seconds))
    for way in sorted(best, key=lambda way: best[way])[:WAYS]:
        own = [layout for layout in layouts if _way(layout) == way]
        for recompute in ("none", "selective", "full"):
            fastest = float("inf")
            for micro_batch in MICRO_BATCHES:
                seconds = [second.add(_with(config, x, recompute, micro_batch)) for x in own]
                if min(seconds) >= fastest:
                    break  # larger ones will not help either
                fastest = min(seconds)
    proposals: list[Proposal] = []
    waiting = sorted(second.found, key=lambda candidate: candidate.seconds)
    for candidate in waiting[: 40 * top]:
        plan = make_plan(candidate.config, cluster, clock)
        if plan.fits:
            proposals.append(Proposal(_overrides(config, candidate.config), plan, reason_of(plan)))
        # Other parts of the run may reorder neighbours, so a few more are looked at.
        if len(proposals) >= top + 5:
            break
    proposals.sort(key=lambda proposal: proposal.plan.seconds)
    return proposals[:top], (first, second)


def check_built(plan: RunPlan) -> None:
    """Builds the first rank of every pipeline stage of a plan on the meta device.

    Raises:
        ConfigError: the config does not fit the ranks.
        AssertionError: a rank holds other parameters than planned.
    """
    per_stage = plan.cluster.gpus // plan.config.parallel.pipeline
    for stage, memory in enumerate(plan.phases[0].memory):
        built = build_rank(plan.config, stage * per_stage, plan.cluster.gpus)
        assert built.parameters == memory.parameters, (stage, built.parameters, memory.parameters)


# ------------------------------------------------------------------ candidates


def _layouts(config: Config, cluster: Cluster, tokens: int) -> Iterator[ParallelConfig]:
    """Sizes that could work for sequences of so many tokens; all else as given."""
    model, world = config.model, cluster.gpus
    experts = _powers(model.moe.num_experts) if model.ffn == "moe" else [1]
    for tensor in _powers(min(cluster.gpus_per_node, model.num_heads)):
        for context, pipeline in product(_contexts(tokens), _powers(model.num_layers)):
            if world % (tensor * context * pipeline):
                continue
            for expert, virtual in product(experts, (1, 2, 3)):
                chunks = pipeline * virtual
                if expert > 64 or (virtual > 1 and (pipeline == 1 or chunks > model.num_layers)):
                    continue
                if world % (pipeline * expert) or model.num_heads % tensor:
                    continue
                base = replace(
                    config.parallel,
                    tensor=tensor,
                    sequence=True,
                    pipeline=pipeline,
                    virtual_pipeline=virtual,
                    pipeline_layers=None,
                    expert=expert,
                    expert_tensor=1,
                    context=context,
                    context_mode="state",
                    context_heads=None,
                    distributed_optimizer=True,
                    overlap_grad_reduce=True,
                    overlap_param_gather=True,
                    recompute_head_groups=0,
                )
                yield base
                if context > 1:
                    yield replace(base, context_mode="heads")
                    yield replace(base, context_attention="ring")
                    heads = min(context, cluster.gpus_per_node // tensor)
                    if 1 < heads < context:
                        yield replace(base, context_mode="two_level", context_heads=heads)


def _contexts(tokens: int) -> list[int]:
    """Sizes of context parallelism: those that leave a rank 4096 tokens of a sequence."""
    return _powers(tokens // 4096) if tokens >= LONG else [1]


def _powers(most: int) -> list[int]:
    return [1 << n for n in range(max(1, most).bit_length())]


def _way(parallel: ParallelConfig) -> tuple[int, ...]:
    """What decides about the layers themselves."""
    return parallel.tensor, parallel.context, parallel.expert


def _with(config: Config, layout: ParallelConfig, recompute: str, micro_batch: int) -> Config:
    return replace(
        config,
        parallel=replace(layout, recompute=recompute),
        train=replace(config.train, micro_batch=micro_batch),
    )


class _Round:
    """Candidates that are valid and whose state fits, with their times."""

    def __init__(self, cluster: Cluster, clock: Clock, activations: bool):
        """With `activations`, those of the first stage have to fit too."""
        self.cluster, self.clock, self.activations = cluster, clock, activations
        self.found: list[_Candidate] = []
        self.tried = 0
        self.least = float("inf")  # bytes
        self.refused = ""

    def add(self, config: Config) -> float:
        """Looks at a candidate, whose layers go where they balance the stages.

        Returns:
            Seconds of a step; infinity if it is not valid or does not fit.
        """
        try:
            derived = validate(_even(config), self.cluster.gpus)
            phase = main_part(derived)
            of_phase = part_config(config, phase)
            found = probe(of_phase, GPU)
            config = _balanced(config, found, self.clock)
            derived = validate(config, self.cluster.gpus)
        except ConfigError as error:
            self.refused = str(error)
            return float("inf")
        self.tried += 1
        of_phase = part_config(config, phase)
        micro_batches = phase.global_batch // (derived.data_parallel * phase.micro_batch)
        state = max(
            state_of(stage_buffers(of_phase, derived, found, stage), of_phase, (0, 0)).total
            for stage in {0, config.parallel.pipeline - 1}
        )
        self.least = min(self.least, state)
        if state > self.cluster.usable:
            return float("inf")
        if self.activations:
            first = stage_memory(of_phase, derived, found, 0, micro_batches)
            if first.total > self.cluster.usable:
                return float("inf")
        network = Network(config, derived, self.cluster)
        time = step_time(of_phase, derived, found, micro_batches, self.clock, network)
        self.found.append(_Candidate(config, derived, time.seconds))
        return time.seconds


def _even(config: Config) -> Config:
    """With layers shared as evenly as whole numbers go, for a first check."""
    parallel = config.parallel
    chunks = parallel.pipeline * parallel.virtual_pipeline
    share, rest = divmod(config.model.num_layers, chunks)
    layers = [share + (n < rest) for n in range(chunks)] if chunks > 1 else None
    return replace(config, parallel=replace(parallel, pipeline_layers=layers))


def _balanced(config: Config, found: Probe, clock: Clock) -> Config:
    """With layers where the slowest chunk is as fast as can be."""
    parallel = config.parallel
    chunks = parallel.pipeline * parallel.virtual_pipeline
    if chunks == 1:
        return _even(config)

    def seconds(name: str) -> float:
        unit = found.units[name]
        return sum(clock(unit.forward).values()) + sum(clock(unit.backward).values())

    layers = [seconds(name) for name in unit_names(config.model)]
    sizes = balance(layers, chunks, seconds(EMBEDDING), seconds(HEAD))
    return replace(config, parallel=replace(parallel, pipeline_layers=sizes))


def balance(seconds: Sequence[float], chunks: int, first: float, last: float) -> list[int]:
    """Layers per chunk so that the slowest chunk is as fast as can be.

    Args:
        seconds: of each layer.
        first, last: what the first and the last chunk do besides.
    """
    total = [0.0]
    for value in seconds:
        total.append(total[-1] + value)
    count = len(seconds)
    # best[n]: slowest so far and cuts, with the first n layers in the chunks so far
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for chunk in range(chunks):
        extra = (first if chunk == 0 else 0.0) + (last if chunk == chunks - 1 else 0.0)
        left = chunks - 1 - chunk
        following: dict[int, tuple[float, list[int]]] = {}
        for begin, (slowest, sizes) in best.items():
            ends = range(begin + 1, count - left + 1) if left else [count]
            for end in ends:
                if end <= begin:
                    continue
                worst = max(slowest, total[end] - total[begin] + extra)
                if end not in following or worst < following[end][0]:
                    following[end] = (worst, [*sizes, end - begin])
        best = following
    return best[count][1]


# ------------------------------------------------------------------ words


def _overrides(before: Config, after: Config) -> tuple[str, ...]:
    """The settings in which two configs differ, as overrides."""
    found = []
    for name, value in vars(after.parallel).items():
        if value != getattr(before.parallel, name):
            found.append(f"parallel.{name}={_text(value)}")
    if after.train.micro_batch != before.train.micro_batch:
        found.append(f"train.micro_batch={after.train.micro_batch}")
    return tuple(found)


def _text(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return str(value)


def reason_of(plan: RunPlan) -> str:
    """What takes the most time besides computing, and how near memory is to its bound."""
    phase = max(plan.phases, key=lambda p: p.steps * p.time.seconds)
    time, parallel = phase.time, plan.config.parallel
    waits = {
        name: seconds
        for name, seconds in time.breakdown.items()
        if name.startswith("awaiting") or "bubble" in name or "launch" in name
    }
    worst = max(waits, key=lambda name: waits[name])
    words = [f"{worst} {waits[worst] / time.seconds:.0%} of the step"]
    if worst != "pipeline bubble" and parallel.pipeline > 1:
        words.append(f"bubble {time.breakdown['pipeline bubble'] / time.seconds:.0%}")
    if parallel.recompute != "none":
        extra = phase.hardware_flops / phase.model_flops - 1
        words.append(f"recomputation and the like add {extra:.0%} FLOPs")
    words.append(f"memory {plan.bytes / plan.cluster.memory:.0%} full")
    if plan.bytes > 0.9 * plan.cluster.usable:
        words.append("bound by it")
    return ", ".join(words)


def _nothing(config: Config, cluster: Cluster, *rounds: _Round) -> str:
    least = min(r.least for r in rounds)
    where = f"cluster={cluster.name}x{cluster.gpus}"
    if not any(r.tried for r in rounds):
        return (
            f"{where}: no layout of {config.model.name} is valid with train.global_batch="
            f"{config.train.global_batch}; the last one tried: {rounds[0].refused}"
        )
    return (
        f"{where}: no layout of {config.model.name} fits: weights, gradients and optimizer state "
        f"alone take at least {least / 2**30:.1f} GiB of the {cluster.usable / 2**30:.1f} GiB of a "
        f"GPU that memory_headroom leaves; use more GPUs, a shorter train.context, or a "
        "smaller model"
    )
