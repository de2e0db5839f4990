#!/usr/bin/env python3
"""Counts the bytes of memory that `chunk_kda` moves, and writes them down.

Interprets a forward and a backward pass at production width, prints bytes per token and head, and
writes benchmarks/results/kernels_bytes.json and .md: every launch with the bytes of its arrays.

python tools/kernel_bytes.py
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "benchmarks/results/kernels_bytes.json",
        help="the JSON file; the Markdown file lies beside it",
    )
    args = parser.parse_args(argv)
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    from megakda.kernels.verify import bytes as count
    from megakda.kernels.verify import interpreter

    began = time.perf_counter()
    interpreter.install()
    steps = count.record_cases()
    count.write(args.output, steps)
    print("\n".join(count.summary(steps)))
    print(f"{len(steps)} cases in {time.perf_counter() - began:.0f} s: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
