"""Document lengths by description, and rows packed with such documents."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from megakda.data.lengths import parse_lengths, sample_rows
from megakda.errors import ConfigError


def rows(text, count=20, context=1000, packing="documents", overlong="split", seed=3):
    return sample_rows(parse_lengths(text), count, context, packing, overlong, seed)


def test_whole_rows():
    assert rows("whole", 2) == [(0, 1000)] * 2


def test_fixed_lengths():
    """301 tokens take 300 positions; what is left is padding, a document of its own."""
    found = rows("fixed:301")
    assert found.count((0, 300, 600, 900, 1000)) >= 19  # one may hold the end of the corpus
    assert rows("fixed:251", 3) == [(0, 250, 500, 750, 1000)] * 3
    assert rows("fixed:2001", 3) == [(0, 1000)] * 3  # cut into two
    assert {(0, 1000), (0, 500, 1000)} == set(rows("fixed:1501", 40, overlong="carry"))


@pytest.mark.parametrize("packing", ["documents", "best_fit"])
def test_log_normal_lengths(packing):
    lengths = parse_lengths("lognormal:mean=200,sigma=1")
    found = sample_rows(lengths, 300, 1000, packing, "split", seed=1)
    assert len(found) == 300
    assert all(row[0] == 0 and row[-1] == 1000 for row in found)
    sizes = [b - a for row in found for a, b in pairwise(row)]
    assert min(sizes) >= 1 and len(set(sizes)) > 100
    assert found == sample_rows(lengths, 300, 1000, packing, "split", seed=1)
    assert found != sample_rows(lengths, 300, 1000, packing, "split", seed=2)
    drawn = lengths.draw(200_000, np.random.RandomState(0))
    assert drawn.mean() == pytest.approx(200, rel=0.02)
    assert np.log(drawn).std() == pytest.approx(1, rel=0.02)


def test_lengths_of_a_file(tmp_path):
    path = tmp_path / "lengths.txt"
    path.write_text("501\n401\n101\n\n")
    found = rows(f"file:{path}", 4, packing="best_fit")
    # The same epoch again and again.
    assert [sorted(b - a for a, b in pairwise(row)) for row in found] == [[100, 400, 500]] * 4
    assert "3 documents of 334 tokens" in str(parse_lengths(f"file:{path}"))


@pytest.mark.parametrize(
    "text",
    [
        "uniform:3",
        "fixed:many",
        "fixed:1",
        "whole:3",
        "lognormal:mean=3",
        "lognormal:mean=800,sigma=-1",
        "lognormal:mean=800,sigma=1,seed=3",
        "file:missing.txt",
    ],
)
def test_what_cannot_be_read(text):
    with pytest.raises(ConfigError, match=f"lengths={text}"):
        parse_lengths(text)


def test_a_file_of_something_else(tmp_path):
    path = tmp_path / "lengths.txt"
    for content in ("", "100\n1\n", "100\nten\n"):
        path.write_text(content)
        with pytest.raises(ConfigError, match="lengths=file:"):
            parse_lengths(f"file:{path}")
