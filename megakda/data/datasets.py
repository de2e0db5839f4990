"""Training and validation sequences from megatron-core's indexed datasets, at a resumable position.

Which sequences a step trains on depends on the seed, the data, the number of sequences consumed
before and, where a run repeats its corpora, on its length; never on how the ranks are laid out.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
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

from megakda.config import Config, derive
from megakda.config.schema import DataConfig
from megakda.config.stages import read_stages
from megakda.config.timetable import Stream, Timetable
from megakda.data.chat_corpus import prepare_stdlib_chat
from megakda.data.corpus import prepare_stdlib
from megakda.data.indexed import IndexedInfo, check_answers, check_indexed
from megakda.data.packed_dataset import Batch, PackedDataset, PackedDatasetConfig, collate
from megakda.data.tokenizer import Tokenizer, load_tokenizer
from megakda.errors import ConfigError, DataError, MegakdaError
from megakda.runtime.distributed import world_size


@dataclass(frozen=True)
class Corpus:
    """Checked data sets and the tokenizer that made them."""

    tokenizer: Tokenizer
    parts: dict[str, IndexedInfo]  # by path


def prepare_data(
    config: Config, scan: bool = True, streams: Iterable[Stream] | None = None
) -> Corpus:
    """Loads the tokenizer, makes the data set where the recipe asks for it, and checks every file.

    Needs no process group; one rank calls it before the others start to wait for each other.

    Args:
        scan: also read the tokens of data sets that do not say what their largest id is.
        streams: what the run still reads; None: the data of all stages.

    Raises:
        ConfigError: no data paths, or weights or a split that do not fit them.
        DataError: files that are missing, torn, made with another tokenizer, without the marks of
            answers that data.loss asks for, or too few or too short documents.
    """
    tokenizer = load_tokenizer(config.data.tokenizer)
    if streams is None:
        needed = [(stage.key("data"), stage.data) for stage in read_stages(config)]
    else:
        needed = [(stream.data_key, stream.data) for stream in streams]
    parts: dict[str, IndexedInfo] = {}
    for number, (key, data) in enumerate(needed):
        if any(data == before for _, before in needed[:number]):
            continue
        _check_settings(key, data)
        if data.prepare != "none":
            _prepare(key, data)
        for path in map(str, data.paths):
            if path not in parts:
                parts[path] = check_indexed(path, tokenizer, config.model.vocab_size, scan=scan)
            _check_split(key, data, parts[path], config.train.eval_batches > 0)
            if data.packing != "none":
                _check_documents(key, data, parts[path], config.train.eval_batches > 0)
            if data.loss == "answers":
                check_answers(parts[path], key)
    return Corpus(tokenizer, parts)


def _check_settings(key: str, data: DataConfig) -> None:
    if not data.paths:
        raise ConfigError(
            f"{key}.paths is empty (data={data.name}): list the prefixes that tools/"
            f"preprocess_data.py has written, as in {key}.paths=[corpus/a,corpus/b]"
        )
    if data.weights is not None and (
        len(data.weights) != len(data.paths)
        or not all(0 < weight < math.inf for weight in data.weights)
    ):
        raise ConfigError(
            f"{key}.weights={list(data.weights)}: needs one positive number for each of the "
            f"{len(data.paths)} {key}.paths; leave out paths that are not to be used"
        )


_PREPARES = {"stdlib": prepare_stdlib, "stdlib_chat": prepare_stdlib_chat}


def _prepare(key: str, data: DataConfig) -> None:
    name, target = data.prepare, Path(data.paths[0])
    if len(data.paths) != 1 or target.name != name:
        raise ConfigError(
            f"{key}.paths={list(data.paths)}: {key}.prepare={name} makes one data set named "
            f"{name}, as in {key}.paths=[FOLDER/{name}]"
        )
    if not target.with_name(f"{name}.idx").exists():
        _PREPARES[name](target.parent, data.tokenizer)


def _check_split(key: str, data: DataConfig, part: IndexedInfo, validates: bool) -> None:
    """Every split that has a share gets a document: megatron-core would search for one for ever."""
    shares = list(data.split)
    if len(shares) != 3 or not all(0 <= share < math.inf for share in shares) or not shares[0]:
        raise ConfigError(
            f"{key}.split={shares}: needs three shares (training, validation, test), the first "
            f"positive, as in {key}.split=[98,2,0]"
        )
    if validates and shares[1] == 0:
        raise ConfigError(
            f"{key}.split={shares} leaves nothing to validate on: give the second share more, "
            "or set train.eval_batches=0"
        )
    for name, first, last in _split_bounds(shares, part.sequences):
        if first >= last:
            raise DataError(
                f"{key}.split={shares} leaves no {name} document of the {part.sequences} in "
                f"{part.prefix}: change the shares, or cut the corpus into more documents"
            )


def _check_documents(key: str, data: DataConfig, part: IndexedInfo, validates: bool) -> None:
    """Every split that is used has a document that predicts something."""
    used = {"training", "validation"} if validates else {"training"}
    corpus = IndexedDataset(part.prefix)
    for name, first, last in _split_bounds(list(data.split), part.sequences):
        if name in used and corpus.sequence_lengths[first:last].max() < 2:
            raise DataError(
                f"none of the {last - first} {name} documents of {part.prefix} has 2 tokens, and "
                f"{key}.packing={data.packing} predicts tokens from others of the same document: "
                "make longer documents (tools/preprocess_data.py --document file), change "
                f"{key}.split, or set {key}.packing=none"
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
class StreamData:
    """`train` and `valid` sequences; `valid` is None where no validation was asked for."""

    train: Any
    valid: Any | None


@dataclass(frozen=True)
class Datasets:
    """What a run still reads, by the number of the stream."""

    streams: dict[int, StreamData]

    @property
    def train(self) -> Any:
        """Of the stream that is read first: the only one, unless stages change context or data."""
        return next(iter(self.streams.values())).train

    @property
    def valid(self) -> Any:
        """Of the same stream; None where a run does not validate."""
        return next(iter(self.streams.values())).valid


class StreamPositions:
    """How far a run has read each of its streams.

    Attributes:
        consumed: sequences of each stream, by its number.
        reordered: whether a stream that goes on has another order than in the checkpoint loaded.
        begun: numbers of the stages ahead whose data the run of the checkpoint loaded did not have.
    """

    def __init__(self, timetable: Timetable, datasets: Datasets):
        self._timetable, self._datasets = timetable, datasets
        self._names = [stream.identity for stream in timetable.streams]
        self.consumed = [0] * len(timetable.streams)
        self.reordered = False
        self.begun: list[int] = []

    def state_dict(self) -> dict[str, Any]:
        """Names, numbers and fingerprints, for the checkpoint."""
        return {"streams": self._names, "consumed": self.consumed, "data_order": self._order()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The counterpart of `state_dict`, also of a run with other streams.

        A stream goes on where it was, whatever its number. One whose name was not there takes the
        position of the one that had its number, if that is gone: its settings may be another way
        to write the same, and `reordered` tells where they are not.
        """
        # Checkpoints from before there were stages count one stream.
        consumed = state.get("consumed") or [state["sequences_consumed"]]
        order = state["data_order"] if "consumed" in state else {0: state["data_order"]}
        names = state.get("streams") or self._names[: len(consumed)]
        before: dict[int, int] = {}  # their number there by ours
        for n, name in enumerate(self._names):
            if name in names:
                before[n] = names.index(name)
            elif n < len(names) and names[n] not in self._names:
                before[n] = n
        self.consumed = [consumed[before[n]] if n in before else 0 for n in range(len(self._names))]
        self.begun = [
            stage.number
            for stage in self._timetable.stages
            if stage.stream not in before and stage.first_step + stage.steps > state["steps_done"]
        ]
        self.reordered = any(
            order.get(before[n], probe) != probe for n, probe in self._order().items()
        )

    def _order(self) -> dict[int, str]:
        """What tells the order of the sequences read so far, for each stream that goes on."""
        return {
            n: order_probe(data.train, self.consumed[n])
            for n, data in self._datasets.streams.items()
            if self.consumed[n]
        }


