#!/usr/bin/env python3
"""Prefill time, time per output token and cache memory against context length.

Kimi Linear, a Gated DeltaNet hybrid and full MLA of the same shape, with random weights; and what
the 48B models keep of a sequence of a million tokens, from their shapes. With --transformers MODEL
also the speed of a trained model here and in transformers, side by side. Without --out nothing is
written; with it inference_cpu (or _gpu) .json, .md and .png go into that folder.

  python tools/bench_inference.py
  python tools/bench_inference.py --transformers runs/quickstart --out benchmarks/results
  python tools/bench_inference.py model=kimi_linear_48b precision=bf16 --contexts 131072 1048576
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import megakda.runtime  # noqa: E402
from megakda.errors import MegakdaError  # noqa: E402

VARIANTS = ("Kimi Linear", "GDN hybrid", "full MLA")


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    try:
        device = megakda.runtime.install()
        from megakda.bench.inference import Plan, measure
        from megakda.bench.inference_report import HEAD, aligned, memory_at_a_million, table, write
        from megakda.bench.peer import Case, compare
        from megakda.kernels.verify.bench.environment import describe

        line = ["python", "tools/bench_inference.py", *(sys.argv[1:] if argv is None else argv)]
        where = describe(device, line)  # before the run, for the load of the machine
        plan = Plan(
            [*args.overrides, f"runtime.threads={args.threads}"],
            args.contexts,
            [n for n in args.contexts if n <= args.prefill_up_to],
            batch=args.batch,
            repeats=args.repeats,
        )
        points = measure(plan, args.variants, device, lambda text: print(text, file=sys.stderr))
        print("\n".join(aligned([HEAD, *table(points)])))
        print("\n" + "\n".join(memory_at_a_million()))
        peer = None
        if args.transformers:
            cases = [Case(1, 32, 256), Case(1, 2048, 128), Case(8, 512, 128)]
            peer = compare(args.transformers, cases, args.repeats, args.threads)
            print("\n" + "\n".join(peer.lines()))
        if args.out:
            base = args.out / f"inference_{'gpu' if device.type == 'cuda' else 'cpu'}"
            print("\n".join(map(str, write(base, points, plan, peer, where))))
    except MegakdaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", default=["model=tiny"], help="(model=tiny)")
    parser.add_argument(
        "--contexts",
        nargs="+",
        type=int,
        metavar="N",
        default=[1024 * 2**n for n in range(7)],
        help="tokens before the one decoded (1024 to 65536, doubling)",
    )
    parser.add_argument(
        "--prefill-up-to", type=int, default=16384, metavar="N", help="tokens (%(default)s)"
    )
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="(%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="(%(default)s)")
    parser.add_argument("--transformers", type=Path, metavar="MODEL", help="a run to compare with")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write JSON, Markdown and a plot")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
