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


def load_template(tokenizer: Tokenizer, source: str | None) -> Template | None:
    """The chat template of a model.

    Special tokens in the text that a template makes become single tokens, as it is usual: also
    those that a message quotes.

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
    if source is None:
        return None
    template = _compile(source, name)
    names = tokenizer.special_names()
    tokenizer.encode_with_special("")  # some tokenizers build something large the first time

    def render(messages: Messages) -> list[int]:
        # Absent tools and documents are None, not undefined, for whoever asks `is not none`.
        asked = {"messages": messages, "tools": None, "documents": None}
        return tokenizer.encode_with_special(
            template.render({**names, **asked, "add_generation_prompt": True})
        )

    return render


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
