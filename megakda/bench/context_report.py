"""Tables and files of `context_parallel`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megakda.bench.context_parallel import ALONE, Row, Sizes, as_data

HEAD: tuple[str, ...] = ("layer", "tokens", "ranks", "mode", "layout", "forward ms", "backward ms")
HEAD += ("forward KiB", "backward KiB", "peak MiB", "of one rank's")


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """`HEAD` for each row; the last column is the peak over that of one rank, where it is known."""
    alone = {
        (row.case.layer, row.case.tokens): row.peak_bytes for row in rows if row.case.mode == ALONE
    }
    found = []
    for row in rows:
        case = row.case
        whole = alone.get((case.layer, case.tokens))
        found.append(
            [
                case.layer,
                f"{case.tokens}",
                f"{case.ranks}",
                "" if case.mode == ALONE else case.mode,
                "" if case.mode == ALONE else case.layout,
                f"{row.forward_ms:.1f}",
                f"{row.backward_ms:.1f}",
                f"{row.forward_bytes / 1024:,.0f}",
                f"{row.backward_bytes / 1024:,.0f}",
                f"{row.peak_bytes / 2**20:.1f}",
                f"{row.peak_bytes / whole:.2f}" if whole else "",
            ]
        )
    return found


def table(rows: Sequence[Row]) -> list[str]:
    """For a terminal."""
    lines = [list(HEAD), *cells(rows)]
    widths = [max(len(line[n]) for line in lines) for n in range(len(HEAD))]
    names = [HEAD.index(name) for name in ("layer", "mode", "layout")]

    def aligned(n: int, cell: str) -> str:
        return cell.ljust(widths[n]) if n in names else cell.rjust(widths[n])

    return ["  ".join(aligned(n, cell) for n, cell in enumerate(line)).rstrip() for line in lines]


def write(
    base: Path, rows: Sequence[Row], sizes: Sizes, where: dict[str, Any], repeats: int
) -> None:
    """`base`.json and `base`.md.

    Args:
        where: what `megakda.kernels.verify.bench.environment.describe` says of the machine.
    """
    base.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "environment": where,
        "sizes": asdict(sizes),
        "threads_per_rank": 1,
        "repeats": repeats,
        "dtype": "float32",
        "rows": as_data(rows),
    }
    base.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    base.with_suffix(".md").write_text("\n".join(_markdown(rows, sizes, where, repeats)) + "\n")


def _markdown(rows: Sequence[Row], sizes: Sizes, where: dict[str, Any], repeats: int) -> list[str]:
    hardware, versions = where["hardware"], where["versions"]
    lines = [
        "# One operator over a sequence on several CPU ranks",
        "",
        f"Written by `{where['command']}` on {where['date'][:10]}, commit "
        f"{str(where['commit'])[:10]} with {where['changed_files']} changed files.",
        "",
        f"{hardware['name']}, {hardware['cores']} cores shared by all ranks, one thread per rank, "
        f"gloo; python {versions['python']}, torch {versions['torch']}. Load average before the "
        f"run {where['load_average'][0]:.2f}.",
        "",
        f"{sizes.heads} heads, fp32. KDA with K = V = {sizes.head_dim}, short convolutions of "
        f"{sizes.taps} taps and gates; MLA with latents of {sizes.latent} + {sizes.shared} and "
        f"heads of {sizes.head_dim}. One row that is one document. Times are medians of {repeats} "
        "runs, each of the slowest rank; ranks share the cores, so more ranks need not be faster. "
        "Bytes are those of one rank: of each exchange what it sends or receives, whichever is "
        "more. Peak: what a rank's process holds at most in a forward and backward pass, beyond "
        "its inputs, gradients included.",
        "",
        "| " + " | ".join(HEAD) + " |",
        "|" + "---|" * len(HEAD),
    ]
    return [*lines, *("| " + " | ".join(line) + " |" for line in cells(rows))]
