"""Which sequences a step trains on, and what is refused before training starts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from megakda.config import Config, compose
from megakda.data.datasets import (
    Batch,
    build_datasets,
    micro_batches,
    order_probe,
    prepare_data,
)
from megakda.data.preprocess import preprocess
from megakda.errors import ConfigError, DataError

CONTEXT = 16


class Numbers(torch.utils.data.Dataset):
    """Sequence n holds the number n."""

    def __init__(self, length: int):
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        assert 0 <= index < self.length
        return {"tokens": torch.tensor([index])}


def numbers(batches: Sequence[Batch]) -> list[int]:
    return [int(n) for batch in batches for n in batch["tokens"].flatten()]


def steps_of(ranks: int, micro_batch: int, consumed: int, steps: int, length: int = 1000) -> Any:
    """The sequences of each step of 8 on each rank: [step][rank]."""
    per_step = 8 // (ranks * micro_batch)
    found: list[list[list[int]]] = [[] for _ in range(steps)]
    for rank in range(ranks):
        batches = micro_batches(Numbers(length), consumed, micro_batch, rank, ranks)
        for step in range(steps):
            mine = list(islice(batches, per_step))
            assert all(batch["tokens"].shape == (micro_batch, 1) for batch in mine)
            found[step].append(numbers(mine))
    return found


@pytest.mark.parametrize("micro_batch", [1, 2])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_global_batch_is_the_same_set_for_any_number_of_ranks(ranks, micro_batch):
    for step, by_rank in enumerate(steps_of(ranks, micro_batch, consumed=24, steps=3)):
        assert all(len(mine) == 8 // ranks for mine in by_rank)
        together = sorted(sum(by_rank, []))
        assert together == list(range(24 + 8 * step, 24 + 8 * (step + 1)))  # each once


def test_resuming_continues_exactly():
    """At the same layout in the same order; at another one with the same steps."""
    before = steps_of(ranks=2, micro_batch=2, consumed=0, steps=5)
    assert before[3] == [[24, 25, 28, 29], [26, 27, 30, 31]]
    assert steps_of(ranks=2, micro_batch=2, consumed=3 * 8, steps=2) == before[3:]

    def sets(steps: Any) -> list[list[int]]:
        return [sorted(sum(by_rank, [])) for by_rank in steps]

    for ranks, micro_batch in ((1, 2), (2, 1), (4, 2)):
        assert sets(steps_of(ranks, micro_batch, 3 * 8, steps=2)) == sets(before[3:])


def test_data_start_over_after_the_last_sequence():
    found = steps_of(2, 1, consumed=0, steps=3, length=10)
    assert sorted(sum(found[1], [])) == [0, 1, 2, 3, 4, 5, 8, 9]
    assert sum((sum(step, []) for step in found), []).count(9) == 2
    far = micro_batches(Numbers(10), consumed=10**12 + 3, micro_batch=4, rank=0, ranks=1)
    assert numbers([next(far)]) == [3, 4, 5, 6]


def write_corpus(folder: Path, name: str, documents: Sequence[str]) -> Path:
    """A byte-level data set with these documents, in this order."""
    source = folder / f"{name}.txt"
    source.write_text("\n".join(documents))
    preprocess([source], folder / name, document="line", workers=1, progress=False)
    return folder / name


def make_config(paths: Sequence[Path], *overrides: str) -> Config:
    return compose(
        [
            "data=indexed",
            f"data.paths=[{','.join(map(str, paths))}]",
            "data.split=[98,2,0]",
            f"train.context={CONTEXT}",
            "train.steps=10",
            "train.global_batch=8",
            "train.eval_batches=0",
            *overrides,
        ]
    )


@pytest.fixture
def letters(tmp_path) -> Path:
    """200 documents of 23 different bytes each, all of them different, and an end mark."""
    alphabet = "abcdefghijklmnopqrstuvwxyz0123456789"
    documents = [(alphabet[n % 36 :] + alphabet)[:23] for n in range(200)]
    return write_corpus(tmp_path, "letters", documents)


def read_tokens(prefix: Path) -> list[int]:
    import numpy as np

    return np.fromfile(f"{prefix}.bin", dtype=np.uint16).tolist()


def test_labels_are_the_tokens_one_later(letters):
    config = make_config([letters])
    dataset = build_datasets(config, prepare_data(config))
    assert dataset.valid is None
    batches = list(islice(micro_batches(dataset.train, 0, 4, 0, 1), 20))
    stream = read_tokens(letters)
    documents = {tuple(stream[start : start + 24]) for start in range(0, len(stream), 24)}
    assert len(documents) == 36 and all(document[-1] == 256 for document in documents)
    for batch in batches:
        assert batch["tokens"].dtype == batch["labels"].dtype == torch.int64
        assert batch["tokens"].shape == batch["labels"].shape == (4, CONTEXT)
        assert torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])
        assert torch.equal(batch["position_ids"], torch.arange(CONTEXT).expand(4, -1))
        assert torch.equal(batch["loss_mask"], torch.ones(4, CONTEXT))
        for tokens, labels in zip(batch["tokens"].tolist(), batch["labels"].tolist(), strict=True):
            # With the last label, a piece of one document and perhaps the start of another.
            whole = [*tokens, labels[-1]]
            cut = whole.index(256) + 1 if 256 in whole else len(whole)
            head, tail = tuple(whole[:cut]), tuple(whole[cut:])
            assert any(contains(document, head) for document in documents)
            assert any(document[: len(tail)] == tail for document in documents)
    # 80 sequences of 16 predicted tokens are 27 % of the corpus: none comes twice.
    assert len({tuple(row) for b in batches for row in b["tokens"].tolist()}) > 60


def contains(document: tuple[int, ...], part: tuple[int, ...]) -> bool:
    return any(document[i : i + len(part)] == part for i in range(len(document)))


def sequences(config: Config, count: int) -> list[tuple[int, ...]]:
    batches = micro_batches(build_datasets(config, prepare_data(config)).train, 0, 1, 0, 1)
    return [tuple(batch["tokens"][0].tolist()) for batch in islice(batches, count)]


def test_the_seed_and_nothing_else_shuffles(letters):
    config = make_config([letters])
    first = sequences(config, 80)
    assert sequences(config, 80) == first  # from the cached index files
    fresh = make_config([letters], f"data.cache={letters.parent}/other_cache")
    assert sequences(fresh, 80) == first
    assert sequences(make_config([letters], "train.seed=99"), 80) != first


def test_the_order_probe_sees_another_order(letters):
    """36 steps use the corpus once, 73 all but twice: megatron-core shuffles both times as one."""

    def probe(consumed: int, *overrides: str) -> str:
        config = make_config([letters], *overrides)
        return order_probe(build_datasets(config, prepare_data(config)).train, consumed)

    same = probe(80, "train.steps=20")
    assert probe(80, "train.steps=36") == same
    assert probe(81, "train.steps=36") != same
    for changed in ("steps=73", "seed=2", "context=15"):
        assert probe(80, f"train.{changed}") != same, changed
    assert probe(80, "data.split=[90,10,0]") != same


@pytest.fixture
def two_corpora(tmp_path) -> list[Path]:
    """One of a's, and one of b's with a quarter of the tokens."""
    return [
        write_corpus(tmp_path, "a", ["a" * 39] * 200),
        write_corpus(tmp_path, "b", ["b" * 39] * 50),
    ]


def mixed_sequences(paths: list[Path], weights: list[str]) -> list[list[tuple[int, ...]]]:
    """80 sequences per choice of weights; megatron-core mixes inside process groups only."""
    from megakda.runtime.distributed import process_groups

    found = []
    for choice in weights:
        config = make_config(paths, f"data.weights={choice}")
        with process_groups(config.parallel, config.runtime, torch.device("cpu")):
            found.append(sequences(config, 80))
    return found


def test_corpora_are_mixed_by_weight_or_size(ranks, two_corpora):
    shares = {"[3,1]": 0.75, "[1,3]": 0.25, "[0.3,0.3]": 0.5, "null": 0.8}
    (found,) = ranks.run(1, mixed_sequences, two_corpora, list(shares))
    for (weights, share), rows in zip(shares.items(), found, strict=True):
        is_a = [ord("a") in row for row in rows]
        assert is_a == [ord("b") not in row for row in rows]
        assert sum(is_a) == pytest.approx(80 * share, abs=1), weights
        assert sum(is_a[:40]) == pytest.approx(40 * share, abs=1), weights  # evenly over the run


def test_validation_data_are_other_documents(tmp_path):
    documents = [chr(ord("a") + n // 10) * 39 for n in range(100)]
    prefix = write_corpus(tmp_path, "sorted", documents)
    config = make_config([prefix], "data.split=[80,20,0]", "train.eval_batches=1")
    found = build_datasets(config, prepare_data(config))

    def kinds(dataset: Any, count: int) -> set[int]:
        batches = islice(micro_batches(dataset, 0, 1, 0, 1), count)
        return {int(t) for batch in batches for t in batch["tokens"].flatten()} - {256}

    assert kinds(found.train, 80) == {ord("a") + n for n in range(8)}
    assert kinds(found.valid, 8) <= {ord("i"), ord("j")}


def refused(error: type[Exception], match: str, config: Config) -> None:
    with pytest.raises(error, match=match):
        prepare_data(config)


def test_paths_and_weights_that_cannot_work(two_corpora):
    refused(ConfigError, r"data\.paths is empty.*preprocess_data", make_config([]))
    for weights in ("[1]", "[1,2,3]", "[1,-1]", "[0,0]", "[]"):
        config = make_config(two_corpora, f"data.weights={weights}")
        refused(ConfigError, r"data\.weights=\[.*needs one .*number for each of the 2", config)
    prepare_data(make_config(two_corpora, "data.weights=[0.5,2]"))


@pytest.mark.parametrize("split", ["[]", "[98,2]", "[98,2,0,0]", "[-1,2,0]", "[0,1,0]"])
def test_malformed_splits(letters, split):
    config = make_config([letters], f"data.split={split}")
    refused(ConfigError, r"data\.split=\[.*\]: needs three shares", config)


def test_a_split_that_leaves_nothing_to_validate_on(letters):
    config = make_config([letters], "data.split=[1,0,0]", "train.eval_batches=2")
    refused(ConfigError, r"nothing to validate on.*train\.eval_batches=0", config)
    prepare_data(make_config([letters], "data.split=[1,0,0]"))


def test_a_split_without_documents_fails_instead_of_hanging(tmp_path):
    """Every split with a share, also the ones that are not used: megatron-core builds them all."""
    prefix = write_corpus(tmp_path, "short", ["one", "two", "three"])
    for split, name in (("98,2,0", "validation"), ("50,50,1", "test"), ("1,99,0", "training")):
        config = make_config([prefix], f"data.split=[{split}]")
        refused(DataError, rf"data\.split=.* leaves no {name} document of the 3", config)
    prepare_data(make_config([prefix], "data.split=[1,1,1]"))


def test_damaged_files(letters):
    config = make_config([letters])
    size = os.path.getsize(f"{letters}.bin")
    os.truncate(f"{letters}.bin", size - 2)
    refused(DataError, rf"letters\.bin is cut short.*{size} bytes and it has {size - 2}", config)
    os.unlink(f"{letters}.idx")
    refused(DataError, r"no .*letters\.idx", config)


def test_a_tokenizer_that_the_model_has_no_room_for(letters):
    config = make_config([letters], "model.vocab_size=256")
    refused(DataError, r"'byte' has 257 ids, more than model\.vocab_size=256", config)
    prepare_data(make_config([letters], "model.vocab_size=257"))


def test_a_corpus_shorter_than_a_sequence(tmp_path):
    """No hang and no bare exception of megatron-core."""
    prefix = write_corpus(tmp_path, "short", ["one"])
    config = make_config([prefix], "data.split=[1,0,0]", "train.context=2048")
    corpus = prepare_data(config)
    found = build_datasets(config, corpus)  # repeats the corpus as often as it takes
    (batch,) = islice(micro_batches(found.train, 0, 1, 0, 1), 1)
    assert batch["tokens"].shape == (1, 2048)
    assert set(batch["tokens"].flatten().tolist()) == {*b"one", 256}


@pytest.mark.parametrize(("documents", "split"), [(25, "[93,5,2]"), (73, "[50,1,95]")])
def test_splits_round_as_megatron_core_does(tmp_path, documents, split):
    """Where a share rounds to no document there, megatron-core would search for one for ever."""
    prefix = write_corpus(tmp_path, "many", [f"document {i}" for i in range(documents)])
    config = make_config([prefix], f"data.split={split}", "train.eval_batches=1")
    refused(DataError, r"data\.split=.* leaves no \w+ document", config)


@pytest.mark.parametrize("setting", ["data.split=[nan,1,0]", "data.split=[inf,1,0]"])
def test_splits_are_finite(letters, setting):
    refused(ConfigError, "needs three shares", make_config([letters], setting))


def test_weights_are_positive_and_finite(two_corpora):
    for weights in ("[0,2]", "[nan,1]", "[inf,1]"):
        config = make_config(two_corpora, f"data.weights={weights}")
        refused(ConfigError, r"data\.weights=\[.*needs one positive number", config)
