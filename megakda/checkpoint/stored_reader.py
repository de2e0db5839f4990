"""Reads a checkpoint tensor by tensor. See `megakda.checkpoint.stored`."""

from __future__ import annotations

import io
import math
import os
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megakda.checkpoint.folders import COMMON, OPTIMIZER, read_manifest, reason
from megakda.errors import CheckpointError

# What reading a damaged file raises
_DAMAGE = (
    OSError,
    EOFError,
    KeyError,
    ValueError,
    TypeError,
    AttributeError,
    ImportError,
    IndexError,
    RuntimeError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    CheckpointException,
)


@dataclass(frozen=True)
class StoredChunk:
    """A block of a tensor, and where it is: `length` bytes at `position` of `file`."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: Path
    position: int
    length: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint by its global name; the chunks cover it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[StoredChunk, ...]

    @property
    def rows(self) -> int:
        """Length of axis 0; 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class StoredCheckpoint:
    """A complete checkpoint folder, open for reading.

    Attributes:
        path: the folder.
        manifest: the facts saved beside the tensors.
        tensors: every tensor, weights first as they were saved, by global name; those of the
            optimizer begin with `OPTIMIZER`.
        objects: names of what is stored and is no tensor. Older checkpoints have empty
            `_extra_state` of linear layers, which nothing needs.

    Raises:
        CheckpointError: a file is missing, shorter than it should be, or damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        self.manifest = read_manifest(path)
        file = path / ".metadata"
        try:
            metadata = filesystem.FileSystemReader(path).read_metadata()
            found = {**metadata.state_dict_metadata}
            places = {
                (index.fqn, tuple(index.offset or ())): place
                for index, place in metadata.storage_data.items()
            }
            self.objects = [k for k, v in found.items() if not isinstance(v, TensorStorageMetadata)]
            self.tensors = {
                name: _stored_tensor(path, name, entry, places)
                for name, entry in found.items()
                if isinstance(entry, TensorStorageMetadata)
            }
        except _DAMAGE as error:
            raise CheckpointError(f"{file} cannot be read: {_what(error)}") from error
        self._check_files()
        self._layouts: dict[StoredChunk, _Layout] = {}
        self._checked: dict[StoredChunk, tuple[int, int]] = {}  # rows read so far, their CRC-32

    @cached_property
    def common(self) -> dict[str, Any]:
        """What `common.pt` holds: the trainer's state, and the optimizer's but for its tensors.

        Raises:
            CheckpointError: the file is missing or damaged.
        """
        file = self.path / COMMON
        try:
            return dict(torch.load(file, map_location="cpu", weights_only=False))
        except _DAMAGE as error:
            raise CheckpointError(f"{file} cannot be read: {_what(error)}") from error

    @property
    def trainer(self) -> dict[str, Any]:
        """The trainer's state; {} of a checkpoint that holds weights alone."""
        return self.common.get("trainer", {})

    def model_names(self) -> list[str]:
        """Names of the weights and buffers, without optimizer state."""
        return [name for name in self.tensors if not name.startswith(OPTIMIZER)]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows `start` to `stop` (default: the last) of a tensor's axis 0, on the CPU.

        Reads only these rows, where a chunk is stored row by row, as it nearly always is. A chunk
        whose rows are read in order, in one call or several, is compared with its checksum.

        Raises:
            CheckpointError: no tensor of this name, or its files are damaged.
            ValueError: rows that it does not have.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self.path} holds no tensor {name}")
        tensor = self.tensors[name]
        stop = tensor.rows if stop is None else stop
        if not 0 <= start <= stop <= tensor.rows:
            raise ValueError(f"rows {start}:{stop} of {name}, which has {tensor.rows}")
        rows = torch.empty((stop - start, *tensor.shape[1:]), dtype=tensor.dtype)
        for chunk in tensor.chunks:
            above, *across = chunk.offset or (0,)
            height, *width = chunk.shape or (1,)
            first, last = max(start, above), min(stop, above + height)
            if first >= last or 0 in width:
                continue
            inside = [slice(o, o + n) for o, n in zip(across, width, strict=True)]
            target = rows[(slice(first - start, last - start), *inside)]
            try:
                self._fill(target, chunk, first - above, last - above)
            except _DAMAGE as error:
                raise CheckpointError(
                    f"{chunk.file} is damaged: {name} cannot be read: {_what(error)}"
                ) from error
        return rows if tensor.shape else rows.reshape(())

    def _fill(self, target: torch.Tensor, chunk: StoredChunk, first: int, last: int) -> None:
        """Copies rows of a chunk into a tensor of their shape."""
        height, *width = chunk.shape or (1,)
        with open(chunk.file, "rb") as file:
            if chunk not in self._layouts:
                self._layouts[chunk] = _layout(file, chunk)
            layout = self._layouts[chunk]
            if layout.dtype != target.dtype:
                raise ValueError(f"{layout.dtype} is stored where {target.dtype} should be")
            if layout.by_rows:
                direct = target.is_contiguous()
                block = target if direct else torch.empty(target.shape, dtype=target.dtype)
                position = layout.position + first * math.prod(width) * target.itemsize
                self._check(chunk, layout, first, last, _read_exactly(file, position, block))
                if not direct:
                    target.copy_(block)
            else:
                storage = torch.empty(layout.elements, dtype=target.dtype)
                self._check(chunk, layout, 0, height, _read_exactly(file, layout.position, storage))
                whole = storage.as_strided((height, *width), layout.stride, layout.offset)
                target.copy_(whole[first:last])

    def _check(
        self, chunk: StoredChunk, layout: _Layout, first: int, last: int, data: memoryview
    ) -> None:
        """Compares a chunk with its checksum, once its rows have been read one after the other."""
        rows, checksum = self._checked.get(chunk, (0, 0)) if first else (0, 0)
        if rows != first or layout.checksum is None:
            return
        checksum = zlib.crc32(data, checksum)
        self._checked[chunk] = last, checksum
        if last == (chunk.shape or (1,))[0] and checksum != layout.checksum:
            raise ValueError("its checksum is wrong")

    def _check_files(self) -> None:
        ends: dict[Path, int] = {}
        for tensor in self.tensors.values():
            for chunk in tensor.chunks:
                end = chunk.position + chunk.length
                ends[chunk.file] = max(ends.get(chunk.file, 0), end)
        for file, end in ends.items():
            try:
                size = file.stat().st_size
            except OSError as error:
                raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
            if size < end:
                raise CheckpointError(f"{file} is damaged: it has {size} bytes of at least {end}")


