"""Training on answers alone, at every layout: batches and ranks without any answer among them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megakda.config import compose
from megakda.data.chat import ChatInput
from megakda.data.datasets import build_datasets, prepare_data
from megakda.data.preprocess import preprocess
from tests import jobs
from tests.parallel.test_layouts import check

ANSWERS = ["data.packing=best_fit", "data.loss=answers"]
STEPS = 2
LAYOUTS = {
    "dp2": (2, []),
    "pp2": (2, ["parallel=pp2"]),
    "cp2": (2, ["parallel.context=2"]),
}


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> Path:
    """Long questions with short answers: parts of documents hold nothing to train on."""
    folder = tmp_path_factory.mktemp("chats")
    with (folder / "chats.jsonl").open("w") as stream:
        for n in range(1, 60):
            question = {"role": "user", "content": f"{n} " * (20 + n % 7)}
            answer = {"role": "assistant", "content": f"The square is {n * n}."}
            stream.write(json.dumps({"messages": [question, answer]}) + "\n")
    source = [folder / "chats.jsonl"]
    preprocess(source, folder / "chats", "byte", workers=1, progress=False, chat=ChatInput())
    return folder / "chats"


def counted(corpus: Path) -> list[float]:
    """Tokens that count in each sequence of the first steps, which are micro-batches."""
    config = compose([*jobs.SMALL, f"data.paths=[{corpus}]", "data.prepare=none", *ANSWERS])
    rows = build_datasets(config, prepare_data(config)).train
    return [float(rows[n]["loss_mask"].sum()) for n in range(4 * STEPS)]


def test_every_layout_has_the_mean_over_all_answers(ranks, chats):
    found = counted(chats)
    assert found.count(0) > 1 and sum(found) > 0, found
    # In one step one of two data-parallel ranks has nothing at all to train on, and the other has.
    shares = [[sum(found[4 * s + r : 4 * s + 4 : 2]) for r in (0, 1)] for s in range(STEPS)]
    assert any(min(share) == 0 < max(share) for share in shares), shares
    expected = ranks.run(1, jobs.train, ANSWERS, chats, STEPS, gradients=True)[0]
    assert all(0 < loss < 10 for loss in expected["loss"])
    for world, layout in LAYOUTS.values():
        overrides = [*ANSWERS, *layout]
        check(ranks.run(world, jobs.train, overrides, chats, STEPS, gradients=True)[0], expected)


def without_answers(overrides: list[str], corpus: Any) -> list[Any]:
    """Three steps, the second of which has no answer in all its global batch."""
    with jobs.trainer(overrides, corpus) as run:

        def emptied(batches: Iterator[Any]) -> Iterator[Any]:
            for number, batch in enumerate(batches):
                if number // run.derived.micro_batches == 1:
                    batch["loss_mask"] = batch["loss_mask"] * 0
                yield batch

        batches = [emptied(b) for b in run._batches(run.datasets.train, 0)]
        return [run.step(batches) for _ in range(3)]


def test_a_global_batch_without_answers(ranks, chats):
    first, empty, last = ranks.run(2, without_answers, ANSWERS, chats)[0]
    assert [step.problem for step in (first, empty, last)] == [None] * 3
    assert math.isnan(empty.loss) and empty.grad_norm == 0 and empty.tokens > 100
    assert first.loss > 0 and last.loss > 0 and last.grad_norm > 0


def test_resumed_runs_have_the_same_bits(ranks, chats, tmp_path):
    overrides = [*ANSWERS, "train.eval_batches=1", "data.split=[80,20,0]", "train.steps=4"]
    first = [*overrides, "train.save_every=2"]
    whole = ranks.run(1, jobs.fit, first, chats, str(tmp_path / "whole"))[0]
    saved = tmp_path / "whole" / "checkpoints" / "step_00000002"
    last = [*overrides, f"train.resume={saved}"]
    resumed = ranks.run(1, jobs.fit, last, chats, str(tmp_path / "parts"))[0]
    assert resumed["loss"] == whole["loss"][2:] and not resumed["data_reordered"]
