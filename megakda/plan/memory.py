"""Bytes of one rank of each pipeline stage, at its fullest.

Weights, gradients and optimizer state are there all the time (`state`). Activations come and go:
`Schedule` walks through the forward and backward passes of megatron-core's pipeline schedules in
their order and adds up what `probe` has found for each layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megakda.config import Config, Derived
from megakda.config.layout import chunk_layers_of_rank
from megakda.config.pattern import LINEAR, layer_kinds
from megakda.models.flops import CHUNK
from megakda.plan.probe import EMBEDDING, HEAD, Probe, Unit, Weight
from megakda.plan.state import Buffer, State, buffers, state_of

BATCH_BYTES = 8 + 8 + 8 + 4
"""Per token of a micro-batch: tokens, labels and positions as int64, a loss mask in fp32."""


@dataclass(frozen=True)
class Chunk:
    """One virtual stage of a pipeline rank.

    Attributes:
        units: in order; the embedding and the head are units too.
        receives, sends: whether activations come from, or go to, another rank or chunk.
    """

    units: tuple[Unit, ...]
    receives: bool
    sends: bool

    @property
    def weights(self) -> list[Weight]:
        return [weight for unit in self.units for weight in unit.weights]


@dataclass(frozen=True)
class Activations:
    """What the forward and backward passes of one rank hold, in bytes.

    Attributes:
        peak: most at any time, everything included.
        saved: of that, for backward passes still to come.
        working: of that, what the unit then at work needs besides.
        in_flight: micro-batches (of a chunk each, with virtual stages) between their passes.
        unit, backward: which unit was at work at the peak, and in which pass.
    """

    peak: int
    saved: int
    working: int
    in_flight: int
    unit: str
    backward: bool


@dataclass(frozen=True)
class StageMemory:
    """One rank of a pipeline stage.

    Attributes:
        stage: 0-based.
        layers: (first, last + 1) of each chunk, 0-based.
        parameters: elements that this rank holds.
        state, activations: bytes.
    """

    stage: int
    layers: tuple[tuple[int, int], ...]
    parameters: int
    state: State
    activations: Activations

    @property
    def total(self) -> int:
        """At the fullest moment: activations, or later the optimizer's step."""
        return self.state.total + max(self.activations.peak, self.state.step)


def stage_chunks(config: Config, found: Probe, stage: int) -> list[Chunk]:
    """The chunks of one pipeline rank."""
    parallel = config.parallel
    ranges = chunk_layers_of_rank(config.model, parallel, stage)
    last_stage = stage == parallel.pipeline - 1
    chunks = []
    for number, (first, last) in enumerate(ranges):
        begins = stage == 0 and number == 0
        ends = last_stage and number == len(ranges) - 1
        units = found.layers(config.model, first, last)
        units = [found.units[EMBEDDING]] * begins + units + [found.units[HEAD]] * ends
        chunks.append(Chunk(tuple(units), not begins, not ends))
    return chunks


def stage_buffers(config: Config, derived: Derived, found: Probe, stage: int) -> list[Buffer]:
    """All buffers of one pipeline rank."""
    return [
        buffer
        for number, chunk in enumerate(stage_chunks(config, found, stage))
        for buffer in buffers(chunk.weights, config, derived, stage == 0 and number == 0)
    ]


def stage_memory(
    config: Config, derived: Derived, found: Probe, stage: int, micro_batches: int
) -> StageMemory:
    """What the fullest rank of a pipeline stage holds in a step of so many micro-batches."""
    chunks = stage_chunks(config, found, stage)
    return StageMemory(
        stage=stage,
        layers=tuple(chunk_layers_of_rank(config.model, config.parallel, stage)),
        parameters=sum(weight.elements for chunk in chunks for weight in chunk.weights),
        state=state_of(stage_buffers(config, derived, found, stage), config),
        activations=activations(config, found, chunks, stage, micro_batches),
    )


# ------------------------------------------------------------------ activations


