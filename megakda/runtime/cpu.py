"""megatron-core on CPU over gloo: the only place that adapts it.

megatron-core assumes CUDA. Three kinds of change make the same code run on a machine without a
GPU, none of them thread-local and none of them wrapping tensor operations:

1. literal "cuda" devices and "torch.cuda.*Tensor" type names in its code become their CPU
   counterparts while a module is imported (`retarget`; `RETARGETED` lists the functions touched);
2. the few `torch.cuda` functions that it calls unconditionally get CPU meanings;
3. symbols of single modules, in `PATCHES`: random state, compiled fusions, and collectives that
   gloo lacks.
"""

from __future__ import annotations

import contextlib
import logging
from types import CodeType, ModuleType
from typing import Any

import torch

from megakda.errors import RuntimeMismatch
from megakda.runtime.hook import Patches

RETARGETED: list[str] = []  # "file.py:function" of every function whose literals changed


def retarget(code: CodeType) -> CodeType:
    """`code` with CUDA device literals replaced, in nested functions and tuples too."""
    constants = tuple(_retarget_constant(c) for c in code.co_consts)
    own_before = [c for c in code.co_consts if not isinstance(c, CodeType)]
    own_after = [c for c in constants if not isinstance(c, CodeType)]
    if own_before != own_after:
        name = getattr(code, "co_qualname", code.co_name)  # co_qualname: Python >= 3.11
        RETARGETED.append(f"{code.co_filename.split('/megatron/core/')[-1]}:{name}")
    return code.replace(co_consts=constants)


def _retarget_constant(constant: Any) -> Any:
    if isinstance(constant, str):
        if constant == "cuda":
            return "cpu"
        if constant.startswith("torch.cuda.") and constant.endswith("Tensor"):
            return constant.replace("torch.cuda.", "torch.")
        return constant
    if isinstance(constant, tuple):
        return tuple(_retarget_constant(c) for c in constant)
    return retarget(constant) if isinstance(constant, CodeType) else constant


class _Stream:
    """Stands for a CUDA stream and for the event that it records: everything is synchronous."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def wait_stream(self, other: _Stream) -> None:
        pass

    def wait_event(self, event: _Stream) -> None:
        pass

    def record_event(self, event: Any = None) -> _Stream:
        return self

    def synchronize(self) -> None:
        pass


_STREAM = _Stream()

# One function object per name: torch._dynamo refuses two names for one object.
_TORCH_CUDA: dict[str, Any] = {
    "current_device": lambda: torch.device("cpu"),
    "synchronize": lambda device=None: None,
    "manual_seed": lambda seed: torch.random.default_generator.manual_seed(seed) and None,
    "get_rng_state": lambda device=None: torch.random.get_rng_state(),
    "Stream": _Stream,
    "current_stream": lambda device=None: _STREAM,
    "stream": lambda stream: contextlib.nullcontext(),
}


def _no_compile(module: ModuleType) -> dict[str, Any]:
    module.disable_jit_fuser()  # torch.compile on CPU: slow first steps and another rounding
    return {}


def _random(module: ModuleType) -> dict[str, Any]:
    # The CPU generator stands for the CUDA generator, so a "changed" warning means nothing.
    logging.getLogger(module.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )
    return {
        "_get_cuda_rng_state": lambda *args, **kwargs: torch.random.get_rng_state(),
        "_set_cuda_rng_state": lambda state, *args, **kwargs: torch.random.set_rng_state(state),
    }


def _dispatcher(module: ModuleType) -> dict[str, Any]:
    # The original leaves CPU tensors alone even where it was asked for numpy, and all-to-all
    # rejects split sizes that are tensors.
    original = module.maybe_move_tensor_to_cpu

    def maybe_move_tensor_to_cpu(tensor, as_numpy=False, record_stream=False):  # type: ignore
        tensor = original(tensor, as_numpy, record_stream)
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    return {"maybe_move_tensor_to_cpu": maybe_move_tensor_to_cpu}


def _mappings(module: ModuleType) -> dict[str, Any]:
    # gloo has no uneven all-gather and reduce-scatter, which expert tensor parallelism needs;
    # its all-to-all is uneven.
    even_gather = module._gather_along_first_dim
    even_scatter = module._reduce_scatter_along_first_dim

    def exchange(x, sends, receives, group):  # type: ignore[no-untyped-def]
        out = x.new_empty([sum(receives), *x.shape[1:]])
        torch.distributed.all_to_all_single(out, x.contiguous(), receives, sends, group=group)
        return out

    def all_gather(x, group, output_split_sizes=None, use_global_buffer=False):  # type: ignore
        size = group.size()
        if size == 1 or output_split_sizes is None:
            return even_gather(x, group, None, use_global_buffer)
        return exchange(torch.cat([x] * size), [len(x)] * size, list(output_split_sizes), group)

    def reduce_scatter(x, group, input_split_sizes=None, use_global_buffer=False):  # type: ignore
        size = group.size()
        if size == 1 or input_split_sizes is None:
            return even_scatter(x, group, None, use_global_buffer)
        mine = input_split_sizes[group.rank()]
        received = exchange(x, list(input_split_sizes), [mine] * size, group)
        return received.view(size, mine, *x.shape[1:]).sum(0)

    return {
        "_gather_along_first_dim": all_gather,
        "_reduce_scatter_along_first_dim": reduce_scatter,
    }


PATCHES: Patches = {
    "jit": _no_compile,
    "tensor_parallel.random": _random,
    "tensor_parallel.mappings": _mappings,
    "transformer.moe.token_dispatcher": _dispatcher,
}


def install() -> None:
    """Gives `torch.cuda` its CPU meanings. `megakda.runtime.install` calls this once."""
    for name, replacement in _TORCH_CUDA.items():
        if not hasattr(torch.cuda, name):
            raise RuntimeMismatch(f"torch.cuda.{name} is gone from torch {torch.__version__}")
        setattr(torch.cuda, name, replacement)
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
