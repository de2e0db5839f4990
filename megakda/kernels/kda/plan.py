"""Where the chunks and ranges of a batch of sequences lie: small tables made on the host.

Tokens of all sequences are counted through, [B, T] flattened. A chunk is BT consecutive tokens of
one sequence (fewer at its end), a range some consecutive chunks of one sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True, eq=False)
class ChunkPlan:
    """Tables for the chunked kernels, all int32 on the device.

    Attributes:
        chunks: [NC, 2], first token and end of each chunk.
        sequences: [N, 5], each sequence as one range: first token, end, first chunk, and its number
            twice, as the slots of its initial and final state.
        ranges: [R, 5], the same for the pieces that sequences are split into, with the range's own
            number as initial slot and its sequence's as final slot, or -1 but for the last range of
            a sequence. None if nothing is split.
        own_slots: [R, 5], `ranges` with each range's own number in both slots.
        first_ranges: [N + 1], the ranges of each sequence.
        chunk_bounds: number of the first chunk of each sequence, N + 1 of them, on the host.
    """

    chunks: torch.Tensor
    sequences: torch.Tensor
    ranges: torch.Tensor | None
    own_slots: torch.Tensor | None
    first_ranges: torch.Tensor | None
    chunk_bounds: tuple[int, ...]

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
    chunks: list[tuple[int, int]] = []
    sequences: list[tuple[int, ...]] = []
    ranges: list[tuple[int, ...]] = []
    own_slots: list[tuple[int, ...]] = []
    first_ranges, chunk_bounds = [0], [0]
    for n, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        sequences.append((start, end, len(chunks), n, n))
        step = chunk_size * (chunks_per_range or max(1, end - start))
        starts = range(start, end, step) or (start,)  # an empty sequence is one empty range
        for low in starts:
            high = min(low + step, end)
            r, first = len(ranges), len(chunks) + (low - start) // chunk_size
            ranges.append((low, high, first, r, n if high == end else -1))
            own_slots.append((low, high, first, r, r))
        chunks += [(t, min(t + chunk_size, end)) for t in range(start, end, chunk_size)]
        first_ranges.append(len(ranges))
        chunk_bounds.append(len(chunks))

    def table(rows: Sequence[tuple[int, ...]] | list[int]) -> torch.Tensor:
        return torch.tensor(rows, dtype=torch.int32).to(device)

    split = len(ranges) > len(sequences)
    return ChunkPlan(
        chunks=table(chunks) if chunks else torch.empty(0, 2, dtype=torch.int32, device=device),
        sequences=table(sequences),
        ranges=table(ranges) if split else None,
        own_slots=table(own_slots) if split else None,
        first_ranges=table(first_ranges) if split else None,
        chunk_bounds=tuple(chunk_bounds),
    )


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
    lengths = [end - start for start, end in zip(bounds, bounds[1:], strict=False)]
    longest = -(-max(lengths) // chunk_size)
    total = sum(-(-length // chunk_size) for length in lengths)
    # The walk takes as long as its longest piece. Splitting doubles the work, so it pays where it
    # leaves pieces well below half of that, and while there are processors without work.
    wanted = max(MIN_CHUNKS_PER_RANGE, -(-total * programs // cores))
    return wanted if 3 * wanted <= longest else None
