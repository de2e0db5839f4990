"""Filters and draws against plain loops and against `transformers`' own."""

from __future__ import annotations

import pytest
import torch

from megakda.inference.request import SamplingParams
from megakda.inference.sampling import choose_tokens, token_logprobs

VOCABULARY = 50
DRAWS = 4000


def logits_of(rows: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(rows, VOCABULARY, generator=generator)


def processed(logits: torch.Tensor, params: SamplingParams, ids: list[int]) -> torch.Tensor:
    """Probabilities by transformers' processors, in the order in which it applies them."""
    from transformers import (
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    chain = [RepetitionPenaltyLogitsProcessor(params.repetition_penalty)]
    chain.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        chain.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        chain.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        chain.append(MinPLogitsWarper(params.min_p))
    row = logits[None]
    for step in chain:
        row = step(torch.tensor([ids]), row)
    return row[0].softmax(-1)


CASES = {
    "temperature": SamplingParams(temperature=0.7),
    "top_k": SamplingParams(top_k=5, temperature=1.3),
    "top_p": SamplingParams(top_p=0.6),
    "min_p": SamplingParams(min_p=0.2),
    "penalty": SamplingParams(repetition_penalty=1.8),
    "all": SamplingParams(temperature=1.4, top_k=12, top_p=0.9, min_p=0.02, repetition_penalty=1.3),
}


@pytest.mark.parametrize("case", CASES)
def test_draws_follow_the_distribution_of_transformers(case):
    """Evenly spaced uniforms: each token is drawn in proportion, to one part in DRAWS."""
    params, logits, ids = CASES[case], logits_of(1), [3, 9, 9, 17]
    expected = processed(logits[0], params, ids)
    uniforms = [(n + 0.5) / DRAWS for n in range(DRAWS)]
    seen = torch.tensor(sorted(set(ids))) if params.repetition_penalty != 1 else None
    tokens = choose_tokens(
        logits.expand(DRAWS, -1), [params] * DRAWS, uniforms, [seen] * DRAWS, VOCABULARY
    )
    found = torch.bincount(torch.tensor(tokens), minlength=VOCABULARY) / DRAWS
    assert torch.equal(found > 0, expected > 0.5 / DRAWS) or case in ("temperature", "penalty")
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=1.5 / DRAWS)


def test_rows_do_not_know_each_other():
    params = [*CASES.values(), SamplingParams(temperature=0.0)]
    logits = logits_of(len(params))
    uniforms = [0.37] * len(params)
    seen = [torch.tensor([1, 2]) if p.repetition_penalty != 1 else None for p in params]
    before = logits.clone()
    together = choose_tokens(logits, params, uniforms, seen, VOCABULARY)
    alone = [
        choose_tokens(logits[n : n + 1], [params[n]], [0.37], [seen[n]], VOCABULARY)[0]
        for n in range(len(params))
    ]
    assert together == alone
    assert torch.equal(logits, before)  # log-probabilities are read from them afterwards


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_the_ends_of_the_unit_interval(uniform):
    logits = torch.full((1, VOCABULARY), -1000.0)
    logits[0, 7], logits[0, 8] = 0.0, -0.1
    params = SamplingParams(temperature=1.0, top_k=2)
    assert choose_tokens(logits, [params], [uniform], [None], VOCABULARY)[0] in (7, 8)


def test_the_smallest_temperature_is_greedy():
    logits = logits_of(3)
    params = [SamplingParams(temperature=t) for t in (1e-308, 1e-30, 1e-6)]
    found = choose_tokens(logits, params, [0.3, 0.6, 0.99], [None] * 3, VOCABULARY)
    assert found == logits.argmax(-1).tolist()


def test_padding_of_the_vocabulary_is_never_chosen():
    logits = logits_of(3)
    logits[:, 40:] += 100
    params = [SamplingParams(temperature=t) for t in (0.0, 1.0, 5.0)]
    assert max(choose_tokens(logits, params, [0.1, 0.9, 0.999], [None] * 3, 40)) < 40


def test_log_probabilities_ranks_and_alternatives():
    logits = logits_of(4)
    tokens = [int(logits[0].argmax()), 3, 11, 49]
    truth = logits.double().log_softmax(-1)
    for row, token, found, top in zip(
        truth, tokens, token_logprobs(logits, tokens, [3, 0, 2, 20]), (3, 0, 2, 20), strict=True
    ):
        assert found.token == token
        assert found.logprob == pytest.approx(float(row[token]), abs=1e-5)
        assert found.rank == int((row > row[token]).sum()) + 1
        best = row.argsort(descending=True)[:top].tolist()
        assert [token for token, _ in found.top] == best
        assert [x for _, x in found.top] == pytest.approx(row[best].tolist(), abs=1e-5)
    assert token_logprobs(logits[:0], [], []) == []
