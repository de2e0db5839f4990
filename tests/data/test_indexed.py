"""The indexed format: what megatron-core reads back, and what check_indexed refuses."""

import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import megakda
from megakda.data.indexed import (
    check_indexed,
    read_index,
    read_sidecar,
    token_dtype,
    unigram_entropy,
    write_index,
)
from megakda.data.preprocess import preprocess
from megakda.data.tokenizer import ByteTokenizer, load_tokenizer
from megakda.errors import DataError

BYTE = load_tokenizer("byte")
ENV = {**os.environ, "PYTHONPATH": str(Path(megakda.__file__).parents[1])}

# In a process of its own: megatron-core may only be imported once the runtime is installed.
READ_BACK = """
import json, sys
from megatron.core.datasets.indexed_dataset import IndexedDataset
out = []
for prefix in sys.argv[1:]:
    d = IndexedDataset(prefix)
    out.append({
        "dtype": d.index.dtype.__name__,
        "items": [d[i].tolist() for i in range(len(d))],
        "documents": d.document_indices.tolist(),
        "lengths": d.sequence_lengths.tolist(),
        "part": d.get(len(d) - 1, offset=1, length=2).tolist(),
    })
print("RESULT" + json.dumps(out))
"""
WRITE = """
import sys, numpy, torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
for dtype in (numpy.uint16, numpy.int32):
    b = IndexedDatasetBuilder(f"{sys.argv[1]}_{dtype.__name__}.bin", dtype=dtype)
    for n in (3, 1, 5):
        b.add_item(torch.arange(n) + 7)
        b.end_document()
    b.finalize(f"{sys.argv[1]}_{dtype.__name__}.idx")
"""


class WideTokenizer(ByteTokenizer):
    """A vocabulary whose ids need int32."""

    spec = "wide"
    vocab_size = 100_001
    eod = 100_000

    def __init__(self):
        self.fingerprint = "wide"


@pytest.fixture
def made(tmp_path):
    (tmp_path / "a.txt").write_text("hello world, this is a document")
    (tmp_path / "b.txt").write_text("another")
    preprocess([tmp_path], tmp_path / "set", progress=False)
    return tmp_path / "set"


def test_megatron_reads_what_we_write_and_writes_the_same_bytes(tmp_path, monkeypatch):
    texts = ["first é", "x", "third document " * 3]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    preprocess([source], tmp_path / "narrow", progress=False)
    monkeypatch.setattr("megakda.data.preprocess.load_tokenizer", lambda spec: WideTokenizer())
    preprocess([source], tmp_path / "wide", "wide", progress=False)

    code = READ_BACK + WRITE.replace("sys.argv[1]", repr(str(tmp_path / "theirs")))
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "narrow"), str(tmp_path / "wide")],
        capture_output=True,
        text=True,
        env=ENV,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(x for x in done.stdout.splitlines() if x.startswith("RESULT"))
    narrow, wide = json.loads(line.removeprefix("RESULT"))
    for got, eod, dtype in ((narrow, 256, "uint16"), (wide, 100_000, "int32")):
        want = [[*t.encode(), eod] for t in texts]
        assert got["items"] == want
        assert got["documents"] == [0, 1, 2, 3]
        assert got["lengths"] == [len(w) for w in want]
        assert got["part"] == want[-1][1:3]
        assert got["dtype"] == dtype

    for dtype in ("uint16", "int32"):
        theirs = tmp_path / f"theirs_{dtype}"
        with open(tmp_path / "ours.idx", "wb") as f:
            write_index(f, np.array([3, 1, 5]), np.dtype(dtype))
        assert (tmp_path / "ours.idx").read_bytes() == theirs.with_suffix(".idx").read_bytes()
        info = read_index(theirs)
        assert (info.documents, info.tokens) == (3, 9)
        assert info.bin_bytes_expected == theirs.with_suffix(".bin").stat().st_size
        check_indexed(theirs, BYTE, 257)


