"""What a person sees while a run trains: a live line on a terminal, sparse lines in a log file."""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

# Weight of the newest step in the mean step time. About the last 20 steps count, so that a
# checkpoint or a validation does not throw the ETA off and a lasting change still shows soon.
# The first steps are averaged evenly.
_NEWEST = 0.1


def format_count(value: float) -> str:
    """A count with a decimal suffix and three digits or so: 950, 1.2k, 34k, 1.25M."""
    if not math.isfinite(value):
        return str(value)
    for limit, scale, suffix in ((1e12, 1e12, "T"), (1e9, 1e9, "G"), (1e6, 1e6, "M")):
        if abs(value) >= 0.9995 * limit:
            return f"{value / scale:.2f}{suffix}"
    if abs(value) >= 99_950:
        return f"{value / 1e3:.0f}k"
    if abs(value) >= 999.5:
        return f"{value / 1e3:.1f}k"
    return f"{value:.0f}"


def format_duration(seconds: float) -> str:
    """A time span in its two largest units: 42s, 3m10s, 2h05m, 4d03h."""
    if not math.isfinite(seconds):
        return "?"
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def _format_small(value: float) -> str:
    """Two decimals where that says something, else an exponent: 0.51, 12.30, 3.1e-4."""
    if value == 0 or (math.isfinite(value) and 0.01 <= abs(value) < 1000):
        return f"{value:.2f}"
    return _format_exponent(value)


def _format_exponent(value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


class Progress:
    """Shows how training goes.

    On a terminal one line is rewritten in place; if it is narrow, the less important numbers go
    first. Elsewhere (a log file) a plain line appears at most every ``every_seconds``, and for the
    first and the last step.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int,
        stream: TextIO | None = None,
        interactive: bool | None = None,
        every_seconds: float = 10,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin before step ``start_step + 1`` of ``total_steps``.

        ``stream``: where to write, standard error by default. ``interactive``: a live line; by
        default if the stream is a terminal that can move its cursor. ``clock``: seconds.
        """
        self.total_steps = total_steps
        self.stream = sys.stderr if stream is None else stream
        if interactive is None:
            isatty = getattr(self.stream, "isatty", None)
            interactive = bool(isatty and isatty()) and os.environ.get("TERM") != "dumb"
        self.interactive = interactive
        self.every_seconds = every_seconds
        self._clock = clock
        self._step = start_step
        self._stamp: float | None = None  # time of the last update; None before the first
        self._step_seconds: float | None = None  # smoothed
        self._timed = 0  # steps in it
        self._shown_at: float | None = None  # time of the last plain line
        self._pending: str | None = None  # the last plain line, if it was held back
        self._closed = False
        self._bar: Any = None
        if interactive:
            from tqdm import tqdm

            self._tqdm = tqdm
            # tqdm rewrites the line and keeps notes off it; the layout is ours. So it gets a fixed
            # size to believe in: with the size 0 x 0 of some terminals it would show nothing.
            self._bar = tqdm(
                total=total_steps,
                initial=start_step,
                file=self.stream,
                bar_format="{desc}",
                ncols=10_000,
                nrows=20,
            )

    @property
    def eta_seconds(self) -> float | None:
        """Seconds to the last step by the smoothed step time; None until two steps are done."""
        if self._step_seconds is None:
            return None
        return self._step_seconds * max(0, self.total_steps - self._step)

    def update(
        self, step: int, loss: float, tokens_per_s: float, grad_norm: float, lr: float
    ) -> None:
        """Show that ``step`` (counted from 1) is done.

        ``tokens_per_s`` counts the whole run, not one device. Steps may be left out.
        """
        now = self._clock()
        # The first step compiles kernels and fills caches, so timing starts at its end.
        if self._stamp is not None and step > self._step:
            steps = step - self._step
            seconds = (now - self._stamp) / steps
            self._timed += steps
            weight = max(steps / self._timed, 1 - (1 - _NEWEST) ** steps)
            mean = 0.0 if self._step_seconds is None else self._step_seconds
            self._step_seconds = mean + weight * (seconds - mean)
        self._stamp, self._step = now, step

        # Each field with its rank: the highest rank leaves a narrow terminal first.
        fields = [
            (0, f"step {step}/{self.total_steps}"),
            (1, f"loss {loss:.3f}"),
            (3, f"{format_count(tokens_per_s)} tok/s"),
            (4, f"gnorm {_format_small(grad_norm)}"),
            (5, f"lr {_format_exponent(lr)}"),
        ]
        if self.eta_seconds is not None and step < self.total_steps:
            fields.append((2, f"ETA {format_duration(self.eta_seconds)}"))
        if self.interactive:
            self._bar.n = step
            self._bar.set_description_str(self._fit(fields))
        else:
            self._plain(self._join(fields), now)

    @staticmethod
    def _join(fields: list[tuple[int, str]]) -> str:
        return "  ".join(text for _, text in fields)

    def _fit(self, fields: list[tuple[int, str]]) -> str:
        width = self._width() - 1  # a full last column makes some terminals wrap
        while len(fields) > 1 and len(self._join(fields)) > width:
            fields.remove(max(fields))
        return self._join(fields)[: max(width, 1)]

    def _width(self) -> int:
        try:
            return os.get_terminal_size(self.stream.fileno()).columns or 80
        except (AttributeError, OSError, ValueError):
            return shutil.get_terminal_size().columns

    def _plain(self, line: str, now: float) -> None:
        last = self._step >= self.total_steps
        if self._shown_at is None or last or now - self._shown_at >= self.every_seconds:
            self._print(line)
            self._shown_at, self._pending = now, None
        else:
            self._pending = line

    def _print(self, line: str) -> None:
        print(line, file=self.stream, flush=True)

    def note(self, text: str) -> None:
        """Print a message on lines of its own, above the live line if there is one."""
        if self.interactive and not self._closed:
            self._tqdm.write(text, file=self.stream)
            self.stream.flush()
        else:
            self._print(text)

    def close(self) -> None:
        """Leave the last step's line on show and end it. Calling it again does nothing."""
        if self._closed:
            return
        self._closed = True
        if self.interactive:
            self._bar.close()
            self.stream.flush()
        elif self._pending is not None:
            self._print(self._pending)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
