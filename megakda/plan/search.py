"""Layouts for a run on a cluster, best first.

Two rounds, since looking at every layout would take an hour. The first tries tensor, context,
expert and pipeline sizes with selective recomputation and one sequence per micro-batch, and keeps
the promising ways to cut layers. The second tries those with all ways of recomputation and larger
micro-batches, and the best with other modes of context parallelism. Every candidate goes through
`megakda.config.validate`, as a run would, and those that are proposed are then built on the meta
device at full rank count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from megakda.config import Config, validate
from megakda.config.schema import ParallelConfig
from megakda.errors import ConfigError
from megakda.models.dry_run import build_rank
from megakda.plan.candidates import Candidate, Judge
from megakda.plan.cluster import Cluster
from megakda.plan.planner import RunPlan, make_plan, parts_of
from megakda.plan.timing import Clock

WAYS, SHARED_WAYS = 4, 1
"""Ways to cut layers (tensor, context, expert) that get into the second round; and of those, ways
that are also tried with more context parallelism, where a part of the run has longer sequences."""

MICRO_BATCHES = (1, 2, 4)

LIGHT = ["core_attn", "layernorm"]
"""Modules that cost little to recompute."""

LONG, VERY_LONG = 16_384, 131_072
"""Tokens of a sequence from which sharing it among ranks is tried; and from which too many layouts
are possible to look at those that can hardly be good."""


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
        given: the plan of the recipe as it is; None where it is not valid on the cluster.
        notes: what is good to know besides.
    """

    proposals: tuple[Proposal, ...]
    tried: int
    given: RunPlan | None
    notes: tuple[str, ...]


def search(config: Config, cluster: Cluster, top: int = 10) -> Searched:
    """The fastest layouts of `config` on `cluster` that fit.

    Only `parallel` and `train.micro_batch` change, with the distributed optimizer and overlapped
    gradients and parameters throughout. The recipe as it is is among the candidates.

    Raises:
        ConfigError: nothing is valid, or nothing fits, or what is wrong with any layout.
    """
    alone = replace(config, parallel=ParallelConfig(), train=replace(config.train, micro_batch=1))
    parts = parts_of(validate(alone, 1))
    clock, notes, given = Clock(cluster), [], None
    try:
        given = make_plan(config, cluster, clock)
    except ConfigError as error:
        notes.append(f"The recipe as it is does not work here: {error}")
    usual = max(parts, key=lambda part: part.steps * part.context * part.global_batch).context
    longest = max(part.context for part in parts)
    judge = Judge(cluster, clock)
    for everything in (False, True) if longest >= LONG else (False,):
        tokens = longest if everything else usual
        candidates = _candidates(config, cluster, judge, tokens, longest, everything)
        proposals = _proposals(config, cluster, clock, judge, candidates, given, top)
        if proposals:
            notes += judge.notes()
            return Searched(tuple(proposals), judge.tried, given, tuple(notes))
    raise ConfigError(judge.nothing(config))


def _candidates(
    config: Config,
    cluster: Cluster,
    judge: Judge,
    tokens: int,
    longest: int,
    everything: bool,
) -> list[Candidate]:
    """Both rounds over layouts for sequences of so many tokens; fastest first."""
    # Another way of recomputation may fit where the first round's does not.
    best: dict[tuple[int, ...], float] = {}
    for way in _ways(config, cluster, tokens, everything):
        layouts = _layouts(config, cluster, way, tokens)
        judged = [judge.add(_with(config, x, "selective", 1), False) for x in layouts]
        seconds = [candidate.seconds for candidate in judged if candidate]
        if seconds:
            best[way] = min(seconds)
    ways = sorted(best, key=lambda way: best[way])[:WAYS]
    if longest > tokens:
        ways += [
            (tensor, context * more, expert)
            for tensor, context, expert in ways[:SHARED_WAYS]
            for more in (2, 4)
            if _sensible(longest, tensor, context * more)
        ]
    found = [
        candidate
        for way in dict.fromkeys(ways)
        for recompute, modules in _recomputations(config)
        # More ranks per sequence are there to recompute less.
        if way in best or recompute != "full"
        for candidate in _with_micro_batches(
            config, cluster, judge, way, tokens, recompute, modules
        )
    ]
    found.sort(key=lambda candidate: candidate.seconds)
    shared = [candidate for candidate in found if candidate.config.parallel.context > 1]
    for candidate in shared[:2]:
        for layout in _modes(candidate.config.parallel, cluster):
            other = judge.add(replace(candidate.config, parallel=layout), True)
            found += [other] if other else []
    return sorted(found, key=lambda candidate: candidate.seconds)


