#!/usr/bin/env python3
"""Continues a prompt with the newest checkpoint of a run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import megakda.runtime  # noqa: E402
from megakda.errors import MegakdaError  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="the run's folder (its train.out)")
    parser.add_argument("--prompt", default="def ", help="text to continue (default: %(default)r)")
    parser.add_argument("--tokens", type=int, default=200, help="at most so many (%(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0: always the likeliest (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws (%(default)s)")
    args = parser.parse_args(argv)
    try:
        device = megakda.runtime.install()
        from megakda.inference.sample import loaded_model, sample

        with loaded_model(args.run, device) as (model, tokenizer):
            print(args.prompt, end="", flush=True)
            for text in sample(
                model, tokenizer, args.prompt, args.tokens, args.temperature, args.seed
            ):
                print(text, end="", flush=True)
            print()
    except MegakdaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
