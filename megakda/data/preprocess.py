"""Text in, megatron-core's indexed format out.

The main process reads the inputs in order and hands blocks of them to worker processes, which
check, parse and tokenize; results are written in input order, so the output does not depend on the
number of workers. `readers` has the first part of this, `encode` the second, `output` the third.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megakda.data.chat import ChatFormat, ChatInput, chat_format
from megakda.data.encode import MAX_LISTED, BrokenRecord, Job, encode, usable_cores
from megakda.data.indexed import token_dtype
from megakda.data.output import OutputBusyError, check_output, open_output
from megakda.data.readers import FORMATS, Input, find_inputs, read_blocks
from megakda.data.tokenizer import Tokenizer, load_tokenizer
from megakda.errors import DataError

__all__ = [
    "FORMATS",
    "MAX_LISTED",
    "BrokenRecord",
    "ChatInput",
    "OutputBusyError",
    "PreprocessReport",
    "preprocess",
]

_SERIAL_BELOW = 16 << 20  # bytes of input that are not worth starting processes for
_LINE_EVERY = 10.0  # seconds between progress lines where there is no terminal


@dataclass
class PreprocessReport:
    """What `preprocess` did. Sizes are in bytes, times in seconds."""

    prefix: str
    tokenizer: str
    dtype: str = ""
    files: int = 0
    skipped_files: int = 0  # in folders, of unknown type
    input_bytes: int = 0  # on disk, as given
    text_bytes: int = 0  # of the documents, in UTF-8
    documents: int = 0
    empty_documents: int = 0
    tokens: int = 0  # with the end-of-document tokens
    answer_tokens: int | None = None  # of conversations: those that are trained on
    cut_tokens: int = 0  # of those, the ones that lie on the edge of an answer
    max_token_id: int = -1
    bin_bytes: int = 0
    broken: int = 0
    broken_listed: list[BrokenRecord] = field(default_factory=list)
    workers: int = 1
    seconds: float = 0.0

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text per token, end-of-document tokens included."""
        return self.text_bytes / max(self.tokens, 1)

    def __str__(self) -> str:
        rate = self.input_bytes / max(self.seconds, 1e-9) / 1e6
        workers = "1 worker" if self.workers == 1 else f"{self.workers} workers"
        files, answers = ".bin, .idx, .json", []
        if self.answer_tokens is not None:
            files += ", .answers.bin, .answers.idx"
            share = self.answer_tokens / max(self.tokens, 1)
            cut = f", {self.cut_tokens:,} of them on an edge" if self.cut_tokens else ""
            answers = [("answers", f"{self.answer_tokens:,} tokens ({share:.1%}){cut}")]
        rows = [
            ("output", f"{self.prefix}{files} ({self.bin_bytes:,} bytes of {self.dtype})"),
            ("tokenizer", self.tokenizer),
            ("inputs", f"{self.files:,} files, {self.input_bytes:,} bytes"),
            ("documents", f"{self.documents:,}"),
            ("tokens", f"{self.tokens:,}"),
            ("bytes/token", f"{self.bytes_per_token:.3f}"),
            ("largest id", f"{self.max_token_id}"),
            *answers,
            ("time", f"{self.seconds:.1f} s with {workers} ({rate:.1f} MB/s)"),
            ("empty", f"{self.empty_documents:,} documents or lines left out"),
            ("broken", f"{self.broken:,} records left out"),
        ]
        if self.skipped_files:
            rows.append(("skipped", f"{self.skipped_files:,} files of unknown type in folders"))
        lines = [f"{name:<12} {value}" for name, value in rows]
        lines += [f"  {record}" for record in self.broken_listed]
        if self.broken > len(self.broken_listed):
            lines.append(f"  ... and {self.broken - len(self.broken_listed):,} more")
        return "\n".join(lines)


