"""Rows of packed documents: what they hold, their order, and what is refused.

Every token of these corpora has an id of its own, and the next token of its document has the next
id. So a row says where each of its positions is from.
"""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megakda.config import Config
from megakda.data.datasets import (
    Batch,
    build_datasets,
    micro_batches,
    order_probe,
    prepare_data,
)
from megakda.data.indexed import write_index
from megakda.data.packed_dataset import PackedDataset, collate, packing_efficiency
from megakda.data.packing import pack_epochs
from megakda.errors import DataError
from tests.data.test_datasets import make_config, write_corpus

CONTEXT = 16
EOD = 256  # of the byte tokenizer
FIRST = 1000  # token ids start here, above all that means something
MODES = [("documents", "split"), ("documents", "carry"), ("best_fit", "split")]
modes = pytest.mark.parametrize("mode", MODES, ids="-".join)


def write_numbers(prefix: Path, lengths: Sequence[int], first: int = FIRST) -> Path:
    """Documents of these lengths, whose tokens are first, first + 1, ..."""
    ids = np.arange(first, first + sum(lengths), dtype="<i4")
    Path(f"{prefix}.bin").write_bytes(ids.tobytes())
    with open(f"{prefix}.idx", "wb") as stream:
        write_index(stream, np.array(lengths), ids.dtype)
    return prefix


def settings(paths: Sequence[Path], mode: tuple[str, str], *more: str) -> Config:
    packing, overlong = mode
    return make_config(
        paths,
        *(f"data.packing={packing}", f"data.overlong={overlong}", "data.split=[1,0,0]"),
        *("model.vocab_size=100000", *more),
    )


def build(config: Config) -> Any:
    return build_datasets(config, prepare_data(config))


LENGTHS = [0, 1, 2, 17, 18, 100, 1, 3, *np.random.default_rng(0).integers(2, 30, 40).tolist()]


@pytest.fixture
def corpus(tmp_path) -> Path:
    return write_numbers(tmp_path / "numbers", LENGTHS)


def starts_of(lengths: Sequence[int]) -> np.ndarray:
    """The id that each document starts with."""
    return FIRST + np.cumsum([0, *lengths])[:-1]


def check_rows(tokens: torch.Tensor, batch: Batch, bounds: Sequence[int]) -> list[int]:
    """Everything that holds inside the pieces between `bounds`; the ids of the real positions."""
    labels, loss = batch["labels"].flatten(), batch["loss_mask"].flatten()
    padding, positions = batch["padding_mask"].flatten(), batch["position_ids"].flatten()
    assert torch.equal(loss, 1 - padding.float())
    assert bounds[0] == 0 and bounds[-1] == len(tokens)
    found: list[int] = []
    for a, b in zip(bounds, bounds[1:], strict=False):
        assert a < b
        assert torch.equal(positions[a:b], torch.arange(b - a))
        assert padding[a:b].all() or not padding[a:b].any()
        if padding[a]:
            assert b % CONTEXT == 0  # it ends its row
            assert (tokens[a:b] == EOD).all() and (labels[a:b] == EOD).all()
        else:
            assert torch.equal(tokens[a:b], tokens[a] + torch.arange(b - a))
            assert torch.equal(labels[a:b], tokens[a:b] + 1)
            found += tokens[a:b].tolist()
    return found


@modes
def test_an_epoch_of_rows_has_every_position_once(corpus, mode):
    dataset = build(settings([corpus], mode)).train
    assert isinstance(dataset, PackedDataset) and len(dataset) == 80  # steps * global_batch
    documents = np.arange(len(LENGTHS), dtype=np.int32)
    epoch = len(pack_epochs(np.array(LENGTHS), documents, CONTEXT, *mode, seed=1234))
    assert epoch < 80
    found = Counter[int]()
    for row in (dataset[index] for index in range(epoch)):
        assert row["cu_seqlens"].dtype == torch.int32
        found.update(check_rows(row["tokens"], row, row["cu_seqlens"].tolist()))
    starts = starts_of(LENGTHS).tolist()
    expected = [s + i for s, n in zip(starts, LENGTHS, strict=True) for i in range(n - 1)]
    assert found == Counter(expected)


