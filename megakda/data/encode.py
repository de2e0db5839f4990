"""Blocks of input in, token ids out: what the processes of `megakda.data.preprocess` work on."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from typing import Any

import numpy as np

from megakda.data.indexed import token_dtype
from megakda.data.readers import Bad, Block, utf8_reason
from megakda.data.tokenizer import Tokenizer, first_line, load_tokenizer, some
from megakda.errors import DataError

MAX_LISTED = 20  # broken records named in the report; all are counted


@dataclass(frozen=True)
class BrokenRecord:
    """An input record that was left out. `line` counts lines (parquet: rows) from 1."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


@dataclass(frozen=True)
class Job:
    """What a worker has to know."""

    tokenizer: str
    text_key: str
    append_eod: bool


@dataclass
class Encoded:
    """What has become of a block. `broken` names the first `MAX_LISTED` of `broken_count`."""

    tokens: bytes
    lengths: np.ndarray
    max_id: int
    text_bytes: int
    empty: int
    broken_count: int
    broken: list[BrokenRecord]
    input_bytes: int


# --- one block ------------------------------------------------------------------------------------


def _encode_block(block: Block, job: Job, tokenizer: Tokenizer) -> Encoded:
    dtype = token_dtype(tokenizer.vocab_size)
    end = [tokenizer.eod] if job.append_eod else []
    end_bytes = np.array(end, dtype=dtype).tobytes()
    out = bytearray()
    lengths: list[int] = []
    broken: list[BrokenRecord] = []
    broken_count = empty = text_bytes = 0
    max_id = -1
    for i in range(len(block.items)):
        text = _text(block, i, job.text_key)
        encoded = text if isinstance(text, Bad) else _ids(text, tokenizer)
        if isinstance(encoded, Bad):
            broken_count += 1
            if len(broken) < MAX_LISTED:
                broken.append(_record(block, i, encoded))
            continue
        ids, size = encoded
        if len(ids) == 0:
            empty += 1
            continue
        max_id = max(max_id, int(ids.max()), *end)
        out += ids.astype(dtype, copy=False).tobytes()
        out += end_bytes
        lengths.append(len(ids) + len(end))
        text_bytes += size
    return Encoded(
        tokens=bytes(out),
        lengths=np.array(lengths, dtype=np.int32),
        max_id=max_id,
        text_bytes=text_bytes,
        empty=empty,
        broken_count=broken_count,
        broken=broken,
        input_bytes=block.input_bytes,
    )


def _record(block: Block, i: int, bad: Bad) -> BrokenRecord:
    if block.kind == "files":
        return BrokenRecord(block.names[i], 1 + bad.line, bad.reason)
    return BrokenRecord(block.names[0], block.first + i, bad.reason)


def _text(block: Block, i: int, key: str) -> str | Bad:
    item = block.items[i]
    if isinstance(item, str | Bad):
        return item
    if block.kind == "rows":
        return _no_text("column", key, item)
    try:
        text = item.decode("utf-8")
    except UnicodeDecodeError as e:
        return Bad(utf8_reason(e), item.count(b"\n", 0, e.start))
    if block.kind == "files" or block.first + i == 1:
        text = text.removeprefix("\ufeff")  # a byte order mark is not part of the text
    if block.kind == "jsonl" and text.strip():
        return _json_text(text, key)
    return text.rstrip("\r\n") if block.kind == "lines" else text


def _json_text(line: str, key: str) -> str | Bad:
    try:
        record = json.loads(line)
    except RecursionError:
        return Bad("invalid JSON (nested too deeply)")
    except ValueError as e:
        return Bad(f"invalid JSON ({e})")
    if not isinstance(record, dict):
        return Bad(f"the line is a JSON {type(record).__name__}, not an object")
    if key not in record:
        return Bad(f"no key {key!r} (keys: {some(list(record))}); see --text-key")
    text = record[key]
    return text if isinstance(text, str) else _no_text("key", key, text)


def _no_text(what: str, key: str, value: Any) -> Bad:
    held = "null" if value is None else type(value).__name__
    return Bad(f"{what} {key!r} holds {held}, not text")


def _ids(text: str, tokenizer: Tokenizer) -> tuple[np.ndarray, int] | Bad:
    """The tokens of a text, none for a blank one, and its size in UTF-8."""
    if not text.strip():
        return np.array([], dtype=np.int32), 0
    try:
        size = len(text.encode("utf-8"))
        return tokenizer.encode_array(text), size
    except UnicodeEncodeError:
        return Bad("invalid Unicode (half of a surrogate pair)")
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as e:  # a panic of a Rust tokenizer is no Exception
        return Bad(f"the tokenizer fails ({type(e).__name__}: {first_line(e)})")


# --- processes ------------------------------------------------------------------------------------


_worker: tuple[Job, Tokenizer] | None = None


def _start_worker(job: Job) -> None:
    global _worker

    def follow() -> None:
        parent = parent_process()
        assert parent is not None
        parent.join()  # a parent that was killed cannot stop its workers
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to handle
    _worker = (job, load_tokenizer(job.tokenizer))


def _work(block: Block) -> Encoded:
    assert _worker is not None
    return _encode_block(block, *_worker)


def encode(
    blocks: Iterable[Block], job: Job, tokenizer: Tokenizer, workers: int
) -> Generator[Encoded, None, None]:
    """Encodes blocks in order; close it to stop the workers.

    Args:
        blocks: what to encode.
        job: how.
        tokenizer: the one that `job` names; worker processes load their own.
        workers: processes; 1: this one alone.

    Raises:
        DataError: a worker process died.
    """
    if workers == 1:
        for block in blocks:
            yield _encode_block(block, job, tokenizer)
        return
    # Spawn: forking a process that holds threads (torch, tokenizers) can deadlock. An executor
    # rather than a Pool, because a Pool waits for ever for the result of a worker that was killed.
    pool = ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(job,)
    )
    queue: deque[Future[Encoded]] = deque()
    try:
        for block in blocks:
            queue.append(pool.submit(_work, block))
            if len(queue) >= 3 * workers:  # bounds the memory that waiting blocks take
                yield queue.popleft().result()
        while queue:
            yield queue.popleft().result()
    except BrokenProcessPool as e:
        raise DataError(
            f"a worker process of {workers} died: it ran out of memory, or the calling script has "
            'no `if __name__ == "__main__":` guard; use fewer (--workers 1 needs no processes)'
        ) from e
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def usable_cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
