"""How long a step takes on a cluster: arithmetic from counted work and assumed efficiencies.

Each operation takes as long as its matrix products or its bytes, whichever is longer, at the
assumed shares of the machine's rates, and a pass takes at least as long as launching its kernels.
Rules of overlap, all on the side of caution:

- messages inside layers (tensor, expert and context parallelism) are awaited;
- activations between stages travel while the next micro-batch is worked on with virtual stages, and
  are awaited without;
- with `parallel.overlap_grad_reduce` gradients of the first stage, which are in buckets, are summed
  during the last backward pass, all but the last bucket; those of later stages while earlier stages
  still work;
- with `parallel.overlap_param_gather` those of the first stage are gathered during the first
  forward pass, all but the first bucket; those of later stages, one bucket each, are awaited;
- the optimizer's step is awaited.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megakda.config import Config, Derived
from megakda.optim.newton_schulz import flops as newton_schulz_flops
from megakda.plan.cluster import Cluster
from megakda.plan.memory import Chunk, stage_buffers, stage_chunks
from megakda.plan.network import Network, Transfer
from megakda.plan.probe import Probe
from megakda.plan.recorder import ATTENTION, DENSE, GROUPED, KDA, OTHER, Work
from megakda.plan.state import Buffer

KINDS = {
    DENSE: "matrix products",
    GROUPED: "expert products",
    ATTENTION: "attention",
    KDA: "KDA kernels",
    OTHER: "memory-bound operations",
}
LAUNCH = "waiting for launches"

ADAMW_BYTES = 100
"""Per element of a shard: AdamW reads and writes 20 fp32 values (`megakda.runtime.adamw`), clipping
and the norm 3, the copy into the model's dtype 2."""

MUON_BYTES = 84
"""Per element: 21 fp32 values. `megakda.optim.muon` reads and writes 3 for the momentum, 3 for the
look-ahead, 3 (6 of 2 bytes) for the way into and out of Newton-Schulz, 2 for the scale, 2 for the
decay and 3 for the update; clipping and the norm 3, the copy into the model's dtype 2."""

GRADIENT_BYTES = 12
"""Per element of a whole buffer of fp32 gradients: set to zero before a step, and after it divided
by the number of tokens, which reads and writes."""


@dataclass(frozen=True)
class StageTime:
    """Seconds of one rank of a pipeline stage for one micro-batch, forward and backward.

    Attributes:
        compute: by kind of work.
        messages: inside layers, by purpose: bytes and awaited seconds.
        sends: between stages.
    """

    compute: dict[str, float]
    messages: dict[str, Transfer]
    sends: Transfer
    sends_hidden: bool

    @property
    def seconds(self) -> float:
        sent = 0.0 if self.sends_hidden else self.sends.seconds
        return sum(self.compute.values()) + sum(x.seconds for x in self.messages.values()) + sent


@dataclass(frozen=True)
class StepTime:
    """One optimizer step.

    Attributes:
        seconds: in all.
        breakdown: seconds by what they go for; adds up to `seconds`.
        slowest: the stage that all others wait for.
        stages: of each pipeline stage.
        traffic: bytes that a rank of the slowest stage sends in a step, by purpose; seconds as if
            nothing overlapped.
        exposed: awaited seconds, by purpose; of gradients, parameters and Muon's matrices those of
            the stage that waits longest for them.
    """

    seconds: float
    breakdown: dict[str, float]
    slowest: int
    stages: tuple[StageTime, ...]
    traffic: dict[str, Transfer]
    exposed: dict[str, float]


def work_seconds(work: Work, cluster: Cluster) -> dict[str, float]:
    """Of one pass, by kind of work."""
    share = cluster.efficiency
    rates = {
        DENSE: share.dense_gemm,
        GROUPED: share.grouped_gemm,
        ATTENTION: share.attention,
        KDA: share.kda,
    }
    memory = cluster.memory_bandwidth_gbs * 1e9 * share.memory
    seconds = dict.fromkeys(KINDS, 0.0)
    launches = 0
    for operation, count in work.operations.items():
        launches += count
        computing = 0.0
        if operation.flops:
            computing = operation.flops / (cluster.peak * rates[operation.kind])
        seconds[operation.kind] += count * max(computing, operation.bytes / memory)
    found = {KINDS[kind]: time for kind, time in seconds.items()}
    found[LAUNCH] = max(0.0, launches * cluster.launch_us * 1e-6 - sum(seconds.values()))
    return found


class Clock:
    """Times of passes on one cluster, each computed once."""

    def __init__(self, cluster: Cluster):
        self.cluster = cluster
        self._known: dict[int, tuple[Work, dict[str, float]]] = {}

    def __call__(self, work: Work) -> dict[str, float]:
        known = self._known.get(id(work))
        if known is None or known[0] is not work:
            known = self._known[id(work)] = (work, work_seconds(work, self.cluster))
        return known[1]


