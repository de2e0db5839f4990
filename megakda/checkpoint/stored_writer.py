"""Writes a checkpoint part by part. See `megakda.checkpoint.stored`."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megakda.checkpoint.folders import (
    COMMON,
    CONTENT,
    FORMAT,
    MANIFEST,
    claimed,
    reason,
    sync_folder,
    write_json,
)
from megakda.errors import CheckpointError

_JOB, _INDEX = "job.json", ".index.json"
_PART_NAME = re.compile(r"\w[\w.-]*")
WRITE_BUFFER = 1 << 20
"""Bytes; torch.save writes in small pieces, and through Python's own buffer 3 times slower."""


class CheckpointWriter:
    """Writes a checkpoint folder part by part; it gets its name after its last byte is on disk.

    Until `finish` everything is in a hidden folder beside `target`. A writer that finds such a
    folder, left by one that was interrupted, keeps the parts that are complete there. No other
    process can write there until `finish` or `close`, or the end of a `with` block.

    Args:
        target: the folder to make; its parents are made too.
        job: facts, as JSON holds them, that say what is written. What an interrupted writer with
            other facts has left is not continued.

    Raises:
        CheckpointError: `target` exists, another job has left parts there, or another process is
            writing it.
    """

    def __init__(self, target: Path, job: dict[str, Any] | None = None):
        self.target = target
        self.partial = target.parent / f".{target.name}.partial"
        self._refuse_existing()
        with ExitStack() as lock:
            try:
                lock.enter_context(claimed(self.partial))
                self._refuse_existing()  # another process may have finished it just now
                self.partial.mkdir(exist_ok=True)
                self._parts = dict(self._complete_parts())
                self._claim({} if job is None else job)
            except OSError as error:
                raise CheckpointError(self._failed(error)) from error
            self._lock = lock.pop_all()

    def close(self) -> None:
        """Lets other processes write there; what is complete stays."""
        self._lock.close()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def has_part(self, name: str) -> bool:
        """Whether this part is complete."""
        return name in self._parts

    def write_part(
        self,
        name: str,
        tensors: Iterable[tuple[str, torch.Tensor, tuple[int, ...], tuple[int, ...]]],
    ) -> None:
        """Writes blocks of tensors into a file of their own, one after the other.

        Args:
            name: of the part: letters, digits and ``._-``.
            tensors: (global name, block, shape of the whole tensor, offset of the block in it).

        Raises:
            CheckpointError: the file cannot be written.
        """
        if not _PART_NAME.fullmatch(name):
            raise ValueError(f"{name!r} must consist of letters, digits and ._-")
        file = _file(name)
        scratch = self.partial / f".{file}.{os.getpid()}.tmp"
        blocks: list[_Block] = []
        try:
            with open(scratch, "wb", buffering=WRITE_BUFFER) as stream:
                for tensor_name, block, shape, offset in tensors:
                    blocks.append(self._write_block(stream, tensor_name, block, shape, offset))
                    del block  # or it would be held while the next one is made
                stream.flush()
                os.fsync(stream.fileno())
                size = stream.tell()
            # A part is complete once its index is there, so the index comes last.
            self._index(name).unlink(missing_ok=True)
            os.replace(scratch, self.partial / file)
            write_json(
                self._index(name), {"bytes": size, "blocks": [asdict(block) for block in blocks]}
            )
        except OSError as error:
            raise CheckpointError(self._failed(error)) from error
        finally:
            scratch.unlink(missing_ok=True)
        self._parts[name] = blocks

    def finish(
        self,
        manifest: dict[str, Any],
        trainer: dict[str, Any],
        optimizer: dict[str, Any] | None = None,
    ) -> None:
        """Completes the checkpoint and gives it its name.

        Args:
            manifest: facts about the run, JSON; `format` is added.
            trainer: the trainer's state; {} where there is none to continue.
            optimizer: what `common.pt` holds of the optimizer besides its tensors.

        Raises:
            CheckpointError: blocks overlap or leave gaps, or files cannot be written.
        """
        self._check_cover()
        common = {"trainer": trainer, "content_metadata": dict(CONTENT)}
        if optimizer is not None:
            common["optimizer"] = optimizer
        self._refuse_existing()
        try:
            self._remove_others()
            with open(self.partial / COMMON, "wb") as stream:
                torch.save(common, stream)
                stream.flush()
                os.fsync(stream.fileno())
            with open(self.partial / ".metadata", "wb") as stream:
                pickle.dump(self._metadata(), stream)
                stream.flush()
                os.fsync(stream.fileno())
            backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
            write_json(
                self.partial / "metadata.json",
                {**backend, "common_backend": "torch", "common_backend_version": 1},
            )
            write_json(self.partial / MANIFEST, {"format": FORMAT, **manifest})
            os.replace(self.partial, self.target)
            # Removed only now, so that a writer killed before this line finds its parts again.
            for name in self._parts:
                (self.target / self._index(name).name).unlink()
            (self.target / _JOB).unlink()
            sync_folder(self.target)
            sync_folder(self.target.parent)
        except OSError as error:
            raise CheckpointError(self._failed(error)) from error
        self.close()

    def _write_block(
        self,
        stream: IO[bytes],
        name: str,
        block: torch.Tensor,
        shape: tuple[int, ...],
        offset: tuple[int, ...],
    ) -> _Block:
        block = block.detach().cpu().contiguous()
        if block.untyped_storage().nbytes() != block.nbytes:
            block = block.clone()  # torch.save writes a view's whole storage
        position = stream.tell()
        try:
            torch.save(block, stream)
        except RuntimeError as error:  # torch's zip writer hides the OSError
            raise CheckpointError(self._failed(error)) from error
        dtype = str(block.dtype).removeprefix("torch.")
        inside = (list(block.shape), list(offset), list(shape))
        return _Block(name, dtype, *inside, position, stream.tell() - position)

    def _index(self, part: str) -> Path:
        return self.partial / f"{part}{_INDEX}"

    def _complete_parts(self) -> Iterator[tuple[str, list[_Block]]]:
        for index in sorted(self.partial.glob(f"*{_INDEX}")):
            part = index.name.removesuffix(_INDEX)
            saved = json.loads(index.read_text())
            if _size(self.partial / _file(part)) == saved["bytes"]:
                yield part, [_Block(**block) for block in saved["blocks"]]

    def _claim(self, job: dict[str, Any]) -> None:
        file = self.partial / _JOB
        if self._parts and (not file.is_file() or json.loads(file.read_text()) != job):
            raise CheckpointError(
                f"{self.partial} holds parts of something else, which was interrupted: repeat that "
                "command to complete it, or delete the folder"
            )
        write_json(file, job)

    def _refuse_existing(self) -> None:
        if self.target.exists():
            raise CheckpointError(f"{self.target} exists: choose another output, or delete it")

    def _remove_others(self) -> None:
        """Removes what killed writers have left half-written."""
        ours = {_JOB}
        for part in self._parts:
            ours |= {_file(part), self._index(part).name}
        for path in self.partial.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in ours:
                path.unlink()

    def _check_cover(self) -> None:
        """Every tensor is covered by its blocks, none of them twice."""
        tensors: dict[str, list[_Block]] = {}
        for blocks in self._parts.values():
            for block in blocks:
                tensors.setdefault(block.name, []).append(block)
        if not tensors:
            raise CheckpointError(f"{self.target} would hold no tensor")
        for name, blocks in tensors.items():
            kinds = {(block.dtype, *block.global_shape) for block in blocks}
            if len(kinds) > 1:
                raise CheckpointError(f"blocks of {name} differ in dtype or global shape: {kinds}")
            for block in blocks:
                if not block.is_inside():
                    raise CheckpointError(f"a block lies outside of its tensor: {block}")
            blocks.sort(key=lambda block: block.offset)
            for number, one in enumerate(blocks):
                for other in takewhile(one.reaches, blocks[number + 1 :]):
                    if one.overlaps(other):
                        raise CheckpointError(f"blocks overlap: {one} and {other}")
            covered, whole = sum(b.elements() for b in blocks), math.prod(blocks[0].global_shape)
            if covered != whole:
                raise CheckpointError(f"{name} is incomplete: {covered} of {whole} elements")

    def _metadata(self) -> Metadata:
        tensors: dict[str, Any] = {}
        places: dict[MetadataIndex, Any] = {}
        for part, blocks in self._parts.items():
            file = _file(part)
            for block in blocks:
                chunk = ChunkStorageMetadata(torch.Size(block.offset), torch.Size(block.shape))
                properties = TensorProperties(dtype=getattr(torch, block.dtype))
                whole = TensorStorageMetadata(properties, torch.Size(block.global_shape), [])
                tensors.setdefault(block.name, whole).chunks.append(chunk)
                place = filesystem._StorageInfo(file, block.position, block.length)
                places[MetadataIndex(block.name, chunk.offsets)] = place
        storage = StorageMeta(checkpoint_id=str(self.target), save_id=str(uuid.uuid4()))
        metadata = Metadata(tensors, storage_data=places, storage_meta=storage)
        metadata.version = filesystem.CURRENT_DCP_VERSION
        return metadata

    def _failed(self, error: BaseException) -> str:
        return (
            f"writing {self.target} failed: {reason(error)}; what is complete stays in "
            f"{self.partial}, and the same command continues there"
        )


@dataclass(frozen=True)
class _Block:
    """A block of a tensor in a part, as its index holds it."""

    name: str
    dtype: str
    shape: list[int]
    offset: list[int]
    global_shape: list[int]
    position: int
    length: int

    def elements(self) -> int:
        return math.prod(self.shape)

    def is_inside(self) -> bool:
        same_axes = len(self.shape) == len(self.offset) == len(self.global_shape)
        return same_axes and all(
            o >= 0 and o + n <= whole
            for o, n, whole in zip(self.offset, self.shape, self.global_shape, strict=True)
        )

    def reaches(self, other: _Block) -> bool:
        """Whether `other`, which does not begin before this block, begins in one of its rows."""
        return not self.shape or other.offset[0] < self.offset[0] + self.shape[0]

    def overlaps(self, other: _Block) -> bool:
        axes = zip(self.offset, self.shape, other.offset, other.shape, strict=True)
        return all(a < b + m and b < a + n for a, n, b, m in axes)


def _file(part: str) -> str:
    return f"{part}{filesystem.DEFAULT_SUFFIX}"


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None
