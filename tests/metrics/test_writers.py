"""Metric writers: what is on disk after writes, kills and resumes."""

import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from megakda.config.schema import LoggingConfig
from megakda.errors import ConfigError, MegakdaError
from megakda.metrics.writers import (
    JsonlWriter,
    MetricWriters,
    flatten,
    open_writers,
    read_metrics,
    wandb_mode,
)

ROOT = Path(__file__).parents[2]


def lines(path):
    return path.read_text().splitlines()


def steps(path):
    return [row["step"] for row in read_metrics(path)]


def open_jsonl(out, resume_step=0):
    return open_writers(LoggingConfig(), out, {}, resume_step)


# --- metrics.jsonl ---


def test_rows_are_on_disk_before_close(tmp_path):
    writers = open_jsonl(tmp_path / "new" / "run")
    path = tmp_path / "new" / "run" / "metrics.jsonl"
    writers.write(1, {"loss": 2.5, "lr": 1e-3})
    assert lines(path) == ['{"step": 1, "loss": 2.5, "lr": 0.001}']
    writers.write(2, {"valid_loss": 2.25, "kda": {"decay": [0.5, 1.0]}})
    assert read_metrics(path)[1] == {
        "step": 2,
        "valid_loss": 2.25,
        "kda": {"decay": [0.5, 1.0]},
    }
    writers.close()
    writers.close()


def test_nonfinite_values_are_null_and_named(tmp_path):
    with open_jsonl(tmp_path) as writers:
        kda = {"decay": [1.0, -math.inf]}
        writers.write(3, {"loss": math.nan, "grad_norm": math.inf, "kda": kda, "lr": 1})
    (line,) = lines(tmp_path / "metrics.jsonl")
    row = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert row == {
        "step": 3,
        "loss": None,
        "grad_norm": None,
        "kda": {"decay": [1.0, None]},
        "lr": 1,
        "nonfinite": ["loss", "grad_norm", "kda/decay/1"],
    }


def test_arrays_and_the_step_argument(tmp_path):
    with open_jsonl(tmp_path) as writers:
        writers.write(4, {"step": 9, "loss": np.float32(1.5), "heads": np.arange(3), "ok": (1, 2)})
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 4, "loss": 1.5, "heads": [0, 1, 2], "ok": [1, 2]}
    ]


def test_resume_drops_later_rows(tmp_path):
    with open_jsonl(tmp_path) as writers:
        for step in (1, 2, 3, 4, 4, 5):
            writers.write(step, {"loss": float(step)})
    path = tmp_path / "metrics.jsonl"
    kept = lines(path)[:3]
    with open_jsonl(tmp_path, resume_step=3) as writers:
        assert lines(path) == kept
        writers.write(4, {"loss": 40.0})
    assert lines(path) == [*kept, '{"step": 4, "loss": 40.0}']
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl"]


def test_fresh_run_keeps_the_old_rows_aside(tmp_path):
    for loss in (1.0, 2.0):
        with open_jsonl(tmp_path) as writers:
            writers.write(1, {"loss": loss})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]
    assert read_metrics(tmp_path / "metrics.previous.jsonl") == [{"step": 1, "loss": 1.0}]


