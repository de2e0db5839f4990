"""A run step by step, before it starts: rate, context, batch and data of every step.

`resolve` turns the stages of a recipe into a `Plan`, plain numbers that everything else reads.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from megakda.config.schema import DataConfig, TrainConfig
from megakda.config.stages import StageSettings
from megakda.errors import ConfigError

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
        stream: which of `Plan.streams` it reads.
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
class PlannedStep:
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
class Plan:
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

    def at(self, step: int) -> PlannedStep:
        """The 0-based `step`. A run that goes past its end goes on as in its last step."""
        step, past = min(step, self.steps - 1), max(0, step - self.steps + 1)
        stage = self.stages[bisect_right([s.first_step for s in self.stages], step) - 1]
        size = stage.sizes[bisect_right([s.first_step for s in stage.sizes], step) - 1]
        tokens = size.global_batch * stage.context
        before = size.first_token + (step - size.first_step) * tokens
        return PlannedStep(
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


def resolve(
    settings: Sequence[StageSettings],
    train: TrainConfig,
    peak: float,
    data_parallel: int,
    interleave: int = 1,
) -> Plan:
    """The plan of these stages.

    A stage in tokens ends at the step whose end is nearest to where all stages so far should end,
    so that roundings do not add up, and the last stage ends within half a step of the whole.

    A batch that grows takes every multiple of data-parallel ranks x micro-batch x `interleave`
    between its ends, or grows by as much at a time as the stage says; each size has the same share
    of the stage's tokens.

    Args:
        settings: batches checked to be such multiples.
        train: the length of the run, if it says one.
        peak: `optim.lr`, the rate of a first stage that is no warmup.
        data_parallel: ranks that share a batch.
        interleave: what an interleaved pipeline wants multiples of, per rank.

    Raises:
        ConfigError: a stage shorter than a step, or without a rate to train at; stages that are not
            as long as the run.
    """
    units = [data_parallel * stage.micro_batch * interleave for stage in settings]
    closed = _close(settings, units, train)
    walked = _walk(closed, units)
    _check_length(closed, walked, units, train)

    stages: list[Stage] = []
    streams: list[Stream] = []
    step = token = 0
    rate = 0.0 if settings[0].kind == "warmup" else peak
    for setting, counts in zip(closed, walked, strict=True):
        sizes = []
        first_step, first_token = step, token
        for batch, count in counts:
            sizes.append(Size(step, count, token, batch))
            step, token = step + count, token + count * batch * setting.context
        tokens, target = token - first_token, rate if setting.to is None else setting.to
        if not (target or (rate and setting.kind != "constant")):
            raise ConfigError(
                f"{setting.name} begins at the learning rate 0 and stays there: give the stage "
                "before it a positive `to`, or this one"
            )
        last = counts[-1][0] * setting.context
        if setting.kind != "warmup":
            reach = tokens + last  # the last step of a fall still trains, if it goes to 0
        elif setting.reach_steps is None:
            reach = tokens
        else:
            reach = setting.reach_steps * last
        stages.append(
            Stage(
                number=len(stages) + 1,
                kind=setting.kind,
                first_step=first_step,
                steps=step - first_step,
                first_token=first_token,
                tokens=tokens,
                lr_from=target if setting.kind == "constant" else rate,
                lr_to=target,
                reach=reach,
                context=setting.context,
                micro_batch=setting.micro_batch,
                expert_bias_rate=setting.expert_bias_rate,
                stream=_stream(streams, setting),
                sizes=tuple(sizes),
            )
        )
        rate = target
        _extend(streams, stages[-1])
    return Plan(tuple(stages), tuple(streams), data_parallel)


def _stream(streams: list[Stream], stage: StageSettings) -> int:
    own = stage.context, sequence_settings(stage.data)
    for number, stream in enumerate(streams):
        if (stream.context, sequence_settings(stream.data)) == own:
            return number
    keys = stage.key("context"), stage.key("data")
    streams.append(Stream(stage.context, stage.data, *keys, sequences=0, batch=0, last_step=0))
    return len(streams) - 1


def _extend(streams: list[Stream], stage: Stage) -> None:
    stream = streams[stage.stream]
    streams[stage.stream] = replace(
        stream,
        sequences=stream.sequences + stage.sequences,
        batch=max(stream.batch, stage.batch),
        last_step=stage.first_step + stage.steps - 1,
    )


Counts = list[tuple[int, int]]
"""Steps of each batch size, in order: [(global batch, steps), ...]."""


def _walk(settings: Sequence[StageSettings], units: Sequence[int]) -> list[Counts]:
    """The steps of every stage."""
    found, behind = [], 0  # tokens by which the stages so far are too short
    for stage, unit in zip(settings, units, strict=True):
        if stage.tokens is None:
            assert stage.steps is not None
            found.append(_counts_of_steps(stage, unit, stage.steps))
        else:
            _check_tokens(stage)
            wanted = stage.tokens + behind
            # One step at least, also where the stage before has steps that are much longer.
            counts = _counts_of_tokens(stage, unit, max(wanted, stage.batch[1] * stage.context))
            behind = wanted - _tokens(stage, counts)
            found.append(counts)
    return found


def _check_tokens(stage: StageSettings) -> None:
    """A stage in tokens is no shorter than half a step; one that grows, than its last step."""
    assert stage.tokens is not None
    first, last = stage.batch
    per_step = last * stage.context
    step = f"of {last} x {stage.context:,} = {per_step:,}"
    if first < last and stage.tokens < per_step:
        raise ConfigError(
            f"{stage.name} has {stage.tokens:,} tokens, less than the last step {step} of its "
            f"growing batch: make it longer, or lower {stage.key('batch')}.to"
        )
    if 2 * stage.tokens < per_step:
        raise ConfigError(
            f"{stage.name} has {stage.tokens:,} tokens, less than half a step {step}: make it "
            "longer, or its batch smaller"
        )


def _sizes(stage: StageSettings, unit: int) -> range:
    first, last = stage.batch
    return range(first, last + 1, stage.batch_by or unit)


def _counts_of_tokens(stage: StageSettings, unit: int, tokens: int) -> Counts:
    """About `tokens` tokens, the same share with each batch size, but a step of the last."""
    sizes = _sizes(stage, unit)
    before_last = tokens - sizes[-1] * stage.context
    counts: Counts = []
    position = 0
    for number, batch in enumerate(sizes, start=1):
        per_step, end = batch * stage.context, tokens * number // len(sizes)
        if number < len(sizes):
            end = min(end, before_last)
        left = end - position
        steps = (2 * left + per_step) // (2 * per_step)  # to the nearest border of a step
        if number == len(sizes) > 1:
            steps = max(steps, 1)  # also where whoever asks has steps for less
        if steps > 0:
            counts.append((batch, steps))
            position += steps * per_step
    return counts


def _counts_of_steps(stage: StageSettings, unit: int, steps: int) -> Counts:
    """Exactly `steps` steps, about the same share of tokens with each batch size."""
    sizes = _sizes(stage, unit)
    if len(sizes) == 1:
        return [(sizes[0], steps)]
    share = steps / sum(1 / (batch * stage.context) for batch in sizes)
    counts = dict(_counts_of_tokens(stage, unit, round(share * len(sizes))))
    while extra := sum(counts.values()) - steps:  # a step or two, by rounding
        most = max(counts, key=lambda batch: counts[batch])
        counts[most] -= 1 if extra > 0 else extra
    return [(batch, count) for batch, count in counts.items() if count]


def _tokens(stage: StageSettings, counts: Counts) -> int:
    return sum(batch * steps for batch, steps in counts) * stage.context


def _nominal(stage: StageSettings, unit: int) -> int:
    """Tokens of a stage that has a length, before any rounding."""
    if stage.tokens is not None:
        return stage.tokens
    assert stage.steps is not None
    return _tokens(stage, _counts_of_steps(stage, unit, stage.steps))


def _close(
    settings: Sequence[StageSettings], units: Sequence[int], train: TrainConfig
) -> list[StageSettings]:
    """The stages with what the others leave for the open one."""
    where = next((n for n, stage in enumerate(settings) if stage.is_open), None)
    if where is None:
        return list(settings)
    others = [n for n in range(len(settings)) if n != where]
    rest = [settings[n] for n in others]
    length: dict[str, Any]
    if train.steps is not None:
        walked = _walk(rest, [units[n] for n in others])
        taken = sum(steps for counts in walked for _, steps in counts)
        key, whole, length = "train.steps", train.steps, {"steps": train.steps - taken}
    else:
        assert train.tokens is not None
        taken, whole = sum(_nominal(settings[n], units[n]) for n in others), int(train.tokens)
        key, length = "train.tokens", {"tokens": whole - taken}
    if whole <= taken:
        raise ConfigError(
            f"{settings[where].name} takes what the others leave of {key}={whole:,}, and they take "
            f"{taken:,}: raise {key}, or shorten them"
        )
    closed = list(settings)
    closed[where] = replace(settings[where], **length)
    return closed


def _check_length(
    settings: Sequence[StageSettings],
    walked: Sequence[Counts],
    units: Sequence[int],
    train: TrainConfig,
) -> None:
    """The stages together are what `train.steps` and `train.tokens` say, where they say it."""
    remedy = "or leave out the length of one stage, which then takes the rest"

    def parts(numbers: Sequence[int]) -> str:
        terms = (f"{s.kind} {n:,}" for s, n in zip(settings, numbers, strict=True))
        return " + ".join(terms)

    steps = [sum(count for _, count in counts) for counts in walked]
    if train.steps is not None and sum(steps) != train.steps:
        raise ConfigError(
            f"schedule.stages add up to {sum(steps):,} steps ({parts(steps)}), not to train.steps="
            f"{train.steps:,}: set train.steps={sum(steps)} or null, {remedy}"
        )
    tokens = [_nominal(stage, unit) for stage, unit in zip(settings, units, strict=True)]
    last_step = walked[-1][-1][0] * settings[-1].context
    if train.tokens is not None and abs(sum(tokens) - train.tokens) >= last_step:
        raise ConfigError(
            f"schedule.stages add up to {sum(tokens):,} tokens ({parts(tokens)}), not to "
            f"train.tokens={train.tokens:,.0f}: set train.tokens={sum(tokens)} or null, {remedy}"
        )
