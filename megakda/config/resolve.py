"""From the stages of a recipe to every step of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megakda.config.schema import TrainConfig
from megakda.config.stages import StageSettings
from megakda.config.timetable import Size, Stage, Stream, Timetable, sequence_settings
from megakda.errors import ConfigError


def resolve(
    settings: Sequence[StageSettings],
    train: TrainConfig,
    peak: float,
    data_parallel: int,
    interleave: int = 1,
) -> Timetable:
    """The timetable of these stages.

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
    return Timetable(tuple(stages), tuple(streams), data_parallel)


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