def test_failed_truncation_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path)
    for step in (1, 2, 3):
        writer.write(step, {})
    before = path.read_bytes()

    def no_space(descriptor):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        with pytest.raises(OSError, match="no space"):
            writer.truncate_after(1)
    assert path.read_bytes() == before
    writer.truncate_after(1)
    assert steps(path) == [1]
    writer.close()


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', "{", '{"step": 3}garb', "[1, 2]", "\x00\x00"])
def test_torn_last_line_is_passed_over_and_cut_off(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n' + torn)
    assert steps(path) == [1, 2]
    with open_jsonl(tmp_path, resume_step=2) as writers:
        writers.write(3, {})
    assert lines(path) == ['{"step": 1}', '{"step": 2}', '{"step": 3}']


def test_complete_last_row_without_newline_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    writer = JsonlWriter(path)
    writer.write(3, {})
    writer.close()
    assert lines(path) == ['{"step": 1}', '{"step": 2}', '{"step": 3}']


def test_damage_before_the_last_line_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(MegakdaError, match="line 2"):
        read_metrics(path)
    before = path.read_bytes()
    with pytest.raises(MegakdaError, match="line 2"):
        open_jsonl(tmp_path, resume_step=5)
    assert path.read_bytes() == before


def test_killed_writer_leaves_whole_rows(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; "
        "from megakda.metrics.writers import JsonlWriter\n"
        "writer = JsonlWriter(Path(sys.argv[1]))\n"
        "for step in range(50): writer.write(step, {'loss': 1.0 / (step + 1)})\n"
        "os.kill(os.getpid(), 9)"
    )
    path = tmp_path / "metrics.jsonl"
    assert subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT).returncode == -9
    assert steps(path) == list(range(50))


# --- fan-out ---


def test_flatten():
    flat = flatten(
        {
            "loss": 1.5,
            "kda": {"decay": {"mean": 0.5, "heads": [1, 2]}, "layers": [{"a": 1}, {"a": 2}]},
            "table": [[1, 2], [3]],
            "note": "text",
            "gone": None,
        }
    )
    assert flat == {
        "loss": 1.5,
        "kda/decay/mean": 0.5,
        "kda/decay/heads": [1, 2],
        "kda/layers/0/a": 1,
        "kda/layers/1/a": 2,
        "table/0": [1, 2],
        "table/1": [3],
    }


def test_all_writers_are_closed_even_if_one_fails():
    closed = []

    class Recorder:
        def __init__(self, fail):
            self.fail = fail

        def write(self, step, metrics):
            pass

        def close(self):
            closed.append(self)
            if self.fail:
                raise OSError("disk full")

    writers = MetricWriters([Recorder(True), Recorder(False)])
    with pytest.raises(OSError, match="disk full"):
        writers.close()
    assert closed == writers.writers


@pytest.mark.parametrize(
    ("field", "module"),
    [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")],
)
def test_missing_package_names_the_setting_and_changes_nothing(
    tmp_path, monkeypatch, field, module
):
    monkeypatch.setitem(sys.modules, module, None)
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    with pytest.raises(ConfigError, match=rf"logging\.{field}=True.*pip install {field}"):
        open_writers(LoggingConfig(**{field: True}), tmp_path, {}, 0)
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl"] and steps(path) == [1]


# --- TensorBoard ---


def test_tensorboard_scalars_histograms_and_resume(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging_cfg = LoggingConfig(tensorboard=True)
    with open_writers(logging_cfg, tmp_path, {"optim": {"lr": 0.1}}, 0) as writers:
        for step in (1, 2, 3):
            writers.write(step, {"loss": float(step), "kda": {"decay": [1.0, math.nan, 2.0]}})
    with open_writers(logging_cfg, tmp_path, {}, 2) as writers:
        writers.write(3, {"loss": 30.0, "empty": [], "note": "text"})
    # By default the reader keeps one histogram of all steps.
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"histograms": 0})
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert [e.step for e in events.Histograms("kda/decay")] == [1, 2]
    assert events.Histograms("kda/decay")[0].histogram_value.num == 2


# --- Weights & Biases ---


@pytest.mark.parametrize(
    ("environ", "mode"),
    [
        ({}, "offline"),
        ({"WANDB_API_KEY": ""}, "offline"),
        ({"WANDB_API_KEY": "not-a-key"}, "online"),
        ({"WANDB_API_KEY": "not-a-key", "WANDB_MODE": "offline"}, "offline"),
        ({"WANDB_MODE": "disabled"}, "disabled"),
        ({"WANDB_MODE": "online"}, "online"),
    ],
)
def test_wandb_mode_by_environment(tmp_path, environ, mode):
    assert wandb_mode({"HOME": str(tmp_path), **environ}) == mode


