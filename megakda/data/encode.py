"""Blocks of input in, token ids out: what the processes of `megakda.data.preprocess` work on."""

from __future__ import annotations

import json
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

import numpy as np

from megakda.data.chat import BadChat, ChatFormat, encode_chat
from megakda.data.chat_template import ChatTemplate
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
    chat: ChatFormat | None = None  # of conversations, in the place of texts


@dataclass(frozen=True)
class Document:
    """An item in tokens, without its end; of a conversation also which are answers."""

    ids: np.ndarray
    size: int = 0  # of its text in UTF-8
    answers: np.ndarray | None = None  # [tokens] uint8
    cut_tokens: int = 0  # on the edge of an answer


@dataclass
class Encoded:
    """What has become of a block. `broken` names the first `MAX_LISTED` of `broken_count`.

    `answers` has a byte per token, 1 for those of answers; empty where there are no conversations.
    """

    tokens: bytes
    answers: bytes
    lengths: np.ndarray
    max_id: int
    text_bytes: int
    empty: int
    broken_count: int
    broken: list[BrokenRecord]
    input_bytes: int
    cut_tokens: int


# --- one block ------------------------------------------------------------------------------------


Reader = Callable[[Block, int], Document | Bad]
"""Makes a document of an item of a block; one without tokens of a blank item."""


def reader(job: Job, tokenizer: Tokenizer) -> Reader:
    """What a process encodes items with."""
    chat = job.chat
    if chat is None:
        return lambda block, i: _text_document(_text(block, i, job.text_key), tokenizer)
    template = ChatTemplate(tokenizer, chat.source, chat.name)

    def read(block: Block, i: int) -> Document | Bad:
        return _chat_document(_conversation(block, i, chat), chat, template, tokenizer)

    return read


