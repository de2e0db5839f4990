"""KDA over a sequence on several ranks against one rank: outputs, states and every gradient."""

from __future__ import annotations

import pytest

from megakda.layers.context_layout import Documents
from megakda.layers.context_parallel import ALONE
from tests.layers import context_jobs as jobs

TOLERANCE = 1e-5
HEADS = {2: 4, 3: 3, 4: 4}


def alone(bounds, heads, states=True, tokens=jobs.TOKENS, **inputs):
    documents = Documents(bounds[-1] // tokens, tokens, tuple(bounds))
    tensors = jobs.kda_inputs(
        documents.rows, len(bounds) - 1 if states else 0, heads, tokens=tokens, **inputs
    )
    return jobs.run_alone(jobs.kda_operator(documents, ALONE, states), *tensors)


def check(found, expected):
    assert found.keys() == expected.keys()
    for name, theirs in expected.items():
        error = (found[name] - theirs).norm() / theirs.norm().clamp_min(1e-12)
        assert error < TOLERANCE, f"{name}: {error:.1e}"


MODES = {2: ["state", "heads"], 3: ["state", "heads"], 4: ["state", "heads", "two_level"]}
CASES = [(ranks, mode) for ranks, modes in MODES.items() for mode in modes]


@pytest.mark.parametrize("documents", jobs.DOCUMENTS)
@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
@pytest.mark.parametrize(("world", "mode"), CASES)
def test_against_one_rank(ranks, world, mode, kind, documents):
    bounds, heads = jobs.DOCUMENTS[documents], HEADS[world]
    found = ranks.run(world, jobs.kda_shared, mode, kind, bounds, heads, heads_ranks=2)[0]
    check(found, alone(bounds, heads))
