"""How the tokens of a batch lie on the ranks of a context-parallel group, and where documents are.

A batch is a stream of B rows of T tokens, row after row. Every row is cut into equal segments in
global order, and a rank holds one segment of each row (contiguous) or two (zig-zag: the r-th and
the r-th last, which balances causal attention). All layers share one layout, so that nothing is
re-shuffled between them. Documents are bounds in the stream and have nothing to do with where it
is cut: what a rank holds of a document within one segment is a piece.

Only numbers here: no tensors on devices, no communication.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

import torch

LAYOUTS = ("contiguous", "zigzag")


@dataclass(frozen=True)
class ContextLayout:
    """Which segments of a row each rank holds.

    Attributes:
        kind: "contiguous" (rank r of P holds segment r of P) or "zigzag" (segments r and 2P-1-r of
            2P, as in megatron-core).
        ranks: P, size of the context-parallel group.
    """

    kind: str
    ranks: int

    def __post_init__(self) -> None:
        assert self.kind in LAYOUTS and self.ranks >= 1

    @property
    def per_rank(self) -> int:
        """Segments of a row that one rank holds."""
        return 2 if self.kind == "zigzag" and self.ranks > 1 else 1

    @property
    def segments(self) -> int:
        """Segments of a row."""
        return self.per_rank * self.ranks

    def held(self, rank: int) -> tuple[int, ...]:
        """The segments of `rank`, in global order, which is also their order in its memory."""
        if self.per_rank == 1:
            return (rank,)
        return rank, self.segments - 1 - rank

    def owner(self, segment: int) -> tuple[int, int]:
        """(rank, place among its segments) of `segment`."""
        if segment < self.ranks:
            return segment, 0
        return self.segments - 1 - segment, 1

    def segment_length(self, tokens: int) -> int:
        """Tokens of a segment of a row of `tokens`.

        Raises:
            ValueError: the row cannot be cut into equal segments.
        """
        if tokens < 1 or tokens % self.segments:
            raise ValueError(
                f"{tokens} tokens cannot be cut into the {self.segments} equal segments of "
                f"parallel.context={self.ranks} with parallel.context_layout={self.kind}: use a "
                f"multiple of {self.segments}"
            )
        return tokens // self.segments

    def outer(self, inner: int) -> ContextLayout:
        """The layout seen by groups of `inner` neighbouring ranks that share what they hold.

        Neighbours hold neighbouring segments, so together they hold a segment of the coarser
        layout of the same kind.
        """
        assert self.ranks % inner == 0
        return ContextLayout(self.kind, self.ranks // inner)

    def take(self, x: torch.Tensor, rank: int, dim: int = 1) -> torch.Tensor:
        """What `rank` holds of `x`, whole along `dim`.

        Raises:
            ValueError: see `segment_length`.
        """
        if self.ranks == 1:
            return x
        length = self.segment_length(x.shape[dim])
        parts = [x.narrow(dim, segment * length, length) for segment in self.held(rank)]
        return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, dim)

    def restore(self, x: torch.Tensor) -> torch.Tensor:
        """[P, per_rank, ...], held by all ranks -> [segments, ...] in global order."""
        if self.per_rank == 1:
            return x.squeeze(1)
        first, second = x.unbind(1)
        return torch.cat([first, second.flip(0)])


@dataclass(frozen=True)
class Documents:
    """Where the documents of a batch begin and end.

    Attributes:
        rows: B.
        tokens: T, of a row.
        bounds: token numbers in the stream of B*T, not falling, from 0 to B*T; document n is the
            tokens bounds[n] up to, not including, bounds[n + 1]. No document spans two rows.
    """

    rows: int
    tokens: int
    bounds: tuple[int, ...]

    def __post_init__(self) -> None:
        bounds, total = self.bounds, self.rows * self.tokens
        if (
            len(bounds) < 2
            or bounds[0] != 0
            or bounds[-1] != total
            or any(a > b for a, b in pairwise(bounds))
        ):
            shown = ", ".join(map(str, bounds[:6])) + (", ..." if len(bounds) > 6 else "")
            raise ValueError(
                f"cu_seqlens: [{shown}] must rise from 0 to rows x tokens = {self.rows} x "
                f"{self.tokens} = {total}"
            )
        missing = set(range(0, total, self.tokens)).difference(bounds)
        if missing:
            raise ValueError(
                f"cu_seqlens: no bound at token {min(missing)}, where a row of {self.tokens} "
                "begins; a document must not span two rows"
            )

    @staticmethod
    def whole_rows(rows: int, tokens: int) -> Documents:
        """Every row is one document."""
        return Documents(rows, tokens, tuple(range(0, rows * tokens + 1, tokens)))

    @property
    def are_rows(self) -> bool:
        return len(self.bounds) == self.rows + 1


@dataclass(frozen=True)
class Piece:
    """What one rank holds of one document within one segment. Never empty.

    Attributes:
        start, end: in the rank's own stream of B rows of T/P tokens.
        first: number of its first token in the whole stream.
        document: its number.
        document_start: number of the document's first token in the whole stream.
        segment: slot of the segment among those of the rank, row * per_rank + place.
        enters: the document began in an earlier segment.
        leaves: it goes on in the next one.
    """

    start: int
    end: int
    first: int
    document: int
    document_start: int
    segment: int
    enters: bool
    leaves: bool

    @property
    def last(self) -> int:
        """Number, in the whole stream, of the token after the last."""
        return self.first + self.end - self.start


@dataclass(frozen=True)
class ContextPlan:
    """The pieces of one rank, and what it has to do with others.

    Attributes:
        layout, documents, rank: what it is the plan of.
        pieces: in the order of the rank's memory.
    """

    layout: ContextLayout
    documents: Documents
    rank: int
    pieces: tuple[Piece, ...]

    @cached_property
    def bounds(self) -> tuple[int, ...]:
        """Bounds of the pieces in the rank's own stream."""
        return (0, *(piece.end for piece in self.pieces))

    @cached_property
    def cu_seqlens(self) -> torch.Tensor:
        """`bounds` as an int32 tensor on the CPU."""
        return torch.tensor(self.bounds, dtype=torch.int32)

    @cached_property
    def entering(self) -> tuple[int, ...]:
        """Numbers of the pieces that need what came before; at most one per segment."""
        return tuple(n for n, piece in enumerate(self.pieces) if piece.enters)

    @cached_property
    def leaving(self) -> tuple[int, ...]:
        """Numbers of the pieces that another segment needs; at most one per segment."""
        return tuple(n for n, piece in enumerate(self.pieces) if piece.leaves)

    @property
    def slots(self) -> int:
        """Segments that the rank holds, of all rows."""
        return self.documents.rows * self.layout.per_rank

    @cached_property
    def linked(self) -> bool:
        """Whether any document of any rank crosses from one segment into the next."""
        length = self.layout.segment_length(self.documents.tokens)
        total = self.documents.rows * self.documents.tokens
        cuts = set(range(0, total, length))
        return not cuts.issubset(self.documents.bounds)

    @cached_property
    def positions(self) -> torch.Tensor:
        """Position of each of the rank's tokens in its document, int64 [B * T/P] on the CPU."""
        ranges = [
            torch.arange(p.first - p.document_start, p.last - p.document_start) for p in self.pieces
        ]
        return torch.cat(ranges)


