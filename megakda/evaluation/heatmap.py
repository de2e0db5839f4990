"""Scores between 0 and 1 as a picture: one coloured cell each, with its value in percent."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Grid:
    """What a heat map shows.

    Attributes:
        values: one sequence per row, from the top; from 0 to 1, or None where nothing was measured.
        columns, rows: their labels.
        column_label, row_label: of the axes.
    """

    values: Sequence[Sequence[float | None]]
    columns: Sequence[str]
    rows: Sequence[str]
    column_label: str
    row_label: str


def heatmap(grid: Grid, title: str, meaning: str, out: Path) -> Path:
    """Draws a PNG.

    Args:
        meaning: of the values, beside the colour bar.

    Returns:
        `out`.
    """
    # The object interface with an explicit canvas touches no global state and needs no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, columns = len(grid.rows), len(grid.columns)
    size = (3.2 + 0.85 * columns, max(2.6, 1.5 + 0.42 * rows))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots()
    values = np.array(grid.values, dtype=float).reshape(rows, columns)  # None becomes NaN
    # cividis is as readable with a red-green deficiency as without.
    image = axes.imshow(values, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for row, column in np.ndindex(rows, columns):
        value = values[row, column]
        text = "" if np.isnan(value) else f"{100 * value:.0f}"
        color = "black" if value > 0.5 else "white"
        axes.text(column, row, text, ha="center", va="center", color=color, fontsize=9)
    axes.set_xticks(range(columns), grid.columns)
    axes.set_yticks(range(rows), grid.rows)
    axes.set_xticks(np.arange(columns - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(rows - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(grid.column_label)
    axes.set_ylabel(grid.row_label)
    axes.set_title(title, loc="left", fontsize=11)
    bar = figure.colorbar(image, ax=axes, format=lambda x, _: f"{x:.0%}", shrink=0.9)
    bar.set_label(textwrap.fill(meaning, int(12 * size[1])), fontsize=8)
    bar.outline.set_visible(False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, format="png", facecolor="white")
    return out
