"""Perplexity of corpora: equal to the loss of training, over the same tokens."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from megakda.data.indexed import read_sidecar, sidecar_bytes, write_index
from megakda.data.preprocess import preprocess
from megakda.data.tokenizer import load_tokenizer
from megakda.errors import ConfigError, DataError
from megakda.evaluation.perplexity import PerplexitySettings, corpus_perplexity, windows
from megakda.inference.request import TokenLogprob
from tests import jobs
from tests.inference.models import full_logprobs, random_model

BYTE = load_tokenizer("byte")
CONTEXT = 48
TEXTS = ["a first document", "grün und blau", "", "a third one, a little longer than the others"]
VALID = "".join(f"{n} is followed by {n + 1}; " for n in range(100))[: 8 * CONTEXT]


def make_corpus(folder: Path, texts: list[str]) -> str:
    source = folder / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    preprocess([source], folder / "corpus", "byte", workers=1, progress=False)
    return str(folder / "corpus")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("small"), TEXTS)


def documents() -> list[list[int]]:
    return [[*BYTE.encode(text), BYTE.eod] for text in TEXTS if text]


class Uneven:
    """Knows of a token that it is the `n`th of its sequence: its loss is n."""

    def __init__(self):
        self.seen = []

    def score(self, sequences):
        self.seen += sequences
        return [
            [None, *(TokenLogprob(token, -float(n), 1) for n, token in enumerate(ids[1:], start=1))]
            for ids in sequences
        ]


@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 30])
@pytest.mark.parametrize(("context", "overlap"), [(1, 0), (8, 0), (8, 3), (8, 7), (40, 10)])
def test_windows_predict_every_token_once(tokens, context, overlap):
    found = list(windows(tokens, context, overlap))
    assert [i for _, first, end in found for i in range(first, end)] == list(range(1, tokens))
    assert all(end - start <= context + 1 for start, _, end in found)
    for (_, _, end), (start, first, _) in pairwise(found):
        assert first == end and first - start == 1 + overlap


def measured(prefix, **settings):
    engine = Uneven()
    found = corpus_perplexity(engine, BYTE, 257, prefix, PerplexitySettings(**settings))
    return found, engine.seen


def test_streams(corpus):
    stream = [token for document in documents() for token in document]
    found, seen = measured(corpus, context=20)
    assert seen == [stream[i : i + 21] for i in range(0, len(stream) - 1, 20)]
    assert found.tokens == len(stream) - 1 and found.documents == 3
    losses = [n for i in range(0, len(stream) - 1, 20) for n in range(1, len(stream[i : i + 21]))]
    assert found.nats == pytest.approx(sum(losses) / len(losses))
    # Of the first token nothing is known, and ends of documents are no text.
    assert found.text_bytes == sum(len(text.encode()) for text in TEXTS) - 1
    assert found.bits == pytest.approx(found.nats / math.log(2))
    assert found.bits_per_byte == pytest.approx(found.bits * found.tokens / found.text_bytes)
    assert found.perplexity == pytest.approx(math.exp(found.nats))
    assert found.tokenizer_checked

    again, seen = measured(corpus, context=20, overlap=15)
    assert again.tokens == found.tokens and again.nats > found.nats
    assert seen[1] == stream[5:26]


def test_documents(corpus):
    found, seen = measured(corpus, context=30, by_document=True)
    whole = [[BYTE.eod, *document] for document in documents()]
    assert seen == [whole[0], whole[1], whole[2][:31], whole[2][30:]]
    assert found.tokens == sum(map(len, documents())) and found.documents == 3
    assert found.text_bytes == sum(len(text.encode()) for text in TEXTS)
    part, seen = measured(corpus, context=60, by_document=True, first=1, last=2)
    assert seen == [whole[1]] and part.documents == 1


@pytest.mark.parametrize("by_document", [False, True])
def test_a_limit_cuts_the_last_window(corpus, by_document):
    everything = measured(corpus, context=20, by_document=by_document)[1]
    found, seen = measured(corpus, context=20, by_document=by_document, limit=28)
    assert found.tokens == 28 == sum(len(ids) - 1 for ids in seen)
    assert seen[:-1] == everything[: len(seen) - 1]
    assert seen[-1] == everything[len(seen) - 1][: len(seen[-1])]
    assert found.documents == 2


def test_many_windows_go_to_the_engine_in_pieces(corpus, monkeypatch):
    monkeypatch.setattr("megakda.evaluation.perplexity._TOGETHER", 25)
    calls = []
    engine = Uneven()
    found = corpus_perplexity(
        engine,
        BYTE,
        257,
        corpus,
        PerplexitySettings(context=10),
        lambda done, total: calls.append((done, total)),
    )
    assert [done for done, _ in calls] == [30, 60, found.tokens]
    assert {total for _, total in calls} == {found.tokens}
    assert found.nats == measured(corpus, context=10)[0].nats


def test_settings_and_corpora_that_cannot_work(corpus, tmp_path):
    for settings, message in (
        ({"context": 0}, "context=0 must be at least 1"),
        ({"context": 8, "overlap": 8}, "overlap=8 must be in 0..7"),
        ({"context": 8, "limit": 0}, "tokens=0 must be at least 1"),
        ({"context": 8, "first": 2, "last": 2}, "documents 2:2 are no range of the 3"),
        ({"context": 8, "last": 4}, "documents 0:4 are no range of the 3"),
    ):
        with pytest.raises(ConfigError, match=message):
            measured(corpus, **settings)
    with pytest.raises(DataError, match="incomplete"):
        measured(str(tmp_path / "none"), context=8)
    for suffix in (".bin", ".idx"):
        (tmp_path / f"other{suffix}").write_bytes(Path(corpus + suffix).read_bytes())
    assert not measured(str(tmp_path / "other"), context=8)[0].tokenizer_checked
    foreign = {**read_sidecar(corpus), "fingerprint": "0" * 16}
    foreign.pop("megakda_format")
    (tmp_path / "other.json").write_bytes(sidecar_bytes(foreign))
    with pytest.raises(DataError, match="was made with tokenizer 'byte' .fingerprint 0000"):
        measured(str(tmp_path / "other"), context=8)


def test_one_token_of_a_stream_predicts_nothing(tmp_path):
    np.array([65], dtype="<u2").tofile(tmp_path / "one.bin")
    with (tmp_path / "one.idx").open("wb") as stream:
        write_index(stream, np.array([1]), np.dtype("<u2"))
    with pytest.raises(DataError, match="documents 0:1 of .* hold nothing to predict"):
        measured(str(tmp_path / "one"), context=8)


def test_the_model_gives_the_losses_of_a_plain_forward(corpus):
    from megakda.inference.engine import Engine, EngineSettings

    with random_model() as model:
        engine = Engine(model, EngineSettings(max_sequences=3, max_context=21, prefill_chunk=17))
        found = corpus_perplexity(engine, BYTE, 257, corpus, PerplexitySettings(context=20))
        stream = [token for document in documents() for token in document]
        losses = []
        for start, first, end in windows(len(stream), 20):
            logprobs = full_logprobs(model, stream[start : end - 1])
            losses += [-logprobs[i - 1 - start, stream[i]].item() for i in range(first, end)]
    assert found.tokens == len(losses)
    assert found.nats == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_it_is_the_validation_loss_of_the_trainer(tmp_path):
    """A split of one document, of which the trainer's validation reads every token once."""
    from megakda.inference.engine import Engine, EngineSettings
    from megakda.inference.loading import LoadedModel

    prefix = make_corpus(tmp_path, [VALID, VALID])
    overrides = [
        "data.split=[1,1,0]",
        f"train.context={CONTEXT}",
        "train.eval_batches=2",
        "train.steps=2",
        "train.eval_every=2",
        "train.seed=1",
    ]
    with jobs.trainer(overrides, prefix) as run:
        batches = run._batches(run.datasets.train, 0)
        for _ in range(2):
            run.step(batches)
        expected = run.validate()
        (chunk,) = run.chunks
        model = LoadedModel(
            chunk.module.eval(), run.config.model, BYTE, frozenset({256}), "fp32", tmp_path
        )
        engine = Engine(model, EngineSettings(max_context=CONTEXT + 1))
        settings = PerplexitySettings(context=CONTEXT, first=1)
        with torch.no_grad():
            found = corpus_perplexity(engine, BYTE, 257, prefix, settings)
    assert found.tokens == 8 * CONTEXT and found.documents == 1
    assert found.nats == pytest.approx(expected, rel=1e-5)