def test_wandb_mode_by_netrc(tmp_path):
    environ = {"HOME": str(tmp_path)}
    (tmp_path / ".netrc").write_text("machine example.org login user password not-a-key\n")
    assert wandb_mode(environ) == "offline"
    assert wandb_mode({**environ, "WANDB_BASE_URL": "https://example.org:8080"}) == "online"
    other = tmp_path / "other"
    other.write_text("machine api.wandb.ai login user password not-a-key\n")
    assert wandb_mode({**environ, "NETRC": str(other)}) == "online"
    other.write_text("machine\nnonsense")
    assert wandb_mode({**environ, "NETRC": str(other)}) == "offline"
    assert wandb_mode({**environ, "NETRC": str(tmp_path / "missing")}) == "offline"


@pytest.fixture
def fake_wandb(monkeypatch):
    """A module in place of wandb that records what it is asked; `.runs` lists its runs."""
    module = types.ModuleType("wandb")
    module.runs = []

    class Run:
        def __init__(self, options):
            self.options, self.rows, self.defined, self.finished = options, [], [], 0

        def define_metric(self, name, step_metric=None):
            self.defined.append((name, step_metric))

        def log(self, row):
            self.rows.append(row)

        def finish(self):
            self.finished += 1

    def init(**options):
        module.runs.append(Run(options))
        return module.runs[-1]

    module.init = init
    module.Histogram = lambda values: ("histogram", list(values))
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setenv("WANDB_MODE", "offline")
    return module


def test_wandb_run(tmp_path, fake_wandb):
    logging_cfg = LoggingConfig(wandb=True, wandb_project="kda", wandb_name="first")
    with open_writers(logging_cfg, tmp_path, {"optim": {"lr": 0.1}}, 0) as writers:
        writers.write(1, {"loss": 1.5, "kda": {"decay": [1.0, math.inf], "rms": 2.0}})
    (run,) = fake_wandb.runs
    assert run.options == {
        "project": "kda",
        "name": "first",
        "config": {"optim": {"lr": 0.1}},
        "dir": str(tmp_path),
        "id": (tmp_path / "wandb_id").read_text().strip(),
        "mode": "offline",
        "resume": "allow",
    }
    assert run.defined == [("step", None), ("*", "step")]
    assert run.rows == [{"step": 1, "loss": 1.5, "kda/decay": ("histogram", [1.0]), "kda/rms": 2.0}]
    assert run.finished == 1


def test_wandb_resume_joins_the_run_and_a_fresh_run_does_not(tmp_path, fake_wandb):
    logging_cfg = LoggingConfig(wandb=True)
    for resume_step in (0, 5, 0):
        open_writers(logging_cfg, tmp_path, {}, resume_step).close()
    first, second, third = (run.options["id"] for run in fake_wandb.runs)
    assert first == second != third
    assert (tmp_path / "wandb_id").read_text().strip() == third


def test_wandb_offline_for_real(tmp_path):
    pytest.importorskip("wandb")
    code = (
        "import sys; from pathlib import Path\n"
        "from megakda.config.schema import LoggingConfig\n"
        "from megakda.metrics.writers import open_writers\n"
        "with open_writers(LoggingConfig(wandb=True), Path(sys.argv[1]), {'a': 1}, 0) as writers:\n"
        "    writers.write(1, {'loss': 2.0, 'kda': {'decay': [1.0, 2.0]}})\n"
    )
    environ = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    environ |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "missing"), "WANDB_SILENT": "true"}
    out = tmp_path / "run"
    subprocess.run([sys.executable, "-c", code, str(out)], cwd=ROOT, env=environ, check=True)
    run_id = (out / "wandb_id").read_text().strip()
    assert list((out / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
