"""Pictures of context parallelism: work per rank, and what exchanges add."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megakda.models.context_balance import Balance
from megakda.models.exchange_model import Point

# Okabe and Ito's colours, apart also for colour-blind readers.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
_GRID = "#E6E6E6"


def plot_balance(found: Balance, out: Path) -> Path:
    """Work of each rank in MLA layers over the mean of its micro-batch, a PNG file.

    One panel per layout. Bars are the mean over micro-batches, whiskers the least and the most;
    perfect balance is 1.
    """

    def draw(figure: Any) -> None:
        axes = figure.subplots(1, len(found.layouts), sharey=True, squeeze=False)[0]
        for ax, layout, color in zip(axes, found.layouts.values(), _COLORS, strict=False):
            mean = [rank.mean for rank in layout.by_rank]
            below = [rank.mean - rank.least for rank in layout.by_rank]
            above = [rank.most - rank.mean for rank in layout.by_rank]
            ax.bar(range(len(mean)), mean, color=color, width=0.75)
            if found.micro_batches > 1:
                whiskers = {"fmt": "none", "color": "#4D4D4D", "lw": 1}
                ax.errorbar(range(len(mean)), mean, yerr=[below, above], **whiskers)
            ax.axhline(1.0, color="#222222", lw=1, ls="--")
            ax.set_title(
                f"{layout.kind}: busiest rank {layout.attention.imbalance:.2f} x the mean",
                loc="left",
                fontsize=10,
            )
            ax.set_xlabel("Rank of the context-parallel group")
            ax.xaxis.get_major_locator().set_params(integer=True)
            tidy(ax)
        axes[0].set_ylabel("Work in MLA over the mean")

    return save_figure(draw, out, (4.3 * len(found.layouts), 3.4))


def plot_exchange(points: Sequence[Point], tensor: int, out: Path) -> Path:
    """What each mode of KDA adds to a layer over the tokens of a rank, a PNG file.

    One panel per size of the context-parallel group, for `tensor` tensor-parallel ranks.
    """
    points = [point for point in points if point.tensor == tensor]
    sizes = list(dict.fromkeys(point.ranks for point in points))

    def draw(figure: Any) -> None:
        columns = min(3, len(sizes))
        rows = -(-len(sizes) // columns)
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for ax, ranks in zip(grid.flat, sizes, strict=False):
            mine = [point for point in points if point.ranks == ranks]
            for color, mode in zip(_COLORS, mine[0].kda, strict=False):
                curve = [(p.tokens, 1e3 * x.cost) for p in mine if (x := p.kda[mode]) is not None]
                if curve:
                    ax.plot(*zip(*curve, strict=True), color=color, label=mode, lw=1.8)
            operator = [x.compute * 1e3 for p in mine if (x := p.kda["state"]) is not None]
            ax.plot([p.tokens for p in mine], operator, color="#4D4D4D", ls=":", label="KDA itself")
            ax.set(xscale="log", yscale="log")
            ax.set_title(f"{ranks} ranks", loc="left", fontsize=10)
            ticks = [p.tokens for p in mine][1::2]
            ax.set_xticks(ticks, [f"{n // 1024}k" for n in ticks])
            ax.minorticks_off()
            tidy(ax)
        for ax in list(grid.flat)[len(sizes) :]:
            ax.remove()
        lines = {line.get_label(): line for ax in figure.axes for line in ax.lines}
        figure.legend(
            lines.values(), lines.keys(), loc="outside upper right", ncols=4, frameon=False
        )
        figure.supxlabel("Tokens of a row on each rank", fontsize=9)
        figure.supylabel("Predicted ms per KDA layer, forward and backward", fontsize=9)

    return save_figure(draw, out, (9.0, 2.7 * -(-len(sizes) // 3) + 0.6))


def tidy(ax: Any) -> None:
    """Horizontal grid lines and no frame."""
    ax.grid(axis="y", color=_GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(length=0)


def save_figure(draw: Callable[[Any], None], out: Path, size: tuple[float, float]) -> Path:
    """What `draw` puts on a figure of `size` inches, as a PNG file."""
    # The object interface with an explicit canvas touches no global state and needs no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, format="png", facecolor="white")
    return out
