#!/usr/bin/env python3
"""Sweeps the learning rate of AdamW and of Muon on `tiny` and compares steps to a loss.

python tools/compare_optimizers.py            # about half an hour on one CPU core
Writes benchmarks/results/optimizers_cpu.{json,md,png}; finished runs are kept and reused.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megakda.bench.optimizers import DEVICE, Settings, report, sweep, write  # noqa: E402
from megakda.kernels.verify.bench.environment import describe  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/optimizers"))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/optimizers_cpu")
    parser.add_argument("--steps", type=int, default=Settings.steps)
    args = parser.parse_args(argv)
    settings = Settings(steps=args.steps)
    environment = describe(DEVICE, ["python", "tools/compare_optimizers.py"])
    runs = sweep(settings, args.runs)
    write(runs, settings, environment, args.out)
    print("\n".join(report(runs, settings, environment)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
