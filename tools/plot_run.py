"""Draw loss, learning rate and throughput of one or several runs: plot_run.py RUN [RUN ...]."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, draw, and return the exit status."""
    from megakda.errors import MegakdaError
    from megakda.metrics.plot import plot_runs

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output folder of a run")
    parser.add_argument("--out", type=Path, default=Path("loss.png"), help="PNG to write")
    parser.add_argument("--labels", nargs="+", help="names for the legend, one per run")
    parser.add_argument("--smooth", type=int, help="rows in the smoothing window; 1: none")
    parser.add_argument("--x", choices=("tokens", "step"), help="default: tokens if recorded")
    arguments = parser.parse_args(argv)
    try:
        path = plot_runs(
            arguments.runs, arguments.out, arguments.labels, arguments.smooth, arguments.x
        )
    except MegakdaError as error:
        print(f"plot_run: {error}", file=sys.stderr)
        return error.exit_code
    print(path)
    return 0


if __name__ == "__main__":
    # Run from a checkout, this works whether or not the package is installed.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    raise SystemExit(main())
