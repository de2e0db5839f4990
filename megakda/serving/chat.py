"""From a conversation to tokens: the model's own chat template, or one given at the start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megakda.data.tokenizer import Tokenizer
from megakda.errors import ConfigError

Messages = list[dict[str, Any]]
Template = Callable[[Messages], list[int]]
"""Tokens of a conversation, up to where the assistant's next message begins."""


def load_template(tokenizer: Tokenizer, source: str | None) -> Template | None:
    """The chat template of a model.

    With a Hugging Face tokenizer, transformers renders it, and special tokens in its text become
    single tokens, as it is usual: also those that a message quotes. With other tokenizers, all of
    the text is ordinary.

    Args:
        source: from `read_template`, in the place of the tokenizer's own.

    Returns:
        None: this model has none.
    """
    if tokenizer.spec.startswith("hf:"):
        return _with_transformers(tokenizer.spec.removeprefix("hf:"), source)
    if source is None:
        return None
    template = _environment().from_string(source)

    def render(messages: Messages) -> list[int]:
        text = template.render(
            messages=messages, add_generation_prompt=True, bos_token="", eos_token=""
        )
        return tokenizer.encode(text)

    return render


def _with_transformers(folder: str, source: str | None) -> Template | None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        str(Path(folder).expanduser()), local_files_only=True, trust_remote_code=False
    )
    if source is None and tokenizer.chat_template is None:
        return None

    def render(messages: Messages) -> list[int]:
        return tokenizer.apply_chat_template(
            messages,
            chat_template=source,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )

    return render


def read_template(file: Path) -> str:
    """A Jinja template with `messages` and `add_generation_prompt`.

    Raises:
        ConfigError: `file` cannot be read or is no template.
    """
    from jinja2 import TemplateSyntaxError

    try:
        source = file.read_text()
        _environment().parse(source)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--chat-template {file} cannot be read: {error}") from error
    except TemplateSyntaxError as error:
        raise ConfigError(
            f"--chat-template {file}: line {error.lineno} is no Jinja template: {error.message}"
        ) from error
    return source


def _environment() -> Any:
    """The environment that chat templates are written for."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    # transformers' generation tags are Jinja statements of its own; templates for training alone
    # have them, so they are not known here.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = refuse
    return environment
