"""From a conversation to the tokens that a model goes on from."""

from __future__ import annotations

from collections.abc import Callable

from megakda.data.chat_template import ChatTemplate, Messages, find_template, read_template
from megakda.data.tokenizer import Tokenizer

__all__ = [
    "ChatTemplate",
    "Messages",
    "Template",
    "find_template",
    "load_template",
    "read_template",
]

Template = Callable[[Messages], list[int]]
"""Tokens of a conversation, up to where the assistant's next message begins."""


def load_template(tokenizer: Tokenizer, source: str | None) -> Template | None:
    """`find_template` for those who want tokens alone."""
    found = find_template(tokenizer, source)
    return None if found is None else found.tokens
