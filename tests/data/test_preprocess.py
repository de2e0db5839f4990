"""Preprocessing: the same tokens from every format and worker count, and no torn output."""

import gzip
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import megakda
from megakda.data import preprocess as module
from megakda.data.corpus import prepare_stdlib
from megakda.data.indexed import check_indexed, read_index, read_sidecar
from megakda.data.preprocess import BrokenRecord, OutputBusyError, preprocess
from megakda.data.tokenizer import load_tokenizer
from megakda.errors import DataError

ROOT = Path(megakda.__file__).parents[1]
TOOL = ROOT / "tools" / "preprocess_data.py"
ENV = {**os.environ, "PYTHONPATH": str(ROOT)}
BYTE = load_tokenizer("byte")
SUFFIXES = (".bin", ".idx", ".json")


def documents(prefix):
    """The documents of a byte-level data set, without their ends."""
    index = Path(f"{prefix}.idx").read_bytes()
    info = read_index(prefix)
    lengths = np.frombuffer(index, dtype=np.int32, count=info.sequences, offset=34)
    tokens = np.fromfile(f"{prefix}.bin", dtype=info.dtype)
    out = []
    for part in np.split(tokens, np.cumsum(lengths)[:-1]):
        assert part[-1] == 256 and 256 not in part[:-1]
        out.append(bytes(part[:-1].astype(np.uint8)).decode())
    return out


def run(inputs, output_prefix, **kwargs):
    return preprocess(inputs, output_prefix, progress=False, **kwargs)


def files_of(prefix):
    return {s: Path(f"{prefix}{s}").read_bytes() for s in SUFFIXES}


def leftovers(folder):
    return sorted(p.name for p in folder.iterdir() if p.suffix in (".partial", ".lock"))


@pytest.fixture
def texts():
    rng = random.Random(3)
    words = ["alpha", "βήτα", "伽馬", "🧪", "def f(x):\n    return x\n", "line\r\nline", '"q"\\']
    return [" ".join(rng.choices(words, k=rng.randint(1, 60))).strip() for _ in range(300)]


def write_jsonl(path, texts, key="text"):
    data = "".join(json.dumps({"id": i, key: t}) + "\n" for i, t in enumerate(texts)).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


# --- formats --------------------------------------------------------------------------------------


def test_all_formats_agree(tmp_path, texts):
    plain = tmp_path / "plain"
    plain.mkdir()
    for i, text in enumerate(texts):
        (plain / f"{i:04}.txt").write_bytes(text.encode())
    table = pa.table({"id": range(len(texts)), "text": texts})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=70)
    dictionary = pa.table({"text": pa.array(texts).dictionary_encode()})
    pq.write_table(dictionary, tmp_path / "d.parquet")
    inputs = {
        "plain": plain,
        "glob": str(plain / "*.txt"),
        "jsonl": write_jsonl(tmp_path / "t.jsonl", texts),
        "gz": write_jsonl(tmp_path / "t.jsonl.gz", texts),
        "parquet": tmp_path / "t.parquet",
        "dictionary": tmp_path / "d.parquet",
    }
    for name, source in inputs.items():
        report = run([source], tmp_path / f"out_{name}")
        assert documents(report.prefix) == texts
        assert (report.documents, report.broken, report.empty_documents) == (300, 0, 0)
        assert report.text_bytes == sum(len(t.encode()) for t in texts)
        assert report.tokens == report.text_bytes + 300
        assert report.bin_bytes == 2 * report.tokens
        check_indexed(report.prefix, BYTE, 257)
    assert leftovers(tmp_path) == []


def test_one_document_per_line(tmp_path):
    for name, data in {
        "a.txt": b"\xef\xbb\xbfone\r\ntwo \n\n   \nthree",
        "b.txt.gz": gzip.compress(b"four\n"),
    }.items():
        (tmp_path / name).write_bytes(data)
    report = run([tmp_path], tmp_path / "out", document="line")
    assert documents(report.prefix) == ["one", "two ", "three", "four"]
    assert report.empty_documents == 2


def test_no_end_of_document_token(tmp_path):
    (tmp_path / "a.txt").write_text("ab")
    run([tmp_path / "a.txt"], tmp_path / "out", append_eod=False)
    assert np.fromfile(tmp_path / "out.bin", dtype=np.uint16).tolist() == [97, 98]
    assert read_sidecar(tmp_path / "out")["max_token_id"] == 98


