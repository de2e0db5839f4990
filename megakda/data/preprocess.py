"""Text in, megatron-core's indexed format out.

The main process reads the inputs in order and hands blocks of them to worker processes, which
check, parse and tokenize; results are written in input order, so the output does not depend on the
number of workers. Nothing appears under the final names before everything is on disk, and the .idx
comes last: where there is an .idx, the data set is whole.
"""

from __future__ import annotations

import glob
import gzip
import json
import os
import signal
import sys
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megakda.data.indexed import sidecar_bytes, token_dtype, write_index
from megakda.data.tokenizer import Tokenizer, first_line, load_tokenizer, some
from megakda.errors import DataError

try:
    import fcntl
except ImportError:  # not on every system; it only guards against two runs at the same time
    fcntl = None  # type: ignore[assignment]

FORMATS = ("text", "jsonl", "parquet")
MAX_LISTED = 20  # broken records named in the report; all are counted
_TEXT_NAMES = """
    txt text md rst tex py pyi c h cc cpp hpp cu cuh java js jsx ts tsx go rs rb php pl r jl lua
    swift kt scala hs ml el sh bash sql html css xml toml yaml yml cfg ini
"""
TEXT_SUFFIXES = frozenset("." + name for name in _TEXT_NAMES.split())
_JSONL_SUFFIXES = frozenset((".jsonl", ".ndjson"))
_BLOCK_BYTES = 1 << 20  # of input handed to a worker at a time
_BLOCK_FILES = 256
_MAX_DOCUMENT = 1 << 30  # bytes of one text file taken as one document
_SERIAL_BELOW = 16 << 20  # bytes of input that are not worth starting processes for
_GZ_ERRORS = (EOFError, zlib.error, gzip.BadGzipFile)
_LINE_EVERY = 10.0  # seconds between progress lines where there is no terminal


@dataclass(frozen=True)
class BrokenRecord:
    """An input record that was left out. `line` counts lines (parquet: rows) from 1."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


@dataclass
class PreprocessReport:
    """What `preprocess` did. Sizes are in bytes, times in seconds."""

    prefix: str
    tokenizer: str
    dtype: str = ""
    files: int = 0
    skipped_files: int = 0  # in folders, of unknown type
    input_bytes: int = 0  # on disk, as given
    text_bytes: int = 0  # of the documents, in UTF-8
    documents: int = 0
    empty_documents: int = 0
    tokens: int = 0  # with the end-of-document tokens
    max_token_id: int = -1
    bin_bytes: int = 0
    broken: int = 0
    broken_listed: list[BrokenRecord] = field(default_factory=list)
    workers: int = 1
    seconds: float = 0.0

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text per token, end-of-document tokens included."""
        return self.text_bytes / max(self.tokens, 1)

    def __str__(self) -> str:
        rate = self.input_bytes / max(self.seconds, 1e-9) / 1e6
        workers = "1 worker" if self.workers == 1 else f"{self.workers} workers"
        rows = [
            (
                "output",
                f"{self.prefix}.bin, .idx, .json ({self.bin_bytes:,} bytes of {self.dtype})",
            ),
            ("tokenizer", self.tokenizer),
            ("inputs", f"{self.files:,} files, {self.input_bytes:,} bytes"),
            ("documents", f"{self.documents:,}"),
            ("tokens", f"{self.tokens:,}"),
            ("bytes/token", f"{self.bytes_per_token:.3f}"),
            ("largest id", f"{self.max_token_id}"),
            ("time", f"{self.seconds:.1f} s with {workers} ({rate:.1f} MB/s)"),
            ("empty", f"{self.empty_documents:,} documents or lines left out"),
            ("broken", f"{self.broken:,} records left out"),
        ]
        if self.skipped_files:
            rows.append(("skipped", f"{self.skipped_files:,} files of unknown type in folders"))
        lines = [f"{name:<12} {value}" for name, value in rows]
        lines += [f"  {record}" for record in self.broken_listed]
        if self.broken > len(self.broken_listed):
            lines.append(f"  ... and {self.broken - len(self.broken_listed):,} more")
        return "\n".join(lines)


