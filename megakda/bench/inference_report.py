"""Table, files and picture of `megakda.bench.inference`, and what memory the 48B model saves."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megakda.bench.inference import VARIANTS, Plan, Point
from megakda.bench.peer import Comparison, grid
from megakda.config import compose
from megakda.models.cache_size import cache_size
from megakda.models.params import count_layers

HEAD = ["model", "context", "prefill s", "ms per token", "linear ms", "full ms", "cache MiB"]
MILLION = 1 << 20
# Okabe and Ito's colours, apart also for colour-blind readers.
_LINES = {
    "Kimi Linear": ("#0072B2", "-"),
    "GDN hybrid": ("#009E73", "--"),
    "full MLA": ("#D55E00", "-"),
}
_MIXERS = {
    "Kimi Linear": ("KDA layer", "linear"),
    "GDN hybrid": ("GDN layer", "linear"),
    "full MLA": ("MLA layer", "full"),
}


def table(points: Sequence[Point]) -> list[list[str]]:
    """One row per point, under `HEAD`."""

    def number(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    return [
        [
            point.variant,
            f"{point.context:,}",
            number(point.prefill_s, 2),
            number(point.decode_ms, 2),
            number(point.linear_ms, 2),
            number(point.full_ms, 2),
            f"{point.cache_bytes / 2**20:.2f}",
        ]
        for point in points
    ]


def memory_at_a_million(precision: str = "bf16") -> list[str]:
    """Cache of one sequence of 2^20 tokens for the 48B models, from their shapes."""
    sizes = {
        name: cache_size(compose([f"model={name}"]).model, precision)
        for name in ("kimi_linear_48b", "gdn_h_48b", "mla_48b")
    }
    whole = sizes["mla_48b"].total(MILLION)
    lines = [
        f"Cache of one sequence of {MILLION:,} tokens in {precision}, from the shapes:",
        "",
        "| model | states MiB | latents GiB | total GiB | less than full MLA |",
        "|---|---|---|---|---|",
    ]
    for name, size in sizes.items():
        total = size.total(MILLION)
        lines.append(
            f"| {name} | {size.states / 2**20:.1f} | {size.per_token * MILLION / 2**30:.2f} | "
            f"{total / 2**30:.2f} | {1 - total / whole:.1%} |"
        )
    return lines


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines for a terminal: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if n else cell.ljust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def write(
    base: Path,
    points: Sequence[Point],
    plan: Plan,
    peer: Comparison | None,
    where: dict[str, Any],
) -> list[Path]:
    """`base`.json, .md and .png.

    Args:
        where: what `megakda.kernels.verify.bench.environment.describe` says of the machine.
    """
    base.parent.mkdir(parents=True, exist_ok=True)
    data = {
        "environment": where,
        "plan": asdict(plan),
        "points": [asdict(point) for point in points],
        "transformers": None if peer is None else asdict(peer),
    }
    json_path, md_path = base.with_suffix(".json"), base.with_suffix(".md")
    json_path.write_text(json.dumps(data, indent=1) + "\n")
    md_path.write_text("\n".join(_markdown(points, plan, peer, where, base.name)) + "\n")
    return [json_path, md_path, plot(points, plan, base.with_suffix(".png"))]


def _markdown(
    points: Sequence[Point],
    plan: Plan,
    peer: Comparison | None,
    where: dict[str, Any],
    name: str,
) -> list[str]:
    hardware, versions = where["hardware"], where["versions"]
    lines = [
        "# Generation against context length",
        "",
        f"Written by `{where['command']}` on {where['date'][:10]}, commit "
        f"{str(where['commit'])[:10]} with {where['changed_files']} changed files.",
        "",
        f"{hardware['name']}, python {versions['python']}, torch {versions['torch']}. Models: "
        f"`{' '.join(plan.overrides)}`, random weights. {plan.batch} sequence(s) decoded together; "
        f"prefill in chunks of {plan.chunk:,}; decoding times are medians of {plan.repeats}. "
        "Linear and full ms: the token mixers of each kind together.",
        "",
        f"![times and memory]({name}.png)",
        "",
        *grid(HEAD, table(points)),
        "",
        *memory_at_a_million(),
    ]
    if peer is not None:
        lines += ["", "## Beside transformers", "", *peer.lines()]
    return lines


def plot(points: Sequence[Point], plan: Plan, out: Path) -> Path:
    """Prefill time, time per output token and cache over context, as a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    per_layer = {p.variant: _layers(plan, p.variant) for p in points}

    def layer_ms(point: Point, kind: str) -> float | None:
        total = point.linear_ms if kind == "linear" else point.full_ms
        return None if total is None else total / per_layer[point.variant][kind]

    panels: list[tuple[str, Callable[[Point], float | None]]] = [
        ("Prefill, s", lambda point: point.prefill_s),
        (f"Time per output token, ms (batch {plan.batch})", lambda point: point.decode_ms),
        ("Of it one token mixer, ms", lambda point: layer_ms(point, "linear")),
        ("Cache of a sequence, MiB", lambda point: point.cache_bytes / 2**20),
    ]
    figure, grid = pyplot.subplots(2, 2, figsize=(10, 7), layout="constrained")
    for ax, (label, value) in zip(grid.flat, panels, strict=True):
        for variant, (color, dashes) in _LINES.items():
            own = [p for p in points if p.variant == variant]
            style = {"marker": "o", "ms": 4, "color": color, "ls": dashes}
            if label == panels[2][0]:
                name, kind = _MIXERS[variant]
                _line(ax, own, lambda p, kind=kind: layer_ms(p, kind), {**style, "label": name})
            else:
                _line(ax, own, value, {**style, "label": variant})
        ax.set_xscale("log", base=2)
        ticks = sorted({point.context for point in points})
        ax.set_xticks(ticks, [_short(tick) for tick in ticks])
        ax.set_ylim(bottom=0)
        ax.set_xlabel("Context, tokens")
        ax.set_title(label, loc="left", fontsize=10)
        ax.grid(color="#E6E6E6")
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False)
    figure.savefig(out, dpi=120)
    pyplot.close(figure)
    return out


def _line(ax: Any, points: list[Point], value: Callable[..., Any], style: dict[str, Any]) -> None:
    found = [(point.context, value(point)) for point in points]
    found = [(x, y) for x, y in found if y is not None]
    if found:
        ax.plot(*zip(*found, strict=True), **style)


def _layers(plan: Plan, variant: str) -> dict[str, int]:
    """Numbers of linear and full layers of a variant."""
    return count_layers(compose([*plan.overrides, *VARIANTS[variant]]).model)


def _short(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)
