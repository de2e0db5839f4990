"""How far each stream has been read, over resumes that change the stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from megakda.config import compose, derive
from megakda.data.datasets import Datasets, StreamData, StreamPositions

WHOLE = "{kind: constant, steps: 4}"
LONG = "{kind: constant, steps: 4, context: 96}"
OTHER = "{kind: constant, steps: 4, data: {paths: [%s]}}"


class Sequences:
    """Stands for a data set of the seed's own numbers."""

    def __init__(self, seed: int):
        self.seed = seed

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"tokens": torch.tensor([self.seed, index])}


def positions(*stages: str, seeds: list[int], own: Sequence[str] = ()) -> StreamPositions:
    """Of a run with these stages; `seeds` tell the data of its streams."""
    overrides = [f"schedule.stages=[{','.join(stages)}]", "train.steps=null", "train.context=48"]
    timetable = derive(compose([*overrides, *own]), 1).timetable
    assert len(timetable.streams) == len(seeds)
    data = {n: StreamData(Sequences(seed), None) for n, seed in enumerate(seeds)}
    return StreamPositions(timetable, Datasets(data))


def saved(of: StreamPositions, consumed: list[int], steps_done: int) -> dict[str, Any]:
    of.consumed = consumed
    return {"steps_done": steps_done, **of.state_dict()}


def test_streams_go_on_where_they_were_whatever_their_number():
    state = saved(positions(WHOLE, LONG, seeds=[1, 2]), [32, 8], steps_done=5)
    after = positions(WHOLE, OTHER % "new", LONG, seeds=[1, 3, 2])
    after.load_state_dict(state)
    assert after.consumed == [32, 0, 8]
    assert not after.reordered and after.begun == [2]
    gone = positions(LONG, seeds=[2])
    gone.load_state_dict(state)
    assert gone.consumed == [8] and not gone.reordered and gone.begun == []


def test_a_stage_that_is_over_is_not_told_of():
    state = saved(positions(WHOLE, seeds=[1]), [32], steps_done=4)
    after = positions(LONG, WHOLE, seeds=[2, 1])
    after.load_state_dict(state)
    assert after.consumed == [0, 32] and after.begun == []


@pytest.mark.parametrize("seed", [2, 3])
def test_a_corpus_at_another_path_goes_on_and_its_order_is_compared(seed):
    state = saved(positions(WHOLE, OTHER % "old/corpus", seeds=[1, 2]), [16, 8], steps_done=5)
    after = positions(WHOLE, OTHER % "new/corpus", seeds=[1, seed])
    after.load_state_dict(state)
    assert after.consumed == [16, 8] and after.begun == []
    assert after.reordered == (seed != 2)


def test_how_data_are_read_makes_no_other_stream():
    state = saved(positions(WHOLE, OTHER % "a", seeds=[1, 2]), [16, 8], steps_done=5)
    after = positions(LONG, WHOLE, OTHER % "a", seeds=[3, 1, 2], own=["data.num_workers=2"])
    after.load_state_dict(state)
    assert after.consumed == [0, 16, 8]


def test_checkpoints_from_before_there_were_stages_count_one_stream():
    before = saved(positions(WHOLE, seeds=[1]), [16], steps_done=4)
    old = {"steps_done": 4, "sequences_consumed": 16, "data_order": before["data_order"][0]}
    after = positions(WHOLE, LONG, seeds=[1, 2])
    after.load_state_dict(old)
    assert after.consumed == [16, 0] and not after.reordered and after.begun == [2]
    after = positions(WHOLE, seeds=[5])
    after.load_state_dict(old)
    assert after.reordered
