"""Candidates of a search: whether they are valid, whether they fit, and how fast they are."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megakda.config import Config, Derived, validate
from megakda.errors import ConfigError
from megakda.plan.cluster import Cluster
from megakda.plan.memory import stage_buffers, stage_memory
from megakda.plan.meta_device import GPU
from megakda.plan.network import Network
from megakda.plan.planner import Part, main_part, part_config, parts_of
from megakda.plan.probe import EMBEDDING, HEAD, Probe, probe, unit_names
from megakda.plan.state import state_of
from megakda.plan.timing import Clock, step_time


@dataclass(frozen=True)
class Candidate:
    """A valid one that may fit."""

    config: Config
    derived: Derived
    seconds: float  # of a step of the part with the most tokens


class Judge:
    """Looks at candidates, and remembers what was wrong with them."""

    def __init__(self, cluster: Cluster, clock: Clock):
        self.cluster, self.clock = cluster, clock
        self.tried = self.interleaved = 0  # valid candidates
        self.state = self.total = float("inf")  # least bytes of state, and of all that is too much
        # Refusals without their numbers: how many, and one of them; also of interleaved ones alone.
        self.refused: dict[bool, Counter[str]] = {False: Counter(), True: Counter()}
        self.example: dict[str, str] = {}

    def add(self, config: Config, activations: bool) -> Candidate | None:
        """A candidate whose layers go where they balance the stages, if it is valid and fits.

        Args:
            activations: of the first stage have to fit too, and not state alone.
        """
        try:
            derived = validate(_even(config), self.cluster.gpus)
            part = main_part(derived)
            of_part = part_config(config, part)
            found = probe(of_part, GPU)
            config = _balanced(config, found, self.clock)
            derived = validate(config, self.cluster.gpus)
        except ConfigError as error:
            self._refuse(config, str(error))
            return None
        self.tried += 1
        self.interleaved += config.parallel.virtual_pipeline > 1
        of_part = part_config(config, part)
        state = max(
            state_of(stage_buffers(of_part, derived, found, stage), of_part, (0, 0)).total
            for stage in {0, config.parallel.pipeline - 1}
        )
        self.state = min(self.state, state)
        if state > self.cluster.usable:
            return None
        if activations and not self._fits(config, derived, part):
            return None
        network = Network(config, derived, self.cluster)
        micro_batches = part.global_batch // (derived.data_parallel * part.micro_batch)
        time = step_time(of_part, derived, found, micro_batches, self.clock, network)
        return Candidate(config, derived, time.seconds)

    def fits(self, candidate: Candidate) -> bool:
        """Whether the first stage does with the run's longest sequences."""
        config, derived = candidate.config, candidate.derived
        longest = max(parts_of(derived), key=lambda part: part.context * part.micro_batch)
        return self._fits(config, derived, longest)

    def _fits(self, config: Config, derived: Derived, part: Part) -> bool:
        config = part_config(config, part)
        micro_batches = part.global_batch // (derived.data_parallel * part.micro_batch)
        first = stage_memory(config, derived, probe(config, GPU), 0, micro_batches)
        return self.holds(first.total)

    def holds(self, total: int) -> bool:
        """Whether a GPU has so many bytes, activations included."""
        if total > self.cluster.usable:
            self.total = min(self.total, total)
        return total <= self.cluster.usable

    def _refuse(self, config: Config, text: str) -> None:
        kind = re.sub(r"[\d,.]+", "#", text)
        self.example.setdefault(kind, text)
        self.refused[config.parallel.virtual_pipeline > 1][kind] += 1

    def _commonest(self, refused: Counter[str]) -> str:
        return self.example[refused.most_common(1)[0][0]] if refused else "none was tried"

    def notes(self) -> list[str]:
        """What a reader of the proposals may wonder about."""
        if self.interleaved or not self.refused[True]:
            return []
        return [f"No interleaved pipeline is valid: {self._commonest(self.refused[True])}"]

    def nothing(self, config: Config) -> str:
        """Why there are no proposals."""
        usable = self.cluster.usable
        where = f"cluster={self.cluster.name}x{self.cluster.gpus}: no layout of {config.model.name}"
        if not self.tried:
            refused = self._commonest(self.refused[False] + self.refused[True])
            return (
                f"{where} is valid with train.global_batch={config.train.global_batch}; the "
                f"commonest refusal: {refused}"
            )
        what, least = "weights, gradients and optimizer state alone", self.state
        if self.state <= usable:
            what, least = "with the activations of its longest sequences a GPU", self.total
        return (
            f"{where} fits: {what} would take at least {least / 2**30:.1f} GiB of the "
            f"{usable / 2**30:.1f} GiB of a GPU that memory_headroom leaves; use more GPUs, a "
            "shorter train.context, or a smaller model"
        )


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
