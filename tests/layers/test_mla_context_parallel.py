"""Latent attention over a sequence on several ranks against dense attention on one."""

from __future__ import annotations

import pytest
import torch

from megakda.layers.context_layout import Documents
from megakda.layers.context_parallel import ALONE
from tests.layers import context_jobs as jobs

TOLERANCE = 1e-5


def dense(documents, dtype=torch.float64, max_logit=None):
    """The formula, with a mask, in one matrix of scores; `max_logit` [H] gets the largest."""
    r, n, p, v = jobs.MLA_SIZES.values()
    numbers = torch.zeros(documents.rows * documents.tokens, dtype=torch.long)
    for bound in documents.bounds[1:-1]:
        numbers[bound:] += 1
    visible = (numbers[:, None] == numbers[None, :]).tril()

    def run(own, same):
        q, latent = (own[name].flatten(0, 1).to(dtype) for name in ("q", "latent"))
        expanded = (latent[:, :r] @ same["weight"].to(dtype).T).unflatten(-1, (-1, n + v))
        shared = latent[:, None, r:].expand(-1, q.shape[1], -1)
        k = torch.cat([expanded[..., :n], shared], -1)
        scores = torch.einsum("ihd,jhd->hij", q, k) * 0.3
        scores = scores.masked_fill(~visible, -torch.inf)
        if max_logit is not None:
            max_logit.copy_(scores.detach().amax((1, 2)))
        o = torch.einsum("hij,jhd->ihd", scores.softmax(-1), expanded[..., n:])
        return o.unflatten(0, own["q"].shape[:2]).to(own["q"].dtype), None

    return run


def check(found, expected):
    assert found.keys() == expected.keys()
    for name, theirs in expected.items():
        error = (found[name] - theirs).norm() / theirs.norm().clamp_min(1e-12)
        assert error < TOLERANCE, f"{name}: {error:.1e}"


def whole(bounds):
    return Documents(bounds[-1] // jobs.TOKENS, jobs.TOKENS, tuple(bounds))


@pytest.mark.parametrize("documents", jobs.DOCUMENTS)
def test_alone(documents):
    documents = whole(jobs.DOCUMENTS[documents])
    tensors = jobs.mla_inputs(documents.rows, 3)
    expected = jobs.run_alone(dense(documents), *tensors)
    for max_logit in (None, torch.full((3,), -torch.inf)):
        check(jobs.run_alone(jobs.mla_operator(documents, ALONE, max_logit), *tensors), expected)


@pytest.mark.parametrize("documents", jobs.DOCUMENTS)
@pytest.mark.parametrize("attention", ["all_gather", "ring"])
@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_against_one_rank(ranks, world, kind, attention, documents):
    bounds = jobs.DOCUMENTS[documents]
    found = ranks.run(world, jobs.mla_shared, attention, kind, bounds, 3)[0]
    max_logit = torch.zeros(3, dtype=torch.float64)
    formula = dense(whole(bounds), max_logit=max_logit)
    expected = jobs.run_alone(formula, *jobs.mla_inputs(whole(bounds).rows, 3))
    check(found, expected | {"max_logit": max_logit})