def test_blocks_do_not_change_the_output(tmp_path, texts, monkeypatch):
    sources = [write_jsonl(tmp_path / "a.jsonl.gz", texts), tmp_path / "b", tmp_path / "c.jsonl"]
    sources[1].mkdir()
    for i, text in enumerate(texts[:40]):
        (sources[1] / f"{i:03}.md").write_text(text)
    write_jsonl(sources[2], texts[:7])
    first = run(sources, tmp_path / "one")
    monkeypatch.setattr(module, "_BLOCK_BYTES", 300)
    second = run(sources, tmp_path / "two")
    assert first.tokens == second.tokens
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_workers_do_not_change_the_output(tmp_path, texts):
    sources = [write_jsonl(tmp_path / f"{i}.jsonl", texts * 12) for i in range(4)]
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


def test_inputs(tmp_path, monkeypatch):
    src = tmp_path / "src"
    for name in ["b/x.py", "a.txt", "b/.hidden.py", ".git/y.py", "b/__pycache__/z.py", "c.dat"]:
        (src / name).parent.mkdir(parents=True, exist_ok=True)
        (src / name).write_text(name)
    (src / "dangling.txt").symlink_to("nowhere")
    os.mkfifo(src / "pipe.txt")
    report = run([src, src / "a.txt"], tmp_path / "out")
    assert documents(report.prefix) == ["a.txt", "b/x.py"]
    assert (report.files, report.skipped_files) == (2, 3)
    sources = read_sidecar(report.prefix)["sources"]
    assert sources[0] == {"name": str(src / "a.txt"), "bytes": 5}
    run([src / "c.dat"], tmp_path / "out2", format="text")
    assert documents(tmp_path / "out2") == ["c.dat"]
    monkeypatch.chdir(tmp_path)
    run(["src/b/**/x*.py"], "new/folder/out3")
    assert documents("new/folder/out3") == ["b/x.py"]


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


def test_unreadable_input(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")
    real = Path.open

    def refuse(self, *args, **kwargs):
        if self.name == "a.txt":
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"cannot read input .*a\.txt' \(Permission denied\)"):
        run([tmp_path / "a.txt"], tmp_path / "out")


# --- broken records -------------------------------------------------------------------------------


def test_broken_lines_are_named_and_counted(tmp_path):
    good = json.dumps({"text": "good"}).encode()
    lines = {
        2: (b'{"text": "cut', "invalid JSON"),
        3: (b'{"body": 1}', "no key 'text' (keys: body); see --text-key"),
        4: (b'{"text": 17}', "key 'text' holds int, not text"),
        5: (b'{"text": null}', "key 'text' holds null, not text"),
        6: (b'{"text": "caf\xe9"}', "invalid UTF-8 (byte 0xe9 at offset 13)"),
        7: (b'["text"]', "the line is a JSON list, not an object"),
        8: (b'{"text": "\\ud83d"}', "half of a surrogate pair"),
        9: (b"[" * 100_000, "nested too deeply"),
        12: (b'{"text": "x"} {"text": "y"}', "Extra data"),
    }
    file = tmp_path / "a.jsonl"
    rows = [lines[n][0] if n in lines else good for n in range(1, 15)]
    rows[9] = b""
    rows[10] = b'{"text": "  "}'
    file.write_bytes(b"\n".join(rows))
    report = run([file], tmp_path / "out")
    assert documents(report.prefix) == ["good"] * 3
    assert (report.broken, report.empty_documents) == (9, 2)
    for record, (number, (_, reason)) in zip(report.broken_listed, lines.items(), strict=True):
        assert (record.file, record.line) == (str(file), number)
        assert reason in record.reason
        assert f"{file}:{number}: " in str(report)
    assert read_sidecar(report.prefix)["broken"] == 9
    with pytest.raises(DataError, match=r"a\.jsonl:2: invalid JSON .*--on-error report"):
        run([file], tmp_path / "strict", on_error="fail")
    assert not (tmp_path / "strict.idx").exists() and leftovers(tmp_path) == []


def test_only_the_first_broken_lines_are_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_BYTES", 100)
    file = tmp_path / "a.jsonl"
    file.write_text("nonsense\n" * 500 + '{"text": "x"}\n')
    report = run([file], tmp_path / "out")
    assert report.broken == 500
    assert [r.line for r in report.broken_listed] == list(range(1, 21))
    assert "... and 480 more" in str(report)