@modes
def test_pieces_are_whole_documents_unless_they_are_longer_than_a_row(corpus, mode):
    dataset = build(settings([corpus], mode)).train
    whole = dict(zip(starts_of(LENGTHS).tolist(), LENGTHS, strict=True))
    for index in range(len(dataset)):
        row = dataset[index]
        bounds = row["cu_seqlens"].tolist()
        for a, b in zip(bounds, bounds[1:], strict=False):
            first = int(row["tokens"][a])
            if row["padding_mask"][a] or first not in whole:
                continue  # padding, or a later part of a long document
            positions = whole[first] - 1
            if positions <= CONTEXT:
                assert b - a == positions
            elif mode[1] == "split":
                assert b - a == CONTEXT


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_micro_batches_have_one_list_of_bounds(corpus, micro_batch, workers):
    dataset = build(settings([corpus], MODES[2])).train
    batches = micro_batches(dataset, 0, micro_batch, rank=0, ranks=1, num_workers=workers)
    for number, batch in enumerate(islice(batches, 6)):
        shape = (micro_batch, CONTEXT)
        types = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in batch.items()}
        bounds = batch["cu_seqlens"]
        assert types == {
            **dict.fromkeys(("tokens", "labels", "position_ids"), (torch.int64, shape)),
            "loss_mask": (torch.float32, shape),
            "padding_mask": (torch.bool, shape),
            "cu_seqlens": (torch.int32, (len(bounds),)),
        }
        assert set(range(0, micro_batch * CONTEXT + 1, CONTEXT)) <= set(bounds.tolist())
        check_rows(batch["tokens"].flatten(), batch, bounds.tolist())
        rows = [dataset[number * micro_batch + i] for i in range(micro_batch)]
        assert torch.equal(batch["tokens"], torch.stack([row["tokens"] for row in rows]))
        assert len(bounds) == 1 + sum(len(row["cu_seqlens"]) - 1 for row in rows)


def global_batches(dataset: Any, ranks: int, micro_batch: int, consumed: int, steps: int) -> Any:
    """Of each step of 8 rows: the rows' tokens and bounds, in whatever order."""
    found: list[list[Any]] = [[] for _ in range(steps)]
    for rank in range(ranks):
        batches = micro_batches(dataset, consumed, micro_batch, rank, ranks)
        for step in found:
            for batch in islice(batches, 8 // (ranks * micro_batch)):
                bounds = batch["cu_seqlens"].tolist()
                for row, tokens in enumerate(batch["tokens"].tolist()):
                    first, last = row * CONTEXT, (row + 1) * CONTEXT
                    step.append((tokens, [b - first for b in bounds if first <= b <= last]))
    return [sorted(step) for step in found]


@modes
def test_resumed_runs_and_other_layouts_have_the_same_global_batches(corpus, mode):
    dataset = build(settings([corpus], mode)).train
    expected = global_batches(dataset, 1, 1, consumed=0, steps=6)
    again = build(settings([corpus], mode)).train  # from the cache
    for ranks, micro_batch in ((1, 2), (2, 1), (2, 2), (4, 1), (4, 2)):
        assert global_batches(again, ranks, micro_batch, 0, 6) == expected
        assert global_batches(again, ranks, micro_batch, 3 * 8, 3) == expected[3:]


def test_the_seed_and_the_documents_make_the_order_and_the_steps_do_not(corpus, tmp_path):
    def first_rows(*more: str) -> list[list[int]]:
        dataset = build(settings([corpus], MODES[2], *more)).train
        return [dataset[index]["tokens"].tolist() for index in range(80)]

    def probe(*more: str) -> str:
        return order_probe(build(settings([corpus], MODES[2], *more)).train, 80)

    expected = first_rows()
    assert first_rows(f"data.cache={tmp_path}/other") == expected
    # Several epochs instead of less than two, and the rows in front are the same.
    assert first_rows("train.steps=50") == expected
    assert probe() == probe("train.steps=50")
    assert first_rows("train.seed=2") != expected
    for changed in ("train.seed=2", "train.context=15", "data.packing=documents"):
        assert probe(changed) != probe(), changed


def test_other_documents_at_the_same_path_get_an_index_of_their_own(corpus):
    config = settings([corpus], MODES[2])
    before = {int(t) for row in build(config).train for t in row["tokens"]} - {EOD}
    write_numbers(corpus, [*LENGTHS[30:], *LENGTHS[:30], 40])
    after = {int(t) for row in build(config).train for t in row["tokens"]} - {EOD}
    assert len(after) == len(before) + 39


def test_validation_rows_are_of_other_documents(tmp_path):
    lengths = [5, 9, 30, 12] * 25
    corpus = write_numbers(tmp_path / "numbers", lengths)
    more = ("data.split=[80,20,0]", "train.eval_batches=1")
    found = build(settings([corpus], MODES[1], *more))
    assert (len(found.train), len(found.valid)) == (80, 8)
    border = int(starts_of(lengths)[80])
    for dataset, low, high in ((found.train, FIRST, border), (found.valid, border, 10**6)):
        real = [row["tokens"][~row["padding_mask"]] for row in dataset]
        assert all(low <= int(ids.min()) <= int(ids.max()) < high for ids in real)


def test_a_padding_id_in_the_data_is_nothing_to_learn(corpus):
    """As without packing. Padding of the row is another matter: nothing is there at all."""
    dataset = build(settings([corpus], MODES[2])).train
    row = dataset[0]
    label = int(row["labels"][3])
    dataset._pad_token_id = label
    masked = dataset[0]
    assert masked["loss_mask"].tolist() == [float(x != label and x != EOD) for x in row["labels"]]
    assert torch.equal(masked["padding_mask"], row["padding_mask"])


def test_efficiency_is_that_of_the_rows(corpus):
    for mode in MODES:
        dataset = build(settings([corpus], mode)).train
        found = packing_efficiency(dataset)
        rows = [dataset[index] for index in range(len(dataset))]
        real = sum(float(row["loss_mask"].sum()) for row in rows)
        pieces = sum(len(row["cu_seqlens"]) - 1 - int(row["padding_mask"].any()) for row in rows)
        assert found.real == pytest.approx(real / (80 * CONTEXT))
        assert found.documents_per_row == pytest.approx(pieces / 80)
        assert f"{found.real:.2%} of positions" in str(found)


def test_workers_that_are_not_forked_map_the_index_too(tmp_path):
    corpus = write_numbers(tmp_path / "numbers", [3] * 20_000)
    dataset = build(settings([corpus], MODES[0], "train.steps=200")).train
    sent = pickle.dumps(dataset.rows)
    assert len(sent) < 1000 < dataset.rows.pieces.nbytes
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[7]["labels"], dataset[7]["labels"])
    with pytest.raises(IndexError, match="row 1600 of 1600"):
        dataset[1600]


