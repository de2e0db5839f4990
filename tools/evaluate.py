#!/usr/bin/env python3
"""Measures a model: perplexity on a corpus, lm_eval tasks, or long-context tests.

evaluate.py perplexity MODEL --data PREFIX
evaluate.py lm-eval MODEL --tasks hellaswag,my_task.yaml --out results.json
evaluate.py long-context MODEL --lengths 1024,4096 --out results/

MODEL is a run's folder, a checkpoint, or a Hugging Face folder. Under torchrun the model is split
by --tensor, --pipeline and --expert.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megakda.errors import ConfigError, MegakdaError  # noqa: E402
from megakda.inference.choice import add_model_arguments, chosen_model  # noqa: E402
from megakda.runtime.distributed import rank  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except MegakdaError as error:
        if rank() == 0:
            print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        if rank() == 0:
            print("interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = _command(commands, "perplexity", _perplexity, "loss and perplexity on a corpus")
    command.add_argument(
        "--data", required=True, nargs="+", metavar="PREFIX", help="of prepared corpora"
    )
    command.add_argument(
        "--context", type=int, default=2048, help="tokens per window (%(default)s)"
    )
    group = command.add_mutually_exclusive_group()
    group.add_argument(
        "--overlap", type=int, default=0, help="of them only read, as context (%(default)s)"
    )
    group.add_argument("--stride", type=int, help="the other way to say it: context - overlap")
    group = command.add_mutually_exclusive_group()
    group.add_argument(
        "--stream", action="store_true", help="documents one after the other (default)"
    )
    group.add_argument("--documents", action="store_true", help="each document by itself")
    command.add_argument(
        "--part", metavar="FROM:TO", default=":", help="documents FROM..TO-1 alone"
    )
    command.add_argument("--tokens", type=int, help="predict at most so many")
    command.add_argument("--out", type=Path, help="JSON file to write")

    command = _command(commands, "lm-eval", _lm_eval, "tasks of lm_eval, or your own yaml files")
    command.add_argument(
        "--tasks", required=True, help="names, patterns or yaml files, with commas between them"
    )
    command.add_argument("--include-path", help="folder with further yaml files")
    command.add_argument("--limit", type=float, help="samples per task; below 1: a share of them")
    command.add_argument("--num-fewshot", type=int, help="examples before each question")
    command.add_argument(
        "--max-length", type=int, default=4096, help="tokens of context and answer (%(default)s)"
    )
    command.add_argument(
        "--prefix-token", type=int, help="id before texts without context (end of document)"
    )
    command.add_argument(
        "--apply-chat-template", action="store_true", help="ask in the model's chat template"
    )
    command.add_argument(
        "--chat-template", type=Path, metavar="FILE", help="Jinja (default: the tokenizer's own)"
    )
    command.add_argument("--system-instruction", metavar="TEXT", help="before everything else")
    command.add_argument(
        "--fewshot-as-multiturn",
        action=argparse.BooleanOptionalAction,
        help="examples as messages of their own (default: with --apply-chat-template)",
    )
    command.add_argument("--seed", type=int, default=0, help="of examples and draws (%(default)s)")
    command.add_argument(
        "--out",
        type=Path,
        help="JSON file to write; samples go to OUT.samples.jsonl beside it (OUT without .json)",
    )

    command = _command(
        commands, "long-context", _long_context, "needles, variable tracking and recall"
    )
    command.add_argument(
        "--lengths", default="1024,2048,4096", help="in tokens, with commas (%(default)s)"
    )
    command.add_argument("--tasks", default="all", help="names with commas, or all (%(default)s)")
    command.add_argument(
        "--samples", type=int, default=10, help="per task, length and depth (%(default)s)"
    )
    command.add_argument(
        "--depths", default="0,0.25,0.5,0.75,1", help="of the single needle (%(default)s)"
    )
    command.add_argument(
        "--scoring",
        choices=("generate", "loglikelihood"),
        default="generate",
        help="by what the model writes, or by its log-probabilities of the true answer, for small "
        "base models (%(default)s)",
    )
    command.add_argument("--haystack", choices=("repeat", "text"), help="instead of the task's")
    kinds = ("words", "numbers", "uuids")
    command.add_argument("--keys", choices=kinds, help="of needles, instead of the task's")
    command.add_argument("--values", choices=kinds, help="of needles, instead of the task's")
    command.add_argument("--pairs", type=int, help="of associative_recall; 0: by the length")
    command.add_argument("--chains", type=int, help="of variable_tracking")
    command.add_argument("--hops", type=int, help="of variable_tracking")
    command.add_argument("--seed", type=int, default=0, help="of the samples (%(default)s)")
    command.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder to write to; results of an earlier sweep in it, tables and pictures, are "
        "removed once there are new ones",
    )
    return parser


def _command(commands, name, run, text) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text)
    command.set_defaults(run=run)
    add_model_arguments(command)
    command.add_argument(
        "--sequences", type=int, default=16, help="at the same time, at most (%(default)s)"
    )
    command.add_argument(
        "--chunk", type=int, default=1024, help="tokens per forward pass (%(default)s)"
    )
    return command


def _judged(args: argparse.Namespace):
    from megakda.evaluation.command import Judged

    return Judged(chosen_model(args), args.sequences, args.chunk)


def _perplexity(args: argparse.Namespace) -> None:
    from megakda.evaluation.command import perplexity
    from megakda.evaluation.perplexity import PerplexitySettings

    first, _, last = args.part.partition(":")
    try:
        part = int(first or 0), int(last) if last else None
    except ValueError as error:
        raise ConfigError(f"part={args.part!r} must be FROM:TO, as in 100:200 or 100:") from error
    overlap = args.overlap if args.stride is None else args.context - args.stride
    settings = PerplexitySettings(args.context, overlap, args.documents, *part, args.tokens)
    perplexity(_judged(args), args.data, settings, args.out)


def _lm_eval(args: argparse.Namespace) -> None:
    from megakda.evaluation.command import lm_eval
    from megakda.evaluation.harness import Prompting

    lm_eval(
        _judged(args),
        args.tasks.split(","),
        args.include_path,
        args.limit,
        args.num_fewshot,
        args.max_length,
        args.prefix_token,
        args.seed,
        Prompting(args.apply_chat_template, args.system_instruction, args.fewshot_as_multiturn),
        args.chat_template,
        args.out,
    )


def _long_context(args: argparse.Namespace) -> None:
    from megakda.evaluation.command import long_context
    from megakda.evaluation.sweep import Sweep
    from megakda.evaluation.synthetic import choose_tasks

    tasks = choose_tasks(
        args.tasks.split(","),
        keys=args.keys,
        values=args.values,
        haystack=args.haystack,
        pairs=args.pairs,
        chains=args.chains,
        hops=args.hops,
    )
    sweep = Sweep(
        tasks,
        _numbers("lengths", args.lengths, int),
        args.samples,
        _numbers("depths", args.depths, float),
        args.scoring,
        args.seed,
    )
    long_context(_judged(args), sweep, args.out)


def _numbers(name: str, text: str, kind):
    try:
        return [kind(part) for part in text.split(",") if part]
    except ValueError as error:
        raise ConfigError(f"{name}={text!r} must be numbers with commas between them") from error


if __name__ == "__main__":
    sys.exit(main())
