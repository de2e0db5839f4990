"""PREFIX.bin, .json and .idx: written by one process at a time, and never seen half done.

Of conversations also PREFIX.answers.bin and .idx.

Nothing appears under the final names before everything is on disk, and the .idx comes last: where
there is an .idx, the data set is whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megakda.data.indexed import answers_prefix, sidecar_bytes, write_index
from megakda.errors import DataError
from megakda.locks import exclusive

_ANSWERS = tuple(answers_prefix("") + suffix for suffix in (".bin", ".idx"))
_SUFFIXES = (".bin", *_ANSWERS, ".json", ".idx")  # in the order in which they get their final names


class OutputBusyError(DataError):
    """Another process is writing the same output at the moment."""


def check_output(prefix: str, overwrite: bool) -> None:
    """Raises a DataError if there is an output that may not be replaced."""
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


class Output:
    """An output that is being written. `open_output` makes it."""

    def __init__(self, prefix: str, stream: BinaryIO, answers: BinaryIO | None) -> None:
        self._prefix = prefix
        self._stream = stream
        self._answers = answers

    def write(self, tokens: bytes, answers: bytes = b"") -> None:
        """Appends to the .bin, and to the .answers.bin, which has a byte per token."""
        with _write_errors(self._prefix):
            self._stream.write(tokens)
            if self._answers is not None:
                self._answers.write(answers)

    def publish(self, lengths: np.ndarray, dtype: np.dtype, sidecar: dict[str, Any]) -> None:
        """Gives what was written its final names.

        Args:
            lengths: tokens of each document, in the order of the .bin.
            dtype: type of the ids in the .bin.
            sidecar: contents of the .json.
        """
        prefix = self._prefix
        suffixes = [s for s in _SUFFIXES if self._answers is not None or s not in _ANSWERS]
        with _write_errors(prefix):
            _sync(self._stream)
            if self._answers is not None:
                _sync(self._answers)
                with open(answers_prefix(prefix) + ".idx.partial", "wb") as f:
                    write_index(f, lengths, np.dtype("uint8"))
                    _sync(f)
            with open(prefix + ".json.partial", "wb") as f:
                f.write(sidecar_bytes(sidecar))
                _sync(f)
            with open(prefix + ".idx.partial", "wb") as f:
                write_index(f, lengths, dtype)
                _sync(f)
            # From here on an older .idx must not be found beside a newer .bin.
            for suffix in (".idx", ".json", *_ANSWERS):
                with suppress(FileNotFoundError):
                    os.unlink(prefix + suffix)
            done: list[str] = []
            try:
                for suffix in suffixes:
                    os.replace(prefix + suffix + ".partial", prefix + suffix)
                    done.append(prefix + suffix)
            except OSError:
                for name in done:
                    with suppress(OSError):
                        os.unlink(name)
                raise
            _sync_folder(Path(prefix).parent)


@contextmanager
def open_output(prefix: str, overwrite: bool, answers: bool = False) -> Iterator[Output]:
    """Opens PREFIX.bin.partial for one process alone; removes what is left of it at the end.

    Args:
        answers: also PREFIX.answers.bin.partial.

    Raises:
        OutputBusyError: another process has it open.
        DataError: there is an output that may not be replaced, or the disk refuses (this comes
            from the methods of `Output`, too).
    """
    with _lock(prefix):
        check_output(prefix, overwrite)  # again: another run may just have finished
        streams: list[BinaryIO] = []
        try:
            with _write_errors(prefix):
                for name in (prefix, answers_prefix(prefix))[: 1 + answers]:
                    stream = open(name + ".bin.partial", "wb", buffering=1 << 20)  # noqa: SIM115
                    streams.append(stream)
            yield Output(prefix, streams[0], streams[1] if answers else None)
        finally:
            for stream in streams:
                with suppress(OSError):  # a full disk can fail here a second time
                    stream.close()
            for suffix in _SUFFIXES:
                with suppress(OSError):
                    os.unlink(prefix + suffix + ".partial")


@contextmanager
def _lock(prefix: str) -> Iterator[None]:
    """Holds PREFIX.lock."""
    busy = OutputBusyError(
        f"another process is writing {prefix}.bin: wait for it, or choose another --output-prefix"
    )
    with ExitStack() as stack:
        with _write_errors(prefix):
            stack.enter_context(exclusive(Path(prefix + ".lock"), busy))
        yield


@contextmanager
def _write_errors(prefix: str) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        try:
            stat = os.statvfs(Path(prefix).parent)
            free = f"; {stat.f_bavail * stat.f_frsize:,} bytes are free there"
        except (OSError, AttributeError):
            free = ""
        raise DataError(
            f"cannot write output {e.filename or prefix + '.bin.partial'!r} "
            f"({e.strerror or e}{free}): make room, or choose another --output-prefix"
        ) from e


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
