"""Plots of runs: the curves drawn, the file written, and the errors."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megakda.errors import ConfigError, MegakdaError
from megakda.metrics.plot import plot_runs, smooth_series
from megakda.metrics.writers import JsonlWriter

ROOT = Path(__file__).parents[2]
PNG = b"\x89PNG\r\n\x1a\n"


def make_run(folder, steps=60, seed=0, tokens=True, valid=True, training=True):
    folder.mkdir(parents=True)
    writer = JsonlWriter(folder / "metrics.jsonl")
    noise = np.random.default_rng(seed).normal(scale=0.05, size=steps + 1)
    for step in range(1, steps + 1):
        loss = 2 + 6 / step + noise[step]
        seen = {"tokens": step * 2048} if tokens else {}
        if training:
            loss_or_nan = float("nan") if step == 7 else loss
            row = {"loss": loss_or_nan, "lr": 1e-3 * min(1, step / 10), "tokens_per_s": 900.0}
            writer.write(step, {**row, **seen})
        if valid and step % 20 == 0:
            writer.write(step, {"valid_loss": loss + 0.05})
    writer.close()
    return folder


def test_one_run(tmp_path):
    from matplotlib.image import imread

    out = tmp_path / "pictures" / "loss.png"
    assert plot_runs([make_run(tmp_path / "run")], out) == out
    image = imread(out)
    assert image.shape[0] > 800 and image.shape[1] > 1000
    assert 0.01 < (image[..., :3].min(axis=-1) < 0.95).mean() < 0.3  # ink, but mostly white
    assert [path.name for path in out.parent.iterdir()] == ["loss.png"]


@pytest.fixture
def figures(monkeypatch):
    """Figures of the plots made during the test."""
    from matplotlib.figure import Figure

    made = []
    save = Figure.savefig

    def record(self, *arguments, **options):
        made.append(self)
        return save(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", record)
    return made


def texts(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_curves_and_labels_of_several_runs(tmp_path, figures):
    runs = [make_run(tmp_path / "a", seed=1), make_run(tmp_path / "b", steps=40, seed=2)]
    plot_runs(runs, tmp_path / "loss.png", labels=["3:1", "7:1"], smooth=1)
    loss, lr, speed = figures[0].axes
    assert [axes.get_title(loc="left") for axes in (loss, lr, speed)] == [
        "Loss",
        "Learning rate",
        "Throughput, tokens/s",
    ]
    first, second = loss.lines
    assert first.get_xdata()[-1] == 60 * 2048 and second.get_xdata()[-1] == 40 * 2048
    assert len(first.get_xdata()) == 60 and np.isnan(first.get_ydata()[6])
    assert [len(dots.get_offsets()) for dots in loss.collections] == [3, 2]
    # Validation rows carry no tokens here; their place follows from the training rows.
    assert loss.collections[0].get_offsets()[:, 0].tolist() == [20 * 2048, 40 * 2048, 60 * 2048]
    assert [text[:13] for text in texts(loss)] == ["3:1:  train 2", "7:1:  train 2"]
    assert all("validation 2." in text for text in texts(loss))
    assert lr.lines[0].get_ydata()[-1] == 1e-3
    assert speed.get_xlabel() == "Tokens" and speed.get_ylim()[0] == 0


def test_steps_when_a_run_has_no_tokens(tmp_path, figures):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", tokens=False)]
    plot_runs(runs, tmp_path / "loss.png")
    plot_runs(runs[:1], tmp_path / "loss.png", x="step")
    assert [figure.axes[-1].get_xlabel() for figure in figures] == ["Step", "Step"]
    with pytest.raises(ConfigError, match="x='tokens'"):
        plot_runs(runs, tmp_path / "loss.png", x="tokens")


def test_missing_columns_have_no_panel(tmp_path, figures):
    run = make_run(tmp_path / "a", training=False, tokens=False)
    plot_runs([run / "metrics.jsonl"], tmp_path / "loss.png")
    (axes,) = figures[0].axes
    assert texts(axes)[0].startswith("a:  validation 2.")


def test_long_runs_may_cut_off_the_initial_fall(tmp_path, figures):
    plot_runs([make_run(tmp_path / "a", steps=60)], tmp_path / "loss.png")
    plot_runs([make_run(tmp_path / "b", steps=1000)], tmp_path / "loss.png")
    short, long = (figure.axes[0] for figure in figures)
    assert short.get_ylim()[1] > 6
    assert 2 < long.get_ylim()[1] < 3


def test_single_row(tmp_path):
    run = make_run(tmp_path / "a", steps=1)
    assert plot_runs([run], tmp_path / "loss.png").read_bytes()[:8] == PNG


@pytest.mark.parametrize("window", [1, 2, 5, 8, 40, 500])
def test_smoothing(window):
    line = np.linspace(3.0, 1.0, 101)
    half = window // 2
    assert smooth_series(line, window)[: 101 - half] == pytest.approx(line[: 101 - half])
    assert smooth_series(np.full(9, 4.0), window) == pytest.approx(4.0)
    gap = line.copy()
    gap[50] = np.nan
    smooth = smooth_series(gap, window)
    assert np.isnan(smooth[50]) and np.isfinite(np.delete(smooth, 50)).all()
    if window >= 5:
        noise = np.random.default_rng(0).normal(size=2000)
        assert smooth_series(noise, window)[100:].std() < 0.7


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "has no metrics.jsonl"),
        ("", "has no rows yet"),
        ('{"step": 1, "lo', "has no rows yet"),
        ('{"step": 1, "lr": 0.1}\n', "no finite loss"),
        ('{"step": 1, "loss": null, "nonfinite": ["loss"]}\n', "no finite loss"),
    ],
)
def test_runs_without_anything_to_draw(tmp_path, content, says):
    run = tmp_path / "run"
    run.mkdir()
    if content is not None:
        (run / "metrics.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=says) as caught:
        plot_runs([make_run(tmp_path / "good"), run], tmp_path / "loss.png")
    assert str(run) in str(caught.value)
    assert not (tmp_path / "loss.png").exists()


def test_damaged_rows_are_named(tmp_path):
    run = make_run(tmp_path / "run", steps=3)
    path = run / "metrics.jsonl"
    path.write_text("oops\n" + path.read_text())
    with pytest.raises(MegakdaError, match="line 1"):
        plot_runs([run], tmp_path / "loss.png")


@pytest.mark.parametrize(
    ("options", "says"),
    [({"labels": ["a", "b"]}, "labels"), ({"smooth": 0}, "smooth=0"), ({"x": "time"}, "x='time'")],
)
def test_wrong_options(tmp_path, options, says):
    with pytest.raises(ConfigError, match=says):
        plot_runs([make_run(tmp_path / "run")], tmp_path / "loss.png", **options)
    with pytest.raises(ConfigError, match="run_dirs"):
        plot_runs([], tmp_path / "loss.png")


def test_command_line(tmp_path):
    def call(*arguments):
        tool = [sys.executable, str(ROOT / "tools" / "plot_run.py")]
        return subprocess.run(
            [*tool, *map(str, arguments)], cwd=tmp_path, capture_output=True, text=True
        )

    run = make_run(tmp_path / "run")
    done = call(run, "--out", "loss.png", "--labels", "mine", "--smooth", "5", "--x", "step")
    assert (done.returncode, done.stdout, done.stderr) == (0, "loss.png\n", "")
    assert (tmp_path / "loss.png").read_bytes()[:8] == PNG
    failed = call(tmp_path / "absent")
    assert failed.returncode == ConfigError.exit_code
    assert failed.stderr.startswith("plot_run: run ") and "Traceback" not in failed.stderr
