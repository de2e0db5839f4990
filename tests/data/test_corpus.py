"""The standard library as a data set."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megakda.data.corpus import prepare_stdlib
from megakda.data.indexed import check_indexed, read_sidecar
from megakda.errors import DataError
from tests.data.preparing import BYTE, ENV, files_of, leftovers


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
