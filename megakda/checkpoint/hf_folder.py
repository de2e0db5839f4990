"""Folders of safetensors files: read by slices, and written in shards, with bounded memory.

The format is a header in JSON and then plain numbers (huggingface/safetensors, README). It is read
and written here with ordinary file calls: memory-mapped files count as memory of the process, and
writing whole shards at once needs as much memory as they are large.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch

from megakda.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000  # bytes, the format's own limit
_READ_AT_ONCE = 64 << 20  # bytes, of rows of which only some columns are wanted


@dataclass(frozen=True)
class Entry:
    """One tensor in a file."""

    file: Path
    dtype: str  # as the format names it
    shape: tuple[int, ...]
    start: int  # byte in the file
    size: int  # bytes


class HFFolder:
    """The tensors of a Hugging Face folder: shards with an index, or one file.

    Attributes:
        entries: every tensor by name.

    Raises:
        CheckpointError: no safetensors files, or files that are missing, truncated or damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        self._open: tuple[Path, FileIO] | None = None
        for file, names in _files(folder).items():
            found = read_header(file)
            for name in names or found:
                if name not in found:
                    raise CheckpointError(f"{file} has no {name}, which {INDEX} says is in it")
                self.entries[name] = found[name]

    def close(self) -> None:
        """Closes what `read` has opened; it may be used again."""
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def read(
        self, name: str, where: Sequence[slice] = (), out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """A tensor, or a part of it, on the CPU and in its own dtype.

        Args:
            where: a slice per axis, with start and stop; none for the whole tensor.
            out: memory for it: contiguous, of its dtype and number of elements.

        Raises:
            CheckpointError: the file cannot be read.
        """
        entry = self.entries[name]
        where = where or [slice(0, n) for n in entry.shape]
        shape = [w.stop - w.start for w in where]
        out = torch.empty(shape, dtype=DTYPES[entry.dtype]) if out is None else out.view(shape)
        inner = entry.shape[1:]
        row = math.prod(inner) * out.itemsize
        first, last = where[0].start, where[0].stop
        if shape[1:] == list(inner):
            self._read_rows(entry, first * row, out)
            return out
        step = max(1, _READ_AT_ONCE // max(1, row))
        for begin in range(first, last, step):
            end = min(begin + step, last)
            rows = torch.empty((end - begin, *inner), dtype=out.dtype)
            self._read_rows(entry, begin * row, rows)
            out[begin - first : end - first] = rows[(slice(None), *where[1:])]
        return out

    def _read_rows(self, entry: Entry, start: int, out: torch.Tensor) -> None:
        """Fills `out`, contiguous, from byte `start` of a tensor."""
        if out.numel() == 0:
            return
        try:
            stream = self._stream(entry.file)
            stream.seek(entry.start + start)
            rest = _bytes_of(out)
            while rest:
                count = stream.readinto(rest)
                if not count:
                    raise OSError("the file ends early")
                rest = rest[count:]
        except OSError as error:
            raise CheckpointError(f"{entry.file} cannot be read: {error}") from error

    def _stream(self, file: Path) -> FileIO:
        if self._open is None or self._open[0] != file:
            if self._open is not None:
                self._open[1].close()
            self._open = file, open(file, "rb", buffering=0)  # noqa: SIM115
        return self._open[1]


def read_header(file: Path) -> dict[str, Entry]:
    """What a safetensors file says that it holds, checked against its length.

    Raises:
        CheckpointError: not there, truncated, or not such a file.
    """
    try:
        with open(file, "rb") as stream:
            length = os.fstat(stream.fileno()).st_size
            size = int.from_bytes(stream.read(8), "little")
            if length < 8 or not 2 <= size <= min(_MAX_HEADER, length - 8):
                raise CheckpointError(
                    f"{file} is no whole safetensors file: {length:,} bytes, and a header of "
                    f"{size:,}; copy or download it again"
                )
            header = json.loads(stream.read(size))
        entries = {
            name: _entry(file, name, fields, 8 + size)
            for name, fields in header.items()
            if name != "__metadata__"
        }
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be read ({error.strerror}): copy or download the whole folder again"
        ) from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file} is no safetensors file: {error}") from error
    end = max((entry.start + entry.size for entry in entries.values()), default=8 + size)
    if end > length:
        raise CheckpointError(
            f"{file} is truncated: {length:,} bytes of {end:,}; copy or download it again"
        )
    return entries


def _entry(file: Path, name: str, fields: dict[str, Any], data: int) -> Entry:
    first, last = (int(offset) for offset in fields["data_offsets"])
    shape = tuple(int(n) for n in fields["shape"])
    dtype = str(fields["dtype"])
    known = DTYPES.get(dtype)
    if known is not None and math.prod(shape) * known.itemsize != last - first:
        raise ValueError(f"{name} has {last - first} bytes for {dtype} {list(shape)}")
    return Entry(file, dtype, shape, data + first, last - first)


