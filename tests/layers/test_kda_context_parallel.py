"""KDA over a sequence on several ranks against one rank: outputs, states and every gradient."""

from __future__ import annotations

import pytest

from megakda.layers.context_layout import Documents
from megakda.layers.context_parallel import ALONE
from tests.layers import context_jobs as jobs
from tests.ranks import RankError

TOLERANCE = 1e-5
HEADS = {2: 4, 3: 3, 4: 4}


def alone(bounds, heads, states=True, tokens=jobs.TOKENS, **inputs):
    documents = Documents(bounds[-1] // tokens, tokens, tuple(bounds))
    tensors = jobs.kda_inputs(
        documents.rows, len(bounds) - 1 if states else 0, heads, tokens=tokens, **inputs
    )
    return jobs.run_alone(jobs.kda_operator(documents, ALONE, states), *tensors)


def check(found, expected, limits=None):
    assert found.keys() == expected.keys()
    for name, theirs in expected.items():
        error = (found[name] - theirs).norm() / theirs.norm().clamp_min(1e-12)
        assert error < (limits or {}).get(name, TOLERANCE), f"{name}: {error:.1e}"


MODES = {2: ["state", "heads"], 3: ["state", "heads"], 4: ["state", "heads", "two_level"]}
CASES = [(ranks, mode) for ranks, modes in MODES.items() for mode in modes]


@pytest.mark.parametrize("documents", jobs.DOCUMENTS)
@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
@pytest.mark.parametrize(("world", "mode"), CASES)
def test_against_one_rank(ranks, world, mode, kind, documents):
    bounds, heads = jobs.DOCUMENTS[documents], HEADS[world]
    found = ranks.run(world, jobs.kda_shared, mode, kind, bounds, heads, heads_ranks=2)[0]
    check(found, alone(bounds, heads))


@pytest.mark.parametrize("mode", ["state", "heads"])
def test_the_kernels(ranks, mode):
    """The same with the Triton kernels, interpreted."""
    bounds, heads = jobs.DOCUMENTS["uneven"], 2
    job = (jobs.kda_shared, mode, "zigzag", bounds, heads)
    found = ranks.run(2, *job, states=False, backend="triton")[0]
    # A_log's gradient sums over all tokens what nearly cancels.
    check(found, alone(bounds, heads, states=False), {"dA_log": 5e-5})


@pytest.mark.parametrize("taps", [0, 2, 8])
def test_other_convolutions(ranks, taps):
    """A halo of 7 tokens reaches over several segments of 6 and of 3 tokens."""
    for tokens in (48, 24):
        bounds = [0, 2, 3, 20, tokens]
        job = (jobs.kda_shared, "state", "zigzag", bounds, 2)
        found = ranks.run(4, *job, states=False, tokens=tokens, taps=taps)[0]
        check(found, alone(bounds, 2, states=False, tokens=tokens, taps=taps))


def test_one_decay_per_head(ranks):
    bounds = jobs.DOCUMENTS["two_rows"]
    found = ranks.run(3, jobs.kda_shared, "state", "zigzag", bounds, 3, gdn=True)[0]
    check(found, alone(bounds, 3, gdn=True))


def test_heads_that_cannot_be_shared(ranks):
    def error() -> str:
        with pytest.raises(RankError) as caught:
            ranks.run(2, jobs.kda_shared, "heads", "zigzag", jobs.DOCUMENTS["uneven"], 3)
        return str(caught.value)

    assert "3 heads cannot be shared by the 2 ranks" in error()
    assert "parallel.context_mode=state" in error()