def test_index_info(made):
    info = check_indexed(made, BYTE, 257)
    assert info == read_index(str(made))
    assert (info.prefix, info.dtype, info.sequences, info.documents) == (
        str(made),
        np.dtype("uint16"),
        2,
        2,
    )
    assert info.tokens == 31 + 7 + 2
    assert info.bin_bytes_expected == 2 * info.tokens
    assert token_dtype(65499) == np.uint16 and token_dtype(65500) == np.int32


def test_empty_index(tmp_path):
    with open(tmp_path / "e.idx", "wb") as f:
        write_index(f, np.array([], dtype=np.int32), np.dtype("uint16"))
    (tmp_path / "e.bin").touch()
    assert read_index(tmp_path / "e").tokens == 0
    with pytest.raises(DataError, match="holds no tokens"):
        check_indexed(tmp_path / "e", BYTE, 257)


def test_missing_files_name_what_is_there(made, tmp_path):
    with pytest.raises(DataError, match=rf"no .*sat\.bin and .*sat\.idx \(data sets there: {made}"):
        check_indexed(tmp_path / "sat", BYTE, 257)
    with pytest.raises(DataError, match=r"nowhere does not exist.*data\.paths"):
        check_indexed(tmp_path / "nowhere" / "set", BYTE, 257)
    with pytest.raises(DataError, match=rf"without suffix, '{made}'"):
        check_indexed(f"{made}.bin", BYTE, 257)
    os.unlink(f"{made}.idx")
    with pytest.raises(DataError, match=r"no .*set\.idx \(.* holds a\.txt, b\.txt, set\.bin"):
        check_indexed(made, BYTE, 257)
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match="holds nothing.*tools/preprocess_data.py"):
        check_indexed(tmp_path / "bare" / "set", BYTE, 257)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b"PK\x03\x04" + b[4:], "does not start with megatron-core's index header"),
        (lambda b: b[:20], "does not start with"),
        (lambda b: b"", "does not start with"),
        (lambda b: b[:-1], "bytes long where its header means"),
        (lambda b: b + b"xyz", "bytes long where its header means"),
        (lambda b: b[:9] + struct.pack("<Q", 2) + b[17:], "has version 2"),
        (lambda b: b[:17] + b"\x07" + b[18:], "float32, which is no type of token ids"),
        (lambda b: b[:17] + b"\x63" + b[18:], "type code 99"),
        (lambda b: b[:34] + struct.pack("<i", -4) + b[38:], "negative length"),
        (lambda b: b[:-8] + struct.pack("<q", 1), "document boundaries"),
        (lambda b: b[:18] + struct.pack("<Q", 2**60) + b[26:], "its header means"),
    ],
)
def test_garbled_index(made, change, message):
    path = Path(f"{made}.idx")
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=message) as e:
        check_indexed(made, BYTE, 257)
    assert "tools/preprocess_data.py" in str(e.value)


def test_truncated_bin(made):
    path = Path(f"{made}.bin")
    data = path.read_bytes()
    path.write_bytes(data[:-6])
    with pytest.raises(
        DataError, match=r"cut short: .*means 80 bytes and it has 74: .*tools/preprocess_data\.py"
    ):
        check_indexed(made, BYTE, 257)
    path.write_bytes(data + b"12")
    with pytest.raises(DataError, match="is not the one of its index"):
        check_indexed(made, BYTE, 257)


def test_another_tokenizer(made):
    with pytest.raises(DataError, match=r"made with tokenizer 'byte'.*data\.tokenizer='wide'"):
        check_indexed(made, WideTokenizer(), 100_001)


def test_vocabulary_larger_than_the_model(made):
    with pytest.raises(DataError, match=r"has 257 ids, more than model\.vocab_size=256: set"):
        check_indexed(made, BYTE, 256)


