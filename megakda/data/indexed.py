"""megatron-core's indexed format, read and written without importing megatron-core.

A data set is ``PREFIX.bin`` (token ids, nothing else) and ``PREFIX.idx``: a 34-byte header, then
the length of every sequence (int32), its byte offset in the .bin (int64), and the sequence numbers
at which documents start, plus one for the end (int64). megakda adds ``PREFIX.json``, which says
with which tokenizer the ids were made.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megakda.data.tokenizer import Tokenizer, some
from megakda.errors import DataError

SIDECAR_FORMAT = 1
_MARK = "megakda_format"
_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, np.dtype] = {
    1: np.dtype("uint8"),
    2: np.dtype("int8"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    6: np.dtype("<f8"),
    7: np.dtype("<f4"),
    8: np.dtype("<u2"),
}
_REQUIRED = ("fingerprint", "tokens", "documents", "bin_bytes", "max_token_id")
_BLOCK = 1 << 22  # tokens looked at together when a whole .bin is read
_AGAIN = "make it again with tools/preprocess_data.py --overwrite"


@dataclass(frozen=True)
class IndexedInfo:
    """What an .idx says about its .bin. Counts are of tokens, sequences and documents."""

    prefix: str
    dtype: np.dtype
    sequences: int
    documents: int
    tokens: int
    bin_bytes_expected: int


def answers_prefix(prefix: str | Path) -> str:
    """Prefix of the .bin and .idx that say which tokens of a data set are answers.

    They are of the same documents, with a uint8 per token: 1 for those of answers.
    """
    return f"{prefix}.answers"


def token_dtype(vocab_size: int) -> np.dtype:
    """The type that ids of a vocabulary are stored in: uint16 below 65500, else int32."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


def write_index(stream: BinaryIO, lengths: np.ndarray, dtype: np.dtype) -> None:
    """Writes an .idx for documents of one sequence each.

    Args:
        stream: where to write it.
        lengths: tokens of each document, in the order of the .bin; each below 2**31.
        dtype: type of the ids in the .bin.
    """
    code = next(c for c, d in _DTYPES.items() if d == dtype)
    lengths = np.ascontiguousarray(lengths, dtype="<i4")
    n = len(lengths)
    stream.write(_HEADER.pack(_MAGIC, _VERSION, code, n, n + 1))
    stream.write(lengths.tobytes())
    ends = np.cumsum(lengths, dtype="<i8") * dtype.itemsize
    stream.write(np.concatenate([np.zeros(min(n, 1), "<i8"), ends[:-1]]).tobytes())
    stream.write(np.arange(n + 1, dtype="<i8").tobytes())


def read_index(prefix: str | Path) -> IndexedInfo:
    """Reads and checks ``PREFIX.idx`` alone.

    Raises:
        DataError: the file is missing, not an index of tokens, cut short, or inconsistent.
    """
    prefix = str(prefix)
    path = Path(prefix + ".idx")
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            head = f.read(_HEADER.size)
    except OSError as e:
        raise _missing(prefix, [".idx"], e) from e

    def garbled(what: str) -> DataError:
        return DataError(
            f"{path} {what}, so it is not a usable index of data set {prefix!r}: {_AGAIN}, or "
            "correct data.paths"
        )

    if len(head) < _HEADER.size or not head.startswith(_MAGIC):
        raise garbled(f"({size} bytes) does not start with megatron-core's index header")
    _, version, code, sequences, boundaries = _HEADER.unpack(head)
    if version != _VERSION:
        raise garbled(f"has version {version}, not {_VERSION}")
    dtype = _DTYPES.get(code)
    if dtype is None or dtype.kind not in "iu":
        held = f"type code {code}" if dtype is None else f"{dtype}"
        raise garbled(f"says that the .bin holds {held}, which is no type of token ids")
    plain = _HEADER.size + 12 * sequences + 8 * boundaries
    if size not in (plain, plain + sequences):  # multimodal sets add one byte per sequence
        raise garbled(f"is {size} bytes long where its header means {plain}")
    if sequences == 0 or boundaries == 0:
        return IndexedInfo(prefix, dtype, sequences, max(boundaries - 1, 0), 0, 0)
    raw = np.memmap(path, mode="r", dtype=np.uint8)
    at = _HEADER.size
    lengths = raw[at : at + 4 * sequences].view("<i4")
    at += 4 * sequences
    pointers = raw[at : at + 8 * sequences].view("<i8")
    at += 8 * sequences
    documents = raw[at : at + 8 * boundaries].view("<i8")
    if lengths.min() < 0 or pointers.min() < 0:
        raise garbled("holds a negative length or offset")
    if documents[0] != 0 or documents[-1] != sequences or np.any(np.diff(documents) < 0):
        raise garbled("holds document boundaries that do not cover its sequences in order")
    end = int((pointers + lengths.astype(np.int64) * dtype.itemsize).max())
    return IndexedInfo(
        prefix, dtype, sequences, boundaries - 1, int(lengths.sum(dtype=np.int64)), end
    )


