"""The schedule as stages: what a recipe says, typed and checked.

Stages come from `schedule.stages`, or are those that the shorthand (`schedule.style` and what goes
with it) stands for. `megakda.config.resolve` works out their steps; docs/schedules.md is the
language.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megakda.config.schema import Config, DataConfig, ScheduleConfig
from megakda.config.suggest import suggest
from megakda.errors import ConfigError

FALLS = ("linear", "cosine", "exponential", "minus_sqrt")
KINDS = ("warmup", "constant", *FALLS)
KEYS = (
    "kind",
    "steps",
    "tokens",
    "to",
    "context",
    "batch",
    "micro_batch",
    "data",
    "expert_bias_rate",
)
WHOLE_RUN = {
    "context": "train.context",
    "batch": "train.global_batch",
    "micro_batch": "train.micro_batch",
    "expert_bias_rate": "model.moe.bias_update_rate",
    "data": "data",
}
"""Where the stages that do not say something have it from."""
ONE_PER_RUN = ("name", "tokenizer", "num_workers")


@dataclass(frozen=True)
class StageSettings:
    """One stage of a recipe; what it does not say is filled in from the whole run's settings.

    Attributes:
        path: its place among the settings, as `schedule.stages[2]`.
        given: the keys that the stage itself has.
        kind: one of `KINDS`.
        steps, tokens: its length, at most one of them; neither: what the other stages leave.
        to: the rate that it leads to; None: that of a constant stage does not change.
        reach_steps: steps after which a warmup is at `to`, where the run ends before that.
        context: tokens per sequence.
        batch: sequences per step, at the beginning and at the end.
        batch_by: by how much it grows at a time; None: by as little as the layout allows.
        micro_batch: sequences per rank and forward pass.
        expert_bias_rate: u of the experts' balancing.
        data: what to read.
    """

    path: str
    given: frozenset[str]
    kind: str
    steps: int | None
    tokens: int | None
    to: float | None
    context: int
    batch: tuple[int, int]
    batch_by: int | None
    micro_batch: int
    expert_bias_rate: float
    data: DataConfig
    reach_steps: int | None = None

    @property
    def is_open(self) -> bool:
        """Whether it takes what the other stages leave."""
        return self.steps is None and self.tokens is None

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.path} ({self.kind})"

    def key(self, name: str) -> str:
        """The setting that `name` comes from: the stage's own, or the whole run's."""
        return f"{self.path}.{name}" if name in self.given else WHOLE_RUN[name]


def read_stages(config: Config) -> list[StageSettings]:
    """The stages of a run, in order.

    Raises:
        ConfigError: unknown kinds or keys, values that cannot be, no length or two, several open
            stages; for the shorthand, phases that do not fit into the run.
    """
    written = config.schedule.stages
    if written is None:
        return _shorthand(config)
    if not written:
        raise ConfigError("schedule.stages=[]: needs at least one stage, or null")
    stages = [_read(config, f"schedule.stages[{n}]", stage) for n, stage in enumerate(written)]
    opened = [stage.path for stage in stages if stage.is_open]
    if len(opened) > 1:
        raise ConfigError(
            f"{' and '.join(opened)} have no length: one stage can take what the others leave of "
            "train.steps or train.tokens; give the others steps or tokens"
        )
    if opened and config.train.steps is None and config.train.tokens is None:
        raise ConfigError(
            f"{opened[0]} has no length, and neither train.steps nor train.tokens says what the "
            "other stages leave for it: set one of them, or its steps or tokens"
        )
    return stages


def longest_context(config: Config) -> int:
    """Of all stages, in tokens."""
    return max(stage.context for stage in read_stages(config))


def summary(config: Config) -> str:
    """The stages in a line, lengths as they are written."""
    parts = []
    for stage in read_stages(config):
        lengths = ((stage.steps, "steps"), (stage.tokens, "tokens"))
        length = next((f"{count:,} {unit}" for count, unit in lengths if count), "the rest")
        target = "" if stage.to is None else f" to {stage.to:g}"
        parts.append(f"{stage.kind}{target} for {length}")
    return ", ".join(parts)


def unread_settings(config: Config) -> str | None:
    """What the short form says beside `schedule.stages`, for a person; None: nothing, or no stages.

    A setting that has its default counts as not said.
    """
    said = [
        f"schedule.{item.name}={getattr(config.schedule, item.name)}"
        for item in fields(ScheduleConfig)
        if item.name != "stages" and getattr(config.schedule, item.name) != item.default
    ]
    if config.schedule.stages is None or not said:
        return None
    return (
        f"schedule.stages is set, so {', '.join(said)} {'is' if len(said) == 1 else 'are'} not "
        "read; schedule.stages=null goes back to the short form"
    )


def _read(config: Config, path: str, stage: Any) -> StageSettings:
    if not isinstance(stage, Mapping):
        raise ConfigError(f"{path}={stage!r}: a stage is a mapping, as {{kind: cosine, steps: 10}}")
    for key in stage:
        if key not in KEYS:
            raise ConfigError(
                f"{path}.{key}: no such setting of a stage{suggest(str(key), KEYS)}; a stage has "
                f"{', '.join(KEYS)}"
            )
    kind = stage.get("kind")
    if kind not in KINDS:
        raise ConfigError(
            f"{path}.kind={kind}: no such kind of stage{suggest(str(kind), KINDS)}; the kinds are "
            f"{', '.join(KINDS)}"
        )
    # null is what is not said, so that a recipe can take back what another one says.
    said = {key: value for key, value in stage.items() if value is not None}
    if "steps" in said and "tokens" in said:
        raise ConfigError(
            f"{path} has steps={said['steps']} and tokens={said['tokens']}: a stage has one "
            "length; remove one of them"
        )

    def whole(key: str, default: int | None) -> int | None:
        return whole_number(f"{path}.{key}", said[key]) if key in said else default

    train = config.train
    first, last, by = _batch(f"{path}.batch", said.get("batch", train.global_batch))
    context, micro_batch = whole("context", train.context), whole("micro_batch", train.micro_batch)
    assert context is not None and micro_batch is not None
    return StageSettings(
        path=path,
        given=frozenset(said),
        kind=kind,
        steps=whole("steps", None),
        tokens=whole("tokens", None),
        to=_target(config, path, kind, said.get("to")),
        context=context,
        batch=(first, last),
        batch_by=by,
        micro_batch=micro_batch,
        expert_bias_rate=_rate(
            f"{path}.expert_bias_rate",
            said.get("expert_bias_rate", config.model.moe.bias_update_rate),
        ),
        data=_data(config.data, f"{path}.data", said.get("data", {})),
    )


def _target(config: Config, path: str, kind: str, to: Any) -> float | None:
    if to is None:
        if kind in FALLS:
            raise ConfigError(
                f"{path} ({kind}) does not say where the rate goes: give it a `to`, as to: 1.0e-5"
            )
        return config.optim.lr if kind == "warmup" else None
    rate = _rate(f"{path}.to", to)
    if rate == 0 and kind not in FALLS:
        raise ConfigError(f"{path}.to={to}: a {kind} stage would not train; give a positive rate")
    return rate


def whole_number(key: str, value: Any) -> int:
    """A positive whole number; also one written as 36.0e9.

    Raises:
        ConfigError: it is none; names `key`.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value != int(value) or value < 1:
        raise ConfigError(f"{key}={value!r}: must be a positive whole number")
    return int(value)


