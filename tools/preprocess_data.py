#!/usr/bin/env python
"""Tokenizes text into a data set for training: PREFIX.bin, PREFIX.idx and PREFIX.json.

With --chat the inputs are conversations, one JSON object per line as in
  {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
rendered with a chat template; PREFIX.answers.bin and .idx mark the tokens of answers, for training
with data.loss=answers.

examples:
  python tools/preprocess_data.py docs/*.jsonl.gz --output-prefix data/docs --tokenizer hf:tok/
  python tools/preprocess_data.py src/ --output-prefix data/src
  python tools/preprocess_data.py lines.txt --document line --output-prefix data/lines
  python tools/preprocess_data.py chats.jsonl --chat --tokenizer hf:tok --output-prefix data/chats
"""

from __future__ import annotations

import argparse
import sys

from megakda.data.chat import ANSWERS
from megakda.data.preprocess import FORMATS, MAX_LISTED, ChatInput, preprocess
from megakda.data.tokenizer import SPECS
from megakda.errors import MegakdaError


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="file, quoted glob, or folder (searched recursively): plain text, .jsonl, .parquet; "
        "text and JSON lines also as .gz",
    )
    p.add_argument(
        "--output-prefix", required=True, metavar="PREFIX", help="path of the output, no suffix"
    )
    p.add_argument(
        "--tokenizer", default="byte", metavar="SPEC", help=f"{SPECS} (default: %(default)s)"
    )
    p.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes that tokenize; the output does not depend on it (default: all cores, or 1 "
        "for less than 16 MiB)",
    )
    p.add_argument(
        "--format", choices=FORMATS, help="what the inputs are (default: by their suffix)"
    )
    p.add_argument(
        "--text-key",
        default="text",
        metavar="KEY",
        help="JSON key or parquet column of the text (default: %(default)s)",
    )
    p.add_argument(
        "--document",
        choices=("file", "line"),
        default="file",
        help="what is one document in plain text (default: %(default)s)",
    )
    p.add_argument(
        "--no-eod", action="store_true", help="do not end documents with the end-of-document token"
    )
    p.add_argument(
        "--on-error",
        choices=("report", "fail"),
        default="report",
        help="broken records: leave them out, count them and list the first "
        f"{MAX_LISTED}; or stop at the first (default: %(default)s)",
    )
    chat = p.add_argument_group("conversations")
    chat.add_argument("--chat", action="store_true", help="inputs are JSON lines of conversations")
    chat.add_argument(
        "--messages-key",
        metavar="KEY",
        help=f"JSON key or parquet column of the messages (default: {ChatInput.messages_key})",
    )
    chat.add_argument(
        "--chat-template",
        metavar="FILE",
        help="Jinja template, or plain for the one that needs no special tokens (default: the "
        "tokenizer's own; of the byte tokenizer plain)",
    )
    chat.add_argument(
        "--answers",
        choices=ANSWERS,
        help="which answers are trained on: all, or the last of each conversation (default: all)",
    )
    p.add_argument("--overwrite", action="store_true", help="replace an existing output")
    p.add_argument("--quiet", action="store_true", help="no progress on stderr")
    return p


def main(argv: list[str] | None = None) -> int:
    """Runs the command. Returns its exit code: 0, or the one of the MegakdaError."""
    parser = _parser()
    args = parser.parse_args(argv)
    given = {"messages_key": args.messages_key, "template": args.chat_template}
    given |= {"answers": args.answers}
    given = {name: value for name, value in given.items() if value is not None}
    if given and not args.chat:
        parser.error("--messages-key, --chat-template and --answers are for --chat")
    try:
        report = preprocess(
            args.inputs,
            args.output_prefix,
            args.tokenizer,
            workers=args.workers,
            text_key=args.text_key,
            append_eod=not args.no_eod,
            format=args.format,
            document=args.document,
            on_error=args.on_error,
            overwrite=args.overwrite,
            progress=not args.quiet,
            chat=ChatInput(**given) if args.chat else None,
        )
    except MegakdaError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    except KeyboardInterrupt:
        print("interrupted; no output was written", file=sys.stderr)
        return 130
    print(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
