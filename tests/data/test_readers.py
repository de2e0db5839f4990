"""Inputs: the same documents from every format, and broken records by name."""

import gzip
import json
import os
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megakda.data import readers
from megakda.data.indexed import check_indexed, read_sidecar
from megakda.errors import DataError
from tests.data.preparing import BYTE, TEXTS, documents, files_of, leftovers, run, write_jsonl


def test_all_formats_agree(tmp_path):
    plain = tmp_path / "plain"
    plain.mkdir()
    for i, text in enumerate(TEXTS):
        (plain / f"{i:04}.txt").write_bytes(text.encode())
    table = pa.table({"id": range(len(TEXTS)), "text": TEXTS})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=70)
    dictionary = pa.table({"text": pa.array(TEXTS).dictionary_encode()})
    pq.write_table(dictionary, tmp_path / "d.parquet")
    inputs = {
        "plain": plain,
        "glob": str(plain / "*.txt"),
        "jsonl": write_jsonl(tmp_path / "t.jsonl", TEXTS),
        "gz": write_jsonl(tmp_path / "t.jsonl.gz", TEXTS),
        "parquet": tmp_path / "t.parquet",
        "dictionary": tmp_path / "d.parquet",
    }
    for name, source in inputs.items():
        report = run([source], tmp_path / f"out_{name}")
        assert documents(report.prefix) == TEXTS
        assert (report.documents, report.broken, report.empty_documents) == (300, 0, 0)
        assert report.text_bytes == sum(len(t.encode()) for t in TEXTS)
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


def test_blocks_do_not_change_the_output(tmp_path, monkeypatch):
    sources = [write_jsonl(tmp_path / "a.jsonl.gz", TEXTS), tmp_path / "b", tmp_path / "c.jsonl"]
    sources[1].mkdir()
    for i, text in enumerate(TEXTS[:40]):
        (sources[1] / f"{i:03}.md").write_text(text)
    write_jsonl(sources[2], TEXTS[:7])
    first = run(sources, tmp_path / "one")
    monkeypatch.setattr(readers, "_BLOCK_BYTES", 300)
    second = run(sources, tmp_path / "two")
    assert first.tokens == second.tokens
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


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
    monkeypatch.setattr(readers, "_BLOCK_BYTES", 100)
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
