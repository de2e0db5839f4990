"""Results as JSON and as Markdown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megakda.kernels.verify.bench.sides import OURS, SIDES

Row = dict[str, Any]


def write(path: Path, content: dict[str, Any], tables: Sequence[str]) -> None:
    """The JSON file, one row a line, and a Markdown file beside it.

    Args:
        path: of the JSON file.
        content: with the rows under "rows", errors under "errors".
        tables: lines of Markdown that follow the description of the machine.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = []
    for name, value in content.items():
        if isinstance(value, list) and value:
            lines = ",\n".join(f"  {json.dumps(x)}" for x in value)
            parts.append(f' "{name}": [\n{lines}\n ]')
        else:
            parts.append(f' "{name}": {json.dumps(value)}')
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    text = "\n".join([*_header(content), *tables]) + "\n"
    path.with_suffix(".md").write_text(text)


def _header(content: dict[str, Any]) -> list[str]:
    machine = content["environment"]
    hardware, versions = machine["hardware"], machine["versions"]
    lines = [
        "# Kernels beside others",
        "",
        f"Written by `{machine['command']}` on {machine['date'][:10]}, commit "
        f"{(machine['commit'] or 'unknown')[:10]} with {machine['changed_files']} changed files.",
        "",
        f"{hardware['name']}, "
        + (
            f"{hardware['threads']} threads of {hardware['cores']} cores"
            if "threads" in hardware
            else f"{hardware['processors']} multiprocessors"
        )
        + "; "
        + ", ".join(f"{name} {version}" for name, version in versions.items() if version)
        + f". Load average before the run {machine['load_average'][0]:.2f}.",
    ]
    if content.get("bandwidth"):
        lines[-1] += f" Copying moves {content['bandwidth'] / 1e12:.2f} TB/s."
    return lines


def sequence_tables(content: dict[str, Any]) -> list[str]:
    """One table per shape: milliseconds, memory, and how many times ours each side takes."""
    rows: list[Row] = content["rows"]
    lines = [
        "",
        f"gate {content['gate']}, {content['dtype']}. Milliseconds: median (least to 90th "
        "percentile); both is forward with gradients on, and backward. x: time of the side divided "
        f"by that of {OURS}. Memory: peak beyond the inputs, MiB.",
    ]
    if content.get("bandwidth"):
        lines[-1] += (
            " Roofline: the time in which the inputs could be read and the results written once, "
            "at the speed of a copy, divided by the time it took."
        )
    timed = {row["side"] for row in rows}
    lines += ["", *(f"- {side.name}: {side.what}" for side in SIDES if side.name in timed)]
    for shape in dict.fromkeys(row["shape"] for row in rows):
        here = {(row["side"], row["mode"]): row for row in rows if row["shape"] == shape}
        roofline = any("roofline" in row for row in here.values())
        titles = ["side", "forward", "x", "backward", "both", "x", "memory forward", "both"]
        titles += ["roofline forward", "both"] if roofline else []
        lines += ["", f"## {shape}", "", f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
        for side in dict.fromkeys(name for name, _ in here):
            forward, backward, both = (here.get((side, x)) for x in ("forward", "backward", "both"))
            cells = [
                side,
                _time(forward),
                _ratio(forward, here.get((OURS, "forward"))),
                _time(backward),
                _time(both),
                _ratio(both, here.get((OURS, "both"))),
                _mebibytes(forward),
                _mebibytes(both),
            ]
            if roofline:
                cells += [_share(forward), _share(both)]
            lines.append(f"| {' | '.join(cells)} |")
    return lines + _notes(content)


def decode_table(content: dict[str, Any]) -> list[str]:
    """One line per operator, shape and side: microseconds of a step."""
    lines = [
        "",
        f"{content['dtype']}. Microseconds of a step: median (least to 90th percentile); graph: "
        "one of many steps captured in a CUDA graph, without the cost of launching.",
        "",
        "| operator | shape | side | call | graph |",
        "|---|---|---|---|---|",
    ]
    for row in content["rows"]:
        cells = [row["operator"], row["shape"], row["side"], _time(row["call"], 1e3)]
        lines.append(f"| {' | '.join([*cells, _time(row['graph'], 1e3)])} |")
    return lines + _notes(content)


def _notes(content: dict[str, Any]) -> list[str]:
    lines = []
    reasons: dict[str, list[str]] = {}
    for entry in content["skipped"]:
        reasons.setdefault(f"{entry['side']}: {entry['reason']}", []).append(entry["shape"])
    if reasons:
        lines += ["", "Not measured:", ""]
        for reason, shapes in reasons.items():
            lines.append(f"- {reason} ({'; '.join(dict.fromkeys(shapes))})")
    if content["wrong"]:
        lines += ["", "Not timed, because they are wrong:", ""]
        lines += [f"- {sentence}" for sentence in content["wrong"]]
    worst: dict[str, float] = {}
    for entry in content["errors"]:
        if entry["errors"]:
            worst[entry["side"]] = max(worst.get(entry["side"], 0.0), *entry["errors"].values())
    if worst:
        lines += ["", "Largest RMS error of outputs and gradients, relative, in the checks before:"]
        lines[-1] += " " + ", ".join(f"{side} {error:.1e}" for side, error in worst.items()) + "."
    return lines


def _time(row: Row | None, factor: float = 1.0) -> str:
    if row is None:
        return ""
    median, low, high = (factor * row[name] for name in ("median_ms", "min_ms", "p90_ms"))
    return f"{median:.4g} ({low:.4g} to {high:.4g})"


def _ratio(row: Row | None, ours: Row | None) -> str:
    if row is None or ours is None:
        return ""
    return f"{row['median_ms'] / ours['median_ms']:.2f}"


def _mebibytes(row: Row | None) -> str:
    if row is None or row["peak_bytes"] is None:
        return ""
    return f"{row['peak_bytes'] / 2**20:.0f}"


def _share(row: Row | None) -> str:
    return f"{100 * row['roofline']:.0f} %" if row and "roofline" in row else ""