def _rate(key: str, value: Any) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < 0:
        raise ConfigError(f"{key}={value!r}: must be a number that is not negative, as 1.0e-4")
    return float(value)


def _batch(key: str, value: Any) -> tuple[int, int, int | None]:
    """Its beginning, its end, and by how much it grows at a time, where that is said."""
    if not isinstance(value, Mapping):
        size = whole_number(key, value)
        return size, size, None
    if not {"from", "to"} <= set(value) <= {"from", "to", "by"}:
        raise ConfigError(
            f"{key}={dict(value)}: a batch that grows is {{from: 64, to: 512}} or {{from: 64, to: "
            "512, by: 64}; one that stays is a number"
        )
    first, last = whole_number(f"{key}.from", value["from"]), whole_number(f"{key}.to", value["to"])
    if first >= last:
        raise ConfigError(
            f"{key} goes from {first} to {last}: within a stage a batch cannot fall or stay; raise "
            f"{key}.to, or give each size a stage of its own"
        )
    if value.get("by") is None:
        return first, last, None
    by = whole_number(f"{key}.by", value["by"])
    if (last - first) % by:
        raise ConfigError(
            f"{key}.by={by} must divide the {last - first} that the batch grows by, from {first} "
            f"to {last}: choose another {key}.by or {key}.to"
        )
    return first, last, by


