"""What the chunked kernels are to do, and where the chunks and ranges of a batch of sequences lie:
small tables made on the host.

Tokens of all sequences are counted through, [B, T] flattened. A chunk is BT consecutive tokens of
one sequence (fewer at its end), a range some consecutive chunks of one sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch


@dataclass(frozen=True)
class Fused:
    """What the kernels do besides the recurrence itself.

    Attributes:
        scale: of q.
        gate: "none" (g is the decay), "softplus" or "bounded".
        lower_bound: of the bounded gate.
        beta: "plain", "sigmoid" or "double_sigmoid".
        l2_norm: whether q and k are divided by their norms.
        delta: False for plain gated linear attention, S <- Diag(exp g) S + beta k v^T.
        chunk_size: 16, 32 or 64.
    """

    scale: float
    gate: str = "none"
    lower_bound: float = 0.0
    beta: str = "plain"
    l2_norm: bool = False
    delta: bool = True
    chunk_size: int = 64


@dataclass(frozen=True, eq=False)
class Split:
    """Sequences cut into R ranges; tables as `ChunkPlan.sequences`.

    Attributes:
        walks: [R, 5], with the range's own number as its initial slot, and as its final slot that
            of its sequence, or -1 but for the last range of a sequence.
        maps: [R, 5], with the range's own number in both slots.
        first: [N + 1], the first range of each sequence.
        first_on_host: the same numbers.
    """

    walks: torch.Tensor
    maps: torch.Tensor
    first: torch.Tensor
    first_on_host: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class ChunkPlan:
    """Tables for the chunked kernels, all int32 on the device.

    Attributes:
        chunks: [C, 2], first token and end of each chunk.
        sequences: [N, 5], each sequence as one range: first token, end, first chunk, and its number
            twice, as the slots of its initial and final state.
        split: the ranges that sequences are split into, None if they are not.
    """

    chunks: torch.Tensor
    sequences: torch.Tensor
    split: Split | None

    @property
    def num_chunks(self) -> int:
        return len(self.chunks)


@lru_cache(maxsize=64)
def plan_chunks(
    bounds: tuple[int, ...], chunk_size: int, chunks_per_range: int | None, device: torch.device
) -> ChunkPlan:
    """Plan for sequences of the tokens bounds[n] up to bounds[n + 1], some of which may be empty.

    The result depends on values alone, so equal packings share one plan. It may be cached and must
    not be written to.
    """
    chunks: list[tuple[int, ...]] = []
    sequences: list[tuple[int, ...]] = []
    walks: list[tuple[int, ...]] = []
    maps: list[tuple[int, ...]] = []
    first = [0]
    for n, (start, end) in enumerate(pairwise(bounds)):
        sequences.append((start, end, len(chunks), n, n))
        step = chunk_size * (chunks_per_range or max(1, end - start))
        for low in range(start, end, step) or (start,):  # an empty sequence is one empty range
            high = min(low + step, end)
            r, chunk = len(walks), len(chunks) + (low - start) // chunk_size
            walks.append((low, high, chunk, r, n if high == end else -1))
            maps.append((low, high, chunk, r, r))
        chunks += [(t, min(t + chunk_size, end)) for t in range(start, end, chunk_size)]
        first.append(len(walks))

    def table(rows: list[tuple[int, ...]] | list[int]) -> torch.Tensor:
        return torch.tensor(rows, dtype=torch.int32).to(device)

    split = None
    if len(walks) > len(sequences):
        split = Split(table(walks), table(maps), table(first), tuple(first))
    no_chunks = torch.empty(0, 2, dtype=torch.int32, device=device)
    return ChunkPlan(table(chunks) if chunks else no_chunks, table(sequences), split)


MIN_CHUNKS_PER_RANGE = 8
"""A shorter range is not worth the work of its map, which is that of one more pass."""


def chunks_per_range(
    bounds: tuple[int, ...], chunk_size: int, programs: int, cores: int
) -> int | None:
    """How many chunks a program should walk, or None for whole sequences.

    Args:
        bounds: of the sequences.
        chunk_size: tokens of a chunk.
        programs: how many programs walk one sequence side by side: heads times blocks of V.
        cores: multiprocessors of the GPU.
    """
    lengths = [end - start for start, end in pairwise(bounds)]
    longest = -(-max(lengths) // chunk_size)
    total = sum(-(-length // chunk_size) for length in lengths)
    # The walk takes as long as its longest piece. Splitting doubles the work, so it pays where it
    # leaves pieces well below half of that, and while there are processors without work.
    wanted = max(MIN_CHUNKS_PER_RANGE, -(-total * programs // cores))
    return wanted if 3 * wanted <= longest else None


@lru_cache(maxsize=1024)
def index_tensor(numbers: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """int64 numbers on a device; cached, since copying them there makes the host wait."""
    return torch.tensor(numbers, dtype=torch.int64, device=device)
