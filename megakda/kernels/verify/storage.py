"""Where the tensor arguments of a launch lie in memory, and marks on their elements."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from megakda.kernels.verify.rounding import Array


class Storage:
    """A block of memory that one or more arguments are views of, with marks per unit.

    A unit is as many bytes as the smallest element of these views, a power of two. Marks are
    arrays with one entry per unit, made when first asked for.
    """

    def __init__(self, start: int, size: int) -> None:
        self.start, self.size = start, size
        self.unit = 16
        self._marks: dict[str, Array] = {}

    def marks(self, name: str, value: int | bool) -> Array:
        """The marks called `name`, at first all equal to `value`."""
        if name not in self._marks:
            self._marks[name] = np.full(-(-self.size // self.unit), value)
        return self._marks[name]

    def has_marks(self, name: str) -> bool:
        """Whether anybody has asked for these marks."""
        return name in self._marks

    def units(self, addresses: Array, size: int) -> Array:
        """The units that elements of `size` bytes at `addresses` consist of."""
        first = (addresses - np.uint64(self.start)).view(np.int64) >> (self.unit.bit_length() - 1)
        if size <= self.unit:
            return first
        return (first[:, None] + np.arange(size // self.unit)).reshape(-1)


@dataclass
class Argument:
    """A tensor that was given to a kernel."""

    name: str
    tensor: torch.Tensor
    storage: Storage

    @cached_property
    def start(self) -> int:
        return self.tensor.data_ptr()

    @cached_property
    def size(self) -> int:
        """Bytes from the first to the last element, whatever lies between them."""
        if not self.tensor.numel():
            return 0
        steps = zip(self.tensor.shape, self.tensor.stride(), strict=True)
        return (sum((n - 1) * step for n, step in steps) + 1) * self.tensor.element_size()

    @cached_property
    def belongs(self) -> Array | None:
        """For every byte of `size` whether it is part of an element; None if all are."""
        distinct = math.prod(
            n for n, step in zip(self.tensor.shape, self.tensor.stride(), strict=True) if step
        )
        if distinct * self.tensor.element_size() >= self.size:
            return None
        width = self.tensor.element_size()
        mask = np.zeros(self.size, dtype=bool)
        np.lib.stride_tricks.as_strided(
            mask,
            (*self.tensor.shape, width),
            (*(step * width for step in self.tensor.stride()), 1),
        )[...] = True
        return mask


class Arguments:
    """The tensor arguments of one launch."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._storages: dict[int, Storage] = {}
        self._by_tensor: dict[int, Argument] = {}
        for name, value in arguments.items():
            for path, tensor in _tensors(name, value):
                untyped = tensor.untyped_storage()
                storage = self._storages.setdefault(
                    untyped.data_ptr(), Storage(untyped.data_ptr(), untyped.nbytes())
                )
                storage.unit = min(storage.unit, tensor.element_size())
                self._by_tensor[id(tensor)] = Argument(path, tensor, storage)

    def __iter__(self) -> Iterator[Argument]:
        return iter(self._by_tensor.values())

    @property
    def storages(self) -> list[Storage]:
        return list(self._storages.values())

    def find(self, tensor: torch.Tensor | None, addresses: Array) -> Argument | None:
        """The argument that pointers were made from, or else one in which `addresses` lie."""
        if tensor is not None:
            return self._by_tensor[id(tensor)]
        first, last = int(addresses.min()), int(addresses.max())
        for argument in self:
            if argument.start <= first and last < argument.start + argument.size:
                return argument
        return None


def _tensors(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    value = getattr(value, "base", value) if hasattr(value, "block_shape") else value
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from _tensors(f"{name}[{i}]", item)