def _data(whole_run: DataConfig, path: str, own: Any) -> DataConfig:
    if not isinstance(own, Mapping):
        raise ConfigError(
            f"{path}={own!r}: must be settings of the group data, as {{paths: [...]}}"
        )
    if not own:
        return whole_run
    known = [item.name for item in fields(DataConfig)]
    for key in own:
        if key not in known:
            raise ConfigError(
                f"{path}.{key}: no such setting of the group data{suggest(str(key), known)}"
            )
        if key in ONE_PER_RUN:
            raise ConfigError(f"{path}.{key}: the same for all stages; set data.{key}")
    # These belong to the paths that they stand with.
    own = ({"weights": None, "prepare": "none"} if "paths" in own else {}) | dict(own)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(whole_run), own)
        data = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        raise ConfigError(
            f"{path}{f'.{key}' if key else ''}: {str(error).splitlines()[0]}"
        ) from None
    assert isinstance(data, DataConfig)
    return data


def _shorthand(config: Config) -> list[StageSettings]:
    """The stages of `schedule.style`: a warmup, a constant stretch, a fall to `min_lr`."""
    schedule, train = config.schedule, config.train
    steps, warmup = _shorthand_steps(config), schedule.warmup_steps
    # A run without a fall may end during its warmup: the rate does not depend on its length.
    if schedule.decay_steps > 0 or schedule.style in ("cosine", "linear"):
        _check_shorthand(config, steps)
    kind, fall = schedule.style, steps - warmup
    if schedule.style == "wsd":
        kind, fall = schedule.decay_shape, schedule.decay_steps  # 0: not come to its decay
    elif schedule.style == "constant":
        fall = 0
    constant = max(steps - warmup - fall, 0)

    def stage(kind: str, length: int, to: float | None, reach: int | None = None) -> StageSettings:
        return StageSettings(
            path="schedule.style",
            given=frozenset(),
            kind=kind,
            steps=length,
            tokens=None,
            to=to,
            context=train.context,
            batch=(train.global_batch, train.global_batch),
            batch_by=None,
            micro_batch=train.micro_batch,
            expert_bias_rate=config.model.moe.bias_update_rate,
            data=config.data,
            reach_steps=reach,
        )

    stages = [
        stage("warmup", min(warmup, steps), config.optim.lr, warmup),
        stage("constant", constant, None),
        stage(kind, fall, schedule.min_lr),
    ]
    return [stage for stage in stages if stage.steps]


def _shorthand_steps(config: Config) -> int:
    train = config.train
    per_step = train.global_batch * train.context
    if train.steps is None and train.tokens is None:
        raise ConfigError(
            "train.steps=null and train.tokens=null with schedule.stages=null: nothing says how "
            "long the run is; set one of them, or write schedule.stages"
        )
    if train.steps is None:
        assert train.tokens is not None
        steps = round(whole_number("train.tokens", train.tokens) / per_step)
        if steps == 0:
            raise ConfigError(
                f"train.tokens={train.tokens:,.0f} are less than half a step of train.global_batch="
                f"{train.global_batch} x train.context={train.context} = {per_step:,}: raise it, "
                "or lower the batch"
            )
        return steps
    if train.tokens is not None and abs(train.steps * per_step - train.tokens) >= per_step:
        raise ConfigError(
            f"train.steps={train.steps} of {per_step:,} tokens are {train.steps * per_step:,} "
            f"tokens, not train.tokens={train.tokens:,.0f}: set one of them to null"
        )
    return train.steps


def _check_shorthand(config: Config, steps: int) -> None:
    schedule = config.schedule
    if schedule.warmup_steps + max(schedule.decay_steps, 1) <= steps:
        return
    fall = f"schedule.decay_steps={schedule.decay_steps}"
    if schedule.decay_steps == 0:
        fall = f"a step of schedule.style={schedule.style}"
    length = f"train.steps={steps}"
    if config.train.steps is None:
        length = f"the {steps} steps that train.tokens={config.train.tokens:,.0f} come to"
    raise ConfigError(
        f"schedule.warmup_steps={schedule.warmup_steps} and {fall} do not fit in {length}: lower "
        "them or train longer"
    )
