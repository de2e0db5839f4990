"""Kills, full disks and wrong checkpoints: a clear error, and nothing saved before is lost."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time

import pytest

from megakda.config.schema import CheckpointConfig
from tests import jobs
from tests.ranks import free_port


def test_keeps_the_newest_and_every_nth(ranks, corpus, tmp_path):
    overrides = [
        "train.steps=6",
        "train.save_every=1",
        "checkpoint.keep_last=2",
        "checkpoint.keep_every=2",
    ]
    ranks.run(1, jobs.fit, overrides, corpus, str(tmp_path))
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["latest", *(f"step_{s:08d}" for s in (2, 3, 4, 5, 6))]
    assert (tmp_path / "checkpoints/latest").read_text() == "step_00000006\n"


def test_a_full_disk_stops_the_run_and_keeps_the_last_checkpoint(ranks, corpus, tmp_path):
    ranks.run(2, jobs.fit, ["train.steps=2"], corpus, str(tmp_path))
    kind, message = ranks.run(
        2,
        jobs.error_of,
        jobs.fit_with_small_files,
        ["train.steps=4"],
        corpus,
        str(tmp_path),
        1_000_000,
    )[0]
    assert kind == "CheckpointError"
    for text in (
        "step_00000004",
        "the disk or a quota is full",
        "step_00000002 is intact",
        "train.out",
    ):
        assert text in message
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["latest", "step_00000002"]
    resumed = ranks.run(2, jobs.fit, ["train.steps=4"], corpus, str(tmp_path))[0]
    assert len(resumed["loss"]) == 4


def test_too_little_space_is_noticed_before_writing(ranks, corpus, tmp_path):
    kind, message = ranks.run(
        1, jobs.error_of, jobs.fit_with_free_space, ["train.steps=1"], corpus, str(tmp_path), 2**20
    )[0]
    assert kind == "CheckpointError"
    assert "1 MiB are free" in message
    assert "no earlier checkpoint" in message


@pytest.fixture(scope="module")
def run_of_two_steps(ranks, corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    ranks.run(1, jobs.fit, ["train.steps=2"], corpus, str(out))
    return out


WRONG = {
    "another architecture": (
        ["model.num_heads=2"],
        lambda folder: None,
        ["another architecture", "model.num_heads is 4 there and 2 here"],
    ),
    "truncated tensors": (
        [],
        lambda folder: [os.truncate(f, 100) for f in folder.glob("*.distcp")],
        ["cannot be loaded", "train.resume"],
    ),
    "missing tensors": (
        [],
        lambda folder: [os.remove(f) for f in folder.glob("*.distcp")],
        ["cannot be loaded"],
    ),
    "unknown format": (
        [],
        lambda folder: (folder / "manifest.json").write_text(json.dumps({"format": 99})),
        ["format 99"],
    ),
    "not a checkpoint": (
        ["train.resume={folder}/nothing"],
        lambda folder: None,
        ["nothing", "not a complete checkpoint"],
    ),
    "fresh run over an old one": (
        ["train.resume=none"],
        lambda folder: None,
        ["train.resume=none", "train.out"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_checkpoints_that_do_not_fit(ranks, corpus, tmp_path, run_of_two_steps, case):
    overrides, damage, expected = WRONG[case]
    out = tmp_path / "run"
    shutil.copytree(run_of_two_steps, out)
    folder = out / "checkpoints/step_00000002"
    damage(folder)
    overrides = ["train.steps=4", *(o.format(folder=folder) for o in overrides)]
    kind, message = ranks.run(1, jobs.error_of, jobs.fit, overrides, corpus, str(out))[0]
    assert kind in ("CheckpointError", "ConfigError")
    for text in expected:
        assert text in message
    assert folder.is_dir()


def test_an_earlier_checkpoint_can_be_named(ranks, corpus, tmp_path, run_of_two_steps):
    overrides = ["train.steps=3", f"train.resume={run_of_two_steps}"]
    rows = ranks.run(1, jobs.fit, overrides, corpus, str(tmp_path))[0]["loss"]
    assert len(rows) == 1  # step 3, in a folder of its own


KILLS = 12
STEPS = 24


def _run_killed_many_times(corpus, out, seed, pipe):
    """Forks a training process again and again and kills it at random moments while it saves."""
    import warnings

    warnings.filterwarnings("ignore")
    import torch

    import megakda.runtime

    torch.set_num_threads(1)
    megakda.runtime.install("cpu")
    import megakda.data.datasets
    import megakda.trainer  # noqa: F401  (imported once, before the forks)

    draw = random.Random(seed)
    overrides = [f"train.steps={STEPS}", "train.save_every=1", "train.global_batch=2"]
    kills = 0
    while True:
        pid = os.fork()
        if pid == 0:
            os.environ.update(
                RANK="0",
                WORLD_SIZE="1",
                LOCAL_WORLD_SIZE="1",
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(free_port()),
            )
            try:
                jobs.fit(overrides, corpus, out)
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        deadline = time.monotonic() + (draw.uniform(0.3, 2.5) if kills < KILLS else 120)
        status = None
        while time.monotonic() < deadline and status is None:
            done, code = os.waitpid(pid, os.WNOHANG)
            status = code if done else None
            time.sleep(0.005)
        if status is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            kills += 1
        else:
            break
    pipe.send((os.waitstatus_to_exitcode(status), kills))


def test_killed_at_any_moment_the_run_goes_on_bit_for_bit(ranks, corpus, tmp_path):
    overrides = [f"train.steps={STEPS}", "train.save_every=1", "train.global_batch=2"]
    whole = ranks.run(1, jobs.fit, overrides, corpus, str(tmp_path / "whole"))[0]

    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    out = tmp_path / "killed"
    process = context.Process(
        target=_run_killed_many_times, args=(corpus, str(out), 20251030, theirs)
    )
    process.start()
    assert ours.poll(200), "the killed run did not end"
    exit_code, kills = ours.recv()
    process.join()
    assert exit_code == 0
    assert kills >= KILLS // 2, "too few kills to mean anything: the run ended before them"

    from megakda.checkpoint.manager import complete, latest
    from megakda.metrics.writers import read_metrics

    rows = read_metrics(out / "metrics.jsonl")
    assert [row["loss"] for row in rows] == whole["loss"]
    assert latest(out / "checkpoints").name == f"step_{STEPS:08d}"
    assert len(complete(out / "checkpoints")) == CheckpointConfig().keep_last
