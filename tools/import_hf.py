#!/usr/bin/env python3
"""Converts a Hugging Face folder into a run's: checkpoint, config.yaml, tokenizer.

Kimi Linear or DeepSeek-V3, with or without compressed queries. The checkpoint loads at
any layout, and train.weights=OUT begins a training with it. An interrupted import goes on with the
same command.

python tools/import_hf.py --hf Kimi-Linear-48B-A3B-Base --out runs/kimi_linear_48b
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megakda.checkpoint.hf_import import DTYPES, dry_run, import_hf  # noqa: E402
from megakda.data.tokenizer import SPECS  # noqa: E402
from megakda.errors import MegakdaError  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    """Runs the command. Returns its exit code: 0, or the one of the MegakdaError."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--hf", type=Path, required=True, metavar="DIR", help="config.json and *.safetensors"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="must not exist")
    parser.add_argument(
        "--dtype",
        choices=sorted(DTYPES),
        default="keep",
        help="of the weights; A_log, dt_bias and routers are fp32 in any case (%(default)s)",
    )
    parser.add_argument(
        "--tokenizer", metavar="SPEC", help=f"{SPECS}; default: the one in the folder, copied"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check names, shapes and files; write nothing"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar on stderr")
    args = parser.parse_args(argv)
    if args.out is None and not args.dry_run:
        parser.error("--out is needed, or --dry-run")
    try:
        if args.dry_run:
            print(dry_run(args.hf, args.dtype))
            return 0
        done = import_hf(args.hf, args.out, args.dtype, args.tokenizer, not args.quiet)
    except MegakdaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    if done.nonfinite:
        print(f"warning: NaN or infinity in {', '.join(done.nonfinite)}", file=sys.stderr)
    print(f"{args.out}: {done}, written in {done.seconds:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
