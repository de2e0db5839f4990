#!/usr/bin/env python3
"""Continues prompts with a trained model, printing as it goes.

examples:
  python tools/generate.py runs/quickstart --prompt "def "
  python tools/generate.py exported/ --prompt-file question.txt --tokens 500 --temperature 0
  torchrun --standalone --nproc-per-node 2 tools/generate.py runs/quickstart --tensor 2
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megakda.errors import ConfigError, MegakdaError  # noqa: E402
from megakda.inference.choice import add_model_arguments, chosen_model  # noqa: E402
from megakda.inference.request import SamplingParams  # noqa: E402
from megakda.runtime.distributed import rank, world_size  # noqa: E402


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    what = parser.add_argument_group("prompt")
    source = what.add_mutually_exclusive_group()
    source.add_argument("--prompt", default="def ", help="text to continue (default: %(default)r)")
    source.add_argument("--prompt-file", metavar="FILE", help="its text; - for standard input")
    draw = parser.add_argument_group("answer")
    draw.add_argument("--tokens", type=int, default=200, help="at most so many (%(default)s)")
    draw.add_argument(
        "--temperature", type=float, default=0.8, help="0: always the likeliest (%(default)s)"
    )
    draw.add_argument("--top-k", type=int, default=0, metavar="K", help="0: all (%(default)s)")
    draw.add_argument("--top-p", type=float, default=1.0, metavar="P", help="(%(default)s)")
    draw.add_argument("--min-p", type=float, default=0.0, metavar="P", help="(%(default)s)")
    draw.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="X", help="1: none (%(default)s)"
    )
    draw.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="ends the answer; repeatable"
    )
    draw.add_argument("--ignore-eos", action="store_true", help="go on after a document's end")
    draw.add_argument("--seed", type=int, default=0, help="of the draws (%(default)s)")
    draw.add_argument(
        "--logprobs", type=int, metavar="N", help="list each token with N alternatives afterwards"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        _generate(args)
    except MegakdaError as error:
        if rank() == 0:
            print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # whoever read the text has seen enough
        sys.stderr.close()
    return 0


def _prompt(args: argparse.Namespace) -> str:
    if not args.prompt_file:
        return args.prompt
    try:
        if args.prompt_file == "-":
            if world_size() > 1:
                raise ConfigError("--prompt-file - is read by one rank alone: name a file")
            return sys.stdin.read()
        return Path(args.prompt_file).read_text(errors="replace")
    except OSError as error:
        raise ConfigError(f"--prompt-file {args.prompt_file}: {error.strerror}") from error


def _generate(args: argparse.Namespace) -> None:
    params = SamplingParams(
        max_tokens=args.tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        stop=tuple(args.stop),
        ignore_eos=args.ignore_eos,
        seed=args.seed,
        logprobs=args.logprobs,
    )
    params.check()
    prompt = _prompt(args)
    with chosen_model(args).open() as model:
        from megakda.inference.engine import Engine, EngineSettings

        ids = model.tokenizer.encode(prompt)
        context = max(2, len(ids) + args.tokens)
        engine = Engine(model, EngineSettings(max_sequences=1, max_context=context, prefix_slots=0))
        started, count, listed = time.perf_counter(), 0, []
        _show(prompt)
        for update in engine.stream(ids, params):
            _show(update.text)
            count += len(update.tokens)
            listed += update.logprobs
        seconds = time.perf_counter() - started
        _show("\n")
        for entry in listed:
            others = " ".join(f"{model.tokenizer.decode([t])!r} {x:.3f}" for t, x in entry.top)
            text = model.tokenizer.decode([entry.token])
            _show(f"{text!r:>12} {entry.logprob:8.3f}  {others}\n")
        if rank() == 0:
            speed = f"{count / seconds:.1f} tokens/s" if seconds else ""
            print(f"[{len(ids)} + {count} tokens in {seconds:.2f} s, {speed}]", file=sys.stderr)


def _show(text: str) -> None:
    if rank() == 0:
        print(text, end="", flush=True)


if __name__ == "__main__":
    sys.exit(main())
