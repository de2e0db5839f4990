#!/usr/bin/env python3
"""Times candidate launch configurations of the kernels on a GPU and rewrites its launch table.

Of every kernel at production sizes: candidates that spill or do not fit are dropped by the
compiler, those whose results differ from the current configuration's, or from run to run, are
refused, and of the others the fastest is written into megakda/kernels/launch_tables/, with the GPU
and the versions that it was measured on.

python tools/tune_kernels.py                          # the GPU of this machine, all kernels
python tools/tune_kernels.py --only kda_state kda_grad
python tools/tune_kernels.py --dry-run --architecture sm_90     # without a GPU: only compiles
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="KERNEL", help="names as in the tables")
    parser.add_argument("--dry-run", action="store_true", help="compile the candidates and stop")
    parser.add_argument(
        "--architecture",
        choices=("sm_80", "sm_90", "sm_100"),
        default="sm_90",
        help="of the dry run (sm_90)",
    )
    parser.add_argument("--repeats", type=int, default=30, help="of each measurement (30)")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile (2)")
    parser.add_argument("--table", type=Path, help="write here instead of the GPU's launch table")
    args = parser.parse_args(argv)
    os.environ.pop("TRITON_INTERPRET", None)  # before anything imports triton
    from megakda.kernels.verify.tuning import command

    try:
        if args.dry_run:
            return command.dry_run(args.architecture, args.only, args.jobs)
        return command.tune_all(args.only, args.repeats, args.jobs, args.table)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