@dataclass(frozen=True)
class _Layout:
    """How an archive of `torch.save` holds its one tensor."""

    position: int  # in the file, of the storage, or with `by_rows` of the first element
    elements: int  # of the storage
    dtype: torch.dtype
    offset: int  # of the first element in the storage
    stride: tuple[int, ...]
    by_rows: bool
    checksum: int | None  # CRC-32 of the storage; None if not known, or if the chunk is not all


def _stored_tensor(
    path: Path, name: str, entry: TensorStorageMetadata, places: dict[Any, Any]
) -> StoredTensor:
    chunks = []
    for chunk in entry.chunks:
        offset, shape = tuple(chunk.offsets), tuple(chunk.sizes)
        place = places[name, offset]
        file = path / place.relative_path
        chunks.append(StoredChunk(offset, shape, file, place.offset, place.length))
    covered, whole = sum(math.prod(c.shape) for c in chunks), math.prod(entry.size)
    if covered != whole:
        raise ValueError(f"chunks of {name} have {covered} elements of {whole}")
    return StoredTensor(name, tuple(entry.size), entry.properties.dtype, tuple(chunks))


class _Slice(io.RawIOBase):
    """`length` bytes at `start` of a file, as a file."""

    def __init__(self, file: Any, start: int, length: int):
        self._file, self._start, self._length, self._at = file, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        self._file.seek(self._start + self._at)
        found = self._file.readinto(memoryview(buffer)[: max(0, self._length - self._at)])
        self._at += found
        return found


def _layout(file: Any, chunk: StoredChunk) -> _Layout:
    """Finds the storage in the archive of a chunk, without reading it."""
    view = _Slice(file, chunk.position, chunk.length)
    with zipfile.ZipFile(view) as archive:
        root = archive.namelist()[0].split("/")[0]
        tensor = _TensorUnpickler(archive.open(f"{root}/data.pkl")).load()
        stored = archive.getinfo(f"{root}/data/{tensor.key}")
    if tensor.shape != chunk.shape:
        raise ValueError(f"a tensor of shape {tensor.shape} is stored as {chunk.shape}")
    itemsize = tensor.dtype.itemsize
    if stored.compress_type != zipfile.ZIP_STORED or stored.file_size % itemsize:
        raise ValueError("its storage is not plain numbers")
    view.seek(stored.header_offset)
    header = (
        view.read(30) or b""
    )  # of a local file header; the lengths of name and extra field end it
    position = chunk.position + stored.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
    elements = stored.file_size // itemsize
    by_rows = _is_row_major(chunk.shape, tensor.stride)
    if tensor.offset + (math.prod(chunk.shape) if by_rows else 0) > elements:
        raise ValueError("its storage is too short")
    whole = by_rows and elements == math.prod(chunk.shape)
    return _Layout(
        position + (tensor.offset * itemsize if by_rows else 0),
        elements,
        tensor.dtype,
        tensor.offset,
        tensor.stride,
        by_rows,
        (stored.CRC or None) if whole or not by_rows else None,  # 0 where none was computed
    )


def _is_row_major(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = (math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    return all(n == 1 or a == b for n, a, b in zip(shape, stride, expected, strict=True))


def _read_exactly(file: Any, position: int, target: torch.Tensor) -> memoryview:
    """Fills a contiguous tensor; returns its bytes."""
    view: Any = memoryview(target.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    file.seek(position)
    found = file.readinto(view)
    if found != len(view):
        raise EOFError(f"{found} bytes of {len(view)} are there")
    return view


@dataclass(frozen=True)
class _Pickled:
    key: str
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "BoolStorage": torch.bool,
}
"""torch's own names; its classes warn that they are deprecated as soon as they are looked at."""


class _TensorUnpickler(pickle.Unpickler):
    """Reads what `torch.save` pickled of one tensor: everything but the numbers. Runs no code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._tensor
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"{module}.{name} in the place of a plain tensor")

    def persistent_load(self, pid: Any) -> Any:
        _, dtype, key, _, _ = pid
        return key, dtype

    @staticmethod
    def _tensor(storage: Any, offset: int, shape: Any, stride: Any, *_: Any) -> _Pickled:
        key, dtype = storage
        return _Pickled(key, dtype, offset, tuple(shape), tuple(stride))


def _what(error: BaseException) -> str:
    return f"{type(error).__name__}: {reason(error)}"
