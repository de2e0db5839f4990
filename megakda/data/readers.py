"""The inputs of `megakda.data.preprocess`: which files they are, and their contents in blocks."""

from __future__ import annotations

import glob
import gzip
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BufferedIOBase
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

from megakda.data.tokenizer import first_line, some
from megakda.errors import DataError

FORMATS = ("text", "jsonl", "parquet")
_TEXT_NAMES = """
    txt text md rst tex py pyi c h cc cpp hpp cu cuh java js jsx ts tsx go rs rb php pl r jl lua
    swift kt scala hs ml el sh bash sql html css xml toml yaml yml cfg ini
"""
TEXT_SUFFIXES = frozenset("." + name for name in _TEXT_NAMES.split())
_JSONL_SUFFIXES = frozenset((".jsonl", ".ndjson"))
_BLOCK_BYTES = 1 << 20  # of input handed to a worker at a time
_BLOCK_FILES = 256
_MAX_DOCUMENT = 1 << 30  # bytes of one text file taken as one document
_GZ_ERRORS = (EOFError, zlib.error, gzip.BadGzipFile)


@dataclass(frozen=True)
class Input:
    """A file to read. `size` is in bytes on disk."""

    path: Path
    format: str
    size: int

    def contents(self, raw: BinaryIO) -> BufferedIOBase | BinaryIO:
        """What `raw`, the opened file, holds, without the compression."""
        return gzip.GzipFile(fileobj=raw) if self.path.suffix.lower() == ".gz" else raw


@dataclass(frozen=True)
class Bad:
    """Stands for an item that holds no text, and says why."""

    reason: str
    line: int = 0  # of the item, from 0


@dataclass
class Block:
    """A piece of the inputs, in the form in which it was read.

    `kind` is ``files`` (items: the bytes of whole files), ``lines`` or ``jsonl`` (items: the bytes
    of lines) or ``rows`` (items: values, of which a str is text). A `Bad` may stand for any item.
    """

    kind: str
    names: list[str] = field(default_factory=list)  # one per item of `files`, else one
    first: int = 1  # number of the first line or row
    items: list[Any] = field(default_factory=list)
    input_bytes: int = 0


def utf8_reason(e: UnicodeDecodeError) -> str:
    """What a broken record says about bytes that are not UTF-8."""
    return f"invalid UTF-8 (byte 0x{e.object[e.start]:02x} at offset {e.start})"


# --- files ----------------------------------------------------------------------------------------


def find_inputs(inputs: Iterable[str | Path], format: str | None) -> tuple[list[Input], int]:
    """The input files in order, each once, and the number of files in folders that were left out.

    Args:
        inputs: files, globs or folders.
        format: of all of them; None: by suffix.

    Raises:
        DataError: an input is not there, of no known type or cannot be read, or there are none.
    """
    found: dict[Path, Input] = {}
    skipped = 0
    given = [str(i) for i in inputs]
    for item in given:
        for path, named in _files(item):
            kind = format or _format_of(path)
            if kind is None and named:
                raise DataError(
                    f"input {str(path)!r} has none of the known suffixes (.jsonl, .jsonl.gz, "
                    ".parquet, .txt and other plain text): say what it is with "
                    "--format text|jsonl|parquet"
                )
            if kind is None or not (named or path.is_file()):  # such as a dangling link
                skipped += 1
                continue
            with _reading(path):
                found.setdefault(path.resolve(), Input(path, kind, path.stat().st_size))
    if not found:
        raise DataError(
            f"inputs {some(given)} hold no file of a known type ({skipped} others): correct the "
            "input paths, or say what the files are with --format text|jsonl|parquet"
        )
    return list(found.values()), skipped


def _files(item: str) -> Iterator[tuple[Path, bool]]:
    """The files that an input stands for, and whether it names them rather than their folder."""
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
            yield from ((file, False) for file in _walk(match))
        else:
            yield match, True


