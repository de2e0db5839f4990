"""Weights, gradients and optimizer state of one rank, by the rules of megatron-core's buffers.

`DistributedDataParallel` lays the parameters of one dtype end to end, experts apart from the rest,
in buckets; gradients have fp32 buffers of the same layout. The distributed optimizer gives every
data-parallel rank an equal range of every bucket, whatever parameters lie there, and keeps fp32
main parameters and moments of that range alone. `buffers` and `optimizer_state` do the same sums.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from megakda.config import Config, Derived
from megakda.optim.newton_schulz import BATCH_ELEMENTS
from megakda.plan.probe import FP32, Weight

NEWTON_SCHULZ = 2  # bytes of an element in bf16
PARAMETER_ALIGNMENT, BUCKET_ALIGNMENT = 64, 128  # elements; with the distributed optimizer


@dataclass(frozen=True)
class Buffer:
    """The parameters of one dtype and one data-parallel group, as they lie in memory.

    Attributes:
        expert: reduced over expert-data ranks.
        element_bytes: of the parameters.
        ranks: that share it.
        places: (parameter, its first element).
        bounds: of the buckets, padding included.
    """

    expert: bool
    element_bytes: int
    ranks: int
    places: tuple[tuple[Weight, int], ...]
    bounds: tuple[int, ...]

    @property
    def elements(self) -> int:
        return self.bounds[-1]

    @cached_property
    def moved_elements(self) -> float:
        """Mean over ranks of the elements of Muon's matrices that go to another rank, one way.

        The owner of a matrix is the rank with the largest piece of it, as
        `megakda.optim.matrix_exchange` prefers.
        """
        moved = 0.0
        for weight, start in self.places:
            at = start
            for rows, columns, number, size in weight.matrices:
                blocks = rows * columns / size  # tensor-parallel ranks that have a part of each
                for _ in range(number):
                    largest = self._largest_piece(at, at + size)
                    moved += (rows * columns - largest) / blocks
                    at += size
        return moved / self.ranks

    def _largest_piece(self, start: int, end: int) -> int:
        """Of elements [start, end), the most that one data-parallel rank has."""
        bucket = bisect_right(self.bounds, start) - 1
        first, last = self.bounds[bucket : bucket + 2]
        share = (last - first) // self.ranks
        border = first + -(-(start + 1 - first) // share) * share  # the next one
        if border >= end:
            return end - start
        if end - border >= share:
            return share
        return max(border - start, end - border)

    def share(self, rank: int) -> tuple[int, int]:
        """Elements of parameters in the ranges of one data-parallel rank: of matrices that Muon
        has, and of all others."""
        matrices = others = 0
        starts = [start for _, start in self.places]
        for first, last in pairwise(self.bounds):
            size = (last - first) // self.ranks
            begin = first + rank * size
            for weight, start in self.places[max(0, _before(starts, begin)) :]:
                if start >= begin + size:
                    break
                held = min(start + weight.elements, begin + size) - max(start, begin)
                if held > 0 and weight.matrices:
                    matrices += held
                elif held > 0:
                    others += held
        return matrices, others


def _before(starts: Sequence[int], position: int) -> int:
    """The last of the parameters that begin at or before a position."""
    return bisect_right(starts, position) - 1


def buffers(
    weights: Iterable[Weight], config: Config, derived: Derived, first_chunk: bool
) -> list[Buffer]:
    """The buffers of one model chunk.

    Args:
        weights: in the order of the model.
        first_chunk: the first of the first pipeline stage, whose buffers alone are cut into
            buckets, to begin to reduce before the backward pass is over.
    """
    parallel = config.parallel
    shared = derived.data_parallel * parallel.context
    most = max(40_000_000, 1_000_000 * derived.data_parallel)
    bucket = most if parallel.overlap_grad_reduce and first_chunk else None
    sharded = parallel.distributed_optimizer
    kinds: dict[tuple[bool, int], list[Weight]] = defaultdict(list)
    for weight in weights:
        kinds[weight.expert, weight.element_bytes].append(weight)
    return [
        _buffer(own, derived.expert_data_parallel if expert else shared, bucket, sharded)
        for (expert, _), own in kinds.items()
    ]


def _buffer(weights: list[Weight], ranks: int, bucket: int | None, sharded: bool) -> Buffer:
    end_multiple = math.lcm(ranks, BUCKET_ALIGNMENT) if sharded else 1
    start_multiple = PARAMETER_ALIGNMENT if sharded else 1
    at, bounds, places = 0, [0], []
    for weight in reversed(weights):  # roughly in the order of the backward pass
        at = _up(at, start_multiple)
        places.append((weight, at))
        at += weight.elements
        if bucket is not None and at - bounds[-1] >= bucket:
            at = _up(at, end_multiple)
            bounds.append(at)
    if at > bounds[-1]:
        bounds.append(_up(at, end_multiple))
    return Buffer(weights[0].expert, weights[0].element_bytes, ranks, tuple(places), tuple(bounds))


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class State:
    """Bytes of one rank, and what they are of.

    Attributes:
        weights, gradients: with padding.
        main: fp32 copies of the parameters; none of parameters that are fp32 themselves.
        moments: of AdamW two for each parameter, of Muon one for each matrix.
        step: temporary memory of the optimizer's step.
    """

    weights: int
    gradients: int
    main: int
    moments: int
    step: int

    @property
    def optimizer(self) -> int:
        return self.main + self.moments

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


def state_of(
    all_buffers: Sequence[Buffer], config: Config, ranks: tuple[int, int] | None = None
) -> State:
    """Of a rank with these buffers.

    Args:
        ranks: in the data x context-parallel and in the expert-data-parallel group; None for those
            with the most, buffer by buffer.
    """
    weights = gradients = main = moments = step = 0
    sharded, muon = config.parallel.distributed_optimizer, config.optim.name == "muon"
    for buffer in all_buffers:
        gradients += buffer.elements * FP32
        own = buffer.elements
        if not sharded:
            own = sum(weight.elements for weight, _ in buffer.places)
        weights += own * buffer.element_bytes
        matrices, others = _share(buffer, sharded, ranks and ranks[buffer.expert])
        if buffer.element_bytes != FP32:
            main += (matrices + others) * FP32
        moments += ((1 if muon else 2) * matrices + 2 * others) * FP32
        # AdamW: the denominators. Muon, in Newton-Schulz's dtype: pieces of matrices that leave and
        # arrive, for the busiest rank twice the mean but no more than it holds, and a batch of
        # matrices with four tensors of an iteration. The denominators are gone by then, and
        # buffers share a batch: the sum is an upper bound.
        step += FP32 * others
        if muon:
            moved = min(matrices, 2 * math.ceil(buffer.moved_elements))
            step += (2 * moved + 5 * min(matrices, BATCH_ELEMENTS)) * NEWTON_SCHULZ
        else:
            step += FP32 * matrices
    return State(weights, gradients, main, moments, step)


def _share(buffer: Buffer, sharded: bool, rank: int | None) -> tuple[int, int]:
    if not sharded:
        matrices = sum(weight.elements for weight, _ in buffer.places if weight.matrices)
        return matrices, sum(weight.elements for weight, _ in buffer.places) - matrices
    if rank is not None:
        return buffer.share(rank)
    # Of very many ranks a few stand for all: shares differ in what kinds of parameters they meet.
    looked_at = range(0, buffer.ranks, max(1, buffer.ranks // 16))
    return max((buffer.share(i) for i in looked_at), key=lambda x: x[0] + 2 * x[1])
