"""A picture of whole sequences: time against size, and how well each side does."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from megakda.kernels.verify.bench.problems import Shape, parse_shape

Row = dict[str, Any]

# Okabe and Ito's colours, apart also for colour-blind readers.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_MARKERS = "osD^vP*Xd"


def draw(content: dict[str, Any], path: Path) -> None:
    """Two panels into a PNG file: milliseconds against length (against heads, if only they vary),
    and the share of the roofline, or where no bandwidth is known, tokens per second.

    Dashed lines are the forward pass, solid ones forward and backward together.

    Args:
        content: what the benchmark writes as JSON.
        path: of the PNG file.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    plt = importlib.import_module("matplotlib.pyplot")
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    rows, axis = _varying(content["rows"])
    second = "roofline" if any("roofline" in row for row in rows) else "tokens_per_s"
    sides = list(dict.fromkeys(row["side"] for row in rows))
    for i, side in enumerate(sides):
        color, marker = _COLORS[i % len(_COLORS)], _MARKERS[i % len(_MARKERS)]
        for mode, line in (("forward", "--"), ("both", "-")):
            points = sorted(
                (_size(row, axis), row["median_ms"], row.get(second))
                for row in rows
                if row["side"] == side and row["mode"] == mode
            )
            if not points:
                continue
            style = {"color": color, "marker": marker, "linestyle": line, "markersize": 4}
            label = side if mode == "both" else None
            if mode == "forward" and not _has(rows, side, "both"):
                label = f"{side} (forward)"
            x, y, z = zip(*points, strict=True)
            left.plot(x, y, label=label, **style)
            if None not in z:
                right.plot(x, z, **style)
    xlabel = {"tokens": "tokens of a sequence", "heads": "heads"}[axis]
    left.set(xlabel=xlabel, ylabel="milliseconds", title="time", xscale="log", yscale="log")
    right.set(xlabel=xlabel, xscale="log")
    if second == "roofline":
        right.set(ylabel="share", title="least bytes at the speed of a copy / time", ylim=(0, None))
    else:
        right.set(ylabel="tokens per second", title="throughput", yscale="log")
    for panel in (left, right):
        ticks = sorted({_size(row, axis) for row in rows})
        panel.set_xticks(ticks, [str(x) for x in ticks])
        panel.minorticks_off()
        panel.grid(color="#E6E6E6")
        panel.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=8)
    machine = content["environment"]["hardware"]["name"]
    figure.suptitle(
        f"{machine}, {_common(rows, axis)}, {content['dtype']}, gate {content['gate']}; "
        "dashed forward, solid forward + backward",
        fontsize=9,
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _varying(rows: list[Row]) -> tuple[list[Row], str]:
    """The rows that differ in length alone, or in heads alone, whichever has more shapes."""
    best: tuple[int, list[Row], str] = (0, rows, "tokens")
    for axis in ("tokens", "heads"):
        groups: dict[tuple[int, ...], list[Row]] = {}
        for row in rows:
            shape = parse_shape(row["shape"])
            if not shape.packed:
                groups.setdefault(_others(shape, axis), []).append(row)
        for group in groups.values():
            count = len({row["shape"] for row in group})
            if count > best[0]:
                best = (count, group, axis)
    return best[1], best[2]


def _others(shape: Shape, axis: str) -> tuple[int, ...]:
    rest = shape.heads if axis == "tokens" else shape.tokens
    return (shape.batch, shape.key_dim, shape.value_dim, rest)


def _size(row: Row, axis: str) -> int:
    return getattr(parse_shape(row["shape"]), axis)


def _common(rows: list[Row], axis: str) -> str:
    letter = "T" if axis == "tokens" else "H"
    return ", ".join(x for x in rows[0]["shape"].split(",") if not x.startswith(letter))


def _has(rows: list[Row], side: str, mode: str) -> bool:
    return any(row["side"] == side and row["mode"] == mode for row in rows)
