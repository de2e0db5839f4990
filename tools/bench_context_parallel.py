#!/usr/bin/env python3
"""Times, bytes and peak memory of KDA and MLA over a sequence on 1, 2 and 4 CPU ranks.

Each rank is a process with one thread. Without --out nothing is written; with it,
context_parallel.json and .md go into that folder.

python tools/bench_context_parallel.py
python tools/bench_context_parallel.py --layers kda --tokens 8192 32768 --out benchmarks/results
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megakda.bench.context_parallel import DEVICE, Sizes, cases, measure  # noqa: E402
from megakda.bench.context_report import table, write  # noqa: E402
from megakda.errors import MegakdaError  # noqa: E402
from megakda.kernels.verify.bench.environment import describe  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    sizes = Sizes(heads=args.heads, head_dim=args.head_dim)
    tokens = {"kda": args.tokens, "mla": args.mla_tokens}
    try:
        rows = measure(
            cases(args.layers, args.ranks, tokens),
            sizes,
            args.repeats,
            lambda text: print(text, file=sys.stderr),
        )
    except (MegakdaError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 2)
    print("\n".join(table(rows)))
    if args.out:
        line = [
            "python",
            "tools/bench_context_parallel.py",
            *(sys.argv[1:] if argv is None else argv),
        ]
        write(args.out / "context_parallel", rows, sizes, describe(DEVICE, line), args.repeats)
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", nargs="+", choices=("kda", "mla"), default=["kda", "mla"])
    parser.add_argument("--ranks", nargs="+", type=int, choices=(1, 2, 4), default=[1, 2, 4])
    lengths = {"nargs": "+", "type": int, "metavar": "N"}
    parser.add_argument(
        "--tokens",
        default=[4096, 16384],
        help="of the row, for KDA (4096 16384)",
        **lengths,
    )
    parser.add_argument(
        "--mla-tokens", default=[1024, 4096], help="and for MLA (1024 4096)", **lengths
    )
    parser.add_argument("--heads", type=int, default=Sizes.heads, help="over all ranks (4)")
    parser.add_argument("--head-dim", type=int, default=Sizes.head_dim, help="K = V (64)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each case (3)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write JSON and Markdown")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