def _files(folder: Path) -> dict[Path, list[str]]:
    """The files of a folder and the tensors to take from each; an empty list for all of them."""
    if (folder / INDEX).is_file():
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            files: dict[Path, list[str]] = {}
            for name, file in index.items():
                files.setdefault(folder / str(file), []).append(str(name))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{folder / INDEX} cannot be read: {error}") from error
        return files
    if (folder / SINGLE).is_file():
        return {folder / SINGLE: []}
    there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    hint = ""
    if any(name.endswith((".bin", ".pt", ".pth")) for name in there):
        hint = "; convert its pickled weights to safetensors first"
    raise CheckpointError(f"{folder} has neither {INDEX} nor {SINGLE}{hint}")


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


@dataclass
class _Shard:
    file: Path
    names: list[str]
    data: int = 0  # first byte after the header


class FolderWriter:
    """Writes a folder of shards and its index, tensor by tensor and part by part.

    Shards are filled in the order of `tensors`. Where each tensor lies is known from the start, so
    parts may come in any order among tensors; those of one tensor come first to last.

    Args:
        folder: exists.
        tensors: (name, dtype, shape) of everything that will be written.
        max_shard_bytes: a shard takes no further tensor that would make it larger than this.

    Raises:
        OSError: from every method, where the disk refuses.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]],
        max_shard_bytes: int,
    ):
        self.folder = folder
        self._shapes = {name: (dtype, shape) for name, dtype, shape in tensors}
        assert len(self._shapes) == len(tensors), "a name comes twice"
        self._shards: list[_Shard] = []
        self._at: dict[str, tuple[_Shard, int]] = {}  # where the next part of a tensor goes
        self._left = {name: self._bytes(name) for name in self._shapes}
        self._open: tuple[_Shard, FileIO] | None = None
        self._share(max_shard_bytes)

    def write(self, name: str, part: torch.Tensor) -> None:
        """The next rows of a tensor, as a CPU tensor of its dtype."""
        dtype, _ = self._shapes[name]
        assert part.dtype == dtype, f"{name}: {part.dtype} instead of {dtype}"
        shard, offset = self._at[name]
        size = part.numel() * dtype.itemsize
        assert size <= self._left[name], f"{name}: more than its shape holds"
        if size:
            stream = self._stream(shard)
            stream.seek(offset)
            rest = _bytes_of(part.contiguous())
            while rest:
                rest = rest[stream.write(rest) :]
        self._at[name] = shard, offset + size
        self._left[name] -= size

    def close(self) -> None:
        """Completes the folder with its index. Nothing is flushed to the disk."""
        unfinished = [name for name, left in self._left.items() if left]
        assert not unfinished, f"not wholly written: {unfinished[:3]}"
        self._release()
        total = sum(self._bytes(name) for name in self._shapes)
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: shard.file.name for shard in self._shards for name in shard.names},
        }
        (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _share(self, limit: int) -> None:
        """Gives every tensor its shard and its place there, and writes the headers."""
        shares: list[list[str]] = [[]]
        filled = 0
        for name in self._shapes:
            size = self._bytes(name)
            if shares[-1] and filled + size > limit:
                shares.append([])
                filled = 0
            shares[-1].append(name)
            filled += size
        for number, names in enumerate(shares, start=1):
            file = self.folder / f"model-{number:05d}-of-{len(shares):05d}.safetensors"
            shard = _Shard(file, names)
            self._shards.append(shard)
            # Wide numbers first: readers map the file, and want each at a multiple of its size.
            ordered = sorted(names, key=lambda name: -self._shapes[name][0].itemsize)
            header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
            offset = 0
            for name in ordered:
                dtype, shape = self._shapes[name]
                end = offset + self._bytes(name)
                header[name] = {
                    "dtype": _NAMES[dtype],
                    "shape": list(shape),
                    "data_offsets": [offset, end],
                }
                self._at[name] = shard, offset
                offset = end
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
            shard.data = 8 + len(text)
            for name in ordered:
                self._at[name] = shard, shard.data + self._at[name][1]
            with open(file, "wb") as stream:
                stream.write(len(text).to_bytes(8, "little") + text)
                stream.truncate(shard.data + offset)  # tensors without elements are whole by this

    def _bytes(self, name: str) -> int:
        dtype, shape = self._shapes[name]
        return math.prod(shape) * dtype.itemsize

    def _stream(self, shard: _Shard) -> FileIO:
        if self._open is None or self._open[0] is not shard:
            self._release()
            self._open = shard, open(shard.file, "r+b", buffering=0)  # noqa: SIM115
        return self._open[1]

    def _release(self) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None
