"""Which tokens a rank holds, and what it holds of each document, in plain numbers."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megakda.layers.context_layout import (
    ContextLayout,
    Documents,
    documents_of,
    plan_context,
)


def test_segments_of_each_rank():
    assert [ContextLayout("contiguous", 3).held(r) for r in range(3)] == [(0,), (1,), (2,)]
    assert [ContextLayout("zigzag", 3).held(r) for r in range(3)] == [(0, 5), (1, 4), (2, 3)]
    assert ContextLayout("zigzag", 1).held(0) == (0,)
    for layout in (ContextLayout("contiguous", 3), ContextLayout("zigzag", 3)):
        for rank in range(3):
            for place, segment in enumerate(layout.held(rank)):
                assert layout.owner(segment) == (rank, place)


@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
def test_taking_and_restoring(kind):
    layout, x = ContextLayout(kind, 3), torch.arange(2 * 12).view(2, 12)
    shares = [layout.take(x, rank) for rank in range(3)]
    if kind == "zigzag":
        assert shares[1].tolist() == [[2, 3, 8, 9], [14, 15, 20, 21]]
    by_segment = torch.stack(
        [s.unflatten(1, (layout.per_rank, -1)).transpose(0, 1) for s in shares]
    )
    assert torch.equal(layout.restore(by_segment).transpose(0, 1).flatten(1), x)


@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
def test_neighbours_hold_a_segment_of_the_coarser_layout(kind):
    fine, x = ContextLayout(kind, 4), torch.arange(48).view(1, 48)
    for outer in range(2):
        together = torch.cat([fine.take(x, 2 * outer + i) for i in range(2)], 1)
        assert together.sort().values.tolist() == fine.outer(2).take(x, outer).tolist()


def test_rows_that_cannot_be_cut():
    with pytest.raises(ValueError, match="50 tokens cannot be cut into the 8 equal segments"):
        ContextLayout("zigzag", 4).segment_length(50)


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        ([0, 20], "must rise from 0"),
        ([0, 30, 24, 48], "must rise from 0"),
        ([1, 24, 48], "must rise from 0"),
        ([0, 30, 48], "no bound at token 24"),
    ],
)
def test_documents_that_break_the_rules(bounds, words):
    with pytest.raises(ValueError, match=words):
        documents_of(torch.tensor(bounds), rows=2, tokens=24)


@settings(max_examples=200, deadline=None)
@given(
    kind=st.sampled_from(["contiguous", "zigzag"]),
    ranks=st.integers(1, 5),
    length=st.integers(1, 4),
    rows=st.integers(1, 3),
    data=st.data(),
)
def test_pieces_are_the_documents(kind, ranks, length, rows, data):
    """Every token is in one piece of its rank, and pieces say rightly what is before and after."""
    layout = ContextLayout(kind, ranks)
    tokens = layout.segments * length
    total = rows * tokens
    cuts = data.draw(st.lists(st.integers(0, total), max_size=8))
    bounds = sorted([*cuts, *range(0, total + 1, tokens)])
    documents = Documents(rows, tokens, tuple(bounds))
    stream = torch.arange(total).view(rows, tokens)
    seen: list[int] = []
    for rank in range(ranks):
        plan = plan_context(layout, documents, rank)
        own = layout.take(stream, rank).flatten().tolist()
        assert plan.bounds[-1] == len(own)
        assert all(a < b for a, b in pairwise(plan.bounds))
        for piece in plan.pieces:
            held = own[piece.start : piece.end]
            assert held == list(range(piece.first, piece.last))
            start, end = bounds[piece.document], bounds[piece.document + 1]
            assert start == piece.document_start and start <= piece.first and piece.last <= end
            at_cut = piece.first % length == 0
            assert piece.enters == (start < piece.first)
            assert piece.leaves == (piece.last < end)
            assert not piece.enters or at_cut  # pieces end where documents or segments do
            seen += held
        expected = [token - max(b for b in bounds if b <= token) for token in own]
        assert plan.positions.tolist() == expected
        assert plan.linked == any(cut not in bounds for cut in range(0, total, length))
        assert len({plan.pieces[n].segment for n in plan.entering}) == len(plan.entering)
        assert len({plan.pieces[n].segment for n in plan.leaving}) == len(plan.leaving)
    assert sorted(seen) == list(range(total))
