"""How evenly the ranks of a context-parallel group work on many micro-batches of documents.

Both layouts and all modes of KDA beside each other, and which of them to choose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from megakda.config.schema import Config
from megakda.errors import ConfigError
from megakda.layers.context_layout import LAYOUTS, ContextLayout, Documents, plan_context
from megakda.models.context_cost import (
    ATTENTION,
    MODES,
    Work,
    kda_traffic,
    latent_buffers,
    mla_traffic,
    sharing_of,
    work_of_ranks,
)
from megakda.models.exchange_model import ASSUMED, H200, Assumptions, Machine, Point, predict

CLOSE = 0.01
"""Layouts whose slowdowns differ by less are equally good; the simpler one is recommended."""


@dataclass(frozen=True)
class Spread:
    """Least, mean and most: where nothing else is said FLOPs of ranks, means over micro-batches."""

    least: float
    mean: float
    most: float

    @property
    def imbalance(self) -> float:
        return self.most / self.mean if self.mean else 1.0


@dataclass(frozen=True)
class ModeBalance:
    """One mode of KDA with one layout.

    Attributes:
        heads_ranks: ranks that exchange heads.
        total: work of a rank.
        slowdown: time of a step over that with all work shared evenly, if FLOPs were time. Every
            layer ends in an exchange, so the busiest rank in the layers of each kind counts.
        bytes: per KDA layer, GPU and micro-batch, forward and backward.
    """

    heads_ranks: int
    total: Spread
    slowdown: float
    bytes: tuple[int, int]


@dataclass(frozen=True)
class LayoutBalance:
    """One layout.

    Attributes:
        segment: tokens of a segment.
        linked: share of micro-batches in which a document crosses from one segment into another.
        attention: work of a rank in MLA layers: pairs of tokens, and the expansion of latents.
        by_rank: the same for each rank, over the mean of all ranks: least, mean and most over the
            micro-batches. No FLOPs, but a ratio.
        modes: of KDA; None where the heads cannot be shared so.
        latents: per way of exchange, bytes per MLA layer, GPU and micro-batch, forward, backward.
        buffers: per way of exchange, bytes of latents and their gradients that a GPU holds at once.
    """

    kind: str
    segment: int
    linked: float
    attention: Spread
    by_rank: tuple[Spread, ...]
    modes: dict[str, ModeBalance | None]
    latents: dict[str, tuple[int, int]]
    buffers: dict[str, int]


@dataclass(frozen=True)
class Choice:
    """The recommended settings, and why, as sentences."""

    layout: str
    mode: str
    attention: str
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Balance:
    """All that is known of a recipe and its documents.

    Attributes:
        documents: pieces of documents in a row, padding included, in the mean.
        point: predictions at the recipe's size, for the recommended layout.
    """

    layouts: dict[str, LayoutBalance]
    micro_batches: int
    documents: float
    point: Point
    choice: Choice


def micro_batches(rows: Sequence[tuple[int, ...]], size: int) -> list[Documents]:
    """Rows of equal length, given by the bounds of their documents, `size` at a time."""
    tokens = rows[0][-1]
    batches = []
    for first in range(0, len(rows) - size + 1, size):
        bounds = [0]
        for n, row in enumerate(rows[first : first + size]):
            bounds += [n * tokens + bound for bound in row[1:]]
        batches.append(Documents(size, tokens, tuple(bounds)))
    return batches


def balance(
    config: Config,
    batches: Sequence[Documents],
    machine: Machine = H200,
    assumed: Assumptions = ASSUMED,
) -> Balance:
    """Work and bytes of every rank with both layouts, and a recommendation.

    Args:
        config: `parallel.context` ranks share each row; its layout and mode do not matter.
        batches: micro-batches of `train.context` tokens per row.
        machine, assumed: for the choice of modes.

    Raises:
        ConfigError: sequences are not shared, or cannot be cut by any layout.
    """
    ranks, tokens = config.parallel.context, config.train.context
    if ranks == 1:
        raise ConfigError(
            "parallel.context=1: one rank holds whole sequences and there is nothing to balance; "
            "set parallel.context to the number of ranks that share a sequence"
        )
    node_ranks = max(1, machine.node_gpus // config.parallel.tensor)
    layouts = {
        kind: _layout_balance(config, kind, batches, node_ranks)
        for kind in LAYOUTS
        if tokens % ContextLayout(kind, ranks).segments == 0
    }
    if not layouts:
        raise ConfigError(
            f"train.context={tokens} cannot be cut into parallel.context={ranks} equal segments: "
            f"use a multiple of {2 * ranks}"
        )
    kind = _best_layout(layouts)
    point = predict(config, kind, config.parallel.tensor, ranks, tokens // ranks, machine, assumed)
    rows = sum(batch.rows for batch in batches)
    documents = sum(len(batch.bounds) - 1 for batch in batches) / rows
    return Balance(layouts, len(batches), documents, point, _choice(layouts, kind, point, machine))


def _layout_balance(
    config: Config, kind: str, batches: Sequence[Documents], node_ranks: int
) -> LayoutBalance:
    model, parallel = config.model, config.parallel
    layout = ContextLayout(kind, parallel.context)
    rows, tokens = batches[0].rows, batches[0].tokens
    linked = [plan_context(layout, batch, 0).linked for batch in batches]
    modes: dict[str, ModeBalance | None] = dict.fromkeys(MODES)
    work: list[list[Work]] = []
    for mode in MODES:
        sharing = sharing_of(config, kind, mode, node_ranks=node_ranks)
        if sharing is None:
            continue
        work = [work_of_ranks(model, sharing, batch) for batch in batches]
        modes[mode] = ModeBalance(
            sharing.heads_ranks,
            _spread([[rank.total for rank in batch] for batch in work]),
            _slowdown(work),
            kda_traffic(model, sharing, rows, tokens, any(linked)).bytes,
        )
    attention = [[rank.attention + rank.expansion for rank in batch] for batch in work]
    shares = [[x / (fmean(batch) or 1.0) for x in batch] for batch in attention]
    by_rank = [Spread(min(x), fmean(x), max(x)) for x in zip(*shares, strict=True)]
    latents: dict[str, tuple[int, int]] = {}
    buffers: dict[str, int] = {}
    for way in ATTENTION:
        sharing = sharing_of(config, kind, "state", way)
        assert sharing is not None
        latents[way] = mla_traffic(model, sharing, rows, tokens).bytes
        buffers[way] = latent_buffers(model, sharing, rows, tokens)
    return LayoutBalance(
        kind,
        layout.segment_length(tokens),
        fmean(linked),
        _spread(attention),
        tuple(by_rank),
        modes,
        latents,
        buffers,
    )


def _spread(batches: Sequence[Sequence[int]]) -> Spread:
    """Of each micro-batch the FLOPs of all ranks -> their least, mean and most."""
    return Spread(fmean(map(min, batches)), fmean(map(fmean, batches)), fmean(map(max, batches)))


def _slowdown(batches: Sequence[Sequence[Work]]) -> float:
    slowest = even = 0.0
    for ranks in batches:
        for part in (
            [rank.tokens for rank in ranks],
            [rank.attention + rank.expansion for rank in ranks],
            [rank.maps for rank in ranks],
        ):
            slowest += max(part)
            even += fmean(part)
    return slowest / even


# ------------------------------------------------------------------ recommendation


def _slowdown_of(layout: LayoutBalance) -> float:
    return min(mode.slowdown for mode in layout.modes.values() if mode is not None)


def _best_layout(layouts: dict[str, LayoutBalance]) -> str:
    best = min(layouts, key=lambda kind: _slowdown_of(layouts[kind]))
    simple = layouts.get("contiguous")
    if simple is not None and _slowdown_of(simple) < _slowdown_of(layouts[best]) + CLOSE:
        return "contiguous"
    return best


def _choice(layouts: dict[str, LayoutBalance], kind: str, point: Point, machine: Machine) -> Choice:
    chosen, other = layouts[kind], next((x for x in layouts.values() if x.kind != kind), None)
    busiest = f"the busiest rank has {chosen.attention.imbalance:.2f} times the mean work in MLA"
    if other is None:
        reasons = [f"layout {kind}: the only one that can cut the rows; {busiest}."]
    else:
        against = (
            f"{other.attention.imbalance:.2f} times with {other.kind}; a step would take "
            f"{_slowdown_of(chosen):.2f} and {_slowdown_of(other):.2f} times as long as in perfect "
            "balance"
        )
        why = (
            ". The difference is too small to pay for twice as many segments."
            if kind == "contiguous" and _slowdown_of(other) < _slowdown_of(chosen)
            else "."
        )
        reasons = [f"layout {kind}: {busiest}, against {against}{why}"]

    mode, way = point.best_mode, point.best_attention
    if chosen.linked == 0:
        reasons.append(
            "mode state: no document crosses from one segment into the next, so that this mode "
            "exchanges nothing."
        )
        mode = "state"
    else:
        costs = ", ".join(
            f"{name} {1e3 * x.cost:.2f} ms" for name, x in point.kda.items() if x is not None
        )
        reasons.append(
            f"mode {mode}: adds least to a KDA layer, forward and backward, as predicted for "
            f"{machine.name}: {costs}."
        )
    exposed = " and ".join(f"{1e3 * x.exposed:.2f} ms ({name})" for name, x in point.mla.items())
    held = " and ".join(f"{x / 2**20:,.0f} MiB ({name})" for name, x in chosen.buffers.items())
    reasons.append(
        f"attention {way}: nothing hides {exposed} of the exchange in an MLA layer, as predicted; "
        f"of latents and their gradients a GPU holds {held} at once."
    )
    return Choice(kind, mode, way, tuple(reasons))
