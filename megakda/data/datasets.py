"""Training and validation sequences from megatron-core's indexed datasets, at a resumable position.

Which sequences a step trains on depends on the seed, the data, the number of sequences consumed
before and, where a run repeats its corpora, on its length; never on how the ranks are laid out.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megakda.config.schema import Config
from megakda.data.corpus import prepare_stdlib
from megakda.data.indexed import IndexedInfo, check_indexed
from megakda.data.packed_dataset import Batch, PackedDataset, PackedDatasetConfig, collate
from megakda.data.tokenizer import Tokenizer, load_tokenizer
from megakda.errors import ConfigError, DataError, MegakdaError


@dataclass(frozen=True)
class Corpus:
    """Checked data sets and the tokenizer that made them."""

    tokenizer: Tokenizer
    parts: tuple[IndexedInfo, ...]


def prepare_data(config: Config, scan: bool = True) -> Corpus:
    """Loads the tokenizer, makes the data set where the recipe asks for it, and checks every file.

    Needs no process group; one rank calls it before the others start to wait for each other.

    Args:
        scan: also read the tokens of data sets that do not say what their largest id is.

    Raises:
        ConfigError: no data paths, or weights or a split that do not fit them.
        DataError: files that are missing, torn, made with another tokenizer, or too few or too
            short documents.
    """
    data = config.data
    if not data.paths:
        raise ConfigError(
            f"data.paths is empty (data={data.name}): list the prefixes that tools/"
            "preprocess_data.py has written, as in data.paths=[corpus/a,corpus/b]"
        )
    if data.weights is not None and (
        len(data.weights) != len(data.paths)
        or not all(0 < weight < math.inf for weight in data.weights)
    ):
        raise ConfigError(
            f"data.weights={list(data.weights)}: needs one positive number for each of the "
            f"{len(data.paths)} data.paths; leave out paths that are not to be used"
        )
    tokenizer = load_tokenizer(data.tokenizer)
    if data.prepare == "stdlib":
        target = Path(data.paths[0])
        if len(data.paths) != 1 or target.name != "stdlib":
            raise ConfigError(
                f"data.paths={list(data.paths)}: data.prepare=stdlib makes one data set named "
                "stdlib, as in data.paths=[FOLDER/stdlib]"
            )
        if not target.with_name("stdlib.idx").exists():
            prepare_stdlib(target.parent, data.tokenizer)
    parts = [check_indexed(p, tokenizer, config.model.vocab_size, scan=scan) for p in data.paths]
    for part in parts:
        _check_split(list(data.split), part, config.train.eval_batches > 0)
        if data.packing != "none":
            _check_documents(config, part)
    return Corpus(tokenizer, tuple(parts))


def _check_split(shares: list[float], part: IndexedInfo, validates: bool) -> None:
    """Every split that has a share gets a document: megatron-core would search for one for ever."""
    if len(shares) != 3 or not all(0 <= share < math.inf for share in shares) or not shares[0]:
        raise ConfigError(
            f"data.split={shares}: needs three shares (training, validation, test), the first "
            "positive, as in data.split=[98,2,0]"
        )
    if validates and shares[1] == 0:
        raise ConfigError(
            f"data.split={shares} leaves nothing to validate on: give the second share more, "
            "or set train.eval_batches=0"
        )
    for name, first, last in _split_bounds(shares, part.sequences):
        if first >= last:
            raise DataError(
                f"data.split={shares} leaves no {name} document of the {part.sequences} in "
                f"{part.prefix}: change the shares, or cut the corpus into more documents"
            )


def _check_documents(config: Config, part: IndexedInfo) -> None:
    """Every split that is used has a document that predicts something."""
    data, validates = config.data, config.train.eval_batches > 0
    used = {"training", "validation"} if validates else {"training"}
    corpus = IndexedDataset(part.prefix)
    for name, first, last in _split_bounds(list(data.split), part.sequences):
        if name in used and corpus.sequence_lengths[first:last].max() < 2:
            raise DataError(
                f"none of the {last - first} {name} documents of {part.prefix} has 2 tokens, and "
                f"data.packing={data.packing} predicts tokens from others of the same document: "
                "make longer documents (tools/preprocess_data.py --document file), change "
                "data.split, or set data.packing=none"
            )


def _split_bounds(shares: list[float], sequences: int) -> list[tuple[str, int, int]]:
    """Name, first and last (exclusive) sequence of each split that has a share."""
    # megatron-core's own arithmetic: another order of additions rounds ties otherwise.
    matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(_split_text(shares)))
    return [
        (name, *(round(bound * float(sequences)) for bound in part_of))
        for name, part_of in zip(("training", "validation", "test"), matrix, strict=True)
        if part_of is not None
    ]


def _split_text(shares: Iterable[float]) -> str:
    """The form that megatron-core reads; it takes an exponent for another number."""
    return ",".join(numpy.format_float_positional(share) for share in shares)


@dataclass(frozen=True)
class Datasets:
    """`train` and `valid` sequences; `valid` is None where no validation was asked for."""

    train: Any
    valid: Any | None


def build_datasets(config: Config, corpus: Corpus) -> Datasets:
    """megatron-core's datasets over `data.paths`, index files cached on disk.

    Sequences are cut from the stream of all documents, or are rows of packed documents where
    `data.packing` says so. A collective call: rank 0 writes the index files, then the others read
    them.

    Raises:
        DataError: the corpus cannot be cut into sequences of this length, or index files are
            damaged.
    """
    data, train = config.data, config.train
    cache = Path(data.cache) if data.cache else Path(data.paths[0]).parent / "cache"
    weights: list[float] | None = None
    if len(data.paths) > 1:
        weights = list(data.weights or [float(part.tokens) for part in corpus.parts])
    shared: dict[str, Any] = dict(
        random_seed=train.seed,
        sequence_length=train.context,
        blend=([str(path) for path in data.paths], weights),
        split=_split_text(data.split),
        path_to_cache=str(cache),
        tokenizer=corpus.tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    kind, settings = GPTDataset, GPTDatasetConfig(**shared)
    if data.packing != "none":
        kind = PackedDataset
        settings = PackedDatasetConfig(**shared, packing=data.packing, overlong=data.overlong)
    sizes = [train.steps * train.global_batch, train.eval_batches * train.global_batch, 0]
    try:
        train_set, valid_set, _ = BlendedMegatronDatasetBuilder(
            kind, sizes, lambda: True, settings
        ).build()
    except MegakdaError:
        raise
    except Exception as error:  # megatron-core raises bare exceptions here
        raise DataError(
            f"data.paths={list(data.paths)} cannot be cut into sequences of train.context="
            f"{train.context} tokens with data.split={list(data.split)}: "
            f"{error or type(error).__name__}; use a larger corpus, a shorter context or another "
            f"split, or delete {cache} if a killed run has left broken index files there"
        ) from error
    return Datasets(train_set, valid_set if sizes[1] else None)


class _Positions(torch.utils.data.Sampler[list[int]]):
    """Sequence numbers of this rank's micro-batches, from `consumed` on, without end."""

    def __init__(self, consumed: int, micro_batch: int, rank: int, ranks: int):
        self.consumed, self.micro_batch, self.rank, self.ranks = consumed, micro_batch, rank, ranks

    def __iter__(self) -> Iterator[list[int]]:
        start = self.consumed + self.rank * self.micro_batch
        while True:
            yield list(range(start, start + self.micro_batch))
            start += self.ranks * self.micro_batch


