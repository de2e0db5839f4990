"""The live line and the log lines of a run."""

import io
import math
import re

import pytest

from megakda.metrics.progress import Progress, format_count, format_duration


@pytest.fixture(autouse=True)
def usual_terminal(monkeypatch):
    """The environment of an ordinary terminal, whatever the tests are started from."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def drive(progress, clock, steps, seconds=1.0, **values):
    numbers = {"loss": 2.4134, "tokens_per_s": 1234.0, "grad_norm": 0.512, "lr": 1e-3, **values}
    for step in steps:
        clock.now += seconds
        progress.update(step, **numbers)


def screen(text, width=200):
    """What a terminal shows after the text: carriage returns overwrite the line."""
    shown = []
    for line in text.split("\n"):
        cells = [" "] * width
        for part in line.split("\r"):
            cells[: len(part)] = part
        shown.append("".join(cells).rstrip())
    return shown


def test_log_lines_first_last_and_every_so_often():
    stream, clock = io.StringIO(), Clock()
    progress = Progress(30, 0, stream=stream, every_seconds=10, clock=clock)
    assert not progress.interactive
    drive(progress, clock, range(1, 31))
    progress.close()
    shown = stream.getvalue().splitlines()
    assert [line.split("/")[0] for line in shown] == ["step 1", "step 11", "step 21", "step 30"]
    assert shown[0] == "step 1/30  loss 2.413  1.2k tok/s  gnorm 0.51  lr 1.0e-3"
    assert shown[1] == "step 11/30  loss 2.413  1.2k tok/s  gnorm 0.51  lr 1.0e-3  ETA 19s"
    assert shown[3].endswith("lr 1.0e-3")


def test_close_shows_the_last_step_of_a_run_that_stopped_early():
    stream, clock = io.StringIO(), Clock()
    with Progress(30, 4, stream=stream, clock=clock) as progress:
        drive(progress, clock, (5, 6, 7))
        progress.note("stopping: out of time")
    starts = [line[:7] for line in stream.getvalue().splitlines()]
    assert starts == ["step 5/", "stoppin", "step 7/"]
    progress.close()
    assert stream.getvalue().count("step 7/") == 1


def test_live_line_is_rewritten_in_place():
    stream, clock = Terminal(), Clock()
    progress = Progress(120, 0, stream=stream, clock=clock)
    assert progress.interactive
    drive(progress, clock, range(1, 5))
    assert "\n" not in stream.getvalue()
    (line,) = screen(stream.getvalue())
    # A StringIO has no size, so the width is the environment's.
    assert line.startswith("step 4/120  loss 2.413  1.2k tok/s") and line.endswith("ETA 1m56s")
    progress.close()
    progress.close()
    assert stream.getvalue().endswith("\n")


def test_notes_stand_above_the_live_line():
    stream, clock = Terminal(), Clock()
    progress = Progress(10, 0, stream=stream, clock=clock)
    drive(progress, clock, (1, 2))
    progress.note("saved step 2")
    drive(progress, clock, (3,))
    progress.close()
    progress.note("done")
    shown = [line for line in screen(stream.getvalue()) if line]
    assert shown[0] == "saved step 2"
    assert shown[1].startswith("step 3/10")
    assert shown[2] == "done"


@pytest.mark.parametrize("columns", [20, 40, 60, 79, 120])
def test_narrow_terminals_lose_the_less_important_numbers(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    stream, clock = Terminal(), Clock()
    progress = Progress(2000, 0, stream=stream, clock=clock)
    drive(progress, clock, (119, 120))
    (line,) = screen(stream.getvalue())
    assert len(line) < columns and line.startswith("step 120/2000")
    assert ("ETA" in line) == (columns >= 40)
    assert ("lr" in line) == (columns >= 79)
    progress.close()


def test_dumb_terminals_and_explicit_choice(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    assert not Progress(1, 0, stream=Terminal()).interactive
    monkeypatch.setenv("TERM", "xterm")
    assert Progress(1, 0, stream=Terminal()).interactive
    assert not Progress(1, 0, stream=Terminal(), interactive=False).interactive


def test_eta_skips_the_first_step_and_survives_a_slow_one():
    clock = Clock()
    progress = Progress(1000, 0, stream=io.StringIO(), clock=clock)
    drive(progress, clock, (1,), seconds=300.0)
    assert progress.eta_seconds is None
    drive(progress, clock, range(2, 101))
    assert progress.eta_seconds == pytest.approx(900)
    drive(progress, clock, (101,), seconds=11.0)
    assert progress.eta_seconds == pytest.approx(899 * 2)
    drive(progress, clock, range(102, 202))
    assert progress.eta_seconds == pytest.approx(799, rel=1e-3)
    drive(progress, clock, range(211, 802, 10), seconds=20.0)
    assert progress.eta_seconds == pytest.approx(2 * 199, rel=0.01)
    drive(progress, clock, range(802, 1001))
    assert progress.eta_seconds == 0


def test_nonfinite_numbers_are_shown():
    stream, clock = io.StringIO(), Clock()
    progress = Progress(2, 0, stream=stream, clock=clock)
    drive(progress, clock, (1,), loss=math.nan, grad_norm=math.inf, lr=0.0, tokens_per_s=math.nan)
    line = stream.getvalue()
    assert re.search(r"loss nan  nan tok/s  gnorm inf  lr 0\.0e0", line)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (950, "950"), (999.7, "1.0k"), (1234, "1.2k"), (99_960, "100k"), (523_456, "523k")]
    + [(999_700, "1.00M"), (1.25e6, "1.25M"), (3.2e9, "3.20G"), (5.7e12, "5.70T")],
)
def test_format_count(value, text):
    assert format_count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (42.4, "42s"), (59.6, "1m00s"), (190, "3m10s"), (7500, "2h05m")]
    + [(356_400, "4d03h"), (-1, "0s"), (math.inf, "?")],
)
def test_format_duration(seconds, text):
    assert format_duration(seconds) == text
