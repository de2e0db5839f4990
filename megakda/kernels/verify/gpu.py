"""What GPUs offer a kernel, and how much of it a compiled kernel takes."""

from __future__ import annotations

import collections
import re
import subprocess
import tempfile
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Limits of one architecture, from the CUDA programming guide; sizes in bytes.

    Attributes:
        capability: compute capability, 90 for 9.0.
        example: a product of this architecture.
        shared_per_block: shared memory that one block may have.
        shared_per_sm: shared memory of a multiprocessor.
    """

    capability: int
    example: str
    shared_per_block: int
    shared_per_sm: int


GPUS = {
    "sm_80": Gpu(80, "A100", 163 << 10, 164 << 10),
    "sm_90": Gpu(90, "H200", 227 << 10, 228 << 10),
    "sm_100": Gpu(100, "B200", 227 << 10, 228 << 10),
}
REGISTERS_PER_PARTITION = 16384
PARTITIONS = 4
WARPS_PER_SM = 64
BLOCKS_PER_SM = 32
TENSOR_MEMORY_COLUMNS = 512  # sm_100

PTX = {
    "wgmma": r"\bwgmma\.mma_async",
    "mma.sync": r"\bmma\.sync",
    "tcgen05.mma": r"\btcgen05\.mma",
    "cp.async": r"\bcp\.async\.c[ag]",
    "tma": r"\bcp\.async\.bulk\.tensor",
}
"""What is counted in PTX."""

SASS = ("HGMMA", "HMMA", "UTCHMMA", "FFMA", "MUFU", "BAR", "LDL", "STL")
"""What is counted in machine code: matrix products of sm_90, sm_80 and sm_100, fused multiply-adds,
special functions, barriers, loads and stores of spilled registers and other local memory."""

MATRIX = ("HGMMA", "HMMA", "UTCHMMA")


def blocks_per_sm(gpu: Gpu, registers: int, warps: int, shared: int, tensor_memory: int = 0) -> int:
    """How many blocks of a kernel a multiprocessor holds at once.

    Args:
        gpu: its limits.
        registers: of a thread.
        warps: of a block.
        shared: bytes of a block.
        tensor_memory: columns of a block.
    """
    registers_per_warp = -(-registers * 32 // 256) * 256
    warps_by_registers = PARTITIONS * (REGISTERS_PER_PARTITION // registers_per_warp)
    shared_per_block = -(-(shared + 1024) // 128) * 128  # 1 KB is the system's
    limits = [
        warps_by_registers // warps,
        gpu.shared_per_sm // shared_per_block,
        WARPS_PER_SM // warps,
        BLOCKS_PER_SM,
    ]
    if tensor_memory:
        limits.append(TENSOR_MEMORY_COLUMNS // tensor_memory)
    return min(limits)


def parse_assembler_log(log: str) -> dict[str, int]:
    """Registers, spill_stores, spill_loads and stack (bytes of a thread) from `ptxas -v`.

    Raises:
        ValueError: the log does not hold them.
    """
    patterns = {
        "registers": r"Used (\d+) registers",
        "spill_stores": r"(\d+) bytes spill stores",
        "spill_loads": r"(\d+) bytes spill loads",
        "stack": r"(\d+) bytes stack frame",
    }
    found = {name: re.findall(pattern, log) for name, pattern in patterns.items()}
    missing = [name for name, values in found.items() if not values]
    if missing:
        raise ValueError(f"no {', '.join(missing)} in the assembler's log: {log!r}")
    return {name: max(map(int, values)) for name, values in found.items()}


def count_instructions(ptx: str, cubin: bytes, disassembler: str) -> dict[str, int]:
    """How often the kernel has each instruction of `PTX` and `SASS`, those it has not left out.

    Args:
        ptx: its PTX.
        cubin: its machine code.
        disassembler: path of cuobjdump.
    """
    counts = {name: len(re.findall(pattern, ptx)) for name, pattern in PTX.items()}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run(
            [disassembler, "-sass", file.name], capture_output=True, text=True, check=True
        ).stdout
    # /*0050*/   @!P0 HGMMA.64x64x16.F32.BF16 R24, ...
    found = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)", listing, re.M)
    mnemonics = collections.Counter(found)
    counts |= {name: mnemonics[name] for name in SASS}
    return {name: count for name, count in counts.items() if count}
