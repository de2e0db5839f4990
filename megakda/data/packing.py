"""Packs documents into rows of one context each: the algorithms, and their result on disk.

A document of n tokens has n - 1 positions, one per token that has a successor: position i predicts
token i + 1. A row holds pieces of documents side by side, `train.context` positions at most; what
is left is padding. Best-fit decreasing packing is that of Ding et al. 2024, "Fewer Truncations
Improve Language Modeling" (arXiv 2404.10830).

Every epoch shuffles the documents anew, by the seed and its number alone, and cuts them into
windows. A window is packed on its own and its rows are shuffled, so the parts of a long document
lie apart, memory is that of a window beside the index, and the rows of a short run are the first
ones of a longer run.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from megakda.errors import DataError

INDEX_FORMAT = 1
"""Goes up with any change of the algorithms or of the files: part of the key of cached indexes."""

WINDOW_DOCUMENTS = 1 << 16
WINDOW_ROWS = (1 << 8, 1 << 16)
"""Documents of a window, and the rows that they fill. Long ones end a window early, so that it fits
in memory; of short ones it takes more, because the last row of a window is seldom full."""


@dataclass(frozen=True)
class PackedRows:
    """Which piece of which document each row holds.

    Pickles as the name of its files where it was loaded from some, so that workers map them too.
    """

    pieces: np.ndarray  # [pieces, 3] int32: document, its first position here, positions here
    starts: np.ndarray  # [rows + 1] int64: row r holds pieces[starts[r]:starts[r + 1]]
    positions: int  # of all pieces together
    base: Path | None = None  # what the names of its files begin with

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __reduce__(self) -> tuple[Any, ...]:
        if self.base is not None:
            return load_rows, (self.base,)
        return PackedRows, (self.pieces, self.starts, self.positions)


def cut(positions: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cuts documents into parts of `context` positions, the last of each as short as it comes.

    Args:
        positions: [documents] integer, each at least 1.

    Returns:
        document, start and length of each part, [parts] int64, in the order of the documents.
    """
    positions = positions.astype(np.int64)
    parts = -(-positions // context)
    document = np.repeat(np.arange(len(positions)), parts)
    first_part = np.cumsum(parts) - parts
    start = (np.arange(len(document)) - first_part[document]) * context
    return document, start, np.minimum(positions[document] - start, context)


def next_fit(
    lengths: np.ndarray, context: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Places items into rows in their order, each behind the one before it if there is room.

    An item longer than a row begins in what is left of the open row, however little, and goes on
    in the rows that follow; it is the only kind that is cut.

    Args:
        lengths: [items] integer, each at least 1.

    Returns:
        item, start in it, length and row of each piece, [pieces] int64, rows ascending from 0.
    """
    pieces: list[tuple[int, int, int, int]] = []
    row, room = -1, 0
    for item, left in enumerate(lengths.tolist()):
        if room < left <= context:
            row, room = row + 1, context
        start = 0
        while left:
            if not room:
                row, room = row + 1, context
            length = min(left, room)
            pieces.append((item, start, length, row))
            start, left, room = start + length, left - length, room - length
    table = np.array(pieces, dtype=np.int64).reshape(-1, 4)
    return table[:, 0], table[:, 1], table[:, 2], table[:, 3]


def best_fit(lengths: np.ndarray, context: int) -> np.ndarray:
    """Best-fit decreasing: the longest item first, into the row that it leaves the least room in.

    Rows are kept by how much room they have. Items get shorter, so rows with enough room for one
    item have enough for all later ones, and the fullest of them is the top of a heap. Items of one
    length are placed together: the fullest row that takes one is still the fullest that takes the
    next. O(n log context), and far fewer steps where lengths repeat.

    Args:
        lengths: [items] integer, 1 to `context`.

    Returns:
        The row of each item, [items] int64; rows are numbered from 0 as they were opened.
    """
    sizes, counts = np.unique(lengths, return_counts=True)
    assert not len(sizes) or (sizes[0] > 0 and sizes[-1] <= context)
    rows_with: defaultdict[int, list[int]] = defaultdict(list)  # by room; in a heap if not empty
    enough: list[int] = []  # heap: rooms that take an item of this size
    too_little: list[int] = []  # heap of the others, negated: the largest is the first to return
    rows = 0
    placed: list[int] = []  # rows of the items, longest first
    for size, items in zip(reversed(sizes.tolist()), reversed(counts.tolist()), strict=True):
        while too_little and -too_little[0] >= size:
            heappush(enough, -heappop(too_little))
        while items:
            if not enough:
                opened = -(-items // (context // size))
                rows_with[context] = list(range(rows, rows + opened))
                rows += opened
                enough.append(context)
            room = enough[0]
            candidates = rows_with[room]
            each = min(room // size, items)
            used = min(len(candidates), items // each)
            taken = candidates[-used:]
            del candidates[-used:]
            if not candidates:
                heappop(enough)
            placed.extend(row for row in taken for _ in range(each))
            items -= used * each
            room -= each * size
            if room:
                if not rows_with[room]:
                    heappush(enough, room) if room >= size else heappush(too_little, -room)
                rows_with[room] += taken
    row_of = np.empty(len(lengths), np.int64)
    row_of[np.argsort(-lengths.astype(np.int64), kind="stable")] = placed
    return row_of


def pack_window(
    positions: np.ndarray, context: int, packing: str, overlong: str
) -> tuple[np.ndarray, np.ndarray]:
    """Packs some documents into rows.

    Args:
        positions: [documents] integer, each at least 1.
        packing: `documents` (next-fit) or `best_fit`.
        overlong: what becomes of documents longer than a row: `split` or, with next-fit, `carry`.

    Returns:
        Pieces [pieces, 3] int64 (document, start, length) and the row of each, [pieces] int64;
        every row from 0 on has at least one.
    """
    if packing == "documents" and overlong == "carry":
        *piece, row = next_fit(positions, context)
        return np.stack(piece, axis=1), row
    assert overlong == "split", (packing, overlong)
    part = np.stack(cut(positions, context), axis=1)
    if packing == "best_fit":
        return part, best_fit(part[:, 2], context)
    assert packing == "documents", packing
    *_, row = next_fit(part[:, 2], context)  # none is longer than a row, so none is cut
    return part, row


def pack_epochs(
    tokens: np.ndarray,
    documents: np.ndarray,
    context: int,
    packing: str,
    overlong: str,
    seed: int,
    rows: int | None = None,
) -> PackedRows:
    """As many rows as asked for, epoch after epoch; in each epoch every position comes once.

    Args:
        tokens: [documents] integer, the tokens of each; documents of fewer than 2 predict nothing
            and are left out.
        documents: [documents] integer, what to call each document in the pieces.
        packing, overlong: as in `pack_window`.
        seed: 0 to 2**32 - 1.
        rows: how many rows; None: those of one epoch.

    Raises:
        DataError: rows are asked for and no document has 2 tokens.
    """
    usable = np.flatnonzero(tokens >= 2)
    if rows != 0 and not len(usable):
        raise DataError(f"none of its {len(tokens)} documents has 2 tokens or more")
    pieces: list[np.ndarray] = [np.empty((0, 3), np.int32)]
    sizes: list[np.ndarray] = [np.zeros(1, np.int64)]  # pieces of each row
    made = 0
    for epoch in count():
        if made >= (1 if rows is None else rows):
            break
        # RandomState, because numpy promises its numbers to stay the same for ever.
        random = np.random.RandomState([seed, epoch])
        order = random.permutation(usable)
        for window in _windows(tokens, order, context):
            piece, row = pack_window(
                tokens[window].astype(np.int64) - 1, context, packing, overlong
            )
            row = random.permutation(row.max() + 1)[row]
            piece[:, 0] = documents[window[piece[:, 0]]]
            pieces.append(piece[np.argsort(row, kind="stable")].astype(np.int32))
            sizes.append(np.bincount(row))
            made += len(sizes[-1])
            if rows is not None and made >= rows:
                break
    starts = np.cumsum(np.concatenate(sizes))
    if rows is not None:
        starts = starts[: rows + 1]
    table = np.concatenate(pieces)[: starts[-1]]
    return PackedRows(table, starts, int(table[:, 2].sum(dtype=np.int64)))


def _windows(tokens: np.ndarray, order: np.ndarray, context: int) -> Iterator[np.ndarray]:
    """Slices of `order`, whose sizes depend on nothing that lies behind them."""
    least, most = (rows * context for rows in WINDOW_ROWS)
    first = last = 0
    while first < len(order):
        filled = 0
        while last < len(order) and filled < least:
            step = order[last : last + WINDOW_DOCUMENTS]
            total = np.cumsum(tokens[step] - 1, dtype=np.int64)
            step_length = min(int(np.searchsorted(total, most)) + 1, len(step))
            filled += int(total[step_length - 1])
            last += step_length
        yield order[first:last]
        first = last


_PARTS = ("pieces.npy", "starts.npy", "about.json")
"""What the names of an index's files end with, in the order in which they are written."""


def rows_are_saved(base: Path) -> bool:
    """Whether all files of an index are there; each one appears under its name when it is whole."""
    return all(_file(base, part).is_file() for part in _PARTS)


def save_rows(base: Path, packed: PackedRows, made_of: str) -> None:
    """Writes an index. Whoever is killed meanwhile leaves no index that `load_rows` would take.

    Args:
        base: what the names of its files begin with, unique to all that the rows depend on.
        made_of: what that is, for people who look into the cache.

    Raises:
        DataError: the files cannot be written.
    """
    about = {
        "format": INDEX_FORMAT,
        "rows": len(packed),
        "pieces": len(packed.pieces),
        "positions": packed.positions,
        "made_of": made_of,
    }
    contents = (packed.pieces, packed.starts, about)
    # A name of its own: another run may be writing the same index.
    partial = base.with_name(f"{base.name}-{uuid.uuid4().hex}.partial")
    try:
        base.parent.mkdir(parents=True, exist_ok=True)
        for part, content in zip(_PARTS, contents, strict=True):
            with partial.open("wb") as stream:
                if isinstance(content, np.ndarray):
                    np.save(stream, content, allow_pickle=False)
                else:
                    stream.write((json.dumps(content, indent=2) + "\n").encode())
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(_file(base, part))
    except OSError as error:
        raise DataError(
            f"the index of packed rows cannot be written to {base.parent} ({error.strerror}): set "
            "data.cache to a folder with free space that can be written"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def load_rows(base: Path) -> PackedRows:
    """Maps an index into memory.

    Raises:
        DataError: files are missing, cut short, or do not belong together.
    """
    try:
        about = json.loads(_file(base, "about.json").read_bytes())
        # Plain arrays over the mapped memory: slices of numpy.memmap are slow.
        pieces, starts = (
            np.asarray(np.load(_file(base, part), mmap_mode="r", allow_pickle=False))
            for part in _PARTS[:2]
        )
        promised = (about["format"], about["rows"] + 1, about["pieces"])
        found = (INDEX_FORMAT, len(starts), int(starts[-1]))
        if promised != found or starts[0] != 0 or pieces.shape != (found[2], 3):
            raise ValueError(f"(format, rows + 1, pieces) = {promised} expected, {found} found")
        return PackedRows(pieces, starts, int(about["positions"]), base)
    except (OSError, EOFError, ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(
            f"the index of packed rows {base}-*.npy is damaged or incomplete "
            f"({type(error).__name__}: {error}): delete {base}-* and start again; with several "
            "nodes, data.cache has to be on a file system that all of them share"
        ) from error


def _file(base: Path, part: str) -> Path:
    return base.with_name(f"{base.name}-{part}")
