"""Saved states of prompts' beginnings, from which later prompts go on.

A recurrent state cannot be cut back, so it has to be saved at the very token where prompts part.
Two places are worth it: the end of a prompt (the same prompt again, or the next turn of a
conversation), and the token where a new prompt departs from an earlier one: a beginning that was
shared once will be shared again. Latents are shared by page and cost nothing to save.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from dataclasses import dataclass

import numpy as np

from megakda.inference.pages import PagePool

RECENT_PROMPTS, RECENT_TOKENS = 64, 1 << 22
"""Earlier prompts that a new one is compared with, and their tokens together, at most."""


@dataclass(frozen=True)
class Prefix:
    """The state after `tokens`: a row of the pools of states, and pages of latents."""

    tokens: np.ndarray
    row: int
    pages: tuple[int, ...]

    @property
    def key(self) -> tuple[int, bytes]:
        return _key(self.tokens)


class PrefixCache:
    """The most recently used prefixes.

    Args:
        rows: of the pools of states, for one prefix each; none: nothing is saved.
        pool: of the latents' pages.
        shortest: tokens that a prefix must have to be worth saving.
    """

    def __init__(self, rows: list[int], pool: PagePool, shortest: int):
        self._free_rows, self._pool, self._shortest = list(rows), pool, shortest
        self._enabled = bool(rows)
        self._saved: OrderedDict[tuple[int, bytes], Prefix] = OrderedDict()
        self._recent: deque[np.ndarray] = deque(maxlen=RECENT_PROMPTS)

    def __len__(self) -> int:
        return len(self._saved)

    def find(self, prompt: np.ndarray) -> Prefix | None:
        """The longest saved beginning that leaves at least one token of `prompt` to compute."""
        for length in sorted({key[0] for key in self._saved}, reverse=True):
            found = self._saved.get(_key(prompt[:length])) if length < len(prompt) else None
            if found is not None:
                self._saved.move_to_end(found.key)
                return found
        return None

    def places(self, prompt: np.ndarray) -> list[int]:
        """After how many tokens of `prompt` its state is worth saving, ascending; remembers it."""
        if not self._enabled:
            return []
        shared = max((_common(prompt, other) for other in self._recent), default=0)
        self._recent.append(prompt)
        while len(self._recent) > 1 and sum(map(len, self._recent)) > RECENT_TOKENS:
            self._recent.popleft()
        # One token is left, so that the same prompt can go on from its own prefix.
        places = {min(shared, len(prompt) - 1), len(prompt) - 1}
        return sorted(
            place
            for place in places
            if place >= self._shortest and _key(prompt[:place]) not in self._saved
        )

    def save(self, tokens: np.ndarray, pages: list[int]) -> Prefix | None:
        """A place for the state after `tokens`, whose row the caller fills; None if it has one."""
        if _key(tokens) in self._saved:
            return None
        if not self._free_rows:
            self.evict()
        held = tuple(pages[: self._pool.needed(len(tokens))])
        self._pool.share(held)
        prefix = Prefix(tokens, self._free_rows.pop(), held)
        self._saved[prefix.key] = prefix
        return prefix

    def evict(self, keep: Prefix | None = None) -> bool:
        """Drops the prefix that was not used for longest; False if there is none."""
        for key, prefix in self._saved.items():
            if prefix is not keep:
                del self._saved[key]
                self._pool.give_back(prefix.pages)
                self._free_rows.append(prefix.row)
                return True
        return False

    def reclaimable(self, keep: Prefix | None = None) -> int:
        """Pages that would be free if all prefixes but one were dropped."""
        held = Counter(page for p in self._saved.values() if p is not keep for page in p.pages)
        return sum(self._pool.holders(page) == count for page, count in held.items())

    def clear(self) -> None:
        """Drops all prefixes, as after a change of weights."""
        while self.evict():
            pass
        self._recent.clear()


def _key(tokens: np.ndarray) -> tuple[int, bytes]:
    return len(tokens), tokens.tobytes()


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the longest common beginning."""
    length = min(len(a), len(b))
    differ = np.flatnonzero(a[:length] != b[:length])
    return int(differ[0]) if len(differ) else length