def preprocess(
    inputs: Iterable[str | Path],
    output_prefix: str | Path,
    tokenizer_spec: str = "byte",
    *,
    workers: int | None = None,
    text_key: str = "text",
    append_eod: bool = True,
    format: str | None = None,
    document: str = "file",
    on_error: str = "report",
    overwrite: bool = False,
    progress: bool = True,
    extra: dict[str, Any] | None = None,
    chat: ChatInput | None = None,
) -> PreprocessReport:
    """Tokenizes text files, JSON lines and parquet into ``PREFIX.bin``, ``.idx`` and ``.json``.

    Conversations also into ``PREFIX.answers.bin`` and ``.idx``, which mark the tokens of answers.

    Args:
        inputs: files, globs or folders (searched recursively, hidden names left out, sorted). A
            file that is named twice is read once.
        output_prefix: path of the output without suffix; its folder is made.
        tokenizer_spec: see `megakda.data.tokenizer.load_tokenizer`.
        workers: processes that tokenize; None: all cores that this process may use, or 1 for
            inputs below 16 MiB. The output does not depend on it. Above 1, a script that calls this
            needs an ``if __name__ == "__main__":`` guard.
        text_key: key (JSON lines) or column (parquet) that holds the text.
        append_eod: end each document with the tokenizer's end-of-document token.
        format: ``text``, ``jsonl`` or ``parquet``; None: by suffix (also before ``.gz``).
        document: of text inputs, one document per ``file`` or per ``line``.
        on_error: ``report`` leaves broken records out, counts them and lists the first 20;
            ``fail`` stops at the first.
        overwrite: replace a complete output of the same name.
        progress: show a progress bar on a terminal, else a line every 10 s.
        extra: kept in the sidecar under ``extra``.
        chat: the inputs are JSON lines or parquet with conversations, rendered so. The
            end-of-document token is part of an answer that it follows, and is not written twice.

    Returns:
        Counts, sizes and the list of broken records.

    Raises:
        ConfigError: a chat template that cannot be read, or is none.
        DataError: bad arguments, no chat template, inputs that cannot be found or read, no
            documents at all, an output that exists, or a disk that is full.
    """
    start = time.monotonic()
    prefix = str(output_prefix)
    folder = prefix.endswith(os.sep) or not Path(prefix).name
    _check_choice("format (--format)", format, (None, *FORMATS))
    _check_choice("document (--document)", document, ("file", "line"))
    _check_choice("on_error (--on-error)", on_error, ("report", "fail"))
    if workers is not None and workers < 1:
        raise DataError(f"workers={workers} must be at least 1: change --workers")
    if folder or prefix.endswith((".bin", ".idx", ".json")):
        raise DataError(
            f"output prefix {prefix!r} must be a folder and a name without .bin, .idx or .json: "
            "change --output-prefix"
        )
    check_output(prefix, overwrite)
    tokenizer = load_tokenizer(tokenizer_spec)
    found_chat = None if chat is None else chat_format(tokenizer, chat)
    files, skipped = find_inputs(inputs, format)
    key, option = text_key, "--text-key"
    if chat is not None:
        key, option = chat.messages_key, "--messages-key"
        _check_records(files)
    dtype = token_dtype(tokenizer.vocab_size)
    report = PreprocessReport(
        prefix=prefix,
        tokenizer=tokenizer.spec,
        dtype=dtype.name,
        files=len(files),
        skipped_files=skipped,
        input_bytes=sum(f.size for f in files),
    )
    if workers is None:
        workers = 1 if report.input_bytes < _SERIAL_BELOW else usable_cores()
    report.workers = workers
    job = Job(tokenizer_spec, text_key, append_eod, found_chat)
    blocks = read_blocks(files, document, key, option)
    lengths: list[np.ndarray] = []
    with (
        open_output(prefix, overwrite, answers=chat is not None) as output,
        _Progress(report.input_bytes, progress) as bar,
        closing(encode(blocks, job, tokenizer, workers)) as results,
    ):
        for result in results:
            if result.broken and on_error == "fail":
                raise DataError(
                    f"{result.broken[0]}: correct the input, or leave broken records out with "
                    "--on-error report"
                )
            output.write(result.tokens, result.answers)
            lengths.append(result.lengths)
            report.documents += len(result.lengths)
            report.tokens += int(result.lengths.sum(dtype=np.int64))
            report.text_bytes += result.text_bytes
            if chat is not None:
                report.answer_tokens = (report.answer_tokens or 0) + result.answers.count(1)
                report.cut_tokens += result.cut_tokens
            report.bin_bytes += len(result.tokens)
            report.empty_documents += result.empty
            report.max_token_id = max(report.max_token_id, result.max_id)
            report.broken += result.broken_count
            report.broken_listed += result.broken[: MAX_LISTED - len(report.broken_listed)]
            bar.advance(result.input_bytes)
        if report.documents == 0:
            detail = "; ".join(map(str, report.broken_listed[:3]))
            raise DataError(
                f"no documents in {report.files} input files ({report.empty_documents} empty, "
                f"{report.broken} broken{': ' + detail if detail else ''}): check the inputs, "
                f"{option} {key} and --format"
            )
        sidecar = _sidecar(report, tokenizer, append_eod, files)
        if found_chat is not None:
            sidecar["chat"] = _chat_entry(found_chat, report)
        if extra is not None:
            sidecar["extra"] = extra
        output.publish(np.concatenate(lengths), dtype, sidecar)
    report.seconds = time.monotonic() - start
    return report


