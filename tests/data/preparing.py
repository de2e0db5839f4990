"""What the tests of the parts of `preprocess` have in common."""

import gzip
import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np

import megakda
from megakda.data.indexed import read_index
from megakda.data.preprocess import preprocess
from megakda.data.tokenizer import load_tokenizer

ROOT = Path(megakda.__file__).parents[1]
TOOL = ROOT / "tools" / "preprocess_data.py"
ENV = {**os.environ, "PYTHONPATH": str(ROOT)}
BYTE = load_tokenizer("byte")
SUFFIXES = (".bin", ".idx", ".json")


def _texts():
    rng = random.Random(3)
    words = ["alpha", "βήτα", "伽馬", "🧪", "def f(x):\n    return x\n", "line\r\nline", '"q"\\']
    return [" ".join(rng.choices(words, k=rng.randint(1, 60))).strip() for _ in range(300)]


TEXTS = _texts()


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


def write_jsonl(path, texts, key="text"):
    data = "".join(json.dumps({"id": i, key: t}) + "\n" for i, t in enumerate(texts)).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def fail_rename(monkeypatch: Any, step: int) -> None:
    """Lets the disk be full at the rename after `step` others."""
    real, calls = os.replace, []

    def replace(source: Any, target: Any) -> None:
        if len(calls) == step:
            raise OSError(28, "No space left on device", source)
        calls.append(target)
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
