"""A picture of one or several runs: loss, learning rate and throughput, from ``metrics.jsonl``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megakda.errors import ConfigError
from megakda.metrics.writers import METRICS_FILE, read_metrics

# Okabe and Ito's colours in an order that keeps neighbours apart, also for colour-blind readers.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4D4D4D")
_LONG = 200  # rows from which the loss axis may cut off the initial fall
_INK, _FAINT, _GRID = "#222222", "#6B6B6B", "#E6E6E6"


@dataclass(frozen=True)
class _Run:
    label: str
    step: np.ndarray
    columns: dict[str, np.ndarray]  # one value per row, NaN where the row lacks it


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


def _read_run(folder: Path, label: str | None) -> _Run:
    path = folder if folder.is_file() else folder / METRICS_FILE
    if not path.is_file():
        raise ConfigError(
            f"run {str(folder)!r}: it has no {METRICS_FILE}; give the folder that train.out named."
        )
    rows = read_metrics(path)
    if not rows:
        raise ConfigError(
            f"run {str(folder)!r}: {path} has no rows yet; wait for the first training step, or "
            "check logging.every."
        )
    columns = {
        name: np.array([_number(row.get(name)) for row in rows])
        for name in ("loss", "valid_loss", "lr", "tokens_per_s", "tokens")
    }
    if not np.isfinite(columns["loss"]).any() and not np.isfinite(columns["valid_loss"]).any():
        raise ConfigError(
            f"run {str(folder)!r}: {path} has no finite loss or valid_loss; nothing to draw."
        )
    step = np.array([float(row["step"]) for row in rows])
    name = path.parent.resolve().name if path.name == METRICS_FILE else path.stem
    return _Run(name if label is None else label, step, columns)


def smooth_series(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over about ``window`` values, run twice, so that weights fall off linearly.

    Near the start the window shrinks evenly on both sides, which keeps a steep initial fall in
    place; at the end only its left half is left. NaN values carry no weight.
    """
    for half in (window // 4, window // 4) if window >= 4 else (window // 2,):
        values = _box(values, half)
    return values


def _box(values: np.ndarray, half: int) -> np.ndarray:
    n = len(values)
    index = np.arange(n)
    reach = np.minimum(half, index)
    low, high = index - reach, np.minimum(index + reach, n - 1) + 1
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    count = counts[high] - counts[low]
    mean = (sums[high] - sums[low]) / np.maximum(count, 1)
    return np.where(known & (count > 0), mean, np.nan)


def _axis_values(run: _Run, use_tokens: bool) -> np.ndarray:
    if not use_tokens:
        return run.step
    tokens = run.columns["tokens"]
    known = np.isfinite(tokens)
    # Validation rows need not carry the tokens seen; the training rows around them do.
    order = np.argsort(run.step[known], kind="stable")
    between = np.interp(run.step, run.step[known][order], tokens[known][order])
    return np.where(known, tokens, between)


def _limits(low: float, high: float, margin: float = 0.06) -> tuple[float, float]:
    room = margin * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def plot_runs(
    run_dirs: Sequence[Path | str],
    out: Path | str,
    labels: Sequence[str] | None = None,
    smooth: int | None = None,
    x: str | None = None,
) -> Path:
    """Draw loss, learning rate and throughput of runs into one PNG and return its path.

    ``run_dirs``: output folders of runs (or ``metrics.jsonl`` files). ``labels``: names for the
    legend, by default the folders' names. ``smooth``: rows in the smoothing window of the training
    loss and the throughput (1: none; by default a 25th of the rows). ``x``: "tokens" or "step";
    by default tokens if all runs recorded them. Training loss is the line (the raw values pale
    behind it), validation loss the dots. From 200 rows on, the loss axis covers the smoothed loss
    after the first 3 percent of the rows, so the initial fall may leave the panel at the top.

    Raises `ConfigError` for a run without rows or without a finite loss, for labels that do not
    match the runs, and for an unknown ``x``, and `MegakdaError` for a damaged ``metrics.jsonl``.
    """
    if not run_dirs:
        raise ConfigError("run_dirs: at least one run is needed; give the folder of a run.")
    if labels is not None and len(labels) != len(run_dirs):
        raise ConfigError(
            f"labels={list(labels)!r}: need one per run, {len(run_dirs)} in all; add or drop some."
        )
    if smooth is not None and smooth < 1:
        raise ConfigError(f"smooth={smooth}: must be at least 1 row; use 1 for no smoothing.")
    if x not in (None, "tokens", "step"):
        raise ConfigError(f"x={x!r}: no such axis; use tokens or step.")
    runs = [
        _read_run(Path(folder), labels[i] if labels is not None else None)
        for i, folder in enumerate(run_dirs)
    ]
    have_tokens = all(np.isfinite(run.columns["tokens"]).any() for run in runs)
    if x == "tokens" and not have_tokens:
        raise ConfigError("x='tokens': a run has no tokens in its rows; use step.")
    use_tokens = have_tokens if x is None else x == "tokens"
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    _draw(runs, out, smooth, use_tokens)
    return out


def _draw(runs: list[_Run], out: Path, smooth: int | None, use_tokens: bool) -> None:
    # The object interface with an explicit canvas touches no global state and needs no display.
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    panels = [("loss", "Loss")]
    for name, title in (("lr", "Learning rate"), ("tokens_per_s", "Throughput, tokens/s")):
        if any(np.isfinite(run.columns[name]).any() for run in runs):
            panels.append((name, title))
    style: Any = {
        "font.family": "sans-serif",
        "font.size": 10,
        "text.color": _INK,
        "axes.edgecolor": "#BBBBBB",
        "axes.labelcolor": _FAINT,
        "xtick.color": _FAINT,
        "ytick.color": _FAINT,
    }
    with matplotlib.rc_context(style):
        heights = [3.2] + [1.0] * (len(panels) - 1)
        figure = Figure(figsize=(8.6, 1.35 * sum(heights) + 0.9), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        layout: Any = figure.get_layout_engine()
        layout.set(h_pad=0.06, w_pad=0.1)
        grid = figure.subplots(
            len(panels), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights}
        )
        axes = {name: grid[row, 0] for row, (name, _) in enumerate(panels)}
        for name, title in panels:
            ax = axes[name]
            ax.set_title(title, loc="left", fontsize=10.5, color=_INK, pad=7)
            ax.grid(axis="y", color=_GRID, linewidth=0.8)
            ax.set_axisbelow(True)
            ax.spines[["top", "right", "left"]].set_visible(False)
            ax.tick_params(length=0, pad=5)
        _draw_loss(axes["loss"], runs, smooth, use_tokens)
        if "lr" in axes:
            _draw_lr(axes["lr"], runs, use_tokens)
            axes["lr"].yaxis.set_major_formatter(FuncFormatter(axis_exponent))
        if "tokens_per_s" in axes:
            _draw_throughput(axes["tokens_per_s"], runs, smooth, use_tokens)
            axes["tokens_per_s"].yaxis.set_major_formatter(FuncFormatter(axis_count))
        last = grid[-1, 0]
        last.set_xlabel("Tokens" if use_tokens else "Step")
        right = max(float(_axis_values(run, use_tokens).max()) for run in runs)
        last.set_xlim(0, 1.015 * right or 1.0)
        last.xaxis.set_major_locator(
            MaxNLocator(nbins=8, steps=[1, 2, 2.5, 5, 10], integer=not use_tokens)
        )
        if use_tokens:
            last.xaxis.set_major_formatter(FuncFormatter(axis_count))
        else:
            last.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        # A name ending in .tmp hides the format, so it is given; the rename keeps `out` whole.
        temporary = out.with_name(out.name + ".tmp")
        figure.savefig(temporary, format="png", facecolor="white")
        temporary.replace(out)


def axis_count(value: float, _: int = 0) -> str:
    """A tick label: 500k, 1.5B; "B" because that is how people count tokens."""
    for scale, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:g}{suffix}"
    return f"{value:g}"