def test_broken_files(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\nthr\xffee")
    whole = gzip.compress(b'{"text": "kept"}\n' + b'{"text": "%s"}\n' % (b"x" * 9999))
    (tmp_path / "b.jsonl.gz").write_bytes(whole[:-12])
    (tmp_path / "c.txt.gz").write_bytes(b"not gzip")
    (tmp_path / "d.parquet").write_bytes(b"PAR1 not parquet")
    pq.write_table(pa.table({"other": ["x"]}), tmp_path / "e.parquet")
    pq.write_table(pa.table({"text": ["fine", None, ""]}), tmp_path / "f.parquet")
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "g.parquet")
    bad = pa.Array.from_buffers(  # as another writer may leave it
        pa.string(), 2, [None, pa.py_buffer(np.array([0, 1, 3], np.int32)), pa.py_buffer(b"\xffok")]
    )
    pq.write_table(pa.table({"text": bad}), tmp_path / "h.parquet")
    report = run([tmp_path], tmp_path / "out")
    assert documents(report.prefix)[0] == "kept"
    assert documents(report.prefix)[-2:] == ["fine", "ok"]
    listed = [(Path(r.file).name, r.line, r.reason) for r in report.broken_listed]
    expected = [
        ("a.txt", 3, "invalid UTF-8 (byte 0xff at offset 11)"),
        ("b.jsonl.gz", None, "damaged gzip data"),
        ("c.txt.gz", 1, "damaged gzip data"),
        ("d.parquet", 1, "unreadable parquet"),
        ("e.parquet", 1, "no column 'text' (columns: other)"),
        ("f.parquet", 2, "column 'text' holds null"),
        ("g.parquet", 1, "column 'text' holds int"),
        ("g.parquet", 2, "column 'text' holds int"),
        ("h.parquet", 1, "invalid UTF-8 (byte 0xff at offset 0)"),
    ]
    assert len(listed) == len(expected) == report.broken
    for got, want in zip(listed, expected, strict=True):
        assert got[0] == want[0] and want[1] in (None, got[1]) and want[2] in got[2]


def test_missing_pyarrow(tmp_path, monkeypatch):
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"a\.parquet' needs the pyarrow package"):
        run([tmp_path / "a.parquet"], tmp_path / "out")


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


# --- output ---------------------------------------------------------------------------------------


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
        module._lock(str(tmp_path / "out")),
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
    real, calls = os.replace, []

    def replace(source, target):
        if len(calls) == step:
            raise OSError(28, "No space left on device", source)
        calls.append(target)
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(DataError, match="No space left on device"):
        run([tmp_path / "a.txt"], tmp_path / "out")
    assert os.listdir(tmp_path) == ["a.txt"]


KILL = """
import os, signal, sys
from megakda.data import preprocess as m
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
    m._encode_block = die_at(m._encode_block)
elif kind == "fsync":
    os.fsync = die_at(os.fsync)
else:
    os.replace = die_at(os.replace)
m._BLOCK_BYTES = 2000
m.preprocess(["a.jsonl"], "out", overwrite="overwrite" in sys.argv, progress=False)
"""


@pytest.mark.parametrize(
    ("kind", "nth"),
    [("encode", 0), ("encode", 20), ("fsync", 0), ("fsync", 1), ("fsync", 2)]
    + [("replace", 0), ("replace", 1), ("replace", 2)],
)
@pytest.mark.parametrize("old", [False, True], ids=["new", "over"])
def test_killed_run(tmp_path, texts, kind, nth, old):
    write_jsonl(tmp_path / "a.jsonl", texts)
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
    assert documents(report.prefix) == texts
    assert leftovers(tmp_path) == []