def _encode_block(block: Block, job: Job, tokenizer: Tokenizer, read: Reader) -> Encoded:
    dtype = token_dtype(tokenizer.vocab_size)
    end = [tokenizer.eod] if job.append_eod else []
    end_bytes = np.array(end, dtype=dtype).tobytes()
    out, answers = bytearray(), bytearray()
    lengths: list[int] = []
    broken: list[BrokenRecord] = []
    broken_count = empty = text_bytes = cut_tokens = 0
    max_id = -1
    for i in range(len(block.items)):
        document = read(block, i)
        if isinstance(document, Bad):
            broken_count += 1
            if len(broken) < MAX_LISTED:
                broken.append(_record(block, i, document))
            continue
        ids = document.ids
        if len(ids) == 0:
            empty += 1
            continue
        max_id = max(max_id, int(ids.max()), *end)
        out += ids.astype(dtype, copy=False).tobytes()
        added = end_bytes
        if document.answers is not None:
            answers += document.answers.tobytes()
            if end and ids[-1] == end[0]:
                added = b""  # the template has ended it
            elif end:  # it is the end of the answer that it follows
                answers.append(document.answers[-1])
        out += added
        lengths.append(len(ids) + len(added) // dtype.itemsize)
        text_bytes += document.size
        cut_tokens += document.cut_tokens
    return Encoded(
        tokens=bytes(out),
        answers=bytes(answers),
        lengths=np.array(lengths, dtype=np.int32),
        max_id=max_id,
        text_bytes=text_bytes,
        empty=empty,
        broken_count=broken_count,
        broken=broken,
        input_bytes=block.input_bytes,
        cut_tokens=cut_tokens,
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
    text = _decoded(block, i)
    if isinstance(text, str) and block.kind == "jsonl" and text.strip():
        record = _json_record(text, key, "--text-key")
        if isinstance(record, Bad):
            return record
        return record[key] if isinstance(record[key], str) else _no_text("key", key, record[key])
    return text.rstrip("\r\n") if isinstance(text, str) and block.kind == "lines" else text


def _conversation(block: Block, i: int, chat: ChatFormat) -> dict[str, Any] | Bad:
    """The record of a conversation; an empty one of a blank line."""
    item = block.items[i]
    if isinstance(item, Bad):
        return item
    if block.kind == "rows":
        return {chat.messages_key: item}
    text = _decoded(block, i)
    if isinstance(text, Bad):
        return text
    return _json_record(text, chat.messages_key, "--messages-key") if text.strip() else {}


def _decoded(block: Block, i: int) -> str | Bad:
    item = block.items[i]
    try:
        text = item.decode("utf-8")
    except UnicodeDecodeError as e:
        return Bad(utf8_reason(e), item.count(b"\n", 0, e.start))
    if block.kind == "files" or block.first + i == 1:
        text = text.removeprefix("\ufeff")  # a byte order mark is not part of the text
    return text


def _json_record(line: str, key: str, option: str) -> dict[str, Any] | Bad:
    """The object of a line, which has `key`."""
    try:
        record = json.loads(line)
    except RecursionError:
        return Bad("invalid JSON (nested too deeply)")
    except ValueError as e:
        return Bad(f"invalid JSON ({e})")
    if not isinstance(record, dict):
        return Bad(f"the line is a JSON {type(record).__name__}, not an object")
    if key not in record:
        return Bad(f"no key {key!r} (keys: {some(list(record))}); see {option}")
    return record


def _no_text(what: str, key: str, value: Any) -> Bad:
    held = "null" if value is None else type(value).__name__
    return Bad(f"{what} {key!r} holds {held}, not text")


_NOTHING = Document(np.array([], dtype=np.int32))


def _text_document(text: str | Bad, tokenizer: Tokenizer) -> Document | Bad:
    if isinstance(text, Bad) or not text.strip():
        return text if isinstance(text, Bad) else _NOTHING
    return _tokenized(
        lambda: Document(size=len(text.encode("utf-8")), ids=tokenizer.encode_array(text))
    )


def _chat_document(
    record: dict[str, Any] | Bad, chat: ChatFormat, template: ChatTemplate, tokenizer: Tokenizer
) -> Document | Bad:
    if isinstance(record, Bad) or not record:
        return record if isinstance(record, Bad) else _NOTHING

    def encoded() -> Document:
        found = encode_chat(record, chat, template, tokenizer)
        return Document(found.ids, found.size, found.answers, found.cut_tokens)

    return _tokenized(encoded)


def _tokenized(encoded: Callable[[], Document]) -> Document | Bad:
    try:
        return encoded()
    except UnicodeEncodeError:
        return Bad("invalid Unicode (half of a surrogate pair)")
    except BadChat as e:
        return Bad(str(e))
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as e:  # a panic of a Rust tokenizer is no Exception
        return Bad(f"the tokenizer fails ({type(e).__name__}: {first_line(e)})")


# --- processes ------------------------------------------------------------------------------------


class _Died(Exception):
    """A worker process is gone."""


class _Worker:
    """A process that encodes the blocks it gets, one at a time, and ends with its pipe."""

    def __init__(self, job: Job) -> None:
        # Spawn: forking a process that holds threads (torch, tokenizers) can deadlock.
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(job, theirs), daemon=True)
        self._process.start()
        theirs.close()  # or the end of the process would not be the end of the pipe

    def encode(self, block: Block) -> Encoded:
        try:
            self._pipe.send(block)
            return self._pipe.recv()
        except (EOFError, OSError) as e:
            raise _Died from e

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


def _work(job: Job, pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to handle
    tokenizer = load_tokenizer(job.tokenizer)
    read = reader(job, tokenizer)
    with suppress(EOFError, ConnectionError):  # a parent that was killed has closed its end
        while True:
            pipe.send(_encode_block(pipe.recv(), job, tokenizer, read))


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
        read = reader(job, tokenizer)
        for block in blocks:
            yield _encode_block(block, job, tokenizer, read)
        return
    # A thread waits for each process. The library's pools of processes can wait for ever for one
    # that was killed: Pool always, ProcessPoolExecutor where that happens while others start.
    idle: SimpleQueue[_Worker] = SimpleQueue()

    def on_idle(block: Block) -> Encoded:
        worker = idle.get()
        try:
            return worker.encode(block)
        finally:
            idle.put(worker)

    started: list[_Worker] = []
    threads = ThreadPoolExecutor(workers)
    queue: deque[Future[Encoded]] = deque()
    try:
        for _ in range(workers):
            started.append(_Worker(job))
            idle.put(started[-1])
        for block in blocks:
            queue.append(threads.submit(on_idle, block))
            if len(queue) >= 3 * workers:  # bounds the memory that waiting blocks take
                yield queue.popleft().result()
        while queue:
            yield queue.popleft().result()
    except _Died as e:
        raise DataError(
            f"a worker process of {workers} died: it ran out of memory, or the calling script has "
            'no `if __name__ == "__main__":` guard; use fewer (--workers 1 needs no processes)'
        ) from e
    finally:
        for worker in started:
            worker.kill()
        threads.shutdown(cancel_futures=True)


def usable_cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
