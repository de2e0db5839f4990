"""Balance over micro-batches of documents, and the settings that are recommended for them."""

from __future__ import annotations

import pytest

from megakda.config import compose
from megakda.errors import ConfigError
from megakda.layers.context_layout import ContextLayout, Documents
from megakda.models.context_balance import Spread, balance, micro_batches
from megakda.models.context_cost import sharing_of, work_of_ranks

BASE = ["model=kimi_linear_48b", "precision=bf16", "parallel.context=4"]


def make(tokens=65536, *overrides):
    return compose([*BASE, f"train.context={tokens}", *overrides])


def test_micro_batches_of_rows():
    rows = [(0, 3, 10), (0, 10), (0, 5, 10), (0, 1, 10), (0, 10)]
    assert micro_batches(rows, 2) == [
        Documents(2, 10, (0, 3, 10, 20)),
        Documents(2, 10, (0, 5, 10, 11, 20)),
    ]


def test_whole_rows_want_zigzag():
    config = make()
    found = balance(config, [Documents.whole_rows(1, 65536)])
    contiguous, zigzag = found.layouts["contiguous"], found.layouts["zigzag"]
    assert (contiguous.segment, zigzag.segment) == (16384, 8192)
    assert zigzag.attention.imbalance == pytest.approx(1)
    # Of 1 + 3 + 5 + 7 parts the last rank has 7, and expands the latents of all.
    assert contiguous.attention.imbalance == pytest.approx(7 / 4, rel=0.02)
    assert [round(4 * rank.mean) for rank in contiguous.by_rank] == [1, 3, 5, 7]
    for mode, its in contiguous.modes.items():
        work = work_of_ranks(
            config.model,
            sharing_of(config, "contiguous", mode),
            Documents.whole_rows(1, 65536),
        )
        totals = [rank.total for rank in work]
        assert its.total == Spread(min(totals), sum(totals) / 4, max(totals))
        assert its.slowdown == pytest.approx(its.total.imbalance, rel=0.01)
        assert its.slowdown > zigzag.modes[mode].slowdown
    assert zigzag.modes["state"].bytes[0] == 2 * contiguous.modes["state"].bytes[0]
    assert (found.choice.layout, found.documents) == ("zigzag", 1.0)
    assert "1.75 times" in found.choice.reasons[0] or "1.74 times" in found.choice.reasons[0]


def test_short_documents_want_contiguous():
    """Where no document leaves its segment, nothing is exchanged and all layouts are balanced."""
    bounds = tuple(range(0, 65537, 1024))
    found = balance(make(), [Documents(1, 65536, bounds)] * 3)
    assert (found.micro_batches, found.documents) == (3, 64)
    assert found.choice.layout == "contiguous" and found.choice.mode == "state"
    for layout in found.layouts.values():
        assert layout.linked == 0
        assert layout.modes["state"].bytes == (0, 0)
        assert all(mode.slowdown == 1 for mode in layout.modes.values())
    assert "exchanges nothing" in found.choice.reasons[1]


def test_each_micro_batch_waits_for_its_own_busiest_rank():
    """Work that evens out over micro-batches does not over ranks of one of them."""
    first = Documents(1, 65536, (0, 32768, *range(33792, 65537, 1024)))
    second = Documents(1, 65536, (*range(0, 32769, 1024), 65536))
    alone = balance(make(), [first]).layouts["contiguous"]
    both = balance(make(), [first, second]).layouts["contiguous"]
    assert both.attention.imbalance == pytest.approx(alone.attention.imbalance, rel=0.01)
    # Rank 1 has the second half of the long document in one, rank 3 in the other.
    assert both.by_rank[1].mean == pytest.approx(both.by_rank[3].mean)
    assert both.by_rank[1].most > 5 * both.by_rank[1].least


def test_layouts_and_modes_that_cannot_be():
    found = balance(make(65540), [Documents.whole_rows(1, 65540)])
    assert list(found.layouts) == ["contiguous"] and found.choice.layout == "contiguous"
    assert "the only one" in found.choice.reasons[0]
    config = make(65536, "parallel.tensor=16")  # two heads on a rank
    modes = balance(config, [Documents.whole_rows(1, 65536)]).layouts["zigzag"].modes
    assert modes["heads"] is None and modes["two_level"] is None and modes["state"]
    with pytest.raises(ConfigError, match="train.context=65537 cannot be cut"):
        balance(make(65537), [Documents.whole_rows(1, 65537)])
    with pytest.raises(ConfigError, match="parallel.context=1"):
        balance(make(65536, "parallel.context=1"), [Documents.whole_rows(1, 65536)])


def test_the_layouts_cut_as_the_layers_do():
    for kind in ("contiguous", "zigzag"):
        found = balance(make(), [Documents.whole_rows(1, 65536)]).layouts[kind]
        assert found.segment == ContextLayout(kind, 4).segment_length(65536)