def test_ids_beyond_the_vocabulary(made):
    class Small(ByteTokenizer):
        vocab_size = 100

    # by the sidecar
    with pytest.raises(DataError, match=r"token id 256, outside 0\.\.199.*model\.vocab_size"):
        check_indexed(made, Small(), 200)
    # by reading the tokens
    os.unlink(f"{made}.json")
    assert check_indexed(made, BYTE, 257).documents == 2
    with pytest.raises(DataError, match=r"token id 256, outside 0\.\.199"):
        check_indexed(made, Small(), 200)
    assert check_indexed(made, Small(), 200, scan=False).documents == 2


def test_negative_ids(tmp_path):
    np.array([5, -3, 9], dtype=np.int32).tofile(tmp_path / "n.bin")
    with open(tmp_path / "n.idx", "wb") as f:
        write_index(f, np.array([3]), np.dtype(np.int32))
    with pytest.raises(DataError, match="token id -3"):
        check_indexed(tmp_path / "n", BYTE, 257)


def test_scan_crosses_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("megakda.data.indexed._BLOCK", 4)
    tokens = np.arange(23, dtype=np.uint16)
    tokens[21] = 999
    tokens.tofile(tmp_path / "n.bin")
    with open(tmp_path / "n.idx", "wb") as f:
        write_index(f, np.array([20, 3]), np.dtype(np.uint16))
    with pytest.raises(DataError, match="token id 999"):
        check_indexed(tmp_path / "n", BYTE, 257)
    check_indexed(tmp_path / "n", BYTE, 1000)
    assert unigram_entropy(tmp_path / "n") == pytest.approx(math.log(23))


def test_sidecar(made):
    sidecar = read_sidecar(made)
    assert sidecar["fingerprint"] == BYTE.fingerprint and sidecar["max_token_id"] == 256
    path = Path(f"{made}.json")
    text = path.read_text()
    path.write_text(text[:-40])
    with pytest.raises(DataError, match=r"set\.json is damaged"):
        check_indexed(made, BYTE, 257)
    path.write_text(text.replace('"max_token_id"', '"other"'))
    with pytest.raises(DataError, match="no max_token_id"):
        check_indexed(made, BYTE, 257)
    path.write_text(text.replace('"megakda_format": 1', '"megakda_format": 2'))
    with pytest.raises(DataError, match="format 2"):
        check_indexed(made, BYTE, 257)
    path.write_text(text.replace('"tokens": 40', '"tokens": 41'))
    with pytest.raises(DataError, match="describes .* but the files hold"):
        check_indexed(made, BYTE, 257)
    path.write_text('{"text": "a raw data set"}\n{"text": "of the same name"}\n')
    assert read_sidecar(made) is None
    assert check_indexed(made, BYTE, 257).tokens == 40


def test_unigram_entropy(tmp_path):
    tokens = np.array([1, 1, 2, 3] * 100 + [9] * 50, dtype=np.int32)
    tokens.tofile(tmp_path / "n.bin")
    with open(tmp_path / "n.idx", "wb") as f:
        write_index(f, np.array([450]), np.dtype(np.int32))
    prefix = tmp_path / "n"
    half = 0.5 * math.log(2) + 0.5 * math.log(4)
    assert unigram_entropy(prefix, 0, 400) == pytest.approx(half, rel=1e-12)
    assert unigram_entropy(prefix, 400) == 0.0
    p = np.array([200, 100, 100, 50]) / 450
    assert unigram_entropy(prefix) == pytest.approx(-(p * np.log(p)).sum(), rel=1e-12)
    for bad in [(0, 451), (-1, 4), (5, 5), (450, None)]:
        with pytest.raises(DataError, match="not a range inside the 450 tokens"):
            unigram_entropy(prefix, *bad)
    os.truncate(tmp_path / "n.bin", 100)
    with pytest.raises(DataError, match="ends after 25 of 450"):
        unigram_entropy(prefix)