class OutputBusyError(DataError):
    """Another process is writing the same output at the moment."""


def preprocess(
    inputs: Iterable[str | Path],
    output_prefix: str | Path,
    tokenizer_spec: str = "byte",
    *,
    workers: int | None = None,
    text_key: str = "text",
    append_eod: bool = True,
    format: str | None = None,
    document: str = "file",
    on_error: str = "report",
    overwrite: bool = False,
    progress: bool = True,
    extra: dict[str, Any] | None = None,
) -> PreprocessReport:
    """Tokenizes text files, JSON lines and parquet into ``PREFIX.bin``, ``.idx`` and ``.json``.

    Args:
        inputs: files, globs or folders (searched recursively, hidden names left out, sorted). A
            file that is named twice is read once.
        output_prefix: path of the output without suffix; its folder is made.
        tokenizer_spec: see `megakda.data.tokenizer.load_tokenizer`.
        workers: processes that tokenize; None: all cores that this process may use, or 1 for
            inputs below 16 MiB. The output does not depend on it. Above 1, a script that calls this
            needs an ``if __name__ == "__main__":`` guard.
        text_key: key (JSON lines) or column (parquet) that holds the text.
        append_eod: end each document with the tokenizer's end-of-document token.
        format: ``text``, ``jsonl`` or ``parquet``; None: by suffix (also before ``.gz``).
        document: of text inputs, one document per ``file`` or per ``line``.
        on_error: ``report`` leaves broken records out, counts them and lists the first 20;
            ``fail`` stops at the first.
        overwrite: replace a complete output of the same name.
        progress: show a progress bar on a terminal, else a line every 10 s.
        extra: kept in the sidecar under ``extra``.

    Returns:
        Counts, sizes and the list of broken records.

    Raises:
        DataError: bad arguments, inputs that cannot be found or read, no documents at all, an
            output that exists, or a disk that is full.
    """
    start = time.monotonic()
    prefix = str(output_prefix)
    folder = prefix.endswith(os.sep) or not Path(prefix).name
    _check_choice("format (--format)", format, (None, *FORMATS))
    _check_choice("document (--document)", document, ("file", "line"))
    _check_choice("on_error (--on-error)", on_error, ("report", "fail"))
    if workers is not None and workers < 1:
        raise DataError(f"workers={workers} must be at least 1: change --workers")
    if folder or prefix.endswith((".bin", ".idx", ".json")):
        raise DataError(
            f"output prefix {prefix!r} must be a folder and a name without .bin, .idx or .json: "
            "change --output-prefix"
        )
    _check_output(prefix, overwrite)
    tokenizer = load_tokenizer(tokenizer_spec)
    files, skipped = _find_inputs(inputs, format)
    report = PreprocessReport(
        prefix=prefix,
        tokenizer=tokenizer.spec,
        dtype=token_dtype(tokenizer.vocab_size).name,
        files=len(files),
        skipped_files=skipped,
        input_bytes=sum(f.size for f in files),
    )
    if workers is None:
        workers = 1 if report.input_bytes < _SERIAL_BELOW else _usable_cores()
    report.workers = workers
    job = _Job(tokenizer_spec, text_key, append_eod, document)
    lengths: list[np.ndarray] = []
    with (
        _partials(prefix, overwrite) as (bin_file, write),
        _Progress(report.input_bytes, progress) as bar,
        closing(_encode(_read_blocks(files, job), job, tokenizer, workers)) as results,
    ):
        for result in results:
            if result.broken and on_error == "fail":
                raise DataError(
                    f"{result.broken[0]}: correct the input, or leave broken records out with "
                    "--on-error report"
                )
            write(result.tokens)
            lengths.append(result.lengths)
            report.documents += len(result.lengths)
            report.tokens += int(result.lengths.sum(dtype=np.int64))
            report.text_bytes += result.text_bytes
            report.bin_bytes += len(result.tokens)
            report.empty_documents += result.empty
            report.max_token_id = max(report.max_token_id, result.max_id)
            report.broken += result.broken_count
            report.broken_listed += result.broken[: MAX_LISTED - len(report.broken_listed)]
            bar.advance(result.input_bytes)
        if report.documents == 0:
            detail = "; ".join(map(str, report.broken_listed[:3]))
            raise DataError(
                f"no documents in {report.files} input files ({report.empty_documents} empty, "
                f"{report.broken} broken{': ' + detail if detail else ''}): check the inputs, "
                f"--text-key {text_key} and --format"
            )
        _publish(prefix, bin_file, np.concatenate(lengths), report, tokenizer, files, job, extra)
    report.seconds = time.monotonic() - start
    return report


