"""Finds wrong accesses to memory in interpreted kernels, which a GPU would let pass or punish late.

Inside `checked_memory` every load and store is checked: against the elements of the tensor that the
pointer was made from, and against what the other programs of the launch read and wrote. Memory from
torch.empty holds NaN there (integers: the largest), so that a result made of it shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.utils.deterministic

from megakda.kernels.verify import interpreter
from megakda.kernels.verify.rounding import Array
from megakda.kernels.verify.storage import Argument, Arguments


class MemoryAccessError(Exception):
    """A program accessed memory that is not its own.

    Attributes:
        kernel: the kernel's name.
        argument: the name of its parameter; None if the address is in no tensor of the launch.
        program: the program's three indices.
        byte_range: first byte and byte after the last of the offending accesses of one load or
            store, counted from the argument's first element.
    """

    def __init__(
        self,
        kernel: str,
        argument: str | None,
        program: tuple[int, int, int],
        byte_range: tuple[int, int],
        problem: str,
    ) -> None:
        self.kernel, self.argument, self.program = kernel, argument, program
        self.byte_range = byte_range
        first, end = byte_range
        super().__init__(
            f"{kernel}: program {program} {problem}: bytes [{first}, {end}) of {argument}"
        )


@contextmanager
def checked_memory() -> Iterator[None]:
    """Within the block, kernels that access memory wrongly raise MemoryAccessError.

    Reported are loads and stores outside the elements of an argument, holes of strided views
    included; two programs of one launch that store to the same address; and a program that
    loads what another program of the launch stores, before or after.

    Raises:
        RuntimeError: `interpreter.install` was not called.
    """
    with interpreter.observed_by(_Checker()), poisoned_memory():
        yield


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Within the block, torch.empty gives NaN, and the largest number for integers."""
    # The same switch as use_deterministic_algorithms, which would import the compiler first.
    mode = torch.get_deterministic_debug_mode()
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    torch.set_deterministic_debug_mode(mode or "warn")
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        settings.fill_uninitialized_memory = fill


NOBODY, SEVERAL = -1, -2


class _Checker(interpreter.Observer):
    def launch_begins(self, kernel: str, arguments: dict[str, Any]) -> None:
        self.kernel = kernel
        self.arguments = Arguments(arguments)
        self.programs: list[tuple[int, int, int]] = []

    def program_begins(self, program: tuple[int, int, int]) -> None:
        self.programs.append(program)

    def load(self, addresses: Array, size: int, tensor: torch.Tensor | None) -> None:
        if not addresses.size:
            return
        argument = self._inside(addresses, size, tensor, "loads")
        me, storage = len(self.programs) - 1, argument.storage
        units = storage.units(addresses, size)
        self._alone(argument, addresses, units, "writers", "loads what {} stored")
        readers = storage.marks("readers", NOBODY)
        before = readers[units]
        readers[units] = np.where((before == NOBODY) | (before == me), me, SEVERAL)

    def store(self, addresses: Array, size: int, tensor: torch.Tensor | None) -> None:
        if not addresses.size:
            return
        argument = self._inside(addresses, size, tensor, "stores")
        units = argument.storage.units(addresses, size)
        self._alone(argument, addresses, units, "writers", "stores where {} stored")
        self._alone(argument, addresses, units, "readers", "stores where {} loaded")
        argument.storage.marks("writers", NOBODY)[units] = len(self.programs) - 1

    def _inside(
        self, addresses: Array, size: int, tensor: torch.Tensor | None, verb: str
    ) -> Argument:
        """The argument that is accessed, all of it inside."""
        argument = self.arguments.find(tensor, addresses)
        first, end = int(addresses.min()), int(addresses.max()) + size
        if argument is None:
            raise self._error(None, (first, end), f"{verb} from addresses of no tensor")
        offsets = addresses.astype(np.int64) - argument.start
        if not argument.start <= first <= end <= argument.start + argument.size:
            outside = (offsets < 0) | (offsets + size > argument.size)
            problem = f"{verb} outside of a tensor of {argument.size} bytes"
        elif argument.belongs is not None:
            outside = ~argument.belongs[offsets]
            problem = f"{verb} between the elements of a strided tensor"
        else:
            return argument
        if outside.any():
            wrong = offsets[outside]
            raise self._error(argument, (int(wrong.min()), int(wrong.max()) + size), problem)
        return argument

    def _alone(
        self, argument: Argument, addresses: Array, units: Array, marks: str, problem: str
    ) -> None:
        """Nobody else has left these marks."""
        if not argument.storage.has_marks(marks):
            return
        who = argument.storage.marks(marks, NOBODY)[units]
        other = (who != NOBODY) & (who != len(self.programs) - 1)
        if other.any():
            culprit = int(who[other][0])
            name = "several programs" if culprit == SEVERAL else f"program {self.programs[culprit]}"
            unit = argument.storage.unit
            offsets = units[other] * unit + argument.storage.start - argument.start
            raise self._error(
                argument,
                (int(offsets.min()), int(offsets.max()) + unit),
                problem.format(name),
            )

    def _error(
        self, argument: Argument | None, byte_range: tuple[int, int], problem: str
    ) -> MemoryAccessError:
        name = None if argument is None else argument.name
        return MemoryAccessError(self.kernel, name, self.programs[-1], byte_range, problem)