def _walk(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise _unreadable(folder, error) from error

    for root, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__pycache__")
        yield from (Path(root, n) for n in sorted(names) if not n.startswith("."))


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


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(
        f"cannot read input {str(error.filename or path)!r} ({error.strerror or error}): correct "
        "its rights, or leave it out of the inputs"
    )


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise _unreadable(path, e) from e


# --- blocks ---------------------------------------------------------------------------------------


def read_blocks(
    files: Iterable[Input], document: str, text_key: str, option: str = "--text-key"
) -> Iterator[Block]:
    """The contents of the files, in their order.

    Args:
        files: what `find_inputs` found.
        document: of text files, one document per ``file`` or per ``line``.
        text_key: column (parquet) that holds the text or the messages.
        option: that sets it, for messages.

    Raises:
        DataError: the system refuses to read a file. Damaged contents come as a `Bad` instead.
    """

    def is_document(file: Input) -> bool:
        return file.format == "text" and document == "file"

    for whole, group in groupby(files, is_document):
        if whole:
            yield from _read_files(group)
            continue
        for file in group:
            with _reading(file.path):
                if file.format == "parquet":
                    yield from _read_parquet(file, text_key, option)
                else:
                    yield from _read_lines(file)


def _read_files(files: Iterable[Input]) -> Iterator[Block]:
    block = Block("files")
    for file in files:
        block.names.append(str(file.path))
        with _reading(file.path):
            block.items.append(_read_whole(file))
        block.input_bytes += file.size
        if block.input_bytes >= _BLOCK_BYTES or len(block.items) >= _BLOCK_FILES:
            yield block
            block = Block("files")
    if block.items:
        yield block


def _read_whole(file: Input) -> bytes | Bad:
    try:
        with file.path.open("rb") as raw:
            data = file.contents(raw).read(_MAX_DOCUMENT + 1)
    except _GZ_ERRORS as e:
        return _bad_gz(e)
    if len(data) > _MAX_DOCUMENT:
        return Bad(f"more than {_MAX_DOCUMENT} bytes in one document: use --document line")
    return data


def _bad_gz(error: Exception) -> Bad:
    return Bad(f"damaged gzip data, the rest of the file is lost ({error})")


def _read_lines(file: Input) -> Iterator[Block]:
    kind = "jsonl" if file.format == "jsonl" else "lines"
    number, done, end = 1, 0, False
    with file.path.open("rb") as raw:
        stream = file.contents(raw)
        while not end:
            items: list[bytes | Bad] = []
            size = 0
            try:
                # One by one, so that the lines before damaged gzip data are kept.
                while size < _BLOCK_BYTES and (line := stream.readline()):
                    items.append(line)
                    size += len(line)
                end = size < _BLOCK_BYTES
            except _GZ_ERRORS as e:
                items.append(_bad_gz(e))
                end = True
            at = file.size if end else min(raw.tell(), file.size)
            yield Block(kind, [str(file.path)], number, items, at - done)
            number, done = number + len(items), at


def _read_parquet(file: Input, text_key: str, option: str) -> Iterator[Block]:
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
            if text_key not in table.schema_arrow.names:
                columns = some(table.schema_arrow.names)
                reason = f"no column {text_key!r} (columns: {columns}); see {option}"
                yield Block("rows", name, row, [Bad(reason)], file.size)
                return
            for batch in table.iter_batches(batch_size=1024, columns=[text_key]):
                items = _column(batch.column(0))
                at = file.size * (row - 1 + len(items)) // total
                yield Block("rows", name, row, items, at - done)
                row, done = row + len(items), at
    except (pa.ArrowException, OSError, ValueError) as e:
        if isinstance(e, OSError) and e.errno is not None:
            raise  # of the operating system; damaged data also comes as a bare OSError
        reason = f"unreadable parquet, the rest of the file is lost ({first_line(e)})"
        yield Block("rows", name, row, [Bad(reason)], file.size - done)


def _column(column: Any) -> list[Any]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        out: list[Any] = []
        for value in column:
            try:
                out.append(value.as_py())
            except UnicodeDecodeError as e:
                out.append(Bad(utf8_reason(e)))
        return out
