#!/usr/bin/env python3
"""Serves a model over HTTP, with OpenAI's completions and chat completions.

examples:
  python tools/serve.py runs/quickstart
  python tools/serve.py exported/ --port 8080 --max-sequences 32 --max-context 16384
  MEGAKDA_API_KEY=secret python tools/serve.py runs/quickstart --host 0.0.0.0
  torchrun --standalone --nproc-per-node 4 tools/serve.py exported/ --tensor 4 --expert 4

It is meant for evaluation and small use; docs/serving.md says how to serve with vLLM.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megakda.errors import MegakdaError  # noqa: E402
from megakda.inference.choice import add_model_arguments, chosen_model  # noqa: E402
from megakda.runtime.distributed import rank  # noqa: E402
from megakda.serving import require_packages  # noqa: E402
from megakda.serving.options import Options, parse_size  # noqa: E402


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(p)
    where = p.add_argument_group("where, and for whom")
    where.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    where.add_argument("--port", type=int, default=8000, help="0: any free one (%(default)s)")
    where.add_argument(
        "--api-key",
        metavar="K",
        default=os.environ.get("MEGAKDA_API_KEY"),
        help="what clients must send as 'Authorization: Bearer K' (default: the environment's "
        "MEGAKDA_API_KEY, which others on this machine cannot see; without it everyone may ask)",
    )
    where.add_argument("--access-log", action="store_true", help="print a line for each request")
    where.add_argument(
        "--model-name", metavar="NAME", help="what clients call it (default: the folder's name)"
    )
    where.add_argument(
        "--chat-template", type=Path, metavar="FILE", help="Jinja (default: the tokenizer's own)"
    )
    limits = p.add_argument_group("limits")
    limits.add_argument(
        "--max-sequences", type=int, default=16, metavar="N", help="at once (%(default)s)"
    )
    limits.add_argument(
        "--max-context",
        type=int,
        default=4096,
        metavar="N",
        help="tokens of a prompt and its answer (%(default)s)",
    )
    limits.add_argument(
        "--max-queue", type=int, default=64, metavar="N", help="that may wait (%(default)s)"
    )
    limits.add_argument(
        "--max-choices", type=int, default=16, metavar="N", help="largest n (%(default)s)"
    )
    limits.add_argument(
        "--max-body", type=_size, default="1MB", metavar="SIZE", help="of a request (%(default)s)"
    )
    limits.add_argument(
        "--request-timeout",
        type=float,
        default=600.0,
        metavar="S",
        help="seconds for an answer, waiting included (%(default)g)",
    )
    limits.add_argument(
        "--drain-seconds",
        type=float,
        default=20.0,
        metavar="S",
        help="for running requests after SIGTERM or Ctrl-C (%(default)g)",
    )
    engine = p.add_argument_group("engine")
    engine.add_argument(
        "--cache-tokens",
        type=int,
        metavar="N",
        help="of all sequences together (default: sequences x context, at most 2^20)",
    )
    engine.add_argument(
        "--prefill-chunk",
        type=int,
        default=512,
        metavar="N",
        help="prompt tokens per step; fewer disturb running answers less (%(default)s)",
    )
    engine.add_argument(
        "--prefix-slots",
        type=int,
        default=8,
        metavar="N",
        help="beginnings of prompts to keep; 0: none (%(default)s)",
    )
    return p


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def main(argv: list[str] | None = None) -> int:
    """Runs the command. Returns its exit code: 0, or the one of the MegakdaError."""
    args = _parser().parse_args(argv)
    names = [field.name for field in fields(Options) if field.name != "model"]
    options = Options(chosen_model(args), **{name: getattr(args, name) for name in names})
    try:
        require_packages()
        from megakda.serving.server import serve

        serve(options)
    except MegakdaError as error:
        # Every rank meets the same wrong setting; one of them is enough to say so.
        if rank() == 0 or error.exit_code not in (2, 3, 4):
            print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
