"""Runs the kernel tests compiled on a GPU: a pytest plugin, for a machine that has one.

    python -m pytest -p megakda.kernels.verify.on_gpu --confcutdir tests/kernels tests/kernels

The tests stay as they are, with tensors on the CPU: every launch moves its arguments to the GPU and
back. Tests that look into the interpreter are skipped. The launch table is that of the GPU. The
option keeps tests/conftest.py out, which prepares a process without a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import SkipTest

import torch

from megakda.kernels import backend, launch
from megakda.kernels.verify.tuning.tables import architecture_of

_forever = ExitStack()


def pytest_configure(config: Any) -> None:
    """pytest calls this once, before any test is collected."""
    del config
    install()


def install() -> None:
    """Makes this process launch kernels of CPU tensors on the GPU, for good.

    Raises:
        RuntimeError: there is no GPU, or kernels are to be interpreted.
    """
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise RuntimeError(
            "TRITON_INTERPRET is set, and kernels would be interpreted: unset it, and give pytest "
            "--confcutdir tests/kernels, because tests/conftest.py sets it"
        )
    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no GPU")
    from triton.runtime.jit import JITFunction

    from megakda.kernels.verify import interpreter, memory

    device = torch.device("cuda")
    setattr(JITFunction, "run", moved_launch(JITFunction.run, device))  # noqa: B010
    # Operators refuse CPU tensors unless they are to be interpreted.
    setattr(backend, "interpreting", lambda: True)  # noqa: B010
    name = architecture_of(device)
    _forever.enter_context(launch.force(name if name in launch.ARCHITECTURES else launch.DEFAULT))
    setattr(interpreter, "install", lambda: None)  # noqa: B010
    setattr(interpreter, "observed_by", _skip)  # noqa: B010
    setattr(memory, "checked_memory", memory.poisoned_memory)  # noqa: B010


def moved_launch(run: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """A function like `run` that moves tensor arguments from the CPU to `device` and back.

    Whole storages are moved, so that strides, views and what lies between stay as they are.
    """

    def moved(*args: Any, **kwargs: Any) -> Any:
        storages: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

        def there(x: Any) -> Any:
            if not isinstance(x, torch.Tensor) or x.device.type != "cpu":
                return x
            storage = x.untyped_storage()
            if storage.data_ptr() not in storages:
                here = torch.empty(0, dtype=torch.uint8).set_(storage)
                storages[storage.data_ptr()] = here, here.to(device, copy=True)
            away = storages[storage.data_ptr()][1].untyped_storage()
            copy = torch.empty(0, dtype=x.dtype, device=device)
            return copy.set_(away, x.storage_offset(), x.size(), x.stride())

        with torch.no_grad():
            result = run(*map(there, args), **{name: there(x) for name, x in kwargs.items()})
            for here, away in storages.values():
                here.copy_(away)
        return result

    return moved


def _skip(observer: Any) -> Any:
    raise SkipTest(f"{type(observer).__name__} watches the interpreter")
