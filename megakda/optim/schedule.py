"""Learning rate and weight decay of every step."""

from __future__ import annotations

from typing import Any

from megakda.config.timetable import Timetable


class Schedule:
    """A function of the step alone: nothing to save.

    Args:
        optimizer: has `param_groups`; a group's `wd_mult` is its share of the weight decay.
        timetable: of the run.
        weight_decay: the same in every step.
    """

    def __init__(self, optimizer: Any, timetable: Timetable, weight_decay: float):
        self._optimizer, self._timetable, self._weight_decay = optimizer, timetable, weight_decay

    def set(self, step: int) -> float:
        """Sets all parameter groups for 0-based `step`; returns the learning rate."""
        lr = self._timetable.at(step).lr
        for group in self._optimizer.param_groups:
            group["lr"] = lr
            group["weight_decay"] = self._weight_decay * group.get("wd_mult", 1.0)
        return lr