def stage_time(
    config: Config, found: Probe, chunks: Sequence[Chunk], clock: Clock, network: Network
) -> StageTime:
    """One micro-batch through all chunks of a pipeline rank and back."""
    compute: dict[str, float] = {}
    messages: dict[str, Transfer] = {}
    sends = Transfer()
    group = network.groups["pipeline"]
    for chunk in chunks:
        for unit in chunk.units:
            for work in (unit.forward, unit.backward):
                for kind, seconds in clock(work).items():
                    compute[kind] = compute.get(kind, 0.0) + seconds
                for purpose, transfer in network.layer_messages(work.messages).items():
                    messages[purpose] = messages.get(purpose, Transfer()) + transfer
        # Activations to the next stage, gradients to the one before.
        for leaves in (chunk.sends, chunk.receives):
            if leaves and group.ranks > 1:
                sends += network.transfer("send", group, found.activation)
    return StageTime(compute, messages, sends, config.parallel.virtual_pipeline > 1)


def step_time(
    config: Config,
    derived: Derived,
    found: Probe,
    micro_batches: int,
    clock: Clock,
    network: Network,
) -> StepTime:
    """A step of so many micro-batches."""
    parallel = config.parallel
    stages = range(parallel.pipeline)
    times = []
    for stage in stages:
        chunks = stage_chunks(config, found, stage)
        times.append(stage_time(config, found, chunks, clock, network))
    slowest = max(stages, key=lambda s: times[s].seconds)
    own = times[slowest]
    bubble = sum(t.seconds for s, t in enumerate(times) if s != slowest)
    bubble /= parallel.virtual_pipeline

    sharded = parallel.distributed_optimizer
    reduce, gather, muon = Transfer(), Transfer(), Transfer()  # of the slowest stage
    # Of the stage that takes longest over them, for which all others wait.
    reducing = gathering = optimizer = exchanging = 0.0
    ahead = 0.0  # seconds that earlier stages still work after this one's last backward pass
    for stage in stages:
        buffers = stage_buffers(config, derived, found, stage)
        r, g = network.gradients(buffers, sharded), network.parameters(buffers, sharded)
        step = optimizer_seconds(buffers, config, clock.cluster)
        m = network.matrices(buffers) if config.optim.name == "muon" else Transfer()
        buckets = sum(len(buffer.bounds) - 1 for buffer in buffers)
        # Of a buffer that is one bucket all is awaited: nothing of it travels while others compute.
        beside = times[stage].seconds if buckets > len(buffers) else 0.0
        late, early = r.seconds, g.seconds
        if parallel.overlap_grad_reduce:
            late = max(r.seconds / buckets, r.seconds - beside * 2 / 3 - ahead)
        if parallel.overlap_param_gather:
            early = max(g.seconds / buckets, g.seconds - beside / 3)
        ahead += times[stage].seconds * 2 / 3 / parallel.virtual_pipeline
        if late + early + step + m.seconds > reducing + gathering + optimizer + exchanging:
            reducing, gathering, optimizer, exchanging = late, early, step, m.seconds
        if stage == slowest:
            reduce, gather, muon = r, g, m

    breakdown = {kind: seconds * micro_batches for kind, seconds in own.compute.items()}
    exposed = {p: t.seconds * micro_batches for p, t in own.messages.items()}
    traffic = {p: t.times(micro_batches) for p, t in own.messages.items()}
    if parallel.pipeline > 1:
        traffic["pipeline"] = own.sends.times(micro_batches)
        exposed["pipeline"] = 0.0 if own.sends_hidden else traffic["pipeline"].seconds
    traffic |= {"gradients": reduce, "parameters": gather}
    exposed |= {"gradients": reducing, "parameters": gathering}
    if config.optim.name == "muon":
        traffic["Muon's matrices"], exposed["Muon's matrices"] = muon, exchanging
    breakdown |= {f"awaiting {name}": seconds for name, seconds in exposed.items()}
    breakdown |= {"pipeline bubble": bubble, "optimizer": optimizer}
    return StepTime(sum(breakdown.values()), breakdown, slowest, tuple(times), traffic, exposed)


def optimizer_seconds(buffers: Sequence[Buffer], config: Config, cluster: Cluster) -> float:
    """The step of one rank's share of the parameters."""
    share = cluster.efficiency
    size = flops = 0.0
    for buffer in buffers:
        ranks = buffer.ranks if config.parallel.distributed_optimizer else 1
        size += buffer.elements * GRADIENT_BYTES
        for weight, _ in buffer.places:
            per_element = MUON_BYTES if weight.matrices else ADAMW_BYTES
            size += weight.elements * per_element / ranks
            for rows, columns, number, elements in weight.matrices:
                steps = config.optim.muon.newton_schulz_steps
                whole = number * elements / (rows * columns)
                flops += whole * newton_schulz_flops(rows, columns, steps) / buffer.ranks
    return size / (cluster.memory_bandwidth_gbs * 1e9 * share.memory) + flops / (
        cluster.peak * share.dense_gemm
    )
