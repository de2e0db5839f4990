#!/usr/bin/env python3
"""Prints a recipe's stages and draws its learning rate over tokens, before any training.

python tools/plot_schedule.py experiment=pretrain/kimi_linear_48b --out schedule.png
python tools/plot_schedule.py --ranks 512 experiment=pretrain/kimi_linear_48b optim.lr=1e-3

Needs no data and no GPU. A batch that grows does so in steps that depend on the number of ranks.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megakda.config import compose, validate  # noqa: E402
from megakda.config.layout import least_ranks  # noqa: E402
from megakda.config.stages import unread_settings  # noqa: E402
from megakda.errors import ConfigError, MegakdaError  # noqa: E402
from megakda.metrics.progress import format_count  # noqa: E402
from megakda.metrics.schedule_plot import plot_schedule, stage_table  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, help="ranks of the run; by default the fewest")
    parser.add_argument("--out", type=Path, default=Path("schedule.png"), help="PNG to write")
    parser.add_argument("overrides", nargs="*", help="as for megakda.train")
    args = parser.parse_intermixed_args(argv)
    try:
        config = compose(args.overrides)
        ranks = least_ranks(config.parallel) if args.ranks is None else args.ranks
        timetable = validate(config, ranks).timetable
        print("\n".join(stage_table(timetable)))
        whole = f"{format_count(timetable.tokens)} tokens in {timetable.steps:,} steps"
        print(f"{whole} on {ranks} ranks (data {timetable.data_parallel})")
        unread = unread_settings(config)
        if unread:
            print(f"note: {unread}")
        try:
            print(plot_schedule(timetable, args.out, f"{config.model.name}: {whole}"))
        except OSError as error:
            raise ConfigError(f"--out {args.out}: {error}; name a file to write") from None
    except MegakdaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
