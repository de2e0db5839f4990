#!/usr/bin/env python3
"""Shows how evenly the ranks of a context-parallel group work, and what they exchange.

Both layouts and all modes of KDA beside each other for a recipe and a distribution of document
lengths; then which to choose and why. --exchange predicts instead how long the exchanges take on a
machine, over tokens, ranks and tensor parallelism. Nothing is built, run or measured.

python tools/context_balance.py parallel.context=8 train.context=131072
python tools/context_balance.py --lengths lognormal:mean=8192,sigma=1.5 --plot work.png \\
    experiment=pretrain/kimi_linear_48b parallel.context=8 train.context=131072 \\
    data.packing=best_fit
python tools/context_balance.py --exchange --assume network=0.6 --plot exchange.png \\
    experiment=pretrain/kimi_linear_48b parallel.context=8 train.context=131072
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megakda.config import Config, compose, validate  # noqa: E402
from megakda.config.layout import least_ranks  # noqa: E402
from megakda.data.lengths import FORMS, parse_lengths, sample_rows  # noqa: E402
from megakda.errors import ConfigError, MegakdaError  # noqa: E402
from megakda.metrics.context_plot import plot_balance, plot_exchange  # noqa: E402
from megakda.models.context_balance import balance, micro_batches  # noqa: E402
from megakda.models.context_report import (  # noqa: E402
    assumption_lines,
    balance_lines,
    exchange_lines,
    point_data,
)
from megakda.models.exchange_model import ASSUMED, H200, Assumptions, predict  # noqa: E402

RANKS = (2, 4, 8, 16, 32, 64)
TENSOR = (1, 2, 4, 8)
TOKENS = tuple(1 << n for n in range(9, 19))


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    try:
        config = compose(args.overrides)
        validate(config, args.ranks or least_ranks(config.parallel))
        assumed = _assumptions(args.assume)
        lines, data = (_exchange if args.exchange else _balance)(config, args, assumed)
    except MegakdaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print("\n".join(lines))
    if args.json:
        args.json.write_text(json.dumps(data, indent=1) + "\n")
    return 0


def _balance(config: Config, args: Any, assumed: Assumptions) -> tuple[list[str], Any]:
    if args.samples < 1:
        raise ConfigError(f"--samples={args.samples}: must be at least 1 micro-batch")
    lengths, rows = parse_lengths(args.lengths), config.train.micro_batch
    packing, notes = config.data.packing, []
    if lengths.kind != "whole":
        rows *= args.samples
        notes.append(f"rows are packed by data.packing={packing}")
        if packing == "none":
            packing = "documents"
            notes = [
                "data.packing=none would make every row one document; rows are packed here by "
                "data.packing=documents"
            ]
    seed = config.train.seed if args.seed is None else args.seed
    sampled = sample_rows(lengths, rows, config.train.context, packing, config.data.overlong, seed)
    batches = micro_batches(sampled, config.train.micro_batch)
    found = balance(config, batches, H200, assumed)
    if args.plot:
        plot_balance(found, args.plot)
    data = {"lengths": args.lengths, "packing": packing, "seed": seed, **asdict(found)}
    return balance_lines(config, "; ".join([str(lengths), *notes]), found), data


def _exchange(config: Config, args: Any, assumed: Assumptions) -> tuple[list[str], Any]:
    parallel, heads = config.parallel, config.model.num_heads
    tensors = sorted({n for n in TENSOR if heads % n == 0} | {parallel.tensor})
    ranks = sorted({*RANKS, parallel.context} - {1})
    kind = parallel.context_layout
    points = [
        predict(config, kind, tensor, n, tokens, H200, assumed)
        for tensor in tensors
        for tokens in TOKENS
        for n in ranks
    ]
    own = config.train.context // parallel.context
    detail = predict(config, kind, parallel.tensor, parallel.context, own, H200, assumed)
    if args.plot:
        plot_exchange(points, parallel.tensor, args.plot)
    lines = [*assumption_lines(H200, assumed), "", *exchange_lines(config, kind, points, detail)]
    data = {
        "machine": asdict(H200),
        "assumed": asdict(assumed),
        "recipe": point_data(detail),
        "points": [point_data(point) for point in points],
    }
    return lines, data


def _assumptions(pairs: list[str]) -> Assumptions:
    known = [field.name for field in fields(Assumptions)]
    values = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        try:
            values[name] = float(value)
        except ValueError:
            values[name] = math.nan
        most = math.inf if name == "latency" else 1
        if name not in known or not 0 < values[name] <= most:
            raise ConfigError(
                f"--assume {pair}: must be NAME=SHARE with a share above 0 and up to 1, or "
                f"latency=SECONDS; names are {', '.join(known)}"
            )
    return replace(ASSUMED, **values)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="as for megakda.train")
    parser.add_argument("--lengths", default="whole", metavar="DOCUMENTS", help=f"{FORMS} (whole)")
    parser.add_argument(
        "--samples", type=int, default=64, metavar="N", help="micro-batches that are packed (64)"
    )
    parser.add_argument("--seed", type=int, help="of lengths and packing; default: train.seed")
    parser.add_argument("--ranks", type=int, help="of the run; default: the fewest that work")
    parser.add_argument("--exchange", action="store_true", help="predict times of the exchanges")
    parser.add_argument(
        "--assume", action="append", default=[], metavar="NAME=SHARE", help="another assumption"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a PNG file")
    return parser.parse_intermixed_args(argv)  # settings before and after options


if __name__ == "__main__":
    sys.exit(main())
