"""From a conversation to text: the model's own chat template, or one given at the start."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from megakda.data.tokenizer import Tokenizer
from megakda.errors import ConfigError

Message = dict[str, Any]
Messages = list[Message]
Span = tuple[int, int]
"""First character and the one behind the last."""

PLAIN_NAME = "plain"
PLAIN_TEMPLATE = """\
{%- for message in messages -%}
  {%- if message.tool_calls or message.content is not string -%}
    {{ raise_exception("the plain template takes messages with text alone") }}
  {%- endif -%}
  {%- if not loop.first %}{{ "\\n" }}{% endif -%}
  {{ "<|" + message.role + "|>" }}
  {%- if message.role == "assistant" -%}
    {%- generation -%}{{ message.content }}<|end|>{%- endgeneration -%}
  {%- else -%}
    {{ message.content }}<|end|>
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ "\\n<|assistant|>" }}{% endif -%}
"""
"""For tokenizers without special tokens: ``<|role|>content<|end|>``, messages a line end apart. The
last one ends the text, so that the token behind it is the end of the document."""

# Noncharacters of Unicode, for a program's own use: what a {% generation %} block writes lies
# between them.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"

_GENERATION = re.compile(r"\{%[-+]?\s*generation\b")
_MARK = "[[the message goes on here]] "
"""Stands for what is to come of a message. Its last blank shows whether messages are trimmed."""


class UnclearBlocks(Exception):
    """What a template or a message does so that ``{% generation %}`` blocks cannot be found."""


class ChatTemplate:
    """A chat template with the tokenizer that it is for.

    Special tokens in the text that it makes become single tokens, as it is usual: also those that a
    message quotes.

    Args:
        source: Jinja, with `messages` and `add_generation_prompt`.
        name: of the template, for messages.

    Raises:
        ConfigError: `source` is no template.
        DataError: a special token that the tokenizer's files name is none.
    """

    def __init__(self, tokenizer: Tokenizer, source: str, name: str) -> None:
        self.source, self.name, self._tokenizer = source, name, tokenizer
        self._template = _compile(source, name)
        self._names = tokenizer.special_names()
        tokenizer.encode_with_special("")  # some tokenizers build something large the first time

    @property
    def has_generation(self) -> bool:
        """Whether it says with ``{% generation %}`` what the assistant wrote."""
        return _GENERATION.search(self.source) is not None

    def text(self, messages: Messages, unfinished: bool = False) -> str:
        """A conversation up to where the assistant's next message begins.

        Args:
            unfinished: up to the end of what the last message has so far, to go on from there.

        Raises:
            ValueError: the template does not write the last message out.
            Exception: whatever a template raises.
        """
        if not unfinished:
            return self.render(messages, add_generation_prompt=True)
        *before, last = messages
        marked = {**last, "content": last["content"] + _MARK}
        text = self.render([*before, marked], add_generation_prompt=False)
        text, found, after = text.rpartition(_MARK.strip())
        if not found:
            raise ValueError("the template leaves out the last message, which is to be continued")
        # A template that trims messages is to trim this one too, although it ends in the mark.
        return text if after.startswith(" ") else text.rstrip()

    def tokens(self, messages: Messages) -> list[int]:
        """Tokens of `text`."""
        return self._tokenizer.encode_with_special(self.text(messages))

    def render(
        self, messages: Messages, add_generation_prompt: bool, tools: list[Any] | None = None
    ) -> str:
        """What the template writes.

        Raises:
            Exception: whatever a template raises.
        """
        return self._template.render(self._values(messages, add_generation_prompt, tools))

    def generated(
        self, messages: Messages, tools: list[Any] | None = None
    ) -> tuple[str, list[Span]]:
        """A finished conversation, and what of it lies in ``{% generation %}`` blocks.

        Returns:
            The text, and the characters of each block, in their order.

        Raises:
            UnclearBlocks: they cannot be told: one lies in another, messages hold the characters
                that mark them, or the template changes what a block has written.
            Exception: whatever a template raises.
        """
        text = self.render(messages, False, tools)
        if _OPEN in text or _CLOSE in text:
            raise UnclearBlocks("a message holds U+FDD0 or U+FDD1, which are no characters of text")
        marked = self._marking.render(self._values(messages, False, tools))
        spans: list[Span] = []
        parts: list[str] = []
        at = 0
        for number, part in enumerate(marked.replace(_CLOSE, _OPEN).split(_OPEN)):
            if number % 2:  # every second part is a block
                spans.append((at, at + len(part)))
            parts.append(part)
            at += len(part)
        order = [c for c in marked if c in (_OPEN, _CLOSE)]
        if "".join(parts) != text or order != [_OPEN, _CLOSE] * (len(order) // 2):
            raise UnclearBlocks(
                "the {% generation %} blocks of the template lie in each other, or what they write "
                "is changed later on"
            )
        return text, spans

    @cached_property
    def _marking(self) -> Any:
        return _compile(self.source, self.name, marks=True)

    def _values(
        self, messages: Messages, add_generation_prompt: bool, tools: list[Any] | None
    ) -> dict[str, Any]:
        # Absent tools and documents are None, not undefined, for whoever asks `is not none`.
        asked = {"messages": messages, "tools": tools, "documents": None}
        return {**self._names, **asked, "add_generation_prompt": add_generation_prompt}


def find_template(tokenizer: Tokenizer, source: str | None) -> ChatTemplate | None:
    """The chat template of a model.

    Args:
        source: from `read_template`, in the place of the tokenizer's own.

    Returns:
        None: this model has none.

    Raises:
        ConfigError: it is no template.
        DataError: the tokenizer's own cannot be read, or a special token that the tokenizer's files
            name is none.
    """
    name = "--chat-template"
    if source is None:
        name, source = f"the chat template of {tokenizer.spec}", tokenizer.chat_template()
    return None if source is None else ChatTemplate(tokenizer, source, name)


def read_template(file: Path) -> str:
    """A Jinja template with `messages` and `add_generation_prompt`.

    Args:
        file: with the template, or `PLAIN_NAME` alone for `PLAIN_TEMPLATE`.

    Raises:
        ConfigError: `file` cannot be read or is no template.
    """
    if str(file) == PLAIN_NAME:
        return PLAIN_TEMPLATE
    try:
        source = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--chat-template {file} cannot be read: {error}") from error
    _compile(source, f"--chat-template {file}")
    return source


def _compile(source: str, name: str, marks: bool = False) -> Any:
    from jinja2 import TemplateSyntaxError

    try:
        return _environment(marks).from_string(source)
    except TemplateSyntaxError as error:
        raise ConfigError(
            f"{name}: line {error.lineno} is no Jinja template: {error.message}; correct it, or "
            "name another with --chat-template FILE"
        ) from error


def _environment(marks: bool) -> Any:
    """The environment that chat templates are written for.

    Its options, functions and statements are those of transformers
    (`transformers.utils.chat_template_utils`), in which published templates are written.

    Args:
        marks: put what a ``{% generation %}`` block writes between `_OPEN` and `_CLOSE`.
    """
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`: marks what the assistant wrote, for the loss of a fine-tuning."""

        tags = {"generation"}

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            if marks:
                call = self.call_method("_marked")
                return nodes.CallBlock(call, [], [], body).set_lineno(line)
            return nodes.Scope(body).set_lineno(line)

        def _marked(self, caller: Callable[[], str]) -> str:
            return _OPEN + caller() + _CLOSE

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own is for HTML, and writes < as \u003c.
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment
