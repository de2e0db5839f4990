"""Counts the bytes of global memory that interpreted kernels load and store."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from megakda.kernels.verify import interpreter
from megakda.kernels.verify.rounding import Array
from megakda.kernels.verify.storage import Arguments, Storage


@dataclass
class Traffic:
    """What one launch moved.

    Attributes:
        kernel: the kernel's name.
        programs: how many programs it had.
        unique_loaded: bytes that were loaded at least once before the launch had stored to them:
            they have to come from memory, while what a launch wrote itself is in a cache.
        unique_stored: bytes that were stored to at least once.
        loaded, stored: bytes of all loads and stores, repetitions included.
    """

    kernel: str
    programs: int = 0
    unique_loaded: int = 0
    unique_stored: int = 0
    loaded: int = 0
    stored: int = 0

    @property
    def unique(self) -> int:
        """The least that the launch can move: `unique_loaded` + `unique_stored`."""
        return self.unique_loaded + self.unique_stored


@contextmanager
def record_traffic() -> Iterator[list[Traffic]]:
    """Yields a list to which every launch in the block adds its traffic, in order.

    Raises:
        RuntimeError: `interpreter.install` was not called.
    """
    counter = _Counter()
    with interpreter.observed_by(counter):
        yield counter.launches


class _Counter(interpreter.Observer):
    def __init__(self) -> None:
        self.launches: list[Traffic] = []

    def launch_begins(self, kernel: str, arguments: dict[str, Any]) -> None:
        self.launches.append(Traffic(kernel))
        self.arguments = Arguments(arguments)

    def program_begins(self, program: tuple[int, int, int]) -> None:
        self.launches[-1].programs += 1

    def load(self, addresses: Array, size: int, tensor: torch.Tensor | None) -> None:
        self.launches[-1].loaded += addresses.size * size
        storage = self._storage(addresses, tensor)
        if storage is not None:
            units = storage.units(addresses, size)
            own = storage.marks("stored", False)[units]
            storage.marks("loaded", False)[units[~own]] = True

    def store(self, addresses: Array, size: int, tensor: torch.Tensor | None) -> None:
        self.launches[-1].stored += addresses.size * size
        storage = self._storage(addresses, tensor)
        if storage is not None:
            storage.marks("stored", False)[storage.units(addresses, size)] = True

    def launch_ends(self) -> None:
        launch = self.launches[-1]
        for storage in self.arguments.storages:
            launch.unique_loaded += storage.unit * int(storage.marks("loaded", False).sum())
            launch.unique_stored += storage.unit * int(storage.marks("stored", False).sum())

    def _storage(self, addresses: Array, tensor: torch.Tensor | None) -> Storage | None:
        if not addresses.size:
            return None
        argument = self.arguments.find(tensor, addresses)
        if argument is None:
            raise ValueError(f"{self.launches[-1].kernel}: addresses of no tensor argument")
        return argument.storage