def schedule(
    pipeline: int, chunks: int, stage: int, micro_batches: int
) -> Iterator[tuple[bool, int, int]]:
    """(whether backward, chunk, micro-batch) in the order of megatron-core's schedules.

    Without a pipeline, one forward and one backward pass at a time. 1F1B: as many forward passes
    as there are stages to come, then one of each in turn (arXiv 2104.04473, section 2.2).
    Interleaved: chunk by chunk in groups of as many micro-batches as there are stages.
    """
    passes = micro_batches * chunks
    if chunks > 1:
        ahead = min((pipeline - stage - 1) * 2 + (chunks - 1) * pipeline, passes)
    else:
        ahead = min(pipeline - stage - 1, passes)

    def place(number: int, backward: bool) -> tuple[bool, int, int]:
        group, within = divmod(number, pipeline * chunks)
        chunk, micro_batch = divmod(within, pipeline)
        chunk = chunks - 1 - chunk if backward else chunk
        return backward, chunk, group * pipeline + micro_batch

    for number in range(ahead):
        yield place(number, False)
    for number in range(passes - ahead):
        yield place(number + ahead, False)
        yield place(number, True)
    for number in range(passes - ahead, passes):
        yield place(number, True)


def activations(
    config: Config, found: Probe, chunks: Sequence[Chunk], stage: int, micro_batches: int
) -> Activations:
    """The fullest moment of a step on one rank of a pipeline stage."""
    parallel = config.parallel
    batch = BATCH_BYTES * config.train.context * config.train.micro_batch
    # The pattern repeats: a few rounds show all of it.
    rounds = min(micro_batches, 3 * parallel.pipeline)
    ledger = _Ledger(found, found.workspace + (batch if _reads(chunks, config) else 0))
    for backward, number, _ in schedule(parallel.pipeline, len(chunks), stage, rounds):
        (ledger.backward if backward else ledger.forward)(number, chunks[number])
    return ledger.fullest


def _reads(chunks: Sequence[Chunk], config: Config) -> bool:
    ends = any(not chunk.receives or not chunk.sends for chunk in chunks)
    return ends or config.data.packing != "none"


def kda_state_bytes(config: Config) -> int:
    """Of the states before each chunk and their gradients, which the backward pass of one KDA layer
    makes on a GPU (`megakda.kernels.kda.chunk_triton`); part of the probe's peak."""
    model, parallel, train = config.model, config.parallel, config.train
    if LINEAR not in layer_kinds(model.pattern, model.num_layers, model.last_layer_full):
        return 0
    heads = model.num_heads // parallel.tensor // max(1, parallel.recompute_head_groups)
    chunks = -(-train.micro_batch * train.context // parallel.context // CHUNK)
    size = model.linear.head_dim_k * model.linear.head_dim_v
    return 2 * heads * chunks * size * (2 if config.precision == "bf16" else 4)


class _Ledger:
    """What is alive while passes follow each other."""

    def __init__(self, found: Probe, always: int):
        self.activation = found.activation
        self.live = always
        self.in_flight = 0
        self.left: dict[tuple[int, int], int] = {}  # by chunk and unit: since its backward pass
        self.fullest = Activations(0, 0, 0, 0, "", False)

    def forward(self, number: int, chunk: Chunk) -> None:
        self.live += self._held(chunk)
        self.in_flight += 1
        for place, unit in enumerate(chunk.units):
            self._look(unit.forward_peak, unit, False)
            self.live += unit.saved - self.left.pop((number, place), 0)

    def backward(self, number: int, chunk: Chunk) -> None:
        for place, unit in reversed(list(enumerate(chunk.units))):
            self.live -= unit.saved
            self._look(unit.backward_peak, unit, True)
            self.left[number, place] = unit.left
            self.live += unit.left
        self.live -= self._held(chunk)
        self.in_flight -= 1

    def _held(self, chunk: Chunk) -> int:
        """Inputs and outputs of a chunk, which the schedule keeps until the backward pass."""
        first, last = chunk.units[0], chunk.units[-1]
        received = self.activation if chunk.receives and not first.keeps_input else 0
        return received + last.output

    def _look(self, working: int, unit: Unit, backward: bool) -> None:
        if self.live + working > self.fullest.peak:
            saved, more = (
                (self.live + unit.saved, working - unit.saved)
                if backward
                else (
                    self.live,
                    working,
                )
            )
            self.fullest = Activations(
                self.live + working, saved, more, self.in_flight, unit.name, backward
            )