# --- inputs ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Input:
    path: Path
    format: str
    size: int

    @property
    def gz(self) -> bool:
        return self.path.suffix.lower() == ".gz"


def _format_of(path: Path) -> str | None:
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    last = suffixes[-1] if suffixes else ""
    if last in _JSONL_SUFFIXES:
        return "jsonl"
    if last == ".parquet":
        return "parquet"
    return "text" if last in TEXT_SUFFIXES else None


def _find_inputs(inputs: Iterable[str | Path], format: str | None) -> tuple[list[_Input], int]:
    """The input files in order, and the number of files in folders that were left out."""
    found: dict[Path, _Input] = {}
    skipped = 0

    def add(path: Path, named: bool) -> None:
        nonlocal skipped
        kind = format or _format_of(path)
        if kind is None and named:
            raise DataError(
                f"input {str(path)!r} has none of the known suffixes (.jsonl, .jsonl.gz, .parquet, "
                ".txt and other plain text): say what it is with --format text|jsonl|parquet"
            )
        if kind is None or not (named or path.is_file()):  # such as a dangling link
            skipped += 1
            return
        try:
            found.setdefault(path.resolve(), _Input(path, kind, path.stat().st_size))
        except OSError as e:
            raise _unreadable(path, e) from e

    given = [str(i) for i in inputs]
    for item in given:
        path = Path(item).expanduser()
        if path.exists():
            matches = [path]
        else:
            matches = [Path(m) for m in sorted(glob.glob(str(path), recursive=True))]
        if not matches:
            raise DataError(
                f"input {item!r} is neither a file nor a folder, and matches nothing as a glob "
                f"(from {os.getcwd()}): correct the input paths"
            )
        for match in matches:
            if match.is_dir():
                for file in _walk(match):
                    add(file, named=False)
            else:
                add(match, named=True)
    if not found:
        raise DataError(
            f"inputs {some(given)} hold no file of a known type ({skipped} others): correct the "
            "input paths, or say what the files are with --format text|jsonl|parquet"
        )
    return list(found.values()), skipped


