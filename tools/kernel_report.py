#!/usr/bin/env python3
"""Compiles the Triton kernels for GPUs that are not there, and guards what comes out.

Without options it writes benchmarks/results/kernels_aot.json and .md: registers, spills, shared
memory, occupancy and matrix instructions of every kernel at production sizes, for three
architectures. With --check it compares with those files instead, and fails when a kernel is over
its budget or worse than recorded for this version of triton.

python tools/kernel_report.py --check
python tools/kernel_report.py --only kda_chunk --architectures sm_90
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megakda.kernels.verify import report  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    parser.add_argument("--only", nargs="*", default=[], help="some cases; prints the table only")
    parser.add_argument("--architectures", nargs="*", choices=report.ARCHITECTURES)
    parser.add_argument("--jobs", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--cases", default=report.PRODUCTION, help="module with a list CASES")
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "benchmarks/results/kernels_aot.json",
        help="the JSON file; the Markdown file lies beside it",
    )
    args = parser.parse_args(argv)
    os.environ.pop("TRITON_INTERPRET", None)  # before anything imports triton
    began = time.perf_counter()
    architectures = args.architectures or report.ARCHITECTURES
    found = report.compile_cases(args.cases, args.only, architectures, args.jobs)
    problems = found.problems
    if args.check:
        problems = problems + report.compare(args.output, found)
    elif args.only or args.architectures:
        print(report.markdown({found.versions["triton"]: vars(found)}))
    else:
        report.write(args.output, found)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    seconds = time.perf_counter() - began
    print(f"{len(found.launches)} kernels in {seconds:.0f} s, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