def read_sidecar(prefix: str | Path) -> dict[str, Any] | None:
    """Reads ``PREFIX.json``; None where there is none, or where it is not megakda's.

    Raises:
        DataError: megakda wrote the file, but it is damaged or of a newer format.
    """
    path = Path(f"{prefix}.json")
    try:
        with path.open("rb") as f:
            # A raw data set called PREFIX.json may lie beside its tokens, and may be huge.
            if _MARK.encode() not in f.read(64):
                return None
            f.seek(0)
            data = json.loads(f.read())
        if data[_MARK] > SIDECAR_FORMAT:
            raise DataError(
                f"{path} has format {data[_MARK]}, and this megakda reads up to {SIDECAR_FORMAT}: "
                f"update megakda, or {_AGAIN}"
            )
        absent = [k for k in _REQUIRED if k not in data]
        if absent:
            raise ValueError(f"no {', '.join(absent)}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise DataError(f"{path} is damaged ({type(e).__name__}: {e}): {_AGAIN}") from e
    return data


def sidecar_bytes(data: dict[str, Any]) -> bytes:
    """The contents of a ``PREFIX.json`` for `data`."""
    return (json.dumps({_MARK: SIDECAR_FORMAT, **data}, indent=2) + "\n").encode()


def check_indexed(
    prefix: str | Path, tokenizer: Tokenizer, vocab_size: int, *, scan: bool = True
) -> IndexedInfo:
    """Checks that a data set is whole and fits the tokenizer and the model.

    Args:
        prefix: path without .bin or .idx, as in data.paths.
        tokenizer: the one that data.tokenizer names.
        vocab_size: model.vocab_size, in ids.
        scan: read the whole .bin for ids out of range where no PREFIX.json vouches for them.

    Raises:
        DataError: a file is missing, cut short, foreign or damaged; the ids were made with another
            tokenizer; or an id does not fit the model.
    """
    prefix = str(prefix)
    absent = [s for s in (".bin", ".idx") if not Path(prefix + s).is_file()]
    if absent:
        raise _missing(prefix, absent)
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"data.tokenizer={tokenizer.spec!r} has {tokenizer.vocab_size} ids, more than "
            f"model.vocab_size={vocab_size}: set model.vocab_size to at least "
            f"{tokenizer.vocab_size}, or choose another data.tokenizer"
        )
    info = read_index(prefix)
    actual = os.path.getsize(prefix + ".bin")
    if actual != info.bin_bytes_expected:
        what = "is cut short" if actual < info.bin_bytes_expected else "is not the one of its index"
        raise DataError(
            f"{prefix}.bin {what}: {prefix}.idx means {info.bin_bytes_expected} bytes and it has "
            f"{actual}: copy both files again, or {_AGAIN}"
        )
    if info.tokens == 0:
        raise DataError(f"data set {prefix!r} holds no tokens: {_AGAIN}, or correct data.paths")
    sidecar = read_sidecar(prefix)
    if sidecar is None:
        if scan:
            low, high = _id_range(info, vocab_size)
            _check_ids(prefix, low, high, vocab_size)
        return info
    found = (info.documents, info.tokens, actual)
    promised = (sidecar["documents"], sidecar["tokens"], sidecar["bin_bytes"])
    if found != promised:
        raise DataError(
            f"{prefix}.json describes (documents, tokens, .bin bytes) = {promised}, but the files "
            f"hold {found}: {_AGAIN}, or remove {prefix}.json if another tool wrote the tokens"
        )
    if sidecar["fingerprint"] != tokenizer.fingerprint:
        raise DataError(
            f"data set {prefix!r} was made with tokenizer {sidecar.get('tokenizer')!r} "
            f"(fingerprint {sidecar['fingerprint']}), not with data.tokenizer={tokenizer.spec!r} "
            f"({tokenizer.fingerprint}): set data.tokenizer to the one it was made with, or "
            f"{_AGAIN}"
        )
    _check_ids(prefix, 0, sidecar["max_token_id"], vocab_size)
    return info


