"""Stages that change context, batch and data in the middle of a run, at every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megakda.config import compose, validate
from megakda.data.datasets import prepare_data
from megakda.data.preprocess import preprocess
from megakda.errors import ConfigError, DataError
from tests import jobs

# Two steps as the whole run says; two of packed documents at twice the length, with experts that
# stay as they are; one with other micro-batches; three with a batch that grows, in the first data.
STAGES = (
    "schedule.stages=["
    "{kind: warmup, steps: 2},"
    "{kind: constant, steps: 2, context: 96, batch: 2, data: {packing: documents},"
    " expert_bias_rate: 0.0},"
    "{kind: constant, steps: 1, micro_batch: 2},"
    "{kind: cosine, steps: 3, to: 1e-4, batch: {from: 4, to: 8, by: 4}}]"
)
RUN = [
    STAGES,
    "train.micro_batch=1",
    "train.steps=null",
    "train.eval_batches=1",
    "model.mla.rope=true",
    "model.moe.bias_update_rate=0.01",
    "schedule.warmup_steps=0",
]
STEPS = 8
LAYOUTS = {
    "dp2": ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"],
    "tp2": ["parallel=tp2"],
    "pp2": ["parallel=pp2"],
    "cp2": ["parallel.context=2"],
}


def walk(overrides: list[str], corpus: str) -> list[tuple[float, ...]]:
    """Loss, gradient norm, rate and validation loss of every step."""
    with jobs.trainer([*RUN, *overrides], corpus) as run:
        found = []
        for _ in range(run.timetable.steps):
            result = run.step(run.batches())
            found.append((result.loss, result.grad_norm, result.lr, run.validate()))
        assert run.positions.consumed == [2 * 4 + 1 * 4 + sum(BATCHES[5:]), 2 * 2]
        return found


BATCHES = [4, 4, 2, 2, 4, 4, 4, 8]


@pytest.fixture(scope="module")
def one_rank(ranks, corpus):
    return ranks.run(1, walk, [], str(corpus))[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_trains_as_one_rank(ranks, corpus, one_rank, layout):
    found = ranks.run(2, walk, LAYOUTS[layout], str(corpus))
    assert found[0] == found[1]
    for step, (mine, expected) in enumerate(zip(found[0], one_rank, strict=True)):
        assert mine == pytest.approx(expected, rel=1e-5), f"step {step + 1}"


def again(overrides: list[str], corpus: str, run_folder: str, after: list[int]) -> dict[int, Any]:
    """Losses of the rest of the run, continued from its checkpoint after so many steps."""
    found: dict[int, Any] = {}
    for step in after:
        resume = f"train.resume={run_folder}/checkpoints/step_{step:08d}"
        with jobs.trainer([*RUN, *overrides, resume], corpus) as run:
            run.resume()
            assert not run.positions.reordered
            found[step] = [run.step(run.batches()).loss for _ in range(step, run.timetable.steps)]
    return found


@pytest.mark.parametrize(
    ("world", "overrides", "after"),
    [(1, [], [2, 3, 4, 7]), (2, LAYOUTS["dp2"], [2]), (2, ["parallel=pp2_vpp2"], [6])],
    ids=["one", "dp2", "pp2_vpp2"],
)
def test_a_run_resumes_in_and_between_stages(ranks, corpus, tmp_path, world, overrides, after):
    """Bit for bit; each checkpoint is what a kill there would leave."""
    out = str(tmp_path / "run")
    every = 1 if world == 1 else 2
    often = [*RUN, *overrides, f"train.save_every={every}", "checkpoint.keep_last=10"]
    whole = ranks.run(world, jobs.fit, often, str(corpus), out)[0]["loss"]
    assert len(whole) == STEPS
    parts = ranks.run(world, again, overrides, str(corpus), out, after)[0]
    assert parts == {step: whole[step:] for step in after}
    if world == 1:
        check_rows(Path(out))


@pytest.mark.parametrize("kept", [True, False])
def test_the_ends_of_stages_are_saved_and_stay(ranks, corpus, tmp_path, kept):
    """Where a run saves on its way at all."""
    save = ["train.save_every=3" if kept else "train.save_every=0", "checkpoint.keep_last=1"]
    ranks.run(1, jobs.fit, [*RUN, *save, "train.eval_batches=0"], str(corpus), str(tmp_path))
    found = [path.name for path in sorted((tmp_path / "checkpoints").glob("step_*"))]
    steps = [2, 4, 5, STEPS] if kept else [STEPS]
    assert found == [f"step_{step:08d}" for step in steps]


def changed_data(corpus: str, spike_sigmas: float) -> list[str | None]:
    """Problems of each step; from the third on, data of which no loss is like those before."""
    stages = (
        "schedule.stages=[{kind: warmup, steps: 3},"
        "{kind: constant, steps: 2, data: {packing: documents}}]"
    )
    guard = [f"train.guard.spike_sigmas={spike_sigmas}", "train.guard.spike_window=2"]
    with jobs.trainer([stages, "train.steps=null", *guard], corpus) as run:
        judge = run.guard.judge
        run.guard.judge = lambda loss, norm, stream: judge(
            9.0 if "documents" in stream else 2.0, norm, stream
        )
        return [run.step(run.batches()).problem for _ in range(run.timetable.steps)]


def test_the_guard_compares_no_stage_to_other_data(ranks, corpus):
    assert ranks.run(1, changed_data, str(corpus), 3.0)[0] == [None] * 5


def check_rows(out: Path) -> None:
    """What the metrics of a run in stages say."""
    from megakda.metrics.writers import read_metrics

    rows = read_metrics(out / "metrics.jsonl")
    assert [row["stage"] for row in rows] == [1, 1, 2, 2, 3, 4, 4, 4]
    assert [row["context"] for row in rows] == [48, 48, 96, 96, 48, 48, 48, 48]
    assert [row["batch"] for row in rows] == BATCHES
    assert [row["lr"] for row in rows[:5]] == [5e-4, 1e-3, 1e-3, 1e-3, 1e-3]
    assert "valid_loss" in rows[-1]


def test_data_of_a_later_stage_are_checked_first(corpus, tmp_path):
    """Before any step; and no more once the run is past that stage."""
    stages = (
        f"schedule.stages=[{{kind: warmup, steps: 2, data: {{paths: [{tmp_path}/gone]}}}},"
        "{kind: constant, steps: 2}]"
    )
    config = compose([*jobs.SMALL, stages, "train.steps=null", "data=indexed"])
    config.data.paths = [str(corpus)]
    streams = validate(config, 1).timetable.streams_from
    with pytest.raises(DataError, match="gone"):
        prepare_data(config)
    with pytest.raises(DataError, match="gone"):
        prepare_data(config, streams=streams(1).values())
    assert list(prepare_data(config, streams=streams(2).values()).parts) == [str(corpus)]
    config.schedule.stages[0]["data"] = {"paths": [str(corpus)], "weights": [1.0, 2.0]}
    with pytest.raises(ConfigError, match=r"schedule\.stages\[0\]\.data\.weights=\[1\.0, 2\.0\]"):
        prepare_data(config)
    config.schedule.stages[0]["data"] = {"split": [1, 1e-9, 0]}
    config.train.eval_batches = 1
    with pytest.raises(DataError, match=r"schedule\.stages\[0\]\.data\.split=.* validation docum"):
        prepare_data(config)


def test_rope_tables_follow_the_length(ranks, corpus):
    """A step at 96 tokens after one at 48 is what it is in a run at 96 alone."""
    long = ["train.steps=1", "train.context=96", "train.global_batch=2", "optim.lr=1e-30"]
    expected = ranks.run(1, losses, long, str(corpus))[0]
    stages = (
        "schedule.stages=[{kind: constant, steps: 1},"
        "{kind: constant, steps: 1, context: 96, batch: 2}]"
    )
    found = ranks.run(1, losses, [stages, "train.steps=null", "optim.lr=1e-30"], str(corpus))[0]
    assert torch.allclose(torch.tensor(found[1:]), torch.tensor(expected), rtol=1e-6)


def test_a_blend_of_a_stage(ranks, corpus, tmp_path):
    """Its sequences come from both corpora, in the shares that its weights say."""
    other = tmp_path / "other"
    (tmp_path / "other.txt").write_text("0123456789012345\n" * 5_000)
    text = [tmp_path / "other.txt"]
    preprocess(text, other, "byte", document="line", workers=1, progress=False)
    stages = (
        "schedule.stages=[{kind: constant, steps: 1},"
        f"{{kind: constant, steps: 8, data: {{paths: [{corpus}, {other}], weights: [1, 3]}}}}]"
    )
    first, *blended = ranks.run(1, digits, [stages, "train.steps=null"], str(corpus))[0]
    assert first == 0
    assert sum(blended) == pytest.approx(0.75 * 8 * 4, abs=6)


def digits(overrides: list[str], corpus: str) -> list[int]:
    """Of every step, how many of its sequences are nothing but digits."""
    found = []
    with jobs.trainer(overrides, corpus) as run:
        allowed = torch.tensor([*b"0123456789", run.tokenizer.eod])
        for _ in range(run.timetable.steps):
            (source,) = run.batches()
            batches = [next(source), next(source)]
            rows = [row for batch in batches for row in batch["tokens"]]
            found.append(sum(bool(torch.isin(row, allowed).all()) for row in rows))
            assert run.step([iter(batches)]).problem is None
    return found


def losses(overrides: list[str], corpus: str) -> list[float]:
    """Of every step; the weights stay what they were."""
    common = ["model.mla.rope=true", "optim.weight_decay=0", "model.moe.bias_update_rate=0"]
    with jobs.trainer([*common, "schedule.warmup_steps=0", *overrides], corpus) as run:
        return [run.step(run.batches()).loss for _ in range(run.timetable.steps)]