def build_datasets(
    config: Config, corpus: Corpus, streams: Mapping[int, Stream] | None = None
) -> Datasets:
    """megatron-core's datasets, one for each context and data that stages read.

    A collective call: rank 0 writes the index files, then the others read them.

    Args:
        streams: what the run still reads; None: everything.

    Raises:
        DataError: the corpus cannot be cut into sequences of this length, or index files are
            damaged.
    """
    if streams is None:
        streams = derive(config, world_size()).timetable.streams_from(0)
    return Datasets({n: _build_stream(config, corpus, stream) for n, stream in streams.items()})


def _build_stream(config: Config, corpus: Corpus, stream: Stream) -> StreamData:
    """Datasets over the stream's paths, index files cached on disk.

    Sequences are cut from the stream of all documents, or are rows of packed documents where
    `data.packing` says so.
    """
    data, train = stream.data, config.train
    cache = Path(data.cache) if data.cache else Path(data.paths[0]).parent / "cache"
    weights: list[float] | None = None
    if len(data.paths) > 1:
        tokens = [float(corpus.parts[str(path)].tokens) for path in data.paths]
        weights = list(data.weights or tokens)
    shared: dict[str, Any] = dict(
        random_seed=train.seed,
        sequence_length=stream.context,
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
        settings = PackedDatasetConfig(
            **shared, packing=data.packing, overlong=data.overlong, loss=data.loss
        )
    sizes = [stream.sequences, train.eval_batches * stream.batch, 0]
    try:
        train_set, valid_set, _ = BlendedMegatronDatasetBuilder(
            kind, sizes, lambda: True, settings
        ).build()
    except MegakdaError:
        raise
    except Exception as error:  # megatron-core raises bare exceptions here
        key = stream.data_key
        raise DataError(
            f"{key}.paths={list(data.paths)} cannot be cut into sequences of {stream.context_key}="
            f"{stream.context} tokens with {key}.split={list(data.split)}: "
            f"{error or type(error).__name__}; use a larger corpus, a shorter context or another "
            f"split, or delete {cache} if a killed run has left broken index files there"
        ) from error
    return StreamData(train_set, valid_set if sizes[1] else None)


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
        float, 0 where a label is padding or, with data.loss=answers, is not part of an answer. Of
        packed documents besides: padding_mask of the same shape, bool, True at padding, and
        cu_seqlens [documents + 1] int32, on the CPU, the bounds of documents in the flattened
        stream of micro_batch * context positions. Every row ends one, and the padding of a row is
        one of its own.
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
