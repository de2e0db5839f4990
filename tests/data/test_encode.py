"""Worker processes: the same tokens from any number, and none that stays or is waited for."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from megakda.data.preprocess import BrokenRecord
from tests.data.preparing import ENV, TEXTS, documents, files_of, leftovers, run, write_jsonl


def test_workers_do_not_change_the_output(tmp_path):
    sources = [write_jsonl(tmp_path / f"{i}.jsonl", TEXTS * 12) for i in range(4)]
    with sources[1].open("ab") as f:
        f.write(b"broken\n")
    (tmp_path / "last.txt").write_text("last")
    sources.append(tmp_path / "last.txt")
    (tmp_path / "1").mkdir()
    (tmp_path / "3").mkdir()
    one = run(sources, tmp_path / "1" / "set", workers=1)
    three = run(sources, tmp_path / "3" / "set", workers=3)
    assert files_of(one.prefix) == files_of(three.prefix)
    assert (one.workers, three.workers) == (1, 3)
    assert (
        one.broken_listed
        == three.broken_listed
        == [
            BrokenRecord(
                str(sources[1]), 3601, "invalid JSON (Expecting value: line 1 column 1 (char 0))"
            )
        ]
    )
    assert documents(one.prefix)[-1] == "last"


def test_a_tokenizer_that_fails_breaks_one_document(tmp_path, monkeypatch):
    class Panic(BaseException):
        pass

    def encode(self, text):
        if "bad" in text:
            raise Panic("index out of range")
        return np.frombuffer(text.encode(), np.uint8)

    monkeypatch.setattr("megakda.data.tokenizer.ByteTokenizer.encode_array", encode)
    report = run([write_jsonl(tmp_path / "a.jsonl", ["ok", "bad", "ok"])], tmp_path / "out")
    assert (report.documents, report.broken) == (2, 1)
    assert "the tokenizer fails (Panic: index out of range)" in report.broken_listed[0].reason


def test_kill_at_any_time_leaves_no_processes(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", TEXTS * 40)
    code = (
        "from megakda.data import preprocess, readers; readers._BLOCK_BYTES = 20000\n"
        "preprocess.preprocess(['a.jsonl'], 'out', workers=2, progress=False)"
    )
    for delay in (0.3, 0.6, 0.9):
        parent = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=ENV)
        time.sleep(delay)
        children = _children(parent.pid)
        if parent.poll() is None:
            parent.send_signal(signal.SIGKILL)
        parent.wait()
        deadline = time.monotonic() + 10
        while any(map(_alive, children)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert [p for p in children if _alive(p)] == []
        if (tmp_path / "out.idx").exists():  # it comes last: the kill was too late, all is there
            assert documents(tmp_path / "out") == TEXTS * 40
            break
        assert parent.returncode != 0
    run([tmp_path / "a.jsonl"], tmp_path / "out", overwrite=True)
    assert documents(tmp_path / "out") == TEXTS * 40
    assert leftovers(tmp_path) == []


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _children(pid):
    try:
        return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        return []


def test_a_killed_worker_is_an_error_and_not_a_hang(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", TEXTS * 20)
    code = (
        "import os, threading, time\n"
        "from megakda.data import preprocess, readers\n"
        "from megakda.errors import DataError\n"
        "readers._BLOCK_BYTES = 1000\n"
        "def kill():\n"
        "    while True:\n"
        "        for kid in open(f'/proc/self/task/{os.getpid()}/children').read().split():\n"
        "            if 'spawn_' + 'main' in open(f'/proc/{kid}/cmdline').read():\n"
        "                return os.kill(int(kid), 9)\n"
        "        time.sleep(0.01)\n"
        "threading.Thread(target=kill, daemon=True).start()\n"
        "try:\n"
        "    preprocess.preprocess(['a.jsonl'], 'out', workers=2, progress=False)\n"
        "except DataError as e:\n"
        "    print(e)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=ENV,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "a worker process of 2 died" in done.stdout and "--workers" in done.stdout, done.stderr
    assert os.listdir(tmp_path) == ["a.jsonl"]
