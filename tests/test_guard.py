"""Bad steps are skipped, counted and limited."""

import math

import pytest

from megakda.config.schema import GuardConfig
from megakda.errors import TrainingDiverged
from megakda.guard import Guard
from tests import jobs


def test_nonfinite_steps_are_bad_and_counted():
    guard = Guard(GuardConfig(max_bad_steps=3))
    assert guard.judge(2.0, 1.0) is None
    assert "loss is nan" in guard.judge(math.nan, 1.0)
    assert "gradient norm is inf" in guard.judge(2.0, math.inf)
    assert (guard.skipped, guard.in_a_row) == (2, 2)
    assert guard.judge(2.0, 1.0) is None
    assert (guard.skipped, guard.in_a_row) == (2, 0)


def test_spikes_are_bad_once_the_window_is_full():
    guard = Guard(GuardConfig(spike_sigmas=4, spike_window=4))
    for loss in (2.0, 2.1, 1.9):
        assert guard.judge(loss, 1.0) is None
    assert guard.judge(9.0, 1.0) is None  # three losses say little
    guard = Guard(GuardConfig(spike_sigmas=4, spike_window=4))
    for loss in (2.0, 2.1, 1.9, 2.0):
        guard.judge(loss, 1.0)
    assert "exceeds" in guard.judge(2.5, 1.0)
    assert guard.judge(2.2, 1.0) is None


def test_other_data_or_context_begin_a_new_window():
    guard = Guard(GuardConfig(spike_sigmas=4, spike_window=3))
    for loss in (2.0, 2.1, 1.9):
        assert guard.judge(loss, 1.0, "web") is None
    for loss in (5.0, 5.1, 4.9):
        assert guard.judge(loss, 1.0, "code") is None  # as such data are, no spike
    resumed = Guard(GuardConfig(spike_sigmas=4, spike_window=3))
    resumed.load_state_dict(guard.state_dict())
    assert "exceeds" in resumed.judge(9.0, 1.0, "code")
    assert resumed.judge(9.0, 1.0, "web") is None
    old = {key: value for key, value in guard.state_dict().items() if key != "stream"}
    resumed.load_state_dict(old)
    assert "exceeds" in resumed.judge(9.0, 1.0, "code")


def test_a_batch_of_which_no_token_counts_is_no_part_of_the_window():
    guard = Guard(GuardConfig(spike_sigmas=4, spike_window=2))
    for loss in (2.0, None, 2.1, None):
        assert guard.judge(loss, 1.0) is None
    assert guard.state_dict()["losses"] == [2.0, 2.1]
    assert "gradient norm" in guard.judge(None, math.nan)


def test_too_many_in_a_row_end_the_run():
    guard = Guard(GuardConfig(max_bad_steps=2))
    guard.check(1, guard.judge(math.nan, 1.0))
    with pytest.raises(TrainingDiverged, match="2 bad steps in a row up to step 2"):
        guard.check(2, guard.judge(math.nan, 1.0))


def test_state_survives_a_resume():
    guard = Guard(GuardConfig(spike_sigmas=4, spike_window=2))
    for loss in (2.0, math.nan, 2.1):
        guard.judge(loss, 1.0)
    other = Guard(GuardConfig(spike_sigmas=4, spike_window=2))
    other.load_state_dict(guard.state_dict())
    assert other.state_dict() == guard.state_dict()
    assert other.judge(5.0, 1.0) is not None


@pytest.mark.parametrize("layout", [[], ["parallel=pp2"], ["parallel=ep2"]])
def test_a_bad_batch_changes_no_weight_on_any_rank(ranks, corpus, layout):
    results = ranks.run(2, jobs.train_with_bad_batches, layout, corpus, {1}, 3)
    for result in results:
        assert [problem is None for problem in result["problems"]] == [True, False, True]
        assert result["moved"] == [True, False, True]
        assert result["skipped"] == 1


def test_divergence_raises_on_every_rank(ranks, corpus):
    overrides = ["train.guard.max_bad_steps=2"]
    errors = ranks.run(
        2, jobs.error_of, jobs.train_with_bad_batches, overrides, corpus, {1, 2, 3}, 5
    )
    assert [kind for kind, _ in errors] == ["TrainingDiverged"] * 2
