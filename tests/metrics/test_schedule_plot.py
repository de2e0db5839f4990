"""The picture of a schedule is the timetable."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from megakda.config import compose, validate
from megakda.config.timetable import Timetable
from megakda.metrics.schedule_plot import (
    draw_schedule,
    plot_schedule,
    schedule_series,
    stage_table,
)

STAGES = (
    "schedule.stages=["
    "{kind: warmup, tokens: 40.0e9, batch: {from: 512, to: 7808}},"
    "{kind: constant},"
    "{kind: cosine, tokens: 497.0e9, to: 1.1e-4},"
    "{kind: constant, tokens: 5.4e9, context: 32768, batch: 976}]"
)
RUN = [STAGES, "train.steps=null", "train.tokens=1.4e12", "train.context=4096"]
RUN += ["train.global_batch=7808", "optim.lr=1.1e-3"]


@pytest.fixture(scope="module")
def timetable() -> Timetable:
    return validate(compose(RUN), 16).timetable


def test_every_point_is_the_plans(timetable):
    series = schedule_series(timetable)
    tokens = series["tokens"]
    assert tokens[0] == 0 and tokens[-1] == timetable.tokens and (np.diff(tokens) > 0).all()
    for token, lr, batch, context in zip(*(series[name][:-1] for name in series), strict=True):
        now = timetable.at(timetable.step_at(int(token)))
        assert (now.tokens_before, now.lr, now.global_batch) == (token, lr, batch)
        assert now.context == context
    # The first and last steps of a stage are all there, and so is each size of the batch.
    for stage in timetable.stages:
        for step in (stage.first_step, stage.first_step + stage.steps - 1):
            assert timetable.at(step).tokens_before in tokens
    assert {size.first_token for size in timetable.stages[0].sizes} <= set(tokens)


def test_what_is_drawn(timetable, tmp_path):
    figure = Figure(layout="constrained")
    draw_schedule(figure, timetable, "title")
    series = schedule_series(timetable)
    axes = figure.axes
    for ax, name in zip(axes, ("lr", "batch", "context"), strict=True):
        (line,) = ax.lines
        assert np.array_equal(line.get_xdata(), series["tokens"])
        assert np.array_equal(line.get_ydata(), series[name])
        bounds = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in ax.patches]
        ends = [(stage.first_token, stage.first_token + stage.tokens) for stage in timetable.stages]
        assert np.allclose(bounds, ends)
    assert [text.get_text() for text in axes[0].texts] == ["1", "2", "3", "4"]
    (legend,) = figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts[0] == "1 warmup: 0 → 1.1e-3, 40B tokens, context 4,096, batch 512 → 7,808"
    assert texts[3] == "4 constant: 1.1e-4, 5.4B tokens, context 32,768, batch 976"
    out = plot_schedule(timetable, tmp_path / "deep" / "schedule.png", "title")
    assert out.read_bytes().startswith(b"\x89PNG")


def test_the_table_lines_up(timetable):
    heading, *rows = stage_table(timetable)
    columns = ["stage", "steps", "tokens", "rate", "context", "batch", "micro-batch"]
    assert heading.split() == columns
    assert len({len(line) for line in [heading, *rows]}) == 1
    assert rows[2].startswith("3 cosine") and "0.0011 -> 0.00011" in rows[2]


def test_the_tool_needs_no_data(tmp_path):
    tool = Path(__file__).parents[2] / "tools" / "plot_schedule.py"
    out = tmp_path / "schedule.png"
    command = [sys.executable, str(tool), "--out", str(out), *RUN, "parallel=tp2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "3 cosine" in done.stdout and "on 2 ranks (data 1)" in done.stdout
    assert done.stdout.splitlines()[-1] == str(out) and out.exists()
    assert "note:" not in done.stdout
    here = [sys.executable, str(tool), "--out", str(tmp_path), *RUN, "schedule=cosine"]
    failed = subprocess.run(here, capture_output=True, text=True, timeout=120)
    assert failed.returncode == 2 and "Traceback" not in failed.stderr
    assert f"--out {tmp_path}: " in failed.stderr
    assert "note: schedule.stages is set, so schedule.style=cosine" in failed.stdout
    wrong = [sys.executable, str(tool), "--out", str(out), "schedule.stages=[{kind: cosin}]"]
    failed = subprocess.run(wrong, capture_output=True, text=True, timeout=120)
    assert failed.returncode == 2 and "did you mean cosine" in failed.stderr
