"""New tokens of several sequences whose past lies in a cache, for generation.

A linear layer keeps one state per sequence, however long: the recurrent state S and the last inputs
of its short convolutions. A full layer keeps one latent per token, in pages of a pool. Layers get a
`CachedTokens` where training hands them documents (`packed_seq_params`), compute the new tokens of
all sequences at once, and bring the cache up to date.

Letters in shapes: T new tokens of all sequences together, R rows of the pool of states, H heads on
this rank, K and V their sizes, W taps, L width of a latent with its shared key part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch


@dataclass
class LinearCache:
    """What a linear layer remembers, one row per sequence.

    Attributes:
        state: fp32 [R, H, K, V].
        convolutions: of q, k and v the last inputs, oldest first, [R, H*K or H*V, W-1]; empty
            where the layer has no convolution.
    """

    state: torch.Tensor
    convolutions: tuple[torch.Tensor, ...] = ()

    def clear(self, row: int) -> None:
        """The state before the first token."""
        for tensor in (self.state, *self.convolutions):
            tensor[row].zero_()

    def copy(self, source: int, target: int) -> None:
        """Row `target` becomes what row `source` is."""
        for tensor in (self.state, *self.convolutions):
            tensor[target].copy_(tensor[source])


@dataclass
class LatentCache:
    """What a full layer remembers, one latent per token.

    Attributes:
        latents: [pages, page_size, L], the latent after its norm and the shared key part.
    """

    latents: torch.Tensor

    def copy_page(self, source: int, target: int) -> None:
        """Page `target` becomes what page `source` is."""
        self.latents[target].copy_(self.latents[source])


LayerCache: TypeAlias = LinearCache | LatentCache


@dataclass(frozen=True)
class NewTokens:
    """New tokens of one sequence.

    Attributes:
        row: of the sequence in the pools of states.
        past: tokens that the cache holds already.
        count: new ones, at least 1.
        pages: of its latents in order, enough for past + count tokens.
    """

    row: int
    past: int
    count: int
    pages: Sequence[int] = ()


@dataclass
class CachedTokens:
    """The new tokens of one forward pass, [T, 1, h] in the residual stream.

    Sequences with one new token come first: they are decoded, one recurrent step each. The others
    are prefilled, in chunks. What lies behind the last sequence's tokens is padding (sequence
    parallelism needs a multiple of its ranks); it touches no cache and mixes to zero.

    Args:
        sequences: in the order of their tokens.
        caches: of this rank's layers, by 1-based layer number.
        page_size: tokens per page of latents.
        device: of the caches.
    """

    sequences: list[NewTokens]
    caches: dict[int, LayerCache]
    page_size: int
    device: torch.device
    decoded: int = field(init=False)  # sequences, and so tokens
    tokens: int = field(init=False)
    bounds: list[int] = field(init=False)  # of the prefilled sequences, from 0 at the first

    def __post_init__(self) -> None:
        counts = [sequence.count for sequence in self.sequences]
        self.decoded = next((n for n, count in enumerate(counts) if count > 1), len(counts))
        assert self.sequences and min(counts) > 0, counts
        self.tokens = sum(counts)
        self.bounds = [0]
        for count in counts[self.decoded :]:
            self.bounds.append(self.bounds[-1] + count)
        self.rows = self._tensor([sequence.row for sequence in self.sequences])
        self.positions = self._tensor([s.past + i for s in self.sequences for i in range(s.count)])
        self.cu_seqlens = torch.tensor(self.bounds)
        self._places: torch.Tensor | None = None
        self._block_table: torch.Tensor | None = None
        self._lengths: torch.Tensor | None = None

    @property
    def prefilled(self) -> list[NewTokens]:
        """Sequences with several new tokens."""
        return self.sequences[self.decoded :]

    @property
    def places(self) -> torch.Tensor:
        """[T]: where each new token's latent goes, counted over all pages."""
        if self._places is None:
            size = self.page_size
            self._places = self._tensor(
                [
                    s.pages[t // size] * size + t % size
                    for s in self.sequences
                    for t in range(s.past, s.past + s.count)
                ]
            )
        return self._places

    @property
    def block_table(self) -> torch.Tensor:
        """int32 [decoded, pages], the pages of each decoded sequence; 0 behind its end."""
        if self._block_table is None:
            used = [
                list(s.pages[: -(-(s.past + 1) // self.page_size)])
                for s in self.sequences[: self.decoded]
            ]
            most = max(map(len, used))
            table = [pages + [0] * (most - len(pages)) for pages in used]
            self._block_table = self._tensor(table, torch.int32)
        return self._block_table

    @property
    def lengths(self) -> torch.Tensor:
        """int32 [decoded]: tokens of each decoded sequence, the new one included."""
        if self._lengths is None:
            self._lengths = self._tensor(
                [s.past + 1 for s in self.sequences[: self.decoded]], torch.int32
            )
        return self._lengths

    def _tensor(self, values: list, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype).to(self.device, non_blocking=True)
