"""From a conversation to tokens: the model's own chat template, or one given at the start."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from megakda.data.tokenizer import Tokenizer
from megakda.errors import ConfigError

Messages = list[dict[str, Any]]
Template = Callable[[Messages], list[int]]
"""Tokens of a conversation, up to where the assistant's next message begins."""

_MARK = "[[the message goes on here]] "
"""Stands for what is to come of a message. Its last blank shows whether messages are trimmed."""


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
        self.source, self._tokenizer = source, tokenizer
        self._template = _compile(source, name)
        self._names = tokenizer.special_names()
        tokenizer.encode_with_special("")  # some tokenizers build something large the first time

    def text(self, messages: Messages, unfinished: bool = False) -> str:
        """A conversation up to where the assistant's next message begins.

        Args:
            unfinished: up to the end of what the last message has so far, to go on from there.

        Raises:
            ValueError: the template does not write the last message out.
            Exception: whatever a template raises.
        """
        if not unfinished:
            return self._render(messages, add_generation_prompt=True)
        *before, last = messages
        marked = {**last, "content": last["content"] + _MARK}
        text = self._render([*before, marked], add_generation_prompt=False)
        text, found, after = text.rpartition(_MARK.strip())
        if not found:
            raise ValueError("the template leaves out the last message, which is to be continued")
        # A template that trims messages is to trim this one too, although it ends in the mark.
        return text if after.startswith(" ") else text.rstrip()

    def tokens(self, messages: Messages) -> list[int]:
        """Tokens of `text`."""
        return self._tokenizer.encode_with_special(self.text(messages))

    def _render(self, messages: Messages, add_generation_prompt: bool) -> str:
        # Absent tools and documents are None, not undefined, for whoever asks `is not none`.
        asked = {"messages": messages, "tools": None, "documents": None}
        return self._template.render(
            {**self._names, **asked, "add_generation_prompt": add_generation_prompt}
        )


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


def load_template(tokenizer: Tokenizer, source: str | None) -> Template | None:
    """`find_template` for those who want tokens alone."""
    found = find_template(tokenizer, source)
    return None if found is None else found.tokens


def read_template(file: Path) -> str:
    """A Jinja template with `messages` and `add_generation_prompt`.

    Raises:
        ConfigError: `file` cannot be read or is no template.
    """
    try:
        source = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--chat-template {file} cannot be read: {error}") from error
    _compile(source, f"--chat-template {file}")
    return source


def _compile(source: str, name: str) -> Any:
    from jinja2 import TemplateSyntaxError

    try:
        return _environment().from_string(source)
    except TemplateSyntaxError as error:
        raise ConfigError(
            f"{name}: line {error.lineno} is no Jinja template: {error.message}; correct it, or "
            "name another with --chat-template FILE"
        ) from error


def _environment() -> Any:
    """The environment that chat templates are written for.

    Its options, functions and statements are those of transformers
    (`transformers.utils.chat_template_utils`), in which published templates are written.
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
            return nodes.Scope(body).set_lineno(line)

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
