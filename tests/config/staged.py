"""A small run in stages, for the tests of what they say and of what they may not."""

from __future__ import annotations

import functools
from copy import deepcopy
from typing import Any

from megakda.config import Config, Derived, compose, validate
from megakda.config.timetable import Timetable

WHOLE = [
    "model=tiny",
    "data=indexed",
    "data.paths=[corpus/a]",
    "train.context=64",
    "train.global_batch=8",
    "train.micro_batch=2",
    "optim.lr=1.0",
]
STEP = 8 * 64  # tokens of a step that says nothing else


composed = functools.cache(compose)


def config_of(*stages: dict[str, Any], overrides: tuple[str, ...] = ()) -> Config:
    length = [] if any(o.startswith("train.steps") for o in overrides) else ["train.steps=null"]
    config = deepcopy(composed((*WHOLE, *length, *overrides)))
    config.schedule.stages = list(stages)
    return config


def derived_of(*stages: dict[str, Any], ranks: int = 1, overrides: Any = ()) -> Derived:
    return validate(config_of(*stages, overrides=tuple(overrides)), ranks)


def timetable_of(*stages: dict[str, Any], ranks: int = 1, overrides: Any = ()) -> Timetable:
    return derived_of(*stages, ranks=ranks, overrides=overrides).timetable


def fall(**said: Any) -> dict[str, Any]:
    return {"kind": "linear", "to": 0.1, **said}
