"""tools/evaluate.py from a run to its files, on one rank and at a layout."""

from __future__ import annotations

import errno
import json
import math
import re
from pathlib import Path

import pytest

from tests import jobs as training
from tests.evaluation import jobs

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
MODEL = ("model.vocab_size=264", "train.steps=1", "train.save_every=1")


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    """A run of one step."""
    out = tmp_path_factory.mktemp("evaluated") / "run"
    training.fit(MODEL, corpus, str(out))
    return out


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    rows = [{"q": f"{n} and", "c": ["one", "two"], "g": n % 2} for n in range(4)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(folder / "rows.jsonl")},
            "cache_dir": str(folder / "cache"),
        },
        "test_split": "test",
        "fewshot_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "c",
        "doc_to_target": "g",
        "metric_list": [{"metric": "acc"}],
    }
    (folder / "local.yaml").write_text(json.dumps(config))
    (folder / "chat.jinja").write_text(CHAT)
    return folder / "local.yaml"


def commands(run, corpus, task, out, *layout):
    return [
        ["perplexity", str(run), "--data", str(corpus), "--context", "40", "--stride", "30"]
        + ["--tokens", "300", "--out", str(out / "perplexity.json"), *layout],
        ["long-context", str(run), "--lengths", "500,620", "--samples", "1", "--depths", "0,1"]
        + ["--tasks", "needle_single_1,associative_recall", "--scoring", "loglikelihood"]
        + ["--out", str(out / "long"), *layout],
        ["lm-eval", str(run), "--tasks", str(task), "--max-length", "60", "--limit", "3"]
        + ["--apply-chat-template", "--chat-template", str(task.with_name("chat.jinja"))]
        + ["--system-instruction", "Be brief.", "--num-fewshot", "1", "--no-fewshot-as-multiturn"]
        + ["--out", str(out / "lm_eval.json"), *layout],
    ]


