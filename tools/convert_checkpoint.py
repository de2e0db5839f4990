#!/usr/bin/env python3
"""Inspects, reshards, casts, averages and strips checkpoints, whatever layout they were saved at.

CHECKPOINT is a run's folder, of which the newest checkpoint is taken, or a checkpoint's. OUT
becomes a run's folder: OUT/checkpoints/step_*, and copies of the run's config.yaml and tokenizer
where CHECKPOINT lies in a run that has them, so that tools/generate.py OUT and train.weights=OUT
work. Nothing is overwritten. A command that was interrupted goes on where it was when it is started
again. Memory is bounded by a few times the chunk size, whatever the size of the model.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megakda.checkpoint import convert, inspection  # noqa: E402
from megakda.config.sizes import parse_size  # noqa: E402
from megakda.errors import MegakdaError  # noqa: E402


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    inspect = commands.add_parser("inspect", help="a table of what a checkpoint holds")
    inspect.add_argument("checkpoint", metavar="CHECKPOINT")
    inspect.add_argument("--other", metavar="CHECKPOINT", help="show what differs from this one")
    inspect.add_argument("--filter", metavar="REGEX", help="only names in which this is found")
    inspect.add_argument("--optimizer", action="store_true", help="with the optimizer's state")
    inspect.add_argument(
        "--fail-on-difference", action="store_true", help="with --other: exit code 1 if any differs"
    )

    reshard = commands.add_parser(
        "reshard",
        help="rewrite in files of bounded size, with the optimizer: a run resumes from it",
    )
    cast = commands.add_parser("cast", help="weights in another precision, without the optimizer")
    average = commands.add_parser(
        "average", help="mean of several checkpoints' weights, in float64, without the optimizer"
    )
    strip = commands.add_parser("strip", help="weights as they are, without the optimizer")
    for command in (reshard, cast, strip):
        command.add_argument("checkpoint", metavar="CHECKPOINT")
    cast.add_argument("--dtype", required=True, help=" or ".join(convert.DTYPES))
    average.add_argument("checkpoint", metavar="CHECKPOINT", nargs="+")
    average.add_argument(
        "--weights", type=float, nargs="+", metavar="W", help="one per checkpoint (default: equal)"
    )
    for command in (reshard, cast, average, strip):
        command.add_argument("--out", required=True, type=Path, help="the folder to make")
        command.add_argument(
            "--max-chunk-size",
            default=f"{convert.CHUNK_BYTES // 10**6}MB",
            metavar="SIZE",
            help="of a file, but for a longer row of a tensor: 1GB, 512MiB, ... (%(default)s)",
        )
    return parser


def main(argv: list[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    try:
        if args.command == "inspect":
            return inspect(args)
        limit = parse_size(args.max_chunk_size, "--max-chunk-size")
        if args.command == "reshard":
            result = convert.reshard(args.checkpoint, args.out, limit)
        elif args.command == "cast":
            result = convert.cast(args.checkpoint, args.out, args.dtype, limit)
        elif args.command == "average":
            result = convert.average(args.checkpoint, args.out, args.weights, limit)
        else:
            result = convert.strip(args.checkpoint, args.out, limit)
    except MegakdaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; a conversion goes on with the same command", file=sys.stderr)
        return 130
    print(result)
    return 0


def inspect(args: argparse.Namespace) -> int:
    chosen = (args.filter, args.optimizer)
    if args.other is None:
        print(inspection.inspect(args.checkpoint, *chosen))
        return 0
    found = inspection.compare(args.checkpoint, args.other, *chosen)
    print(found)
    return 1 if found.differs and args.fail_on_difference else 0


if __name__ == "__main__":
    sys.exit(main())
