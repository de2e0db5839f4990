"""The figures of `context_balance` and `exchange_model` as text and as plain data."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from megakda.config.schema import Config
from megakda.models.context_balance import Balance, LayoutBalance, Spread
from megakda.models.context_cost import ATTENTION, MODES
from megakda.models.exchange_model import Assumptions, Machine, Point

WIDTH = 100
SHORT = {"state": "s", "heads": "h", "two_level": "2"}


def balance_lines(config: Config, lengths: str, found: Balance) -> list[str]:
    """Tables of both layouts, and the recommendation."""
    parallel, train = config.parallel, config.train
    lines = _wrapped(
        f"{config.model.name}: train.context={train.context:,} over parallel.context="
        f"{parallel.context} ranks, {train.context // parallel.context:,} tokens of a row on each; "
        f"train.micro_batch={train.micro_batch}, parallel.tensor={parallel.tensor}, "
        f"precision={config.precision}",
        f"{lengths}; {found.documents:.1f} pieces in a row, padding included; "
        f"{found.micro_batches} micro-batches",
    )
    for layout in found.layouts.values():
        lines += ["", *_layout_lines(config, layout)]
    missing = {"contiguous", "zigzag"} - found.layouts.keys()
    for kind in sorted(missing):
        lines += ["", f"{kind}: train.context={train.context} cannot be cut so"]
    choice = found.choice
    lines += [
        "",
        f"Recommended: parallel.context_layout={choice.layout} parallel.context_mode={choice.mode}"
        + _heads_setting(found)
        + f" parallel.context_attention={choice.attention}",
        *_wrapped(
            *(f"- {reason}" for reason in choice.reasons),
            "- predictions are for rows of one document each, and rest on assumptions: --exchange "
            "lists them.",
        ),
    ]
    return lines


def _heads_setting(found: Balance) -> str:
    mode = found.layouts[found.choice.layout].modes[found.choice.mode]
    if found.choice.mode != "two_level" or mode is None:
        return ""
    return f" parallel.context_heads={mode.heads_ranks}"


def _layout_lines(config: Config, layout: LayoutBalance) -> list[str]:
    parallel = config.parallel

    def title(mode: str) -> str:
        found = layout.modes[mode]
        return f"two_level({found.heads_ranks})" if found and mode == "two_level" else mode

    def row(name: str, spread: Spread, end: str = "") -> str:
        values = (spread.least, spread.mean, spread.most)
        return (
            f"  {name:<28}"
            + "".join(f"{x / 1e12:>11,.3f}" for x in values)
            + f"{spread.imbalance:>10.3f}{end}"
        )

    mark = " (the recipe's)" if layout.kind == parallel.context_layout else ""
    per_rank = 2 if layout.kind == "zigzag" else 1
    lines = [
        f"{layout.kind}{mark}: {per_rank} x {layout.segment:,} tokens of a row on each rank",
        f"  a document crosses between segments in {layout.linked:.0%} of micro-batches",
        f"  {'TFLOP per rank and micro-batch':<28}{'least':>9}{'mean':>11}{'most':>11}"
        f"{'most/mean':>10}{'slowdown':>10}",
        row("MLA, pairs and latents", layout.attention),
    ]
    for mode, found in layout.modes.items():
        if found is None:
            heads = config.model.num_heads // parallel.tensor
            why = f"{heads} heads on a GPU"
            if mode == "two_level":
                why += ", no group of neighbours in a node to share them"
            lines.append(f"  all, {mode}: not possible with {why}")
        else:
            lines.append(row(f"all, {title(mode)}", found.total, f"{found.slowdown:>9.3f}x"))
    lines.append(f"  {'MiB per layer and GPU':<28}{'forward':>11}{'backward':>11}")
    for mode, found in layout.modes.items():
        if found is not None:
            lines.append(_mebibytes(f"KDA, {title(mode)}", found.bytes))
    lines += [_mebibytes(f"MLA, {way}", size) for way, size in layout.latents.items()]
    return lines


def _mebibytes(name: str, ways: Sequence[int]) -> str:
    return f"  {name:<28}" + "".join(f"{x / 2**20:>11,.2f}" for x in ways)


def assumption_lines(machine: Machine, assumed: Assumptions) -> list[str]:
    """What predictions rest on."""
    shares = ", ".join(
        f"{name} {value:g}" for name, value in asdict(assumed).items() if name != "latency"
    )
    return _wrapped(
        f"Predicted for {machine.name}, by arithmetic; nothing here is measured.",
        f"  rates: {machine.flops / 1e12:,.1f} TFLOP/s dense bf16, memory "
        f"{machine.memory / 1e12:g} TB/s, between GPUs of a node {machine.link / 1e9:g} GB/s each "
        f"way, between nodes {machine.network / 1e9:g} GB/s each way and GPU",
        *(f"  source: {source}" for source in machine.sources),
        f"  assumed shares of the rates that are reached: {shares}",
        f"  assumed latency of a collective or step: {1e6 * assumed.latency:g} microseconds "
        "(change them with --assume)",
    )


def exchange_lines(config: Config, kind: str, points: Sequence[Point], detail: Point) -> list[str]:
    """Which mode adds least where, one grid per tensor-parallel size, and one point in detail."""
    lines = [
        f"What sharing a sequence adds to one layer, forward and backward, in ms ({kind}):",
        f"{detail.ranks} context-parallel ranks, parallel.tensor={detail.tensor}, "
        f"{detail.tokens:,} tokens of a row on each",
        f"  {'':<17}{'exchange':>10}{'exposed':>10}{'computed':>10}{'adds':>10}{'operator':>10}",
    ]
    for name, found in [*detail.kda.items(), *detail.mla.items()]:
        label = f"{'KDA' if name in MODES else 'MLA'}, {name}"
        if found is None:
            lines.append(f"  {label:<17}{'heads do not divide':>20}")
            continue
        parts = (found.exchange, found.exposed, found.extra, found.cost, found.compute)
        lines.append(f"  {label:<17}" + "".join(f"{1e3 * x:>10.3f}" for x in parts))
    lines += [
        "  exchange: alone; exposed: what nothing hides; computed: besides, for the exchange;",
        "  adds: exposed and computed; operator: KDA or attention itself",
        "",
        "What adds least, KDA / MLA. s: state, h: heads, 2: two_level; g: all_gather, r: ring.",
        "In brackets ms added to the KDA layer.",
    ]
    for tensor in dict.fromkeys(point.tensor for point in points):
        grid = [point for point in points if point.tensor == tensor]
        ranks = list(dict.fromkeys(point.ranks for point in grid))
        lines += [
            "",
            f"parallel.tensor={tensor}: tokens of a row on a rank down, parallel.context across",
            "  " + " " * 9 + "".join(f"{n:>14}" for n in ranks),
        ]
        for tokens in dict.fromkeys(point.tokens for point in grid):
            cells = [_cell(point) for point in grid if point.tokens == tokens]
            lines.append(f"  {tokens:>9,}" + "".join(f"{cell:>14}" for cell in cells))
    return lines


def _cell(point: Point) -> str:
    best = point.kda[point.best_mode]
    assert best is not None
    way = "g" if point.best_attention == ATTENTION[0] else "r"
    return f"{SHORT[point.best_mode]}/{way} ({1e3 * best.cost:.2f})"


def _wrapped(*lines: str) -> list[str]:
    """Prose in lines of `WIDTH`."""
    return [part for x in lines for part in textwrap.wrap(x, WIDTH, subsequent_indent="  ")]


def point_data(point: Point) -> dict[str, Any]:
    """As JSON can hold it; seconds."""
    return {**asdict(point), "best_mode": point.best_mode, "best_attention": point.best_attention}