def axis_exponent(value: float, _: int = 0) -> str:
    """A tick label: 0, 5e-4, 1.5e-3."""
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _color(index: int) -> str:
    return _COLORS[index % len(_COLORS)]


def _window(count: int, smooth: int | None) -> int:
    return max(1, count // 25) if smooth is None else smooth


def _series(run: _Run, name: str, use_tokens: bool) -> tuple[np.ndarray, np.ndarray]:
    """x and y of the rows that have the value; y is NaN where training logged a non-finite one."""
    x, y = _axis_values(run, use_tokens), run.columns[name]
    # Rows of validation have no training loss: they are no gap in the curve. A row with a learning
    # rate but no loss is a training step whose loss was not finite: that one is.
    keep = np.isfinite(y) | (np.isfinite(run.columns["lr"]) if name == "loss" else False)
    return x[keep], y[keep]


def _draw_loss(ax: Any, runs: list[_Run], smooth: int | None, use_tokens: bool) -> None:
    low, high = math.inf, -math.inf
    pale = 0.22 if len(runs) == 1 else 0.15
    any_validation = False
    for index, run in enumerate(runs):
        color = _color(index)
        finals: list[str] = []
        x, y = _series(run, "loss", use_tokens)
        handle = None
        if np.isfinite(y).any():
            window = _window(len(y), smooth)
            curve = smooth_series(y, window)
            if window > 1:
                ax.plot(x, y, color=color, alpha=pale, linewidth=0.8, zorder=2)
            (handle,) = ax.plot(
                x, curve, color=color, linewidth=1.8, solid_capstyle="round", zorder=3
            )
            # A long run's fall from ln(vocabulary) would leave no room for the rest of it.
            settled = curve[int(0.03 * len(curve)) :] if len(curve) >= _LONG else curve
            settled = settled[np.isfinite(settled)]
            settled = settled if settled.size else curve[np.isfinite(curve)]
            low, high = min(low, settled.min()), max(high, settled.max())
            # The pale line should fill the panel, not lie flat in it, once the loss has settled.
            tail = y[len(y) // 2 :]
            tail = tail[np.isfinite(tail)]
            if tail.size:
                low = min(low, float(np.percentile(tail, 1)))
            finals.append(f"train {curve[np.isfinite(curve)][-1]:.3f}")
        x, y = _axis_values(run, use_tokens), run.columns["valid_loss"]
        keep = np.isfinite(y)
        if keep.any():
            dots = ax.scatter(
                x[keep], y[keep], s=30, color=color, edgecolor="white", linewidth=1.1, zorder=4
            )
            handle, any_validation = handle or dots, True
            low, high = min(low, y[keep].min()), max(high, y[keep][-1])
            finals.append(f"validation {y[keep][-1]:.3f}")
        assert handle is not None  # `_read_run` refuses runs with neither loss
        handle.set_label(f"{run.label}:  {',  '.join(finals)}")
    ax.set_ylim(*_limits(low, high))
    ax.locator_params(axis="y", nbins=7)
    legend = ax.legend(loc="upper right", handlelength=1.4, labelspacing=0.5)
    legend.get_frame().set(facecolor="white", alpha=0.85, linewidth=0)
    legend.set_zorder(5)
    if any_validation:
        key = "line: training, dots: validation"
        ax.set_title(key, loc="right", fontsize=9, color=_FAINT, pad=7)


def _draw_lr(ax: Any, runs: list[_Run], use_tokens: bool) -> None:
    top = 0.0
    for index, run in enumerate(runs):
        x, y = _series(run, "lr", use_tokens)
        if y.size:
            ax.plot(x, y, color=_color(index), linewidth=1.6)
            top = max(top, float(y.max()))
    ax.set_ylim(0, 1.12 * top or 1.0)
    ax.locator_params(axis="y", nbins=3)


def _draw_throughput(ax: Any, runs: list[_Run], smooth: int | None, use_tokens: bool) -> None:
    top = 0.0
    for index, run in enumerate(runs):
        x, y = _series(run, "tokens_per_s", use_tokens)
        if y.size:
            window = _window(len(y), smooth)
            curve = smooth_series(y, window)
            if window > 1:
                ax.plot(x, y, color=_color(index), alpha=0.22, linewidth=0.8)
            ax.plot(x, curve, color=_color(index), linewidth=1.6)
            top = max(top, float(curve.max()), float(np.percentile(y, 99)))
    ax.set_ylim(0, 1.12 * top or 1.0)
    ax.locator_params(axis="y", nbins=3)
