"""The tensors of a Hugging Face folder as megakda's, checked against a model before any is read."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from megakda.checkpoint.hf_folder import DTYPES, HFFolder
from megakda.checkpoint.hf_map import Block, Tensor, tensors
from megakda.config.schema import ModelConfig
from megakda.errors import CheckpointError

_LISTED = 5  # names per kind of problem in an error message


class HFSource:
    """A folder that holds exactly the tensors of a model. A context manager.

    Args:
        folder: published, or as megakda or transformers wrote it.
        model: `megakda.checkpoint.hf_config.read(folder)`, or another spelling of it.

    Attributes:
        tensors: megakda's tensors by name, in the order of the layers.

    Raises:
        CheckpointError: files that are missing, truncated or damaged; tensors that are missing,
            that the model has not, or of another shape or an unknown dtype. All are named.
    """

    def __init__(self, folder: Path, model: ModelConfig):
        self.tensors: dict[str, Tensor] = {tensor.name: tensor for tensor in tensors(model)}
        self._folder = HFFolder(folder)
        self._check()

    def __enter__(self) -> HFSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes what `fill` has opened."""
        self._folder.close()

    @property
    def files(self) -> set[Path]:
        """The files that the tensors are in."""
        return {entry.file for entry in self._folder.entries.values()}

    def dtype(self, name: str) -> torch.dtype:
        """Of one of megakda's tensors: the widest of the published ones that it is made of."""
        found = DTYPES[self._folder.entries[self._spelled(self.tensors[name].blocks[0])].dtype]
        for block in self.tensors[name].blocks[1:]:
            other = DTYPES[self._folder.entries[self._spelled(block)].dtype]
            found = torch.promote_types(found, other)
        return found

    def fill(self, name: str, target: torch.Tensor, offset: tuple[int, ...]) -> None:
        """Fills `target`, the block at `offset` of megakda's tensor `name`, in its own dtype.

        Reads no more than this block, but for matrices of which it wants some columns.
        """
        for block in self.tensors[name].blocks:
            overlap = block.overlap(offset, tuple(target.shape))
            if overlap is None:
                continue
            inside, published = overlap
            part, name_there = target[inside].detach(), self._spelled(block)
            kind = DTYPES[self._folder.entries[name_there].dtype]
            if self._is_direct(block, part, kind):
                self._folder.read(name_there, published, out=part)
            else:
                part.copy_(self._read(block, published).reshape(part.shape))

    def held(self, name: str, elements: int, kind: torch.dtype) -> int:
        """Bytes of memory that `fill` needs for a block of so many elements, itself included."""
        blocks, found = self.tensors[name].blocks, self.dtype(name)
        largest = min(elements, max(math.prod(block.shape) for block in blocks))
        copied = found != kind or blocks[0].rotation is not None
        return elements * kind.itemsize + copied * largest * found.itemsize

    @staticmethod
    def _is_direct(block: Block, part: torch.Tensor, kind: torch.dtype) -> bool:
        """Whether the file's numbers can go where they belong without another copy."""
        same = part.dtype == kind and block.rotation is None
        return same and part.is_contiguous() and part.device.type == "cpu"

    def _read(self, block: Block, where: tuple[slice, ...]) -> torch.Tensor:
        name = self._spelled(block)
        if block.rotation is None:
            return self._folder.read(name, where)
        rows = block.rotation.published_rows(where[0].start, where[0].stop)
        first = int(rows.min())
        covering = (slice(first, int(rows.max()) + 1), *where[1:])
        return self._folder.read(name, covering)[rows - first]

    def _spelled(self, block: Block) -> str:
        return block.name if block.name in self._folder.entries else block.also

    def _check(self) -> None:
        entries, used = self._folder.entries, set()
        missing, shapes, dtypes = [], [], []
        for tensor in self.tensors.values():
            for block in tensor.blocks:
                entry = entries.get(self._spelled(block))
                if entry is None:
                    missing.append(block.name)
                    continue
                used.add(self._spelled(block))
                if entry.shape != block.shape:
                    shapes.append(f"{block.name} is {list(entry.shape)}, not {list(block.shape)}")
                if entry.dtype not in DTYPES:
                    dtypes.append(f"{block.name} is {entry.dtype}, not {' or '.join(DTYPES)}")
        problems = {
            "missing": missing,
            "not of this model": sorted(entries.keys() - used),
            "of another shape": shapes,
            "of an unknown type": dtypes,
        }
        found = [
            f"{len(names):,} {problem}: {', '.join(names[:_LISTED])}"
            + (", ..." if len(names) > _LISTED else "")
            for problem, names in problems.items()
            if names
        ]
        if found:
            raise CheckpointError(
                f"{self._folder.folder} does not hold the tensors of the model that its "
                f"config.json describes: {'; '.join(found)}. Copy or download the whole folder "
                "again, or correct config.json"
            )
