"""Preprocessing as a person meets it: arguments, errors, the command and its progress."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megakda.data import preprocess as module
from megakda.data import readers
from megakda.data.indexed import read_sidecar
from megakda.data.preprocess import preprocess
from megakda.errors import DataError
from tests.data.preparing import ENV, TEXTS, TOOL, documents, run, write_jsonl


def test_no_end_of_document_token(tmp_path):
    (tmp_path / "a.txt").write_text("ab")
    run([tmp_path / "a.txt"], tmp_path / "out", append_eod=False)
    assert np.fromfile(tmp_path / "out.bin", dtype=np.uint16).tolist() == [97, 98]
    assert read_sidecar(tmp_path / "out")["max_token_id"] == 98


@pytest.mark.parametrize(
    ("inputs", "kwargs", "message"),
    [
        (["nothing*.txt"], {}, "'nothing.*' is neither a file nor a folder, and matches nothing"),
        (["x.dat"], {}, "none of the known suffixes.*--format"),
        (["empty"], {}, "hold no file of a known type"),
        ([], {}, "hold no file"),
        (["a.txt"], {"workers": 0}, "workers=0"),
        (["a.txt"], {"format": "csv"}, "format .* is 'csv', but must be one of text, jsonl"),
        (["a.txt"], {"document": "page"}, "document .* is 'page'"),
        (["a.txt"], {"on_error": "ignore"}, "on_error .* is 'ignore'"),
        (["a.txt"], {"output_prefix": "out.bin"}, "without .bin"),
        (["a.txt"], {"output_prefix": "out/"}, "--output-prefix"),
        (["a.txt"], {"output_prefix": "a.txt/out"}, "cannot write output .*a.txt. .File exists"),
        (["a.txt"], {"tokenizer_spec": "words"}, "data.tokenizer='words'"),
        (["blank.txt"], {}, r"no documents in 1 input files \(1 empty, 0 broken\)"),
        (["a.jsonl"], {}, "no documents.*1 broken: .*a.jsonl:1: no key 'text' .keys: content."),
    ],
)
def test_errors(tmp_path, monkeypatch, inputs, kwargs, message):
    monkeypatch.chdir(tmp_path)
    for name in ("x.dat", "a.txt"):
        Path(name).write_text("text")
    Path("blank.txt").write_text(" \n")
    Path("a.jsonl").write_text('{"content": "x"}\n')
    Path("empty").mkdir()
    before = sorted(os.listdir())
    with pytest.raises(DataError, match=message):
        run(inputs, **{"output_prefix": "out", **kwargs})
    assert sorted(os.listdir()) == before


def tool(*args, cwd):
    return subprocess.run(
        [sys.executable, str(TOOL), *args],
        cwd=cwd,
        env=ENV,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_command(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", TEXTS, key="body")
    args = ("a.jsonl", "--output-prefix", "out", "--text-key", "body", "--workers", "2")
    done = tool(*args, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    tokens = sum(len(t.encode()) + 1 for t in TEXTS)
    assert report["tokens"] == f"{tokens:,}" and report["documents"] == "300"
    assert documents(tmp_path / "out") == TEXTS
    again = tool(*args, cwd=tmp_path)
    assert again.returncode == DataError.exit_code and again.stdout == ""
    assert again.stderr.startswith("error: output out.idx exists already: give --overwrite")
    assert len(again.stderr.splitlines()) == 1


def test_command_help(tmp_path):
    done = tool("--help", cwd=tmp_path)
    assert done.returncode == 0
    for flag in ("--output-prefix", "--tokenizer", "--on-error", "--document", "--overwrite"):
        assert flag in done.stdout
    assert tool("x", cwd=tmp_path).returncode == 2


def test_progress_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "_LINE_EVERY", 0.0)
    monkeypatch.setattr(readers, "_BLOCK_BYTES", 3000)
    for i, name in enumerate(["a.jsonl", "a.jsonl.gz"]):
        source = write_jsonl(tmp_path / name, TEXTS)
        preprocess([source], tmp_path / str(i), progress=True)
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) > 3 and all(x.startswith("tokenizing: ") for x in lines)
        assert lines[-1].startswith("tokenizing: 100% of ")