def test_kill_at_any_time_leaves_no_processes(tmp_path, texts):
    write_jsonl(tmp_path / "a.jsonl", texts * 40)
    code = (
        "import sys, megakda.data.preprocess as m; m._BLOCK_BYTES = 20000\n"
        "m.preprocess(['a.jsonl'], 'out', workers=2, progress=False)"
    )
    for delay in (0.3, 0.6, 0.9):
        parent = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=ENV)
        time.sleep(delay)
        children = _children(parent.pid)
        if parent.poll() is None:
            parent.send_signal(signal.SIGKILL)
        parent.wait()
        if parent.returncode == 0:
            break
        assert not (tmp_path / "out.idx").exists()
        deadline = time.monotonic() + 10
        while any(map(_alive, children)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert [p for p in children if _alive(p)] == []
    run([tmp_path / "a.jsonl"], tmp_path / "out", overwrite=True)
    assert documents(tmp_path / "out") == texts * 40
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


def test_a_killed_worker_is_an_error_and_not_a_hang(tmp_path, texts):
    write_jsonl(tmp_path / "a.jsonl", texts * 20)
    code = (
        "import os, sys, threading, time, megakda.data.preprocess as m\n"
        "from megakda.errors import DataError\n"
        "m._BLOCK_BYTES = 1000\n"
        "def kill():\n"
        "    while True:\n"
        "        for kid in open(f'/proc/self/task/{os.getpid()}/children').read().split():\n"
        "            if 'spawn_' + 'main' in open(f'/proc/{kid}/cmdline').read():\n"
        "                return os.kill(int(kid), 9)\n"
        "        time.sleep(0.01)\n"
        "threading.Thread(target=kill, daemon=True).start()\n"
        "try:\n"
        "    m.preprocess(['a.jsonl'], 'out', workers=2, progress=False)\n"
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


# --- command --------------------------------------------------------------------------------------


def tool(*args, cwd):
    return subprocess.run(
        [sys.executable, str(TOOL), *args],
        cwd=cwd,
        env=ENV,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_command(tmp_path, texts):
    write_jsonl(tmp_path / "a.jsonl", texts, key="body")
    args = ("a.jsonl", "--output-prefix", "out", "--text-key", "body", "--workers", "2")
    done = tool(*args, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    tokens = sum(len(t.encode()) + 1 for t in texts)
    assert report["tokens"] == f"{tokens:,}" and report["documents"] == "300"
    assert documents(tmp_path / "out") == texts
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


def test_progress_lines(tmp_path, texts, monkeypatch, capsys):
    monkeypatch.setattr(module, "_LINE_EVERY", 0.0)
    monkeypatch.setattr(module, "_BLOCK_BYTES", 3000)
    for i, name in enumerate(["a.jsonl", "a.jsonl.gz"]):
        source = write_jsonl(tmp_path / name, texts)
        preprocess([source], tmp_path / str(i), progress=True)
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) > 3 and all(x.startswith("tokenizing: ") for x in lines)
        assert lines[-1].startswith("tokenizing: 100% of ")


# --- standard library -----------------------------------------------------------------------------


def test_prepare_stdlib(tmp_path, monkeypatch):
    prefix = prepare_stdlib(tmp_path / "data", max_bytes=300_000)
    assert prefix == tmp_path / "data" / "stdlib"
    info = check_indexed(prefix, BYTE, 257)
    assert 200_000 < info.tokens - info.documents <= 300_000
    names = [s["name"] for s in read_sidecar(prefix)["sources"]]
    assert all(n.endswith(".py") for n in names) and names != sorted(names)
    assert not [n for n in names if {"test", "site-packages", "idlelib"} & set(Path(n).parts)]
    stamp = (tmp_path / "data" / "stdlib.bin").stat().st_mtime_ns
    prepare_stdlib(tmp_path / "data", max_bytes=300_000)
    assert (tmp_path / "data" / "stdlib.bin").stat().st_mtime_ns == stamp
    again = prepare_stdlib(tmp_path / "other", max_bytes=300_000)
    assert files_of(again) == files_of(prefix)

    # torn, or asked for otherwise: made again
    os.truncate(tmp_path / "data" / "stdlib.bin", 10)
    prepare_stdlib(tmp_path / "data", max_bytes=300_000)
    assert files_of(again) == files_of(prefix)
    prepare_stdlib(tmp_path / "data", max_bytes=100_000)
    assert check_indexed(prefix, BYTE, 257).tokens < 101_000
    with pytest.raises(DataError, match="max_bytes=1 is less"):
        prepare_stdlib(tmp_path / "data", max_bytes=1)


def test_prepare_stdlib_in_several_processes(tmp_path):
    code = "import megakda.data.corpus as c; c.prepare_stdlib('d', max_bytes=10**6)"
    running = [
        subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=ENV) for _ in range(3)
    ]
    assert [p.wait(60) for p in running] == [0, 0, 0]
    check_indexed(tmp_path / "d" / "stdlib", BYTE, 257)
    assert leftovers(tmp_path / "d") == []