@pytest.fixture(scope="module")
def alone(run, corpus, task, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    (out / "long").mkdir()
    (out / "long" / "needle_single_2.png").touch()  # of an earlier sweep
    return out, [jobs.evaluate(command) for command in commands(run, corpus, task, out)]


def numbers(out):
    """All results that depend on the model, in one list."""
    (perplexity,) = json.loads((out / "perplexity.json").read_text())["results"].values()
    long = json.loads((out / "long" / "results.json").read_text())["cells"]
    rows = (out / "lm_eval.samples.jsonl").read_text().splitlines()
    choices = [pair[0] for row in rows for (pair,) in json.loads(row)["resps"]]
    return [perplexity["nats"], *(cell["logprob"] for cell in long), *choices]


def test_files_and_output(alone, run):
    out, (perplexity, long, lm_eval) = alone
    assert [perplexity[0], long[0], lm_eval[0]] == [0, 0, 0]
    assert "300 tokens" in perplexity[1] and "bits per byte" in perplexity[1]
    assert long[1].startswith("| task | 500 | 620 |\n") and "overview.png" in long[1]
    assert {path.name for path in (out / "long").glob("*.png")} == {
        "overview.png",
        "needle_single_1.png",
    }
    assert "|local|" in lm_eval[1]
    results = json.loads((out / "perplexity.json").read_text())
    assert results["model"] == str(run / "checkpoints" / "step_00000001")
    assert results["settings"]["overlap"] == 10 and results["tokenizer"]["spec"] == "byte"
    results = json.loads((out / "lm_eval.json").read_text())
    assert results["chat_template"] == CHAT and results["fewshot_as_multiturn"] is False
    row = json.loads((out / "lm_eval.samples.jsonl").read_text().splitlines()[0])
    assert re.fullmatch(
        r"<system>Be brief\.<user>\d and (one|two)\s+0 and<assistant>", row["arguments"][0][0]
    )
    found = numbers(out)
    assert len(found) == 1 + 2 * (2 + 1) + 3 * 2
    # A model of one step knows next to nothing.
    assert found[0] == pytest.approx(math.log(264), rel=0.1)


def test_a_layout_gives_the_same_and_one_rank_writes(alone, run, corpus, task, tmp_path, ranks):
    layout = ("--tensor", "2", "--expert", "2")
    for command in commands(run, corpus, task, tmp_path, *layout):
        (status, text), other = ranks.run(2, jobs.evaluate, command)
        assert status == 0 and text
        assert other == (0, "")
    assert numbers(tmp_path) == pytest.approx(numbers(alone[0]), rel=1e-5)


def test_errors_end_with_their_status(run, corpus, task, tmp_path, capsys):
    tool = jobs.tool()
    long = ["long-context", str(run), "--out", str(tmp_path / "out")]
    perplexity = ["perplexity", str(run), "--data", str(corpus)]
    lm_eval = ["lm-eval", str(run), "--tasks", str(task)]
    chat = [*lm_eval, "--apply-chat-template"]
    for command, status, message in (
        ([*long, "--lengths", "1k"], 2, "lengths='1k' must be numbers with commas"),
        ([*long, "--tasks", "needles"], 2, "tasks='needles' must be all or of"),
        ([*long, "--sequences", "0"], 2, "--sequences 0 must be at least 1"),
        ([*perplexity, "--part", "2-3"], 2, "part='2-3' must be FROM:TO"),
        ([*perplexity, "--stride", "0"], 2, "overlap=2048 must be in 0..2047"),
        (["perplexity", str(run), "--data", str(tmp_path / "none")], 3, "none.idx"),
        (["perplexity", str(tmp_path), "--data", str(corpus)], 4, "not a complete checkpoint"),
        ([*lm_eval, "--max-length", "0"], 2, "max-length=0"),
        ([*lm_eval, "--fewshot-as-multiturn"], 2, "give --apply-chat-template too"),
        ([*lm_eval, "--chat-template", "a"], 2, "--chat-template a is for conversations: give"),
        ([*chat, "--chat-template", "none.jinja"], 2, "--chat-template none.jinja cannot be read"),
        (chat, 2, "step_00000001 has no chat template; leave the option out, or name a template"),
    ):
        assert tool.main(command) == status, command
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["perplexity", "lm-eval", "long-context"])
def test_where_results_go_is_checked_before_a_model_is_loaded(
    kind, corpus, task, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("megakda.inference.choice.ModelChoice.open", lambda self: 1 / 0)
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path / "locked")
    (tmp_path / "locked").mkdir()
    (tmp_path / "folder" / "overview.png").mkdir(parents=True)
    (tmp_path / "file").touch()
    (tmp_path / "a.samples.jsonl").mkdir()
    command = {
        "perplexity": ["perplexity", "none", "--data", str(corpus)],
        "lm-eval": ["lm-eval", "none", "--tasks", str(task)],
        "long-context": ["long-context", "none"],
    }[kind]
    wrong = {"file/a": "file is no folder", "locked/a/b": "locked cannot be written to"}
    if kind == "long-context":
        wrong |= {"file": "exists and is no folder", "folder": "overview.png exists and is no"}
    else:
        wrong |= {"folder": "exists and is no regular file"}
    if kind == "lm-eval":
        wrong |= {"a.json": "a.samples.jsonl exists and is no regular file"}
    for out, message in wrong.items():
        assert jobs.tool().main([*command, "--out", str(tmp_path / out)]) == 2
        said = capsys.readouterr().err
        assert f"error: --out {tmp_path / out}".removesuffix(".json") in said and message in said
    with pytest.raises(ZeroDivisionError):  # what is right gets as far as the model
        jobs.tool().main([*command, "--out", str(tmp_path / "new" / "kimi-1.3b")])


def test_the_disk_fails_at_the_end(run, corpus, tmp_path, capsys, monkeypatch):
    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("megakda.checkpoint.folders.write_text", full)
    command = ["perplexity", str(run), "--data", str(corpus), "--context", "40", "--tokens", "9"]
    assert jobs.tool().main([*command, "--out", str(tmp_path / "a.json")]) == 2
    out, err = capsys.readouterr()
    assert "9 tokens" in out  # the result is not lost
    assert f"--out: {tmp_path / 'a.json'} cannot be written (No space left on device)" in err


def test_an_interrupt_is_no_traceback(run, corpus, capsys, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("megakda.evaluation.command.corpus_perplexity", interrupted)
    assert jobs.tool().main(["perplexity", str(run), "--data", str(corpus)]) == 130
    assert capsys.readouterr().err.endswith("interrupted\n")
