"""bf16 training follows fp32, and keeps in fp32 what has to be."""

import pytest

from tests import jobs

STEPS = 20
FAST = ["optim.lr=2e-3", "schedule.warmup_steps=2"]


def test_bf16_follows_fp32(ranks, corpus):
    fp32, bf16 = (
        ranks.run(
            1,
            jobs.train,
            [f"precision={p}", "optim.lr=2e-3", "schedule.warmup_steps=2"],
            corpus,
            STEPS,
        )[0]["loss"]
        for p in ("fp32", "bf16")
    )
    assert fp32[-1] < fp32[0] - 1.0  # it learns, so that following means something
    assert bf16 == pytest.approx(fp32, rel=0.01)


def test_bf16_agrees_between_layouts(ranks, corpus):
    overrides = ["precision=bf16"]
    one = ranks.run(1, jobs.train, overrides, corpus, 5)[0]["loss"]
    two = ranks.run(2, jobs.train, [*overrides, "parallel=tp2"], corpus, 5)[0]["loss"]
    assert two == pytest.approx(one, rel=5e-3)
