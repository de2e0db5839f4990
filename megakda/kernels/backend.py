"""Which implementation an operator runs: chosen once by device, or named by the caller.

Never a silent fallback: a backend that cannot run raises and says what to change.
"""

from __future__ import annotations

import importlib.util
import os

import torch

BACKENDS = ("torch", "triton", "reference")


def choose_backend(
    backend: str | None, device: torch.device, known: tuple[str, ...] = BACKENDS
) -> str:
    """The backend to run on `device`: the one named, or for None "triton" on a GPU, else "torch".

    Raises:
        ValueError: an unknown name, or Triton where it cannot run.
    """
    if backend is None:
        backend = "triton" if device.type == "cuda" else "torch"
    if backend not in known:
        raise ValueError(f"backend: {backend!r} must be one of {known}, or None")
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            raise ValueError(
                "backend: 'triton' needs the triton package (pip install 'triton>=3.6'); "
                "backend='torch' runs without it"
            )
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            raise ValueError(
                f"backend: 'triton' launches on the current device, cuda:"
                f"{torch.cuda.current_device()}, and the tensors are on {device}; call "
                "torch.cuda.set_device first, or use torch.cuda.device"
            )
        # The meta device stands for a GPU while kernels are compiled without one.
        if device.type not in ("cuda", "meta") and not interpreting():
            raise ValueError(
                f"backend: 'triton' runs on a GPU, and the tensors are on {device}; "
                "backend='torch' runs there, and TRITON_INTERPRET=1 interprets kernels for tests"
            )
    return backend


def interpreting() -> bool:
    """Whether Triton kernels are interpreted on the CPU instead of compiled."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
