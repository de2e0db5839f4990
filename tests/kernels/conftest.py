"""Triton kernels run in the corrected interpreter, with every access to memory checked."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def triton_interpreter() -> bool:
    """Corrects the interpreter before the first kernel test; False if triton is not there."""
    if importlib.util.find_spec("triton") is None:
        return False
    from megakda.kernels.verify import interpreter

    interpreter.install()
    return True


@pytest.fixture(autouse=True)
def memory_is_checked(triton_interpreter: bool) -> Iterator[None]:
    """A kernel that leaves its tensors or its program's part of them fails the test.

    torch.empty gives NaN, so that results cannot depend on memory that nobody wrote.
    """
    if not triton_interpreter:
        yield
        return
    from megakda.kernels.verify.memory import checked_memory

    with checked_memory():
        yield
