"""A run step by step, before it starts: rate, context, batch and data of every step.

Plain numbers that everything else reads. `megakda.config.resolve` works them out from the stages of
a recipe.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

from megakda.config.schema import DataConfig

ORDER = ("paths", "weights", "split", "packing", "overlong", "loss")
"""Settings of data that decide which sequences there are, and in which order."""


def sequence_settings(data: DataConfig) -> dict[str, Any]:
    """What decides the sequences of `data`: two that agree in it are read as one stream."""
    return {name: getattr(data, name) for name in ORDER}


@dataclass(frozen=True)
class Size:
    """A stretch of steps of one global batch.

    Attributes:
        first_step, steps: 0-based, of the whole run.
        first_token: tokens of the run before it.
        global_batch: sequences per step.
    """

    first_step: int
    steps: int
    first_token: int
    global_batch: int


@dataclass(frozen=True)
class Stage:
    """A stage in whole steps.

    Attributes:
        number: 1-based.
        kind: one of `stages.KINDS`.
        first_step, steps: 0-based, of the whole run.
        first_token, tokens: positions that the steps train on, padding included.
        lr_from, lr_to: rate before the stage, and the one that it leads to.
        reach: tokens of the stage at which the rate would be `lr_to`.
        context: tokens per sequence.
        micro_batch: sequences per rank and forward pass.
        expert_bias_rate: u of the experts' balancing.
        stream: which of `Timetable.streams` it reads.
        sizes: stretches of one batch; several only where the batch grows.
    """

    number: int
    kind: str
    first_step: int
    steps: int
    first_token: int
    tokens: int
    lr_from: float
    lr_to: float
    reach: int
    context: int
    micro_batch: int
    expert_bias_rate: float
    stream: int
    sizes: tuple[Size, ...]

    @property
    def batch(self) -> int:
        """Sequences per step at the end of the stage, the most that it has."""
        return self.sizes[-1].global_batch

    @property
    def sequences(self) -> int:
        """How many it reads."""
        return self.tokens // self.context

    def lr(self, done: int) -> float:
        """The rate of the step with which `done` tokens of the stage are done."""
        if self.kind == "constant":
            return self.lr_to
        share = done / self.reach
        if self.kind == "warmup":
            return self.lr_from + (self.lr_to - self.lr_from) * share
        return self.lr_to + (self.lr_from - self.lr_to) * _fall(self.kind, share)


def _fall(kind: str, share: float) -> float:
    """From 1 at share 0 to 0 at share 1."""
    if kind == "linear":
        return 1.0 - share
    if kind == "cosine":
        return 0.5 * (math.cos(math.pi * share) + 1.0)
    if kind == "exponential":
        return 2.0 * math.pow(0.5, share) - 1.0
    assert kind == "minus_sqrt", kind
    return 1.0 - math.sqrt(share)


@dataclass(frozen=True)
class Stream:
    """The sequences that stages of the same context and data read one after another.

    Attributes:
        context: tokens per sequence.
        data: what to read.
        sequences: how many its stages read together.
        batch: the most sequences that a step of it has.
        last_step: the 0-based last step that reads it.
        context_key, data_key: the settings that say so, for messages.
    """

    context: int
    data: DataConfig
    context_key: str
    data_key: str
    sequences: int
    batch: int
    last_step: int

    @property
    def identity(self) -> str:
        """The settings that decide which sequences these are, and in which order, as text."""
        return json.dumps({"context": self.context, **sequence_settings(self.data)})


@dataclass(frozen=True)
class Step:
    """What one step does.

    Attributes:
        step: 0-based.
        stage: the stage that it belongs to.
        lr: learning rate.
        context: tokens per sequence.
        global_batch: sequences, over all ranks.
        micro_batch: sequences per rank and forward pass.
        micro_batches: per data-parallel rank.
        expert_bias_rate: u of the experts' balancing.
        tokens_before: positions of all steps before.
    """

    step: int
    stage: Stage
    lr: float
    context: int
    global_batch: int
    micro_batch: int
    micro_batches: int
    expert_bias_rate: float
    tokens_before: int


@dataclass(frozen=True)
class Timetable:
    """Every step of a run on `data_parallel` ranks."""

    stages: tuple[Stage, ...]
    streams: tuple[Stream, ...]
    data_parallel: int

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return self.stages[-1].first_step + self.stages[-1].steps

    @property
    def tokens(self) -> int:
        """Positions that the whole run trains on, padding included."""
        return self.stages[-1].first_token + self.stages[-1].tokens

    @property
    def longest_context(self) -> int:
        """Of all stages."""
        return max(stage.context for stage in self.stages)

    def at(self, step: int) -> Step:
        """The 0-based `step`. A run that goes past its end goes on as in its last step."""
        step, past = min(step, self.steps - 1), max(0, step - self.steps + 1)
        stage = self.stages[bisect_right([s.first_step for s in self.stages], step) - 1]
        size = stage.sizes[bisect_right([s.first_step for s in stage.sizes], step) - 1]
        tokens = size.global_batch * stage.context
        before = size.first_token + (step - size.first_step) * tokens
        return Step(
            step=step + past,
            stage=stage,
            lr=stage.lr(before + tokens - stage.first_token),
            context=stage.context,
            global_batch=size.global_batch,
            micro_batch=stage.micro_batch,
            micro_batches=size.global_batch // (self.data_parallel * stage.micro_batch),
            expert_bias_rate=stage.expert_bias_rate,
            tokens_before=before + past * tokens,
        )

    def step_at(self, tokens: int) -> int:
        """The 0-based step that trains on the token after `tokens` others.

        Raises:
            ValueError: the run does not get there.
        """
        if not 0 <= tokens < self.tokens:
            raise ValueError(f"tokens={tokens}: must be in 0..{self.tokens - 1}, those of the run")
        stage = self.stages[bisect_right([s.first_token for s in self.stages], tokens) - 1]
        size = stage.sizes[bisect_right([s.first_token for s in stage.sizes], tokens) - 1]
        return size.first_step + (tokens - size.first_token) // (size.global_batch * stage.context)

    def lr_at(self, tokens: int) -> float:
        """The rate at which the token after `tokens` others is trained on.

        Raises:
            ValueError: the run does not get there.
        """
        return self.at(self.step_at(tokens)).lr

    def streams_from(self, step: int) -> dict[int, Stream]:
        """The streams that 0-based `step` and later ones read, by number; the last one at least."""
        step = min(step, self.steps - 1)
        return {n: stream for n, stream in enumerate(self.streams) if stream.last_step >= step}

    def rows(self) -> list[dict[str, str]]:
        """The stages as a table: a row each, columns in order.

        The rate of the experts' balancing and settings of the data are there if stages differ.
        """
        rows = [_row(stage) for stage in self.stages]
        if len({stage.expert_bias_rate for stage in self.stages}) > 1:
            for row, stage in zip(rows, self.stages, strict=True):
                row["bias-rate"] = f"{stage.expert_bias_rate:g}"
        data = [sequence_settings(stream.data) for stream in self.streams]
        differ = [name for name in ORDER if any(one[name] != data[0][name] for one in data)]
        if differ:
            for row, stage in zip(rows, self.stages, strict=True):
                row["data"] = " ".join(
                    f"{name}={_brief(data[stage.stream][name])}" for name in differ
                )
        return rows


def _brief(value: Any) -> str:
    """A setting without spaces."""
    if isinstance(value, list):
        return ",".join(f"{item:g}" if isinstance(item, float) else str(item) for item in value)
    return "null" if value is None else str(value)


def _row(stage: Stage) -> dict[str, str]:
    first, last = stage.sizes[0].global_batch, stage.batch
    return {
        "stage": f"{stage.number} {stage.kind}",
        "steps": f"{stage.steps:,}",
        "tokens": f"{stage.tokens:,}",
        "rate": f"{stage.lr_from:g}" + ("" if stage.kind == "constant" else f" -> {stage.lr_to:g}"),
        "context": f"{stage.context:,}",
        "batch": f"{last:,}" if first == last else f"{first:,} -> {last:,}",
        "micro-batch": f"{stage.micro_batch:,}",
    }
