"""A schedule before it runs: learning rate, batch and context over tokens, stage by stage."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megakda.config.timetable import Stage, Timetable
from megakda.metrics.context_plot import save_figure, tidy
from megakda.metrics.plot import axis_count, axis_exponent

# Okabe and Ito's colours; neighbours stay apart also for colour-blind readers.
_COLORS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#0072B2", "#4D4D4D")
_INK, _FAINT, _LINE = "#222222", "#6B6B6B", "#0072B2"
_POINTS = 600  # of a stage, at most: more than the picture is wide


def schedule_series(timetable: Timetable) -> dict[str, np.ndarray]:
    """A timetable as columns, for drawing: the first step of each value, and the end of the run.

    Returns:
        tokens (before the step), lr, batch and context; each holds until the next row. Long stages
        are sampled.
    """
    steps = sorted({step for stage in timetable.stages for step in _sampled(stage)})
    rows = [timetable.at(step) for step in steps]
    end = timetable.at(timetable.steps - 1)
    return {
        "tokens": np.array(
            [*(row.tokens_before for row in rows), timetable.tokens], dtype=np.float64
        ),
        "lr": np.array([row.lr for row in [*rows, end]]),
        "batch": np.array([row.global_batch for row in [*rows, end]]),
        "context": np.array([row.context for row in [*rows, end]]),
    }


def _sampled(stage: Stage) -> Iterator[int]:
    last = stage.first_step + stage.steps - 1
    count = min(stage.steps, _POINTS)
    yield from (int(step) for step in np.linspace(stage.first_step, last, count).round())
    yield from (size.first_step for size in stage.sizes)


def stage_table(timetable: Timetable) -> list[str]:
    """The stages as aligned lines of text, with a heading."""
    table = timetable.rows()
    rows = [list(table[0]), *(list(row.values()) for row in table)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]))
    return lines


def plot_schedule(timetable: Timetable, out: Path, title: str) -> Path:
    """Draws a timetable into a PNG file and returns its path."""
    panels = 3 if len({stage.context for stage in timetable.stages}) > 1 else 2
    height = 3.0 + 1.15 * (panels - 1) + 0.24 * -(-len(timetable.stages) // 2) + 0.9
    return save_figure(lambda figure: draw_schedule(figure, timetable, title), out, (9.4, height))


def draw_schedule(figure: Any, timetable: Timetable, title: str) -> None:
    """Panels of learning rate, batch and, where it changes, context, over bands of the stages."""
    import matplotlib
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    series = schedule_series(timetable)
    panels = [("lr", "Learning rate", 3.2), ("batch", "Sequences per step", 1.0)]
    if len(set(series["context"])) > 1:
        panels.append(("context", "Context, tokens", 1.0))
    with matplotlib.rc_context({"text.color": _INK, "axes.edgecolor": "#BBBBBB", "font.size": 10}):
        figure.get_layout_engine().set(h_pad=0.06, w_pad=0.1)
        figure.suptitle(title, x=0.012, ha="left", fontsize=11.5)
        heights = [height for *_, height in panels]
        grid = figure.subplots(
            len(panels), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights}
        )[:, 0]
        for ax, (name, label, _) in zip(grid, panels, strict=True):
            tidy(ax)
            ax.tick_params(colors=_FAINT)
            ax.set_title(
                label, loc="left", fontsize=9.5, color=_FAINT, pad=22 if ax is grid[0] else 5
            )
            for stage in timetable.stages:
                end = stage.first_token + stage.tokens
                ax.axvspan(stage.first_token, end, color=_color(stage), alpha=0.2, lw=0)
            ax.plot(
                series["tokens"],
                series[name],
                color=_LINE,
                lw=1.9,
                drawstyle="steps-post",
                zorder=3,
            )
            ax.set_ylim(0, 1.1 * float(series[name].max()))
        axes = dict(zip((name for name, *_ in panels), grid, strict=True))
        axes["lr"].yaxis.set_major_locator(MaxNLocator(nbins=6))
        axes["lr"].yaxis.set_major_formatter(FuncFormatter(axis_exponent))
        _ticks_at_values(axes["batch"], [0, *(stage.batch for stage in timetable.stages)])
        if "context" in axes:
            lengths = {stage.context for stage in timetable.stages}
            axes["context"].set_yscale("log", base=2)
            axes["context"].set_ylim(min(lengths) / 1.6, max(lengths) * 1.6)
            axes["context"].minorticks_off()
            axes["context"].set_yticks(sorted(lengths), [f"{n:,}" for n in sorted(lengths)])
        grid[0].set_xlim(0, timetable.tokens)
        grid[-1].xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 2.5, 5, 10]))
        grid[-1].xaxis.set_major_formatter(FuncFormatter(axis_count))
        grid[-1].set_xlabel("Tokens", color=_FAINT)
        _number_stages(grid[0], timetable)
        figure.legend(
            *_key(timetable),
            loc="outside lower left",
            ncols=2,
            frameon=False,
            fontsize=8.5,
            handlelength=1.2,
            columnspacing=2.5,
        )


def _ticks_at_values(ax: Any, values: list[int]) -> None:
    """Ticks at the largest values, and at others where there is room between them."""
    top, ticks = max(values), list[int]()
    for value in sorted(set(values), reverse=True):
        if all(tick - value > 0.2 * top for tick in ticks):
            ticks.append(value)
    ax.set_yticks(ticks, [f"{tick:,}" for tick in ticks])


def _number_stages(ax: Any, timetable: Timetable) -> None:
    """Each stage's number above its band; those of narrow bands make room for one another."""
    centres = [
        (stage.first_token + stage.tokens / 2) / timetable.tokens for stage in timetable.stages
    ]
    room = min(0.026, 1 / len(centres))
    places = list(centres)
    for n in range(1, len(places)):
        places[n] = max(places[n], places[n - 1] + room)
    places[-1] = min(places[-1], 1 - room / 3)
    for n in reversed(range(len(places) - 1)):
        places[n] = min(places[n], places[n + 1] - room)
    for stage, place, centre in zip(timetable.stages, places, centres, strict=True):
        ax.annotate(
            str(stage.number),
            xy=(centre, 1.0),
            xytext=(place, 1.055),
            xycoords="axes fraction",
            ha="center",
            va="center",
            fontsize=9,
            bbox={
                "boxstyle": "circle,pad=0.22",
                "fc": _pale(stage),
                "ec": _color(stage),
                "lw": 0.9,
            },
            arrowprops={"arrowstyle": "-", "color": _color(stage), "lw": 0.9, "shrinkA": 0},
            annotation_clip=False,
        )


def _key(timetable: Timetable) -> tuple[list[Any], list[str]]:
    """Handles and texts of the legend, one per stage."""
    from matplotlib.patches import Patch

    handles = [Patch(fc=_pale(stage), ec=_color(stage), lw=0.9) for stage in timetable.stages]
    texts = []
    for stage, row in zip(timetable.stages, timetable.rows(), strict=True):
        rate = f"{axis_exponent(stage.lr_from)} → {axis_exponent(stage.lr_to)}"
        texts.append(
            f"{row['stage']}: {axis_exponent(stage.lr_to) if stage.kind == 'constant' else rate}, "
            f"{axis_count(float(f'{stage.tokens:.3g}'))} tokens, context {row['context']}, "
            f"batch {row['batch'].replace('->', '→')}"
        )
    return handles, texts


def _color(stage: Stage) -> str:
    return _COLORS[(stage.number - 1) % len(_COLORS)]


def _pale(stage: Stage) -> Any:
    from matplotlib.colors import to_rgb

    return tuple(1 - 0.25 * (1 - part) for part in to_rgb(_color(stage)))
