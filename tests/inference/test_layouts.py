"""Generation at every layout against one rank."""

from __future__ import annotations

import pytest

from tests.inference.jobs import answers

LAYOUTS = {
    "tp2": (2, ["parallel.tensor=2"]),
    "tp2-ep2": (2, ["parallel.tensor=2", "parallel.expert=2"]),
    "pp2": (2, ["parallel.pipeline=2"]),
    "ep2": (2, ["parallel.expert=2"]),
    "tp2-pp2": (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
}
DENSE = ["model.ffn=dense"]


@pytest.fixture(scope="module")
def one_rank(ranks):
    return ranks.run(1, answers, [])[0]


def compare(found: list, expected: list) -> None:
    for rank in found:
        for mine, theirs, answer in zip(rank, found[0], expected, strict=True):
            assert (mine.tokens, mine.text) == (theirs.tokens, theirs.text)
            assert mine.tokens == answer.tokens
            for a, b in zip(mine.logprobs, answer.logprobs, strict=True):
                assert a.logprob == pytest.approx(b.logprob, abs=1e-5)
            for a, b in zip(mine.prompt_logprobs or [], answer.prompt_logprobs or [], strict=True):
                assert (a is None) == (b is None)
                assert a is None or a.logprob == pytest.approx(b.logprob, abs=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_answers_are_those_of_one_rank(ranks, one_rank, layout):
    world, overrides = LAYOUTS[layout]
    compare(ranks.run(world, answers, overrides), one_rank)


def test_tensor_parallel_without_sequence_parallel(ranks):
    expected = ranks.run(1, answers, DENSE)[0]
    overrides = [*DENSE, "parallel.tensor=2", "parallel.sequence=false"]
    compare(ranks.run(2, answers, overrides), expected)