def _walk(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise _unreadable(folder, error) from error

    for root, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__pycache__")
        yield from (Path(root, n) for n in sorted(names) if not n.startswith("."))


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(
        f"cannot read input {str(error.filename or path)!r} ({error.strerror or error}): correct "
        "its rights, or leave it out of the inputs"
    )


@dataclass(frozen=True)
class _Job:
    """What a worker has to know."""

    tokenizer: str
    text_key: str
    append_eod: bool
    document: str


@dataclass
class _Block:
    """A piece of the inputs, in the form in which it was read.

    `kind` is ``files`` (items: the bytes of whole files), ``lines`` or ``jsonl`` (items: the bytes
    of lines) or ``rows`` (items: values, of which a str is text). A `_Bad` may stand for any item.
    """

    kind: str
    names: list[str]  # one per item of `files`, else one
    first: int  # number of the first line or row
    items: list[Any]
    input_bytes: int


def _read_blocks(files: list[_Input], job: _Job) -> Iterator[_Block]:
    pending = _Block("files", [], 1, [], 0)
    for file in files:
        try:
            if file.format == "text" and job.document == "file":
                pending.names.append(str(file.path))
                pending.items.append(_read_whole(file))
                pending.input_bytes += file.size
                if pending.input_bytes >= _BLOCK_BYTES or len(pending.items) >= _BLOCK_FILES:
                    yield pending
                    pending = _Block("files", [], 1, [], 0)
                continue
            if pending.items:  # keeps the order of the inputs
                yield pending
                pending = _Block("files", [], 1, [], 0)
            if file.format == "parquet":
                yield from _read_parquet(file, job)
            else:
                yield from _read_lines(file)
        except OSError as e:
            raise _unreadable(file.path, e) from e
    if pending.items:
        yield pending


def _read_whole(file: _Input) -> bytes | _Bad:
    try:
        with file.path.open("rb") as raw:
            stream = gzip.GzipFile(fileobj=raw) if file.gz else raw
            data = stream.read(_MAX_DOCUMENT + 1)
    except _GZ_ERRORS as e:
        return _Bad(_gz_reason(e))
    if len(data) > _MAX_DOCUMENT:
        return _Bad(f"more than {_MAX_DOCUMENT} bytes in one document: use --document line")
    return data


def _gz_reason(error: Exception) -> str:
    return f"damaged gzip data, the rest of the file is lost ({error})"


def _read_lines(file: _Input) -> Iterator[_Block]:
    kind = "jsonl" if file.format == "jsonl" else "lines"
    name = [str(file.path)]
    number, done = 1, 0
    with file.path.open("rb") as raw:
        stream = gzip.GzipFile(fileobj=raw) if file.gz else raw
        while True:
            lines: list[bytes] = []
            size = 0
            reason = None
            try:
                # One by one, so that the lines before damaged gzip data are kept.
                while size < _BLOCK_BYTES and (line := stream.readline()):
                    lines.append(line)
                    size += len(line)
            except _GZ_ERRORS as e:
                reason = _gz_reason(e)
            end = reason is not None or size < _BLOCK_BYTES
            at = file.size if end else min(raw.tell(), file.size)
            if lines:
                yield _Block(kind, name, number, lines, at - done)
                number += len(lines)
                done = at
            if reason is not None:
                yield _Block(kind, name, number, [_Bad(reason)], file.size - done)
            elif end and done < file.size:
                yield _Block(kind, name, number, [], file.size - done)
            if end:
                return


def _read_parquet(file: _Input, job: _Job) -> Iterator[_Block]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as e:
        raise DataError(
            f"input {str(file.path)!r} needs the pyarrow package ({e}): pip install pyarrow"
        ) from e
    name = [str(file.path)]
    row, done = 1, 0
    file.path.open("rb").close()  # tells a file without read permission from a damaged one
    try:
        with pq.ParquetFile(file.path) as table:
            total = max(table.metadata.num_rows, 1)
            if job.text_key not in table.schema_arrow.names:
                columns = some(table.schema_arrow.names)
                reason = f"no column {job.text_key!r} (columns: {columns}); see --text-key"
                yield _Block("rows", name, row, [_Bad(reason)], file.size)
                return
            for batch in table.iter_batches(batch_size=1024, columns=[job.text_key]):
                items = _column(batch.column(0))
                at = file.size * (row - 1 + len(items)) // total
                yield _Block("rows", name, row, items, at - done)
                row, done = row + len(items), at
    except (pa.ArrowException, OSError, ValueError) as e:
        if isinstance(e, OSError) and e.errno is not None:
            raise  # of the operating system; damaged data also comes as a bare OSError
        reason = f"unreadable parquet, the rest of the file is lost ({first_line(e)})"
        yield _Block("rows", name, row, [_Bad(reason)], file.size - done)


def _column(column: Any) -> list[Any]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        out: list[Any] = []
        for value in column:
            try:
                out.append(value.as_py())
            except UnicodeDecodeError as e:
                out.append(_Bad(_utf8_reason(e)))
        return out


# --- encoding -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Bad:
    reason: str


@dataclass
class _Encoded:
    tokens: bytes
    lengths: np.ndarray
    max_id: int
    text_bytes: int
    empty: int
    broken_count: int
    broken: list[BrokenRecord]
    input_bytes: int


def _utf8_reason(e: UnicodeDecodeError) -> str:
    return f"invalid UTF-8 (byte 0x{e.object[e.start]:02x} at offset {e.start})"


def _documents(block: _Block, job: _Job) -> Iterator[tuple[int, str | _Bad]]:
    """Text of each record of a block, or what is wrong with it, and its index in the block."""
    for i, item in enumerate(block.items):
        if isinstance(item, str | _Bad):
            yield i, item
            continue
        if block.kind == "rows":
            yield i, _no_text("column", job.text_key, item)
            continue
        try:
            text = item.decode("utf-8")
        except UnicodeDecodeError as e:
            yield i, _Bad(_utf8_reason(e))
            continue
        if block.kind == "files" or block.first + i == 1:
            text = text.removeprefix("\ufeff")  # a byte order mark is not part of the text
        if block.kind == "lines":
            text = text.rstrip("\r\n")
        elif block.kind == "jsonl" and text.strip():
            yield i, _json_text(text, job.text_key)
            continue
        yield i, text


def _json_text(line: str, key: str) -> str | _Bad:
    try:
        record = json.loads(line)
    except RecursionError:
        return _Bad("invalid JSON (nested too deeply)")
    except ValueError as e:
        return _Bad(f"invalid JSON ({e})")
    if not isinstance(record, dict):
        return _Bad(f"the line is a JSON {type(record).__name__}, not an object")
    if key not in record:
        return _Bad(f"no key {key!r} (keys: {some(list(record))}); see --text-key")
    text = record[key]
    return text if isinstance(text, str) else _no_text("key", key, text)


def _no_text(what: str, key: str, value: Any) -> _Bad:
    held = "null" if value is None else type(value).__name__
    return _Bad(f"{what} {key!r} holds {held}, not text")


def _encode_block(block: _Block, job: _Job, tokenizer: Tokenizer) -> _Encoded:
    dtype = token_dtype(tokenizer.vocab_size)
    eod = np.array([tokenizer.eod], dtype=dtype)
    out = bytearray()
    lengths: list[int] = []
    broken: list[BrokenRecord] = []
    broken_count = empty = text_bytes = 0
    max_id = -1
    for i, text in _documents(block, job):
        if isinstance(text, str) and not text.strip():
            empty += 1
            continue
        if isinstance(text, str):
            try:
                size = len(text.encode("utf-8"))
                ids = tokenizer.encode_array(text)
            except UnicodeEncodeError:
                text = _Bad("invalid Unicode (half of a surrogate pair)")
            except (KeyboardInterrupt, SystemExit, MemoryError):
                raise
            except BaseException as e:  # a panic of a Rust tokenizer is no Exception
                text = _Bad(f"the tokenizer fails ({type(e).__name__}: {first_line(e)})")
        if isinstance(text, _Bad):
            broken_count += 1
            if len(broken) < MAX_LISTED:
                name, line = block.names[0], block.first + i
                if block.kind == "files":
                    name = block.names[i]
                    line = 1 + _newlines_before_error(block.items[i])
                broken.append(BrokenRecord(name, line, text.reason))
            continue
        if len(ids) == 0:
            empty += 1
            continue
        text_bytes += size
        max_id = max(max_id, int(ids.max()), tokenizer.eod if job.append_eod else -1)
        out += ids.astype(dtype, copy=False).tobytes()
        if job.append_eod:
            out += eod.tobytes()
        lengths.append(len(ids) + job.append_eod)
    return _Encoded(
        tokens=bytes(out),
        lengths=np.array(lengths, dtype=np.int32),
        max_id=max_id,
        text_bytes=text_bytes,
        empty=empty,
        broken_count=broken_count,
        broken=broken,
        input_bytes=block.input_bytes,
    )


def _newlines_before_error(data: bytes | _Bad) -> int:
    if isinstance(data, _Bad):
        return 0
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as e:
        return data.count(b"\n", 0, e.start)
    return 0


_worker: tuple[_Job, Tokenizer] | None = None


def _start_worker(job: _Job) -> None:
    global _worker

    def follow() -> None:
        parent = parent_process()
        assert parent is not None
        parent.join()  # a parent that was killed cannot stop its workers
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to handle
    _worker = (job, load_tokenizer(job.tokenizer))


def _work(block: _Block) -> _Encoded:
    assert _worker is not None
    return _encode_block(block, *_worker)


def _encode(
    blocks: Iterator[_Block], job: _Job, tokenizer: Tokenizer, workers: int
) -> Generator[_Encoded, None, None]:
    """Encodes blocks in order; close it to stop the workers."""
    if workers == 1:
        for block in blocks:
            yield _encode_block(block, job, tokenizer)
        return
    # Spawn: forking a process that holds threads (torch, tokenizers) can deadlock. An executor
    # rather than a Pool, because a Pool waits for ever for the result of a worker that was killed.
    pool = ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(job,)
    )
    queue: deque[Future[_Encoded]] = deque()
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


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# --- output ---------------------------------------------------------------------------------------


