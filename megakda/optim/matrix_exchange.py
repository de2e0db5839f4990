"""Whole matrices from the shards of many ranks, orthogonalised once each, and back.

Momentum stays where megatron-core's distributed optimizer has put it: a flat range of each local
parameter per data-parallel rank. For Newton-Schulz the parts of a matrix travel to one of the ranks
that hold it, its owner, and each holder gets its part of the result. Nothing travels of a matrix
that a rank has whole, so that of data parallelism only the few matrices do that lie across a border
of shards (all that is sharded more finely than by matrix). Owners are chosen so that the work is
even, and no matrix is orthogonalised twice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import NamedTuple

import torch

from megakda.optim.matrices import Block, Matrix
from megakda.optim.newton_schulz import BATCH_ELEMENTS, flops, orthogonalize

IMBALANCE = 1.1
"""Work of a rank over the mean at which a matrix goes to another holder than its largest."""


class Held(NamedTuple):
    """Elements [start, end) of a block, counted row by row, on some rank."""

    block: Block
    start: int
    end: int


class _Transfer(NamedTuple):
    """Elements [start, end) of a block from one rank's held range to another's."""

    source: int
    source_index: int  # among what the source holds
    start: int
    end: int


@dataclass(frozen=True)
class Bytes:
    """What one rank sends in one step."""

    gathered: int
    returned: int


class MatrixExchange:
    """The matrices of one group of ranks, and who orthogonalises which. Making it is collective.

    Args:
        held: what this rank holds. The same element may be held by several ranks (replicas), with
            the same values on each.
        group: the ranks that hold parts of these matrices: a pipeline stage's.
        dtype: of Newton-Schulz, and of what travels.
        steps: of Newton-Schulz.
    """

    def __init__(
        self,
        held: Sequence[Held],
        group: torch.distributed.ProcessGroup,
        dtype: torch.dtype,
        steps: int,
    ):
        self.held, self.group, self.dtype, self.steps = list(held), group, dtype, steps
        everyone: list[list[Held]] = [[] for _ in range(group.size())]
        torch.distributed.all_gather_object(everyone, self.held, group=group)
        self.rank = group.rank()
        self.owners = choose_owners(everyone, steps)
        self._plan(everyone)

    def _plan(self, everyone: list[list[Held]]) -> None:
        """Every rank makes the same plan and keeps its own part of it."""
        holders: dict[Matrix, list[tuple[int, int]]] = defaultdict(list)  # (rank, index there)
        for rank, theirs in enumerate(everyone):
            for index, part in enumerate(theirs):
                holders[part.block.matrix].append((rank, index))
        # What this rank orthogonalises: where the elements come from and where results go.
        self.owned: list[Matrix] = []
        self._sources: dict[Matrix, dict[Block, list[_Transfer]]] = {}
        self._targets: dict[Matrix, list[tuple[int, int, Held]]] = {}
        # What this rank holds of others' matrices, by owner: ranges sent, and those that come back.
        self._gathers: list[list[tuple[int, int, int]]] = [[] for _ in everyone]
        self._arrivals: list[list[int]] = [[] for _ in everyone]
        # Sizes of what the gathering brings, by source.
        self._gathered: list[list[int]] = [[] for _ in everyone]
        # Matrices of one shape follow each other, to be orthogonalised together.
        for matrix in sorted(holders, key=lambda m: (m.rows, m.columns, m.name)):
            owner = self.owners[matrix]
            by_block: dict[Block, list[tuple[int, int]]] = defaultdict(list)
            for rank, index in holders[matrix]:
                by_block[everyone[rank][index].block].append((rank, index))
            sources = {
                block: list(_cover(block, parts, everyone, owner))
                for block, parts in by_block.items()
            }
            if owner == self.rank:
                self.owned.append(matrix)
                self._sources[matrix] = sources
                self._targets[matrix] = [(r, i, everyone[r][i]) for r, i in holders[matrix]]
            else:
                self._arrivals[owner] += [index for r, index in holders[matrix] if r == self.rank]
            for source, index, start, end in chain.from_iterable(sources.values()):
                if owner == self.rank != source:
                    self._gathered[source].append(end - start)
                elif source == self.rank != owner:
                    self._gathers[owner].append((index, start, end))
        self._returned = [
            [self.held[i].end - self.held[i].start for i in indices] for indices in self._arrivals
        ]

    @property
    def bytes(self) -> Bytes:
        """What this rank sends to others in one step."""
        width = torch.empty((), dtype=self.dtype).element_size()
        targets = (target for matrix in self.owned for target in self._targets[matrix])
        return Bytes(
            gathered=width * sum(e - s for entries in self._gathers for _, s, e in entries),
            returned=width * sum(part.end - part.start for r, _, part in targets if r != self.rank),
        )

    def orthogonalize(self, updates: Sequence[torch.Tensor]) -> None:
        """Each matrix U S V^T becomes U V^T, in the held parts. A collective call.

        Args:
            updates: one flat fp32 tensor per held range; overwritten.
        """
        received = self._gather(updates)
        results: list[list[torch.Tensor]] = [[] for _ in self._gathers]  # by destination
        for shape, same in groupby(self.owned, key=lambda m: (m.rows, m.columns)):
            for batch in _batches(list(same), shape):
                self._orthogonalize(batch, updates, received, results)
        self._return(results, updates)

    def _gather(self, updates: Sequence[torch.Tensor]) -> list[Iterator[torch.Tensor]]:
        """Per source, what it has sent, in the order in which `_orthogonalize` asks for it."""
        outgoing = [
            [
                updates[index][start - self.held[index].start : end - self.held[index].start]
                for index, start, end in entries
            ]
            for entries in self._gathers
        ]
        return self._exchange(outgoing, self._gathered)

    def _orthogonalize(
        self,
        matrices: list[Matrix],
        updates: Sequence[torch.Tensor],
        received: list[Iterator[torch.Tensor]],
        results: list[list[torch.Tensor]],
    ) -> None:
        """Matrices of one shape; results go into `updates`, or into `results` for other ranks."""
        joint = torch.empty(
            len(matrices), matrices[0].rows, matrices[0].columns, dtype=self.dtype, device=_device()
        )
        for place, matrix in zip(joint, matrices, strict=True):
            for block, transfers in self._sources[matrix].items():
                parts = [
                    next(received[source])
                    if source != self.rank
                    else updates[index][start - self.held[index].start :][: end - start]
                    for source, index, start, end in transfers
                ]
                flat = parts[0] if len(parts) == 1 else torch.cat(parts)
                _part(place, block).copy_(flat.view(block.rows, block.columns))
        for place, matrix in zip(orthogonalize(joint, self.steps), matrices, strict=True):
            blocks = {block: _part(place, block).flatten() for block in self._sources[matrix]}
            for rank, index, (block, start, end) in self._targets[matrix]:
                part = blocks[block][start:end]
                if rank == self.rank:
                    updates[index].copy_(part)
                else:  # a copy, so that the batch's memory is free again
                    results[rank].append(part.clone())

    def _return(self, results: list[list[torch.Tensor]], updates: Sequence[torch.Tensor]) -> None:
        received = self._exchange(results, self._returned)
        for indices, arrived in zip(self._arrivals, received, strict=True):
            for index in indices:
                updates[index].copy_(next(arrived))

    def _exchange(
        self,
        outgoing: list[list[torch.Tensor]],
        expected: list[list[int]],
    ) -> list[Iterator[torch.Tensor]]:
        """All-to-all of lists of flat tensors; `expected` are their sizes, by source."""
        nothing = torch.empty(0, dtype=self.dtype, device=_device())
        sent = torch.cat([nothing, *(x.to(self.dtype) for parts in outgoing for x in parts)])
        sizes = [sum(part) for part in expected]
        arrived = sent.new_empty(sum(sizes))
        if self.group.size() > 1:
            torch.distributed.all_to_all_single(
                arrived,
                sent,
                output_split_sizes=sizes,
                input_split_sizes=[sum(len(x) for x in parts) for parts in outgoing],
                group=self.group,
            )
        return [
            iter(part.split(lengths)) if lengths else iter(())
            for part, lengths in zip(arrived.split(sizes), expected, strict=True)
        ]


def choose_owners(everyone: Sequence[Sequence[Held]], steps: int) -> dict[Matrix, int]:
    """Which rank orthogonalises each matrix: one of its holders, the work spread evenly.

    Largest matrices first, each to the holder of the largest part, unless that one would have more
    than `IMBALANCE` of the mean and another holder less.
    """
    shares: dict[Matrix, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for rank, theirs in enumerate(everyone):
        for part in theirs:
            shares[part.block.matrix][rank] += part.end - part.start
    cost = {matrix: flops(matrix.rows, matrix.columns, steps) for matrix in shares}
    most = IMBALANCE * sum(cost.values()) / len(everyone)
    work = [0.0] * len(everyone)
    owners = {}
    for matrix in sorted(shares, key=lambda m: (-cost[m], m.name)):
        holders = shares[matrix]
        owner = max(holders, key=lambda rank: (holders[rank], -work[rank], -rank))
        if work[owner] + cost[matrix] > most:
            owner = min(holders, key=lambda rank: (work[rank], -holders[rank], rank))
        work[owner] += cost[matrix]
        owners[matrix] = owner
    return owners


def _cover(
    block: Block,
    parts: Iterable[tuple[int, int]],
    everyone: Sequence[Sequence[Held]],
    owner: int,
) -> Iterator[_Transfer]:
    """Where each element of a block comes from; replicas add nothing, the owner's own is first."""
    at = 0
    parts = list(parts)
    while at < block.size:
        there = [
            (rank, index)
            for rank, index in parts
            if everyone[rank][index].start <= at < everyone[rank][index].end
        ]
        assert there, f"element {at} of {block} is on no rank"
        rank, index = min(
            there, key=lambda part: (part[0] != owner, -everyone[part[0]][part[1]].end, part)
        )
        end = everyone[rank][index].end
        if rank != owner:  # up to where the owner has it
            mine = [everyone[r][i].start for r, i in parts if r == owner]
            end = min([end, *(start for start in mine if start > at)])
        yield _Transfer(rank, index, at, end)
        at = end


def _part(matrix: torch.Tensor, block: Block) -> torch.Tensor:
    return matrix[block.row : block.row + block.rows, block.column : block.column + block.columns]


def _batches(matrices: list[Matrix], shape: tuple[int, int]) -> Iterator[list[Matrix]]:
    count = max(1, BATCH_ELEMENTS // (shape[0] * shape[1]))
    for first in range(0, len(matrices), count):
        yield matrices[first : first + count]


def _device() -> torch.device:
    return torch.device(torch.cuda.current_device())
