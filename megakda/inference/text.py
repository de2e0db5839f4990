"""Text of a growing answer: whole characters only, and nothing of a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

_PENDING = 8
"""Tokens that may wait for a character to become whole; longer, and they are broken UTF-8."""

REPLACEMENT = "\ufffd"


class Decoder(Protocol):
    """What is needed of a tokenizer."""

    def decode(self, ids: list[int]) -> str: ...


class TextStream:
    """Turns tokens into text as they come.

    Args:
        tokenizer: its `decode` is all that is used.
        stop: texts that end the answer. What could become one is held back until it cannot.
        context: the tokens before the first, which say whether it begins with a blank.
    """

    def __init__(self, tokenizer: Decoder, stop: Sequence[str] = (), context: Sequence[int] = ()):
        self._decode, self._stop = tokenizer.decode, tuple(stop)
        if tokenizer.decode(list(context)).endswith(REPLACEMENT):
            context = ()  # the prompt ends within a character
        self._ids = list(context)  # of the last text shown, and those that wait
        self._shown = len(self._ids)  # how many of them are shown
        self._held = ""  # decoded, perhaps the beginning of a stop text
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that `token` makes safe to show; sets `stopped` at a stop text."""
        self._ids.append(token)
        # Decoded together with the tokens before, because some tokenizers join them by blanks.
        before = self._decode(self._ids[: self._shown])
        text = self._decode(self._ids)
        waiting = len(self._ids) - self._shown
        if text.endswith(REPLACEMENT) and waiting <= _PENDING:
            return ""
        self._ids, self._shown = self._ids[self._shown :], waiting
        return self._release(text[len(before) :])

    def finish(self) -> str:
        """What is left when the answer ends."""
        before = self._decode(self._ids[: self._shown])
        rest = self._release(self._decode(self._ids)[len(before) :])
        if self.stopped:
            return rest
        rest, self._held, self._shown = rest + self._held, "", len(self._ids)
        return rest

    def _release(self, text: str) -> str:
        self._held += text
        found = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            shown, self._held = self._held[: min(found)], ""
            return shown
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for size in range(min(longest, len(self._held)), 0, -1):
            tail = self._held[-size:]
            if any(stop.startswith(tail) for stop in self._stop):
                shown, self._held = self._held[:-size], tail
                return shown
        shown, self._held = self._held, ""
        return shown