def check_answers(info: IndexedInfo, key: str = "data") -> None:
    """Checks that the answers of a data set are marked, and that the marks are of these documents.

    Args:
        info: of the data set, checked.
        key: of the settings that ask for it.

    Raises:
        DataError: marks are missing, cut short, or of other documents.
    """
    prefix = answers_prefix(info.prefix)
    absent = [prefix + s for s in (".bin", ".idx") if not Path(prefix + s).is_file()]
    if absent:
        raise DataError(
            f"data set {info.prefix!r} does not say which tokens are answers (no "
            f"{' and '.join(absent)}): make it from conversations with tools/preprocess_data.py "
            f"--chat, or set {key}.loss=all"
        )
    marks = read_index(prefix)
    actual = os.path.getsize(prefix + ".bin")
    same = marks.sequences == info.sequences and _lengths(marks) == _lengths(info)
    if marks.dtype != np.uint8 or not same or actual != marks.bin_bytes_expected:
        raise DataError(
            f"{prefix}.bin and .idx ({actual} bytes of {marks.dtype} for {marks.sequences} "
            f"documents) do not mark the {info.tokens} tokens of the {info.sequences} documents of "
            f"{info.prefix!r}: copy both pairs of files again, or make the data set again with "
            "tools/preprocess_data.py --chat --overwrite"
        )


def _lengths(info: IndexedInfo) -> bytes:
    with open(info.prefix + ".idx", "rb") as f:
        f.seek(_HEADER.size)
        return f.read(4 * info.sequences)


def unigram_entropy(
    prefix: str | Path, tokens_from: int = 0, tokens_to: int | None = None
) -> float:
    """Entropy of the token frequencies: the loss of a model that knows nothing else.

    Args:
        prefix: path of the data set without .bin or .idx.
        tokens_from: first token of the .bin to count.
        tokens_to: end of the range, exclusive; None: the end of the data set.

    Returns:
        Nats per token.

    Raises:
        DataError: the data set is missing or damaged, or the range is empty or outside it.
    """
    info = read_index(prefix)
    end = info.tokens if tokens_to is None else tokens_to
    if not 0 <= tokens_from < end <= info.tokens:
        raise DataError(
            f"tokens_from={tokens_from}, tokens_to={tokens_to} is not a range inside the "
            f"{info.tokens} tokens of {info.prefix!r}"
        )
    counts = np.zeros(0, dtype=np.int64)
    for block in _blocks(info, tokens_from, end):
        new = np.bincount(block)
        if len(new) > len(counts):
            new[: len(counts)] += counts
            counts = new
        else:
            counts[: len(new)] += new
    p = counts[counts > 0] / (end - tokens_from)
    return float(-(p * np.log(p)).sum())


def _blocks(info: IndexedInfo, start: int, end: int) -> Iterator[np.ndarray]:
    try:
        with open(info.prefix + ".bin", "rb") as f:
            f.seek(start * info.dtype.itemsize)
            while start < end:
                want = min(_BLOCK, end - start)
                block = np.fromfile(f, dtype=info.dtype, count=want)
                if len(block) < want:
                    raise DataError(
                        f"{info.prefix}.bin ends after {start + len(block)} of {info.tokens} "
                        f"tokens: {_AGAIN}"
                    )
                yield block
                start += want
    except OSError as e:
        raise _missing(info.prefix, [".bin"], e) from e


def _id_range(info: IndexedInfo, vocab_size: int) -> tuple[int, int]:
    limits = np.iinfo(info.dtype)
    if limits.min >= 0 and limits.max < vocab_size:
        return 0, int(limits.max)  # no id of this type can be out of range
    low, high = math.inf, -math.inf
    for block in _blocks(info, 0, info.bin_bytes_expected // info.dtype.itemsize):
        low, high = min(low, int(block.min())), max(high, int(block.max()))
    return int(low), int(high)


def _check_ids(prefix: str, low: int, high: int, vocab_size: int) -> None:
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        raise DataError(
            f"data set {prefix!r} holds token id {bad}, outside 0..{vocab_size - 1}: set "
            f"model.vocab_size above {max(high, 0)}, or point data.paths at a set made with "
            "data.tokenizer"
        )


def _missing(prefix: str, absent: list[str], error: OSError | None = None) -> DataError:
    """The error for files that are not there, with what lies nearby."""
    path = Path(prefix)
    what = " and ".join(prefix + s for s in absent)
    if error is not None and not isinstance(error, FileNotFoundError):
        return DataError(f"cannot read {what} ({error.strerror}): correct data.paths or its rights")
    fix = "correct data.paths, or make the data set with tools/preprocess_data.py"
    if path.suffix in (".bin", ".idx") and path.exists():
        return DataError(
            f"data.paths entry {prefix!r} is a file: give the prefix without suffix, "
            f"{str(path.with_suffix(''))!r}"
        )
    folder = path.parent
    if not folder.is_dir():
        return DataError(f"data set {prefix!r}: the folder {folder} does not exist: {fix}")
    found = (str(p.with_suffix("")) for p in folder.glob("*.idx"))
    sets = sorted(p for p in found if not p.endswith(answers_prefix("")))
    if sets:
        near = f"data sets there: {some(sets)}"
    else:
        names = sorted(p.name for p in folder.iterdir())
        near = f"{folder} holds {some(names)}"
    return DataError(f"data set {prefix!r} is incomplete: no {what} ({near}): {fix}")
