"""The training command as a person meets it: signals, exit codes, messages."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from megakda.checkpoint.manager import latest, step_of
from megakda.config import recipes_dir
from megakda.metrics.writers import read_metrics
from tests import jobs


def start(corpus, out, *overrides):
    environment = {**os.environ, "PYTHONPATH": str(recipes_dir().parent)}
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "megakda.train", *jobs.SMALL),
            *(f"data.paths=[{corpus}]", "data.prepare=none", f"train.out={out}", *overrides),
        ],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_steps(process, out, steps):
    for _ in range(600):
        path = out / "metrics.jsonl"
        if path.exists() and len(read_metrics(path)) >= steps:
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    raise AssertionError("the run did not get going")


def test_sigterm_saves_and_exits_cleanly_and_two_runs_do_not_share_a_folder(corpus, tmp_path):
    out = tmp_path / "run"
    first = start(corpus, out, "train.steps=2000")
    wait_for_steps(first, out, 2)

    second = start(corpus, out, "train.steps=2000")
    _, message = second.communicate(timeout=60)
    assert second.returncode == 2
    assert f"train.out={out}: another run is writing there" in message
    assert "Traceback" not in message

    first.send_signal(signal.SIGTERM)
    _, log = first.communicate(timeout=60)
    assert first.returncode == 0, log
    saved = latest(out / "checkpoints")
    assert f"stopped by SIGTERM after step {step_of(saved)}" in log
    rows = read_metrics(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, step_of(saved) + 1))
    keys = "loss lr grad_norm param_norm tokens tokens_per_s tflops_per_s step_time_s memory_gib"
    assert set(keys.split()) <= rows[0].keys()
    assert {"expert_load_max_over_mean", "expert_bias_norm", "skipped_steps"} <= rows[0].keys()
    watched = [row for row in rows if "decay_mean" in row]
    for row in watched:
        assert row["decay_mean"].keys() == {"1", "2", "3"}  # the linear layers of 3:1
        assert all(0 < value < 1 for value in row["beta_mean"].values())
        assert all(0 <= value <= 1 for value in row["gate_saturated"].values())


BAD_DATA = {
    "missing .bin": (
        lambda prefix: os.remove(f"{prefix}.bin"),
        [],
        [".bin", "data.paths"],
    ),
    "truncated .bin": (
        lambda prefix: os.truncate(f"{prefix}.bin", os.path.getsize(f"{prefix}.bin") - 100),
        [],
        [".bin", "bytes", "tools/preprocess_data.py"],
    ),
    "a vocabulary larger than the model's": (
        lambda prefix: None,
        ["model.vocab_size=256"],
        ["257", "model.vocab_size"],
    ),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_refused_before_training(corpus, tmp_path, case):
    damage, overrides, expected = BAD_DATA[case]
    prefix = tmp_path / "text"
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(f"{corpus}{suffix}", f"{prefix}{suffix}")
    damage(prefix)
    process = start(prefix, tmp_path / "run", *overrides)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 3
    for text in expected:
        assert text in message
    assert "Traceback" not in message
    assert not (tmp_path / "run").exists()


def test_a_sweep_on_several_ranks_is_refused(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "megakda.train", "-m", "model=tiny", "train.seed=1,2"],
        env={**os.environ, "PYTHONPATH": str(recipes_dir().parent), "WORLD_SIZE": "2", "RANK": "0"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "a sweep (-m) on 2 ranks" in done.stderr