def on_this_rank(paths: list[Path], mode: tuple[str, str], *more: str) -> Any:
    """What one rank of several gets: its rows, and their efficiency."""
    from megakda.runtime.distributed import process_groups

    config = settings(paths, mode, *more)
    with process_groups(config.parallel, config.runtime, torch.device("cpu")):
        dataset = build(config).train
        batches = islice(micro_batches(dataset, 0, 2, rank=0, ranks=1), 40)
        found = [{name: tensor.tolist() for name, tensor in batch.items()} for batch in batches]
        return found, packing_efficiency(dataset)


def test_two_corpora_are_mixed_on_every_rank_alike(ranks, tmp_path):
    """Rows of one corpus each. Rank 1 reads what rank 0 has written."""
    paths = [
        write_numbers(tmp_path / "a", [5, 9, 30] * 30),
        write_numbers(tmp_path / "b", [16] * 200, first=50_000),
    ]
    found, other = ranks.run(2, on_this_rank, paths, MODES[2], "data.weights=[1,3]")
    assert found == other
    batches, efficiency = found
    rows = [row for batch in batches for row in batch["tokens"]]
    is_b = [max(row) >= 50_000 for row in rows]
    assert is_b == [all(t >= 50_000 or t == EOD for t in row) for row in rows]
    assert sum(is_b) == pytest.approx(60, abs=1)
    assert all("cu_seqlens" in batch for batch in batches)
    masks = [mask for batch in batches for mask in batch["loss_mask"]]
    # The index holds a few rows more than the blend draws.
    assert efficiency.real == pytest.approx(np.mean(masks), abs=0.01)


def test_unpacked_batches_are_what_they_were(tmp_path):
    """GPTDataset's own keys and torch's own collation."""
    corpus = write_corpus(tmp_path, "text", ["abcdefghij" * 3] * 50)
    dataset = build(make_config([corpus])).train
    rows = [dataset[index] for index in range(4)]
    batch = next(micro_batches(dataset, 0, 4, rank=0, ranks=1))
    expected = torch.utils.data.default_collate(rows)
    assert list(batch) == list(expected) == ["tokens", "labels", "loss_mask", "position_ids"]
    for found in (batch, collate(rows)):
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_cache_that_is_damaged_is_not_loaded(corpus):
    config = settings([corpus], MODES[2])
    build(config)
    (file,) = (corpus.parent / "cache").glob("*PackedDataset-train-pieces.npy")
    file.write_bytes(file.read_bytes()[:-12])
    with pytest.raises(DataError, match=r"damaged or incomplete.*delete .*PackedDataset-train-\*"):
        build(config)
    file.unlink()  # as if its writer had been killed
    assert len(build(config).train) == 80


def test_documents_too_short_to_predict_anything(tmp_path):
    corpus = write_numbers(tmp_path / "numbers", [1] * 10 + [5] * 10 + [0, 1] * 5)
    validating = "train.eval_batches=1"
    for split, name in (("1,2,0", "training"), ("2,1,0", "validation")):
        config = settings([corpus], MODES[0], f"data.split=[{split}]", validating)
        with pytest.raises(DataError, match=rf"none of the 10 {name} documents of .*numbers"):
            prepare_data(config)
    # Splits that nobody reads may be of such documents.
    config = settings([corpus], MODES[0], "data.split=[2,1,0]")
    found = build(config)
    assert len(found.train) == 80 and found.valid is None
    config = settings([corpus], MODES[2], "data.split=[1,1,1]", validating)
    with pytest.raises(DataError, match="training documents"):
        prepare_data(config)


def test_an_index_without_documents_says_so(corpus):
    """Where the check before training was passed by, the builder does not search for ever."""
    config = settings([corpus], MODES[0])
    checked = prepare_data(config)
    write_numbers(corpus, [1] * len(LENGTHS))
    with pytest.raises(DataError, match=r"train split of .*numbers: none of its .*data\.split"):
        build_datasets(config, checked)
