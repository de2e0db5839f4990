#!/usr/bin/env python3
"""Writes a checkpoint as a Hugging Face folder: safetensors, config.json, tokenizer, model card.

python tools/export_hf.py --checkpoint runs/quickstart --out exported --dtype bf16
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megakda.checkpoint.hf_export import DTYPES, export_hf  # noqa: E402
from megakda.config.sizes import parse_size  # noqa: E402
from megakda.data.tokenizer import SPECS  # noqa: E402
from megakda.errors import MegakdaError  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    """Runs the command. Returns its exit code: 0, or the one of the MegakdaError."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="a run's folder (its newest checkpoint) or a step_* folder; of any layout",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="must not exist")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="keep",
        help="of the weights; A_log, dt_bias and the routing biases stay fp32 (%(default)s)",
    )
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="of a file (%(default)s)"
    )
    parser.add_argument(
        "--tokenizer", metavar="SPEC", help=f"{SPECS}: where it is, if not where it was"
    )
    parser.add_argument(
        "--context", type=int, metavar="N", help="tokens (default: the longest of the run)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar on stderr")
    args = parser.parse_args(argv)
    try:
        done = export_hf(
            args.checkpoint,
            args.out,
            args.dtype,
            parse_size(args.max_shard_size, "--max-shard-size"),
            args.tokenizer,
            args.context,
            not args.quiet,
        )
    except MegakdaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    for warning in done.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if done.nonfinite:
        print(f"warning: NaN or infinity in {', '.join(done.nonfinite)}", file=sys.stderr)
    print(done)
    return 0


if __name__ == "__main__":
    sys.exit(main())
