"""tools/generate.py on a run: what a person sees, and what they see when something is wrong."""

from __future__ import annotations

import io
import runpy
import sys
from pathlib import Path

import pytest

from tests import jobs

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run(ranks, corpus, tmp_path_factory):
    """A run of two steps, trained at pipeline 2."""
    out = tmp_path_factory.mktemp("runs") / "run"
    ranks.run(2, jobs.fit, ["parallel.pipeline=2", "train.steps=2"], corpus, str(out))
    return out


@pytest.fixture
def generate(monkeypatch, capsys):
    """The command line in this process: (exit code, stdout, stderr)."""
    main = runpy.run_path(str(ROOT / "tools/generate.py"))["main"]

    def run_main(*arguments: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = main(list(arguments))
        return code, *capsys.readouterr()

    return run_main


def test_text_repeats_by_its_seed(run, generate):
    code, text, note = generate(str(run), "--prompt", "abc", "--tokens", "12", "--ignore-eos")
    assert code == 0 and text.startswith("abc") and "[3 + 12 tokens in" in note
    (checkpoint,) = (run / "checkpoints").glob("step_*")
    arguments = ["--tokens", "12", "--ignore-eos", "--prompt-file", "-", "--logprobs", "1"]
    _, again, _ = generate(str(checkpoint), *arguments, stdin="abc")
    assert again.startswith(text)
    assert len(again[len(text) :].strip().splitlines()) >= 12


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{run}/nothing"], 4, "not a complete checkpoint"),
        (["{run}", "--prompt", ""], 2, "the prompt is empty"),
        (["{run}", "--top-p", "7"], 2, "top_p=7.0 must be in (0, 1]"),
        (["{run}", "--tensor", "2"], 2, "--tensor 2 x --pipeline 1 need 2 ranks"),
        (["{run}", "--prompt-file", "{run}/none"], 2, "No such file"),
        (["{run}", "--tokenizer", "hf:{run}"], 3, "transformers cannot load"),
    ],
)
def test_mistakes_are_named(run, generate, arguments, code, message):
    found, text, error = generate(*(argument.format(run=run) for argument in arguments))
    assert (found, text) == (code, "")
    assert error.startswith("error: ") and message in error
