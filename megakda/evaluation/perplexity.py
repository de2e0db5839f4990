"""Perplexity on a prepared corpus: the loss of training, over windows of the tokens."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from megakda.data.indexed import check_indexed, read_index, read_sidecar
from megakda.data.tokenizer import Tokenizer
from megakda.errors import ConfigError, DataError
from megakda.evaluation.protocol import Scorer

_TOGETHER = 1 << 15  # tokens handed to the engine at once


@dataclass(frozen=True)
class PerplexitySettings:
    """What to read, and with how much context.

    Attributes:
        context: tokens that are read to predict the last one of a window, as `train.context`.
        overlap: tokens of a window that the one before has predicted already, and that are read
            again as context alone. 0 is the validation of a training run.
        by_document: each document by itself, after an end-of-document token; else the stream of
            all of them, as training without packing reads it. The very first token of a stream is
            not predicted.
        first, last: documents first..last-1 of the corpus; None for the end.
        limit: tokens to predict at most; None for all.
    """

    context: int
    overlap: int = 0
    by_document: bool = False
    first: int = 0
    last: int | None = None
    limit: int | None = None

    def check(self) -> None:
        """Raises ConfigError for settings that cannot work."""
        if self.context < 1:
            raise ConfigError(f"context={self.context} must be at least 1 token")
        if not 0 <= self.overlap < self.context:
            raise ConfigError(
                f"overlap={self.overlap} must be in 0..{self.context - 1}, below context: windows "
                "move on by the difference"
            )
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"tokens={self.limit} must be at least 1")


@dataclass(frozen=True)
class Perplexity:
    """The result.

    Attributes:
        tokens: predicted.
        documents: read, whole or in part.
        nats, bits: mean loss per token.
        perplexity: exp(nats).
        text_bytes: UTF-8 bytes of the predicted text, without ends of documents, as the tokenizer
            decodes it.
        bits_per_byte: the loss of all predicted tokens over `text_bytes`; None without any.
        tokenizer_checked: whether the corpus says with which tokenizer it was made.
        seconds: of scoring.
    """

    tokens: int
    documents: int
    nats: float
    bits: float
    perplexity: float
    text_bytes: int
    bits_per_byte: float | None
    tokenizer_checked: bool
    seconds: float

    def __str__(self) -> str:
        per_byte = "" if self.bits_per_byte is None else f", {self.bits_per_byte:.4f} bits per byte"
        return (
            f"perplexity {self.perplexity:.4f}: {self.nats:.5f} nats or {self.bits:.5f} bits per "
            f"token{per_byte}; {self.tokens:,} tokens of {self.documents:,} documents in "
            f"{self.seconds:.1f} s"
        )


def windows(tokens: int, context: int, overlap: int = 0) -> Iterator[tuple[int, int, int]]:
    """How to predict every token but the first of a sequence.

    Yields:
        (start, first, end): read tokens start..end-1, at most context + 1, and count first..end-1.
    """
    first = 1
    while first < tokens:
        start = max(0, first - 1 - overlap)
        end = min(start + context + 1, tokens)
        yield start, first, end
        first = end


def corpus_perplexity(
    engine: Scorer,
    tokenizer: Tokenizer,
    vocab_size: int,
    prefix: str,
    settings: PerplexitySettings,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Perplexity:
    """Scores a corpus. Collective where the engine is.

    Args:
        engine: for sequences of `settings.context` + 1 tokens.
        vocab_size: of the model.
        prefix: of the corpus, without .bin or .idx.
        progress: called with the tokens predicted so far, and all that there are.

    Raises:
        ConfigError: settings that cannot work.
        DataError: a corpus that is missing, damaged, made with another tokenizer, or without
            anything to predict.
    """
    settings.check()
    check_indexed(prefix, tokenizer, vocab_size)
    corpus = _Corpus(prefix)
    documents = len(corpus.ends) - 1
    last = documents if settings.last is None else settings.last
    if not 0 <= settings.first < last <= documents:
        raise ConfigError(
            f"documents {settings.first}:{last} are no range of the {documents} of {prefix!r}"
        )
    chosen = corpus.ends[settings.first : last + 1]
    total = int(chosen[-1] - chosen[0]) - (0 if settings.by_document else 1)
    total = total if settings.limit is None else min(total, settings.limit)
    if total < 1:
        raise DataError(
            f"documents {settings.first}:{last} of {prefix!r} hold nothing to predict: name more"
        )
    begun, losses, done = time.monotonic(), [], 0
    counter = _TextBytes(tokenizer)
    for batch in _batches(_scored_windows(corpus.tokens, chosen, tokenizer.eod, settings), total):
        for (ids, new), scores in zip(batch, engine.score([ids for ids, _ in batch]), strict=True):
            losses.append(-math.fsum(score.logprob for score in scores[-new:] if score))
            counter.add(ids[-new:])
            done += new
        progress(done, total)
    nats, text_bytes = math.fsum(losses) / total, counter.total()
    reached = int(chosen[0]) + total + (0 if settings.by_document else 1)
    return Perplexity(
        tokens=total,
        documents=int(np.searchsorted(chosen, reached)),
        nats=nats,
        bits=nats / math.log(2),
        perplexity=math.exp(nats) if nats < 700 else math.inf,
        text_bytes=text_bytes,
        bits_per_byte=nats * total / math.log(2) / text_bytes if text_bytes else None,
        tokenizer_checked=read_sidecar(prefix) is not None,
        seconds=time.monotonic() - begun,
    )


class _Corpus:
    """All tokens of a corpus, not read yet, and where its documents end.

    Attributes:
        tokens: [tokens], mapped into memory.
        ends: [documents + 1], the first is 0.

    Raises:
        DataError: the documents do not lie one after the other.
    """

    def __init__(self, prefix: str):
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        info = read_index(prefix)
        index = IndexedDataset(prefix).index
        starts = np.concatenate([[0], np.cumsum(index.sequence_lengths, dtype=np.int64)])
        if not np.array_equal(starts[:-1] * info.dtype.itemsize, index.sequence_pointers):
            raise DataError(
                f"{prefix}.idx does not list its sequences in the order of the .bin: make the data "
                "set again with tools/preprocess_data.py"
            )
        self.tokens = np.memmap(f"{prefix}.bin", dtype=info.dtype, mode="r")
        self.ends = starts[index.document_indices]


def _scored_windows(
    tokens: np.ndarray, ends: np.ndarray, eod: int, settings: PerplexitySettings
) -> Iterator[tuple[list[int], int]]:
    """Token ids to read, and how many of them, at the end, to count."""
    stream = [(int(ends[0]), int(ends[-1]))]
    pieces = zip(ends[:-1], ends[1:], strict=True) if settings.by_document else stream
    for low, high in pieces:
        added = 1 if settings.by_document else 0  # the end of a document that comes before
        for start, first, end in windows(high - low + added, settings.context, settings.overlap):
            ids = tokens[max(low, low + start - added) : low + end - added].tolist()
            yield ([eod, *ids] if start < added else ids), end - first


def _batches(
    found: Iterator[tuple[list[int], int]], total: int
) -> Iterator[list[tuple[list[int], int]]]:
    """Windows in batches of some `_TOGETHER` tokens, until `total` are counted."""
    batch: list[tuple[list[int], int]] = []
    size = 0
    for ids, new in found:
        kept = min(new, total)
        batch.append((ids[: len(ids) - (new - kept)], kept))
        size, total = size + len(ids), total - kept
        if size >= _TOGETHER or not total:
            yield batch
            batch, size = [], 0
        if not total:
            return


class _TextBytes:
    """Counts the bytes of text that tokens decode to, a document at a time."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._open, self._done = tokenizer, list[int](), 0

    def add(self, ids: list[int]) -> None:
        for token in ids:
            if token == self._tokenizer.eod:
                self._close()
            else:
                self._open.append(token)

    def total(self) -> int:
        self._close()
        return self._done

    def _close(self) -> None:
        self._done += len(self._tokenizer.decode(self._open).encode())
        self._open = []
