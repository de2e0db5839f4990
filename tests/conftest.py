"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# One thread per process: the machine's cores are shared by the ranks of distributed tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
# Triton reads this when it is first imported: kernels are interpreted on CPU tensors.
os.environ.setdefault("TRITON_INTERPRET", "1")

import megakda.runtime  # noqa: E402
from tests.ranks import RankPool  # noqa: E402
from tests.text import lines  # noqa: E402

megakda.runtime.install("cpu")  # before any test module imports megatron-core


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Processes for distributed jobs, started as they are needed."""
    pool = RankPool(size=8)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of a small byte-level data set, a document per line."""
    from megakda.data.preprocess import preprocess

    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text.txt").write_text("\n".join(lines(10_000, seed=0)))
    text = [folder / "text.txt"]
    preprocess(text, folder / "text", "byte", document="line", workers=1, progress=False)
    return folder / "text"
