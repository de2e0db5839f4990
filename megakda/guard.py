"""Bad steps: recognised before the update, skipped, counted, and limited."""

from __future__ import annotations

import math
from collections import deque
from statistics import fmean, pstdev
from typing import Any

from megakda.config.schema import GuardConfig
from megakda.errors import TrainingDiverged


class Guard:
    """Judges each step from its loss and gradient norm.

    A step is bad when either is not finite, or when the loss exceeds the mean of the last
    `spike_window` good ones of the same data and context by `spike_sigmas` standard deviations (0
    switches that off). Its update is skipped. `max_bad_steps` in a row end the run.
    """

    def __init__(self, config: GuardConfig):
        self.config = config
        self.skipped = 0  # over the whole run
        self.in_a_row = 0
        self._losses: deque[float] = deque(maxlen=config.spike_window)
        self._stream: str | None = None

    def judge(self, loss: float | None, grad_norm: float, stream: str | None = None) -> str | None:
        """What is wrong with this step, or None where it may update the weights.

        Every rank passes the same numbers and gets the same answer.

        Args:
            loss: None where no token counts, which is no problem and says nothing.
            grad_norm: before clipping.
            stream: tells data and context; others than before have losses of their own, to which
                the window does not compare.
        """
        if self._stream not in (None, stream):
            self._losses.clear()
        self._stream = stream
        problem = self._problem(loss, grad_norm)
        if problem is None:
            self.in_a_row = 0
            if loss is not None:
                self._losses.append(loss)
        else:
            self.skipped += 1
            self.in_a_row += 1
        return problem

    def check(self, step: int, problem: str | None) -> None:
        """Ends the run after too many bad steps in a row.

        Raises:
            TrainingDiverged: naming the last problem and what to change.
        """
        if problem is not None and self.in_a_row >= self.config.max_bad_steps:
            raise TrainingDiverged(
                f"{self.in_a_row} bad steps in a row up to step {step} (train.guard.max_bad_steps="
                f"{self.config.max_bad_steps}), the last one: {problem}. The weights have not "
                "changed since the last good step. Lower optim.lr or optim.clip_grad, resume from "
                "an earlier checkpoint, or look at the data there"
            )

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and a name, for the checkpoint."""
        return {
            "skipped": self.skipped,
            "in_a_row": self.in_a_row,
            "losses": list(self._losses),
            "stream": self._stream,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The counterpart of `state_dict`."""
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
        self._losses = deque(state["losses"], maxlen=self.config.spike_window)
        self._stream = state.get("stream")  # None: from before it was noted

    def _problem(self, loss: float | None, grad_norm: float) -> str | None:
        if loss is not None and not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(grad_norm):
            return f"the gradient norm is {grad_norm}"
        full = len(self._losses) == self.config.spike_window
        if self.config.spike_sigmas > 0 and full and loss is not None:
            mean, spread = fmean(self._losses), pstdev(self._losses)
            limit = mean + self.config.spike_sigmas * spread
            if loss > limit:
                return f"the loss {loss:.4f} exceeds {limit:.4f} (mean {mean:.4f} of the window)"
        return None
