"""Which piece of which document lies in which row, and the files that say so."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import megakda
from megakda.data import packing
from megakda.data.packing import (
    PackedRows,
    best_fit,
    load_rows,
    pack_epochs,
    pack_window,
    rows_are_saved,
    save_rows,
)
from megakda.errors import DataError

MODES = [("documents", "split"), ("documents", "carry"), ("best_fit", "split")]


def pack(tokens: list[int] | np.ndarray, context: int, mode: tuple[str, str], **more) -> PackedRows:
    """Documents are called by their numbers."""
    tokens = np.asarray(tokens, dtype=np.int32)
    documents = np.arange(len(tokens), dtype=np.int32)
    return pack_epochs(tokens, documents, context, *mode, **{"seed": 1, **more})


def rows_of(packed: PackedRows) -> list[list[tuple[int, int, int]]]:
    """The (document, start, length) of each row."""
    bounds = packed.starts.tolist()
    pieces = [tuple(piece) for piece in packed.pieces.tolist()]
    return [pieces[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]


def check_epoch(rows: list[list[tuple[int, int, int]]], tokens: list[int], context: int) -> None:
    """Each position of each document once, in rows that are neither empty nor too long."""
    parts = Counter[tuple[int, int]]()
    for row in rows:
        assert 0 < sum(length for *_, length in row) <= context
        for document, start, length in row:
            assert length > 0
            parts.update((document, start + i) for i in range(length))
    expected = {(d, i) for d, n in enumerate(tokens) for i in range(n - 1)}
    assert parts.keys() == expected
    assert all(times == 1 for times in parts.values())


# The lengths at which something happens: none, one and two tokens, full rows, many rows.
lengths = st.lists(st.integers(0, 3) | st.integers(0, 20) | st.integers(0, 120), max_size=40)


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=150, deadline=None)
@given(
    tokens=lengths.filter(lambda tokens: max(tokens, default=0) > 1),
    context=st.integers(2, 16),
    window=st.sampled_from([1, 3, 1000]),
)
def test_each_position_comes_once_per_epoch(mode, tokens, context, window):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "WINDOW_DOCUMENTS", window)
        patch.setattr(packing, "WINDOW_ROWS", (2, 5))
        epoch = pack(tokens, context, mode)
        check_epoch(rows_of(epoch), tokens, context)
        assert epoch.positions == sum(max(0, n - 1) for n in tokens)
        # Two epochs and a bit of the third, each of them whole.
        rows = 2 * len(epoch) + len(epoch) // 2 + 1
        several = pack(tokens, context, mode, rows=rows)
        check_epoch(rows_of(several)[: len(epoch)], tokens, context)
        assert len(several) == rows
        assert several.positions == several.pieces[:, 2].sum()


@pytest.mark.parametrize("mode", MODES)
def test_every_epoch_is_whole_and_in_its_own_order(mode):
    tokens = [5] * 40  # 4 positions, so that any two are 8, and every epoch has as many rows
    epoch = pack(tokens, 8, mode)
    several = rows_of(pack(tokens, 8, mode, rows=3 * len(epoch)))
    epochs = [several[i * len(epoch) : (i + 1) * len(epoch)] for i in range(3)]
    for rows in epochs:
        check_epoch(rows, tokens, 8)
    assert epochs[0] == rows_of(epoch)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("mode", MODES)
def test_a_shorter_run_has_the_first_rows_of_a_longer_one(mode, monkeypatch):
    monkeypatch.setattr(packing, "WINDOW_DOCUMENTS", 16)
    monkeypatch.setattr(packing, "WINDOW_ROWS", (4, 64))
    tokens = np.random.default_rng(0).integers(0, 60, 100)
    full = rows_of(pack(tokens, 20, mode, rows=500))
    assert len(rows_of(pack(tokens, 20, mode))) < 250  # more than one epoch
    for rows in (0, 1, 37, 250, 499):
        assert rows_of(pack(tokens, 20, mode, rows=rows)) == full[:rows]
    assert rows_of(pack(tokens, 20, mode, rows=500, seed=2)) != full


def test_next_fit_opens_a_row_where_a_document_does_not_fit():
    pieces, row = pack_window(np.array([3, 4, 1, 5, 8, 2]), 8, "documents", "split")
    assert pieces.tolist() == [[n, 0, size] for n, size in enumerate([3, 4, 1, 5, 8, 2])]
    assert row.tolist() == [0, 0, 0, 1, 2, 3]


def test_an_overlong_document_is_split_into_parts_of_a_row():
    pieces, row = pack_window(np.array([3, 20, 3, 16]), 8, "documents", "split")
    assert pieces.tolist() == [
        *([0, 0, 3], [1, 0, 8], [1, 8, 8], [1, 16, 4], [2, 0, 3]),
        *([3, 0, 8], [3, 8, 8]),
    ]
    assert row.tolist() == [0, 1, 2, 3, 3, 4, 5]


def test_an_overlong_document_is_carried_over():
    """It fills the open row and goes on; one that fits a row is never cut."""
    pieces, row = pack_window(np.array([3, 20, 3, 3, 16, 8]), 8, "documents", "carry")
    assert pieces.tolist() == [
        *([0, 0, 3], [1, 0, 5], [1, 5, 8], [1, 13, 7]),
        *([2, 0, 3], [3, 0, 3], [4, 0, 2], [4, 2, 8], [4, 10, 6], [5, 0, 8]),
    ]
    assert row.tolist() == [0, 0, 1, 2, 3, 3, 3, 4, 5, 6]


def test_best_fit_takes_whole_rows_of_an_overlong_document_first():
    pieces, row = pack_window(np.array([3, 20, 4]), 8, "best_fit", "split")
    by_row: dict[int, list[list[int]]] = {}
    for piece, number in zip(pieces.tolist(), row.tolist(), strict=True):
        by_row.setdefault(number, []).append(piece)
    assert sorted(by_row.values()) == [
        [[0, 0, 3]],
        [[1, 0, 8]],
        [[1, 8, 8]],
        [[1, 16, 4], [2, 0, 4]],
    ]


def slow_best_fit(sizes: list[int], context: int) -> list[int]:
    """The room that is left in each row, by the definition of the algorithm."""
    rooms: list[int] = []
    for size in sorted(sizes, reverse=True):
        fits = [room for room in rooms if room >= size]
        if fits:
            rooms[rooms.index(min(fits))] -= size
        else:
            rooms.append(context - size)
    return sorted(rooms)


@settings(max_examples=300, deadline=None)
@given(st.data(), st.integers(1, 60))
def test_best_fit_is_best_fit_decreasing(data, context):
    sizes = data.draw(st.lists(st.integers(1, context) | st.integers(1, 3), max_size=80))
    sizes = [min(size, context) for size in sizes]
    row = best_fit(np.array(sizes, dtype=np.int32), context)
    used = np.bincount(row, weights=sizes).astype(int)
    assert sorted((context - used).tolist()) == slow_best_fit(sizes, context)


@pytest.mark.parametrize("context", [512, 2048, 8192])
@pytest.mark.parametrize("seed", [0, 1])
def test_how_full_rows_get(context, seed):
    """Log-normal document lengths, as those of web text: many short ones and a long tail."""
    tokens = 2 + np.random.default_rng(seed).lognormal(6.2, 1.2, 20_000).astype(np.int64)

    def share(mode: tuple[str, str]) -> float:
        packed = pack(tokens, context, mode)
        return packed.positions / (len(packed) * context)

    greedy, carried, best = (share(mode) for mode in MODES)
    assert greedy <= carried <= 1
    assert best >= greedy
    assert best > 0.99
    assert greedy > 0.75


def test_rows_of_a_long_document_lie_apart():
    """Its parts fill 100 rows of 200: in a batch of 8 neighbours about 4 are from it."""
    for mode in MODES:
        rows = rows_of(pack([1601, *[17] * 100], 16, mode))
        from_it = [row[0][0] == 0 for row in rows]
        assert sum(from_it) >= 99
        assert max(sum(from_it[i : i + 8]) for i in range(0, len(rows), 8)) < 8
        assert 25 < sum(from_it[:100]) < 75


def test_windows_of_short_documents_fill_rows_and_long_ones_stay_small(monkeypatch):
    monkeypatch.setattr(packing, "WINDOW_DOCUMENTS", 10)
    monkeypatch.setattr(packing, "WINDOW_ROWS", (4, 8))
    sizes = []
    original = packing.pack_window

    def spy(positions, context, *mode):
        sizes.append((len(positions), int(positions.sum()) / context))
        return original(positions, context, *mode)

    monkeypatch.setattr(packing, "pack_window", spy)
    pack([3] * 1000, 20, MODES[0])  # 2 positions: 10 documents are one row
    assert {documents for documents, _ in sizes} == {40}
    sizes.clear()
    pack([201] * 100, 20, MODES[0])  # each fills 10 rows
    assert {documents for documents, _ in sizes} == {1}
    sizes.clear()
    pack([21] * 100, 20, MODES[0])
    assert {rows for _, rows in sizes} == {8, 4}  # 8 rows, and the last window of the epoch


def test_documents_that_predict_nothing():
    with pytest.raises(DataError, match="none of its 3 documents has 2 tokens"):
        pack([0, 1, 1], 8, MODES[0], rows=5)
    assert len(pack([0, 1, 1], 8, MODES[0], rows=0)) == 0
    assert rows_of(pack([0, 2, 1], 8, MODES[2], rows=2)) == [[(1, 0, 1)]] * 2


def test_100_000_documents_pack_in_seconds():
    tokens = 2 + np.random.default_rng(0).lognormal(6.2, 1.2, 100_000).astype(np.int64)
    for mode in MODES:
        start = time.perf_counter()
        pack(tokens, 4096, mode)
        assert time.perf_counter() - start < 5  # measured: 0.1


@pytest.fixture
def packed() -> PackedRows:
    return pack(np.random.default_rng(0).integers(2, 50, 300), 32, MODES[2])


def test_what_is_saved_is_loaded(tmp_path, packed):
    base = tmp_path / "cache" / "some-name"
    assert not rows_are_saved(base)
    save_rows(base, packed, "a test")
    assert rows_are_saved(base)
    found = load_rows(base)
    assert np.array_equal(found.pieces, packed.pieces)
    assert np.array_equal(found.starts, packed.starts)
    assert (found.positions, len(found)) == (packed.positions, len(packed))
    assert (found.pieces.dtype, found.starts.dtype) == (np.int32, np.int64)
    assert not found.pieces.flags.owndata  # mapped
    assert len(list(base.parent.iterdir())) == 3
    # A worker that is sent the index opens the files itself.
    sent = pickle.dumps(found)
    assert len(sent) < 1000
    assert np.array_equal(pickle.loads(sent).pieces, packed.pieces)
    assert np.array_equal(pickle.loads(pickle.dumps(packed)).pieces, packed.pieces)


KILLED = """
import os, pathlib, signal, sys
import numpy as np
from megakda.data.packing import pack_epochs, save_rows

