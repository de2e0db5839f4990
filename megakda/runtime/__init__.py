"""Device policy: what has to be true before the first ``import megatron.core``.

`install` is called once per process, by every entry point, before anything else imports
megatron-core. On a GPU it changes nothing but the bugs listed in `megakda.runtime.upstream`; on a
CPU it also adapts megatron-core to gloo (`megakda.runtime.cpu`).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
import warnings

import torch

from megakda.errors import ConfigError, RuntimeMismatch
from megakda.runtime import cpu, hook, upstream

MEGATRON_VERSION = "0.16.1"

_installed: tuple[str, str] | None = None


def install(device: str = "auto", backend: str = "torch", attention: str = "torch") -> torch.device:
    """Prepares this process for megatron-core and returns the device that it computes on.

    Args:
        device: ``auto`` takes the GPU of this rank where there is one, else the CPU.
        backend: ``torch`` needs nothing but torch and megatron-core; ``transformer_engine`` lets
            megatron-core use TransformerEngine's fused optimizer.
        attention: `runtime.attention`, for its check alone.

    Raises:
        ConfigError: a GPU was asked for where there is none, a CPU where there is a GPU, or
            TransformerEngine or flash-attn where it cannot be used.
        RuntimeMismatch: another megatron-core than the one this code was written for, a symbol
            that it adapts is gone, or megatron-core was imported before this call.
    """
    global _installed
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise ConfigError(
            "runtime.device=cuda, but torch sees no GPU: use runtime.device=auto or install a "
            "CUDA build of torch"
        )
    if device == "cpu" and has_gpu:
        raise ConfigError(
            "runtime.device=cpu on a machine with a GPU: megatron-core can be adapted to the CPU "
            "only where torch sees no GPU; hide it with CUDA_VISIBLE_DEVICES= or use "
            "runtime.device=auto"
        )
    if backend == "transformer_engine" and importlib.util.find_spec("transformer_engine") is None:
        raise ConfigError(
            "runtime.backend=transformer_engine, but TransformerEngine is not installed: "
            "pip install megakda[gpu], or use runtime.backend=torch"
        )
    if attention == "flash_attn":
        if not has_gpu:
            raise ConfigError(
                "runtime.attention=flash_attn, but torch sees no GPU: use runtime.attention=torch"
            )
        if importlib.util.find_spec("flash_attn") is None:
            raise ConfigError(
                "runtime.attention=flash_attn, but flash-attn is not installed: pip install "
                "flash-attn (2.7 or later), or use runtime.attention=torch"
            )
    kind = "cuda" if has_gpu else "cpu"
    if _installed is None:
        _check_versions()
        _quieten_upstream()
        patches = upstream.patches(backend)
        if kind == "cpu":
            cpu.install()
            patches = hook.merge(patches, cpu.PATCHES)
        hook.install(patches, rewrite=cpu.retarget if kind == "cpu" else None)
        _installed = (kind, backend)
    elif _installed != (kind, backend):
        raise RuntimeMismatch(
            f"the runtime was installed for {_installed} and cannot change to {(kind, backend)} "
            "in the same process"
        )
    if kind == "cpu":
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cuda", torch.cuda.current_device())


def _quieten_upstream() -> None:
    """Hides warnings that tell users nothing they could act on.

    megatron-core warns at import about every optional package that is missing, and calls functions
    that newer torch releases deprecate.
    """
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    warnings.filterwarnings(
        "ignore",
        message=r"`torch\.distributed\.\w+_tensor` is deprecated",
        category=FutureWarning,
    )


def _check_versions() -> None:
    try:
        version = importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        raise RuntimeMismatch(
            f"megatron-core is not installed: pip install megatron-core=={MEGATRON_VERSION}"
        ) from None
    if version != MEGATRON_VERSION:
        raise RuntimeMismatch(
            f"megatron-core {version} is installed, but megakda adapts {MEGATRON_VERSION} exactly: "
            f"pip install megatron-core=={MEGATRON_VERSION}"
        )
    if hook.ROOT in sys.modules:
        raise RuntimeMismatch(
            f"{hook.ROOT} was imported before megakda.runtime.install(): call install() first"
        )
