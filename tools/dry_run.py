#!/usr/bin/env python3
"""Builds a recipe's model at its full size and rank count, without memory and without other ranks.

python tools/dry_run.py --ranks 1024 experiment=pretrain/kimi_linear_48b parallel.expert=64
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import megakda.runtime  # noqa: E402
from megakda.config import compose, validate  # noqa: E402
from megakda.errors import MegakdaError  # noqa: E402
from megakda.models.params import count_parameters  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, required=True, help="ranks of the run")
    parser.add_argument("overrides", nargs="*", help="as for megakda.train")
    args = parser.parse_args(argv)
    try:
        config = compose(args.overrides)
        derived = validate(config, args.ranks)
        megakda.runtime.install(config.runtime.device, config.runtime.backend)
        from megakda.models.dry_run import count_over_stages

        total, ranks = count_over_stages(config, args.ranks)
    except MegakdaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    count = count_parameters(config.model)
    print(f"{config.model.name} at {args.ranks} ranks: {total:,} parameters as built")
    print(f"closed form: {count.total:,}, active per token {count.active:,}")
    for line in derived.lines(config):
        print(f"  {line}")
    print("first rank of each pipeline stage:")
    for rank in ranks:
        layers = ", ".join(map(str, rank.layers))
        print(f"  rank {rank.rank:>5}: {rank.parameters:>14,} parameters, layers {layers}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