moment, syncs, original = int(sys.argv[2]), 0, os.fsync

def fsync(descriptor):
    global syncs
    syncs += 1
    if syncs == moment:
        os.truncate(descriptor, os.fstat(descriptor).st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    original(descriptor)

os.fsync = fsync
tokens = np.arange(2, 302)
save_rows(pathlib.Path(sys.argv[1]), pack_epochs(tokens, tokens, 32, "best_fit", "split", 1), "")
"""


@pytest.mark.parametrize("moment", [1, 2, 3])
def test_a_killed_save_leaves_no_index(tmp_path, packed, moment):
    base = tmp_path / "index"
    command = [sys.executable, "-c", KILLED, str(base), str(moment)]
    environment = {**os.environ, "PYTHONPATH": str(Path(megakda.__file__).parents[1])}
    assert subprocess.run(command, env=environment).returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == moment  # whole files before it, and a torn one
    assert not rows_are_saved(base)
    with pytest.raises(DataError, match="damaged or incomplete"):
        load_rows(base)
    save_rows(base, packed, "")
    assert np.array_equal(load_rows(base).pieces, packed.pieces)


@pytest.mark.parametrize("part", ["pieces.npy", "starts.npy", "about.json"])
def test_damaged_files_are_refused(tmp_path, packed, part):
    base = tmp_path / "index"
    save_rows(base, packed, "")
    file = tmp_path / f"index-{part}"
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:-8], b""):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"{base}.*damaged.*delete {base}-\* and start again"):
            load_rows(base)


def test_files_of_two_indexes_do_not_mix(tmp_path, packed):
    save_rows(tmp_path / "one", packed, "")
    save_rows(tmp_path / "two", pack([9] * 300, 32, MODES[2]), "")
    for part in ("pieces.npy", "starts.npy", "about.json"):
        file = tmp_path / f"one-{part}"
        whole = file.read_bytes()
        file.write_bytes((tmp_path / f"two-{part}").read_bytes())
        with pytest.raises(DataError, match="damaged"):
            load_rows(tmp_path / "one")
        file.write_bytes(whole)
    assert len(load_rows(tmp_path / "one")) == len(packed)


def test_a_cache_that_cannot_be_written(tmp_path, packed):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot be written to .*file.*set data\.cache"):
        save_rows(tmp_path / "file" / "index", packed, "")