@lru_cache(maxsize=256)
def plan_context(layout: ContextLayout, documents: Documents, rank: int) -> ContextPlan:
    """The plan of `rank`; cached, since all layers of a micro-batch share it.

    Raises:
        ValueError: see `ContextLayout.segment_length`.
    """
    length = layout.segment_length(documents.tokens)
    bounds = documents.bounds
    pieces: list[Piece] = []
    local = 0
    for row in range(documents.rows):
        for place, segment in enumerate(layout.held(rank)):
            low = row * documents.tokens + segment * length
            high = low + length
            slot = row * layout.per_rank + place
            # The last document that begins at `low` or before; the ones before it that begin at the
            # same token are empty.
            n = bisect_right(bounds, low) - 1
            start = low
            while start < high:
                end = min(bounds[n + 1], high)
                if end > start:
                    pieces.append(
                        Piece(
                            start=local + start - low,
                            end=local + end - low,
                            first=start,
                            document=n,
                            document_start=bounds[n],
                            segment=slot,
                            enters=bounds[n] < low,
                            leaves=bounds[n + 1] > high,
                        )
                    )
                start = end
                n += 1
            local += length
    return ContextPlan(layout, documents, rank, tuple(pieces))


def documents_of(
    cu_seqlens: torch.Tensor | Sequence[int] | None, rows: int, tokens: int
) -> Documents:
    """`Documents` from the bounds in a stream of `rows` x `tokens`, or whole rows without them.

    Args:
        cu_seqlens: integer [N + 1]; on a GPU, reading it makes the host wait.

    Raises:
        ValueError: bounds that break the rules of `Documents`.
    """
    if cu_seqlens is None:
        return Documents.whole_rows(rows, tokens)
    values = cu_seqlens.tolist() if isinstance(cu_seqlens, torch.Tensor) else cu_seqlens
    return Documents(rows, tokens, tuple(values))
