"""Conversations that every machine already has: questions about Python's standard library.

Its docstrings are the answers. Modules are parsed, never imported.
"""

from __future__ import annotations

import ast
import json
import uuid
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from megakda.data.chat import ChatInput
from megakda.data.chat_template import PLAIN_NAME, Messages
from megakda.data.corpus import prepare, stdlib_root, stdlib_sources
from megakda.data.tokenizer import load_tokenizer
from megakda.errors import DataError

SYSTEM = "You explain Python's standard library."
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
MOST_TURNS = 4  # questions about one class and its methods


def prepare_stdlib_chat(
    out_dir: str | Path, tokenizer_spec: str = "byte", max_bytes: int | None = None
) -> Path:
    """Makes ``out_dir/stdlib_chat.{bin,idx,json}``, the marks of answers, and ``.jsonl``.

    A conversation per module, function and class of the running interpreter's standard library that
    has a docstring, of the same files in the same order as `prepare_stdlib`. Of a class and its
    methods it has several questions. The .jsonl holds the conversations, to be looked at. Does
    nothing where the data set is whole. Safe to call from several processes at once.

    Args:
        out_dir: folder of the data set; made if it is not there.
        tokenizer_spec: see `megakda.data.tokenizer.load_tokenizer`; a tokenizer without a chat
            template gets the plain one.
        max_bytes: upper bound on the bytes of source text; None: all of it.

    Returns:
        The prefix, ``out_dir/stdlib_chat``.

    Raises:
        DataError: there is no source text, nothing fits `max_bytes`, or the folder cannot be
            written.
    """
    prefix = Path(out_dir) / "stdlib_chat"

    def sources() -> list[Path]:
        return [_write(prefix.with_suffix(".jsonl"), stdlib_sources(max_bytes))]

    own = load_tokenizer(tokenizer_spec).chat_template()
    chat = ChatInput(template=PLAIN_NAME if own is None else None)
    return prepare(prefix, tokenizer_spec, max_bytes, sources, chat)


def _write(path: Path, sources: Sequence[Path]) -> Path:
    """The conversations about `sources`; appears under its name when it is whole."""
    partial = path.with_name(f"{path.name}-{uuid.uuid4().hex}.partial")  # others may write it too
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as stream:
            for source in sources:
                for messages in _of_file(source):
                    stream.write(json.dumps({"messages": messages}) + "\n")
        partial.replace(path)
    except OSError as error:
        raise DataError(
            f"cannot write {path} ({error.strerror}): make room, or set data.paths to a folder "
            "that can be written"
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    return path


def _of_file(source: Path) -> Iterator[Messages]:
    parts = source.relative_to(stdlib_root()).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    if all(part.isidentifier() and not part.startswith("_") for part in parts):
        with suppress(SyntaxError, ValueError):  # a few files are of another version of Python
            yield from conversations(source.read_text(encoding="utf-8"), ".".join(parts))


def conversations(source: str, module: str) -> Iterator[Messages]:
    """The messages of each conversation about a module.

    Args:
        source: of the module.
        module: its dotted name.

    Raises:
        SyntaxError, ValueError: `source` is no Python.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the parser thinks of old string literals
        tree = ast.parse(source)
    if answer := _answer(tree):
        yield _messages([(f"What is the module {module} for?", answer)])
    for node in tree.body:
        if isinstance(node, _FUNCTIONS) and (answer := _answer(node)):
            yield _messages([(f"What does {module}.{node.name} do?", answer)])
        elif isinstance(node, ast.ClassDef) and (turns := list(_turns(node, module))):
            yield _messages(turns[:MOST_TURNS])


def _turns(node: ast.ClassDef, module: str) -> Iterator[tuple[str, str]]:
    if answer := _answer(node):
        yield f"What is {module}.{node.name}?", answer
    for method in node.body:
        if isinstance(method, _FUNCTIONS) and (answer := _answer(method)):
            yield f"What does the method {node.name}.{method.name} do?", answer


def _answer(node: _Documented) -> str | None:
    if getattr(node, "name", "").startswith("_"):
        return None
    return (ast.get_docstring(node) or "").strip() or None


def _messages(turns: list[tuple[str, str]]) -> Messages:
    messages = [{"role": "system", "content": SYSTEM}]
    for question, answer in turns:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return messages
