"""Compiles the launches of operators for a GPU that is not there, and says what came out.

    with compiling("sm_90") as launches:
        x = torch.empty(1, 8192, 4096, dtype=torch.bfloat16, device="meta")
        gated_norm(x, gate, weight, backend="triton")
    print(launches[0].registers, launches[0].spill_loads)

The operators run as they are, on meta tensors, with the launch tables of that architecture. Each
launch is specialised as it would be on a GPU and compiled instead of run. This needs a process of
its own, one without TRITON_INTERPRET.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from megakda.kernels import launch
from megakda.kernels.verify.gpu import (
    GPUS,
    MATRIX,
    TENSOR_MEMORY_COLUMNS,
    Gpu,
    blocks_per_sm,
    count_instructions,
    parse_assembler_log,
)


class CompilationError(Exception):
    """A launch cannot be compiled, or needs more than the GPU has."""


@dataclass
class Compiled:
    """One kernel as it was compiled for one specialisation.

    Attributes:
        kernel: its name.
        architecture: "sm_90" and so on.
        constexprs: its compile-time arguments.
        num_warps, num_stages: as launched.
        launches: how many launches used this specialisation.
        registers: of a thread.
        spill_stores, spill_loads: bytes of a thread that did not fit into registers.
        stack: bytes of a thread in local memory.
        shared: bytes of shared memory of a block.
        blocks_per_sm: blocks that a multiprocessor holds at once.
        instructions: count by name, see `gpu.PTX` and `gpu.SASS`.
        seconds: that the compilation took.
        error: why there is no result, or why it would not run.
    """

    kernel: str
    architecture: str
    constexprs: dict[str, Any]
    num_warps: int = 0
    num_stages: int = 0
    launches: int = 1
    registers: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    stack: int = 0
    shared: int = 0
    blocks_per_sm: int = 0
    instructions: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    error: str | None = None

    @property
    def warps_per_sm(self) -> int:
        """Warps that a multiprocessor holds at once."""
        return self.blocks_per_sm * self.num_warps

    @property
    def matrix_instructions(self) -> int:
        """Instructions for tensor cores."""
        return sum(self.instructions.get(name, 0) for name in MATRIX)


@contextlib.contextmanager
def compiling(architecture: str, keep_going: bool = False) -> Iterator[list[Compiled]]:
    """Within the block, launches of Triton kernels are compiled for `architecture`, and not run.

    Args:
        architecture: a key of `gpu.GPUS`.
        keep_going: note errors in the list instead of raising them.

    Yields:
        A list that grows by one entry with every new specialisation.

    Raises:
        CompilationError: from a launch that does not compile, or needs too much shared memory.
        RuntimeError: TRITON_INTERPRET is set.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("kernels cannot be compiled in a process with TRITON_INTERPRET=1")
    gpu = GPUS[architecture]
    compiled: list[Compiled] = []
    kernels: dict[int, Compiled] = {}  # by the identity of triton's CompiledKernel
    alive: list[Any] = []  # keeps these identities unique

    def compile_launch(jit: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        entry = Compiled(jit.__name__, architecture, _constexprs(jit, args, kwargs))
        began, log, kernel = time.perf_counter(), io.StringIO(), None
        try:
            with contextlib.redirect_stdout(log):
                kernel = original_run(jit, *args, grid=grid, warmup=True, **kwargs)
        except Exception as error:
            if not keep_going:
                raise CompilationError(f"{jit.__name__} for {architecture}: {error}") from error
            entry.error = f"{type(error).__name__}: {error}"
        entry.seconds = time.perf_counter() - began
        if kernel is not None and id(kernel) in kernels:
            kernels[id(kernel)].launches += 1
            return kernel
        compiled.append(entry)
        if kernel is not None:
            kernels[id(kernel)] = entry
            alive.append(kernel)
            _describe(entry, gpu, kernel, log.getvalue())
            if entry.error and not keep_going:
                raise CompilationError(f"{entry.kernel} for {architecture}: {entry.error}")
        return kernel

    original_run, active_driver = JITFunction.run, driver._active
    with (
        tempfile.TemporaryDirectory() as cache,
        knobs.nvidia.scope(),
        knobs.compilation.scope(),
        knobs.language.scope(),
        knobs.cache.scope(),
        launch.force(architecture),
    ):
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True
        knobs.language.default_fp_fusion = True  # the default, said aloud
        knobs.cache.dir = cache
        driver.set_active(_AbsentGpu(gpu.capability))
        JITFunction.run = compile_launch
        try:
            yield compiled
        finally:
            JITFunction.run = original_run
            driver._active = active_driver


class _AbsentGpu:
    """What triton asks of a driver before it launches a kernel."""

    _count = 0

    def __init__(self, capability: int) -> None:
        self.capability = capability
        # Triton keeps compiled kernels per device; a new number makes it compile them again.
        _AbsentGpu._count += 1
        self.device = 1000 + _AbsentGpu._count

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.device

    def set_current_device(self, device: int) -> None:
        self.device = device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


def _constexprs(jit: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    signature = inspect.signature(jit.fn)
    known = {name: value for name, value in kwargs.items() if name in signature.parameters}
    bound = signature.bind_partial(*args, **known)
    bound.apply_defaults()
    plain = (bool, int, float, str, type(None))
    return {
        p.name: value if isinstance(value, plain) else str(value)
        for p in jit.params
        if p.is_constexpr and (value := bound.arguments.get(p.name)) is not None
    }


def _describe(entry: Compiled, gpu: Gpu, kernel: Any, log: str) -> None:
    for name, value in parse_assembler_log(log).items():
        setattr(entry, name, value)
    metadata = kernel.metadata
    entry.num_warps, entry.num_stages = metadata.num_warps, metadata.num_stages
    entry.shared = metadata.shared
    tensor_memory = getattr(metadata, "tmem_size", None) or 0
    entry.blocks_per_sm = blocks_per_sm(
        gpu, entry.registers, entry.num_warps, entry.shared, tensor_memory
    )
    entry.instructions = count_instructions(
        kernel.asm["ptx"], kernel.asm["cubin"], knobs.nvidia.cuobjdump.path
    )
    if entry.shared > gpu.shared_per_block:
        entry.error = f"{entry.shared} bytes of shared memory; there are {gpu.shared_per_block}"
    if tensor_memory > TENSOR_MEMORY_COLUMNS:
        entry.error = f"{tensor_memory} columns of tensor memory; there are {TENSOR_MEMORY_COLUMNS}"


def versions() -> dict[str, str]:
    """Of what decides the outcome of a compilation."""
    return {
        "triton": triton.__version__,
        "ptxas": knobs.nvidia.ptxas.version,
        "torch": torch.__version__.split("+")[0],
    }