def _check_choice(name: str, value: str | None, choices: tuple[str | None, ...]) -> None:
    if value not in choices:
        rule = ", ".join(str(c) for c in choices if c is not None)
        raise DataError(f"{name} is {value!r}, but must be one of {rule}")


def _check_records(files: list[Input]) -> None:
    for file in files:
        if file.format == "text":
            raise DataError(
                f"input {str(file.path)!r} is plain text, and --chat reads conversations from JSON "
                "lines and parquet: leave it out (of a folder, name the files as in "
                "'chats/*.jsonl'), or say what it is with --format jsonl"
            )


def _chat_entry(chat: ChatFormat, report: PreprocessReport) -> dict[str, Any]:
    return {
        "answers": chat.answers,
        "answer_tokens": report.answer_tokens,
        "cut_tokens": report.cut_tokens,
        "template": chat.source,
    }


def _sidecar(
    report: PreprocessReport, tokenizer: Tokenizer, append_eod: bool, files: list[Input]
) -> dict[str, Any]:
    return {
        "tokenizer": tokenizer.spec,
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod,
        "eod_appended": append_eod,
        "dtype": report.dtype,
        "documents": report.documents,
        "tokens": report.tokens,
        "bin_bytes": report.bin_bytes,
        "max_token_id": report.max_token_id,
        "text_bytes": report.text_bytes,
        "empty_documents": report.empty_documents,
        "broken": report.broken,
        "sources": [{"name": str(f.path), "bytes": f.size} for f in files],
    }


class _Progress:
    """A bar in bytes of input on a terminal, else a line on stderr every 10 s."""

    def __init__(self, total: int, show: bool) -> None:
        self._total = total
        self._show = show
        self._done = 0
        self._start = self._last = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> _Progress:
        if self._show and sys.stderr.isatty():
            with suppress(ImportError):
                from tqdm import tqdm

                self._bar = tqdm(
                    total=self._total, unit="B", unit_scale=True, desc="tokenizing", leave=False
                )
        return self

    def advance(self, size: int) -> None:
        self._done += size
        if self._bar is not None:
            self._bar.update(size)
        elif self._show and (now := time.monotonic()) - self._last >= _LINE_EVERY:
            self._last = now
            share = self._done / max(self._total, 1)
            rate = self._done / (now - self._start) / 1e6
            print(
                f"tokenizing: {share:.0%} of {self._total:,} bytes, {rate:.1f} MB/s",
                file=sys.stderr,
                flush=True,
            )

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