def _check_choice(name: str, value: str | None, choices: tuple[str | None, ...]) -> None:
    if value not in choices:
        rule = ", ".join(str(c) for c in choices if c is not None)
        raise DataError(f"{name} is {value!r}, but must be one of {rule}")


def _check_output(prefix: str, overwrite: bool) -> None:
    if overwrite:
        return
    bin_file, idx_file = Path(prefix + ".bin"), Path(prefix + ".idx")
    if idx_file.exists():
        raise DataError(
            f"output {idx_file} exists already: give --overwrite to replace it, or another "
            "--output-prefix"
        )
    # A killed run leaves .idx.partial beside a .bin without .idx. Any other such file is foreign.
    if bin_file.exists() and not Path(prefix + ".idx.partial").exists():
        raise DataError(
            f"{bin_file} exists already and is not a left-over of this command: give --overwrite "
            "to replace it, or another --output-prefix"
        )


def _write_error(prefix: str, error: OSError) -> DataError:
    try:
        stat = os.statvfs(Path(prefix).parent)
        free = f"; {stat.f_bavail * stat.f_frsize:,} bytes are free there"
    except (OSError, AttributeError):
        free = ""
    return DataError(
        f"cannot write output {error.filename or prefix + '.bin.partial'!r} "
        f"({error.strerror or error}{free}): make room, or choose another --output-prefix"
    )


