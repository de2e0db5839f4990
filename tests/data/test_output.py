"""Output files: none torn, none lost, whatever happens while they are written."""

import os
import resource
import signal
import subprocess
import sys

import pytest

from megakda.data import output
from megakda.data.indexed import check_indexed
from megakda.data.preprocess import OutputBusyError
from megakda.errors import DataError
from tests.data.preparing import (
    BYTE,
    ENV,
    TEXTS,
    TOOL,
    documents,
    fail_rename,
    files_of,
    leftovers,
    run,
    write_jsonl,
)


def test_existing_output(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    run([tmp_path / "a.txt"], tmp_path / "out")
    with pytest.raises(DataError, match=r"out\.idx exists already: give --overwrite"):
        run([tmp_path / "b.txt"], tmp_path / "out")
    assert documents(tmp_path / "out") == ["one"]
    run([tmp_path / "b.txt"], tmp_path / "out", overwrite=True)
    assert documents(tmp_path / "out") == ["two"]
    # a file of the same name that is no left-over, such as the weights of a model
    (tmp_path / "model.bin").write_bytes(b"weights")
    with pytest.raises(DataError, match="is not a left-over of this command"):
        run([tmp_path / "a.txt"], tmp_path / "model")
    assert (tmp_path / "model.bin").read_bytes() == b"weights"


def test_failing_overwrite_keeps_the_old_output(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    run([tmp_path / "a.txt"], tmp_path / "out")
    before = files_of(tmp_path / "out")
    (tmp_path / "b.txt").write_text("  ")
    with pytest.raises(DataError, match="no documents"):
        run([tmp_path / "b.txt"], tmp_path / "out", overwrite=True)
    assert files_of(tmp_path / "out") == before and leftovers(tmp_path) == []


def test_two_runs_at_once(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    with (
        output._lock(str(tmp_path / "out")),
        pytest.raises(OutputBusyError, match="another process is writing"),
    ):
        run([tmp_path / "a.txt"], tmp_path / "out")
    run([tmp_path / "a.txt"], tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_full_disk(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["x" * 1000] * 3000)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    done = subprocess.run(
        [sys.executable, str(TOOL), "a.jsonl", "--output-prefix", "out"],
        cwd=tmp_path,
        env=ENV,
        capture_output=True,
        text=True,
        preexec_fn=limit,
        timeout=60,
    )
    assert done.returncode == DataError.exit_code
    assert done.stderr.startswith("error: cannot write output 'out.bin.partial' (File too large")
    assert "bytes are free there): make room" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert os.listdir(tmp_path) == ["a.jsonl"]


@pytest.mark.parametrize("step", range(3))
def test_failing_rename_leaves_no_output(tmp_path, monkeypatch, step):
    (tmp_path / "a.txt").write_text("one")
    fail_rename(monkeypatch, step)
    with pytest.raises(DataError, match="No space left on device"):
        run([tmp_path / "a.txt"], tmp_path / "out")
    assert os.listdir(tmp_path) == ["a.txt"]


KILL = """
import os, signal, sys
from megakda.data import encode, readers
from megakda.data.preprocess import preprocess
kind, nth, calls = sys.argv[1], int(sys.argv[2]), 0
def die_at(f):
    def g(*args, **kwargs):
        global calls
        calls += 1
        if calls > nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return f(*args, **kwargs)
    return g
if kind == "encode":
    encode._encode_block = die_at(encode._encode_block)
elif kind == "fsync":
    os.fsync = die_at(os.fsync)
else:
    os.replace = die_at(os.replace)
readers._BLOCK_BYTES = 2000
preprocess(["a.jsonl"], "out", overwrite="overwrite" in sys.argv, progress=False)
"""


@pytest.mark.parametrize(
    ("kind", "nth"),
    [("encode", 0), ("encode", 20), ("fsync", 0), ("fsync", 1), ("fsync", 2)]
    + [("replace", 0), ("replace", 1), ("replace", 2)],
)
@pytest.mark.parametrize("old", [False, True], ids=["new", "over"])
def test_killed_run(tmp_path, kind, nth, old):
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    if old:
        (tmp_path / "old.txt").write_text("old output")
        run([tmp_path / "old.txt"], tmp_path / "out")
    done = subprocess.run(
        [sys.executable, "-c", KILL, kind, str(nth), *(["overwrite"] if old else [])],
        cwd=tmp_path,
        env=ENV,
        timeout=60,
    )
    assert done.returncode == -signal.SIGKILL
    if old and kind != "replace":
        assert documents(tmp_path / "out") == ["old output"]
    else:
        assert not (tmp_path / "out.idx").exists()
        with pytest.raises(DataError):
            check_indexed(tmp_path / "out", BYTE, 257)
    # the same command again
    report = run([tmp_path / "a.jsonl"], tmp_path / "out", overwrite=old)
    assert documents(report.prefix) == TEXTS
    assert leftovers(tmp_path) == []