class _Wrapped(torch.utils.data.Dataset[Any]):
    """A dataset that starts over after its last sequence."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index % len(self.dataset)]


def order_probe(dataset: Any, consumed: int) -> str:
    """A fingerprint of which sequences the first `consumed` ones were: equal for the same order.

    megatron-core shuffles all epochs that a run needs together, so another `train.steps`, split,
    seed or corpus can change the order. Three sequences tell.
    """
    digest = hashlib.sha256()
    for position in sorted({0, consumed // 2, max(0, consumed - 1)}):
        digest.update(dataset[position % len(dataset)]["tokens"].numpy().tobytes())
    return digest.hexdigest()[:16]


def micro_batches(
    dataset: Any, consumed: int, micro_batch: int, rank: int, ranks: int, num_workers: int = 0
) -> Iterator[Batch]:
    """This data-parallel rank's micro-batches after `consumed` sequences of the whole run.

    Micro-batch i of rank r holds sequences consumed + (i * ranks + r) * micro_batch and following,
    so a global batch is the same set of sequences however many ranks share it.

    Yields:
        tokens, labels, position_ids [micro_batch, context] int64 and loss_mask of the same shape,
        float, 0 where a label is padding. Of packed documents besides: padding_mask of the same
        shape, bool, True at padding, and cu_seqlens [documents + 1] int32, on the CPU, the bounds
        of documents in the flattened stream of micro_batch * context positions. Every row ends
        one, and the padding of a row is one of its own.
    """
    loader = torch.utils.data.DataLoader(
        _Wrapped(dataset),
        batch_sampler=_Positions(consumed, micro_batch, rank, ranks),
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
    )
    return iter(loader)