@contextmanager
def _partials(prefix: str, overwrite: bool) -> Iterator[tuple[BinaryIO, Callable[[bytes], None]]]:
    """Opens PREFIX.bin.partial for one process alone; removes what is left of it at the end."""
    with _lock(prefix):
        _check_output(prefix, overwrite)  # again: another run may just have finished
        try:
            stream = open(prefix + ".bin.partial", "wb", buffering=1 << 20)  # noqa: SIM115
        except OSError as e:
            raise _write_error(prefix, e) from e

        def write(data: bytes) -> None:
            try:
                stream.write(data)
            except OSError as e:
                raise _write_error(prefix, e) from e

        try:
            yield stream, write
        finally:
            with suppress(OSError):  # a full disk can fail here a second time
                stream.close()
            for suffix in (".bin", ".json", ".idx"):
                with suppress(OSError):
                    os.unlink(prefix + suffix + ".partial")


@contextmanager
def _lock(prefix: str) -> Iterator[None]:
    """Holds PREFIX.lock. The system frees it if this process is killed."""
    path = Path(prefix + ".lock")
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stream = path.open("ab")
        except OSError as e:
            raise _write_error(prefix, e) from e
        with stream:
            if fcntl is not None:
                try:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise OutputBusyError(
                        f"another process is writing {prefix}.bin: wait for it, or choose another "
                        "--output-prefix"
                    ) from None
                except OSError:
                    pass  # a file system without locks
            try:
                ours = os.path.samestat(os.fstat(stream.fileno()), os.stat(path))
            except FileNotFoundError:
                ours = False
            if ours:  # else its last holder removed it in between, and a new one is needed
                try:
                    yield
                finally:
                    with suppress(OSError):
                        os.unlink(path)  # while it is held, so that nobody waits on it
                return