def _with_micro_batches(
    config: Config,
    cluster: Cluster,
    judge: Judge,
    way: tuple[int, ...],
    tokens: int,
    recompute: str,
    modules: list[str],
) -> Iterator[Candidate]:
    fastest = float("inf")
    for micro_batch in MICRO_BATCHES:
        found = [
            candidate
            for layout in _layouts(config, cluster, way, tokens)
            if (
                candidate := judge.add(
                    _with(
                        config, replace(layout, recompute_modules=modules), recompute, micro_batch
                    ),
                    True,
                )
            )
        ]
        yield from found
        seconds = min((candidate.seconds for candidate in found), default=float("inf"))
        if seconds >= fastest or not found:
            return  # larger ones will not help either
        fastest = seconds


def _proposals(
    config: Config,
    cluster: Cluster,
    clock: Clock,
    judge: Judge,
    candidates: Sequence[Candidate],
    given: RunPlan | None,
    top: int,
) -> list[Proposal]:
    """The best that fit all parts of the run, and the recipe if it is one of them."""
    plans = [given] if given and given.fits else []
    for candidate in candidates[: 40 * top]:
        if any(candidate.config == plan.config for plan in plans) or not judge.fits(candidate):
            continue
        plan = make_plan(candidate.config, cluster, clock)
        if judge.holds(plan.bytes):
            plans.append(plan)
        # Other parts of the run may reorder neighbours, so a few more are looked at.
        if len(plans) >= top + 5:
            break
    plans.sort(key=lambda plan: plan.seconds)
    return [Proposal(_overrides(config, p.config), p, reason_of(p)) for p in plans[:top]]


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


def _ways(
    config: Config, cluster: Cluster, tokens: int, everything: bool
) -> Iterator[tuple[int, ...]]:
    """Sizes (tensor, context, expert) that could work for sequences of so many tokens."""
    model = config.model
    experts = _powers(min(64, model.moe.num_experts)) if model.ffn == "moe" else [1]
    for tensor in _powers(min(cluster.gpus_per_node, model.num_heads)):
        for context in _powers(tokens // 4096) if tokens >= LONG else [1]:
            if model.num_heads % tensor == 0 and (everything or _sensible(tokens, tensor, context)):
                yield from ((tensor, context, expert) for expert in experts)


def _sensible(tokens: int, tensor: int, context: int) -> bool:
    """Whether a rank gets enough tokens to be busy, and of very long sequences not too many."""
    share = tokens // (tensor * context)
    if tokens >= VERY_LONG:
        return VERY_LONG // 16 <= share <= VERY_LONG // 4
    return share >= 4096 or context == 1


def _layouts(
    config: Config, cluster: Cluster, way: tuple[int, ...], tokens: int
) -> Iterator[ParallelConfig]:
    """Pipelines for a way to cut layers; all else as given."""
    tensor, context, expert = way
    for pipeline, virtual in product(_powers(config.model.num_layers), (1, 2, 3)):
        if cluster.gpus % (tensor * context * pipeline) or cluster.gpus % (pipeline * expert):
            continue
        if virtual > 1 and (pipeline == 1 or pipeline * virtual > config.model.num_layers):
            continue
        yield replace(
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
            # Of very long sequences the latents of all ranks at once need too much memory.
            context_attention="ring" if context > 1 and tokens >= VERY_LONG else "all_gather",
            context_heads=None,
            distributed_optimizer=True,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
            recompute_head_groups=0,
        )


def _modes(layout: ParallelConfig, cluster: Cluster) -> Iterator[ParallelConfig]:
    """Other ways to share sequences among as many ranks."""
    other = "ring" if layout.context_attention == "all_gather" else "all_gather"
    yield replace(layout, context_attention=other)
    base = replace(layout, context_attention="all_gather")
    yield replace(base, context_mode="heads")
    heads = min(layout.context, cluster.gpus_per_node // layout.tensor)
    if 1 < heads < layout.context:
        yield replace(base, context_mode="two_level", context_heads=heads)


def _recomputations(config: Config) -> list[tuple[str, list[str]]]:
    """Ways of recomputation, each with the modules of selective ones."""
    given = list(config.parallel.recompute_modules)
    light = [("selective", LIGHT)] if sorted(given) != sorted(LIGHT) else []
    return [("none", given), *light, ("selective", given), ("full", given)]


def _powers(most: int) -> list[int]:
    return [1 << n for n in range(max(1, most).bit_length())]


def _with(config: Config, layout: ParallelConfig, recompute: str, micro_batch: int) -> Config:
    return replace(
        config,
        parallel=replace(layout, recompute=recompute),
        train=replace(config.train, micro_batch=micro_batch),
    )


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
    phase = plan.longest_phase
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