def _publish(
    prefix: str,
    bin_file: BinaryIO,
    lengths: np.ndarray,
    report: PreprocessReport,
    tokenizer: Tokenizer,
    files: list[_Input],
    job: _Job,
    extra: dict[str, Any] | None,
) -> None:
    sidecar: dict[str, Any] = {
        "tokenizer": tokenizer.spec,
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod,
        "eod_appended": job.append_eod,
        "dtype": report.dtype,
        "documents": report.documents,
        "tokens": report.tokens,
        "bin_bytes": report.bin_bytes,
        "max_token_id": report.max_token_id,
        "text_bytes": report.text_bytes,
        "empty_documents": report.empty_documents,
        "broken": report.broken,
        "sources": [{"name": str(f.path), "bytes": f.size} for f in files],
    }
    if extra is not None:
        sidecar["extra"] = extra
    try:
        _sync(bin_file)
        with open(prefix + ".json.partial", "wb") as f:
            f.write(sidecar_bytes(sidecar))
            _sync(f)
        with open(prefix + ".idx.partial", "wb") as f:
            write_index(f, lengths, token_dtype(tokenizer.vocab_size))
            _sync(f)
        # From here on an older .idx must not be found beside a newer .bin.
        for suffix in (".idx", ".json"):
            with suppress(FileNotFoundError):
                os.unlink(prefix + suffix)
        done: list[str] = []
        try:
            for suffix in (".bin", ".json", ".idx"):
                os.replace(prefix + suffix + ".partial", prefix + suffix)
                done.append(prefix + suffix)
        except OSError:
            for name in done:
                with suppress(OSError):
                    os.unlink(name)
            raise
        _sync_folder(Path(prefix).parent)
    except OSError as e:
        raise _write_error(prefix, e) from e


def _sync(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # not every file system lets folders be synced
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


class _Progress:
    """A bar in bytes of input on a terminal, else a line on stderr every 10 s."""

    def __init__(self, total: int, show: bool) -> None:
        self._total = total
        self._show = show
        self._done = 0
        self._start = self._last = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> _Progress:
        if self._show and sys.stderr.isatty():
            with suppress(ImportError):
                from tqdm import tqdm

                self._bar = tqdm(
                    total=self._total, unit="B", unit_scale=True, desc="tokenizing", leave=False
                )
        return self

    def advance(self, size: int) -> None:
        self._done += size
        if self._bar is not None:
            self._bar.update(size)
        elif self._show and (now := time.monotonic()) - self._last >= _LINE_EVERY:
            self._last = now
            share = self._done / max(self._total, 1)
            rate = self._done / (now - self._start) / 1e6
            print(
                f"tokenizing: {share:.0%} of {self._total:,} bytes, {rate:.1f} MB/s",
                file=sys.stderr,
                flush=True,
            )

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
