"""What all tokenizers have in common."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

SETTING = "set data.tokenizer (or --tokenizer)"


@runtime_checkable
class Tokenizer(Protocol):
    """What the data pipeline, generation and megatron-core's GPTDataset need of a tokenizer."""

    spec: str  # what `load_tokenizer` was given
    vocab_size: int  # largest id + 1
    eod: int  # id that ends a document
    pad: int  # id of padding, -1 if there is none
    fingerprint: str  # equal for two tokenizers exactly if they give the same ids

    @property
    def unique_identifiers(self) -> dict[str, Any]:
        """What megatron-core's index caches are keyed by."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; special tokens spelled out in the text are ordinary text."""
        ...

    def encode_with_special(self, text: str) -> list[int]:
        """Ids of `text`, in which a special token spelled out becomes its one id.

        For what a chat template writes and nothing else. Text from outside that spells special
        tokens out, such as the messages in a conversation, becomes them too.
        """
        ...

    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """`encode_with_special`, and which characters of the text each token stands for.

        Args:
            text: valid Unicode.

        Returns:
            ids [tokens] integer, and [tokens, 2] integer: the first character and the one behind
            the last. Tokens that share a character overlap; one that stands for none is empty.

        Raises:
            DataError: this tokenizer cannot say.
        """
        ...

    def encode_array(self, text: str) -> np.ndarray:
        """`encode` as a one-dimensional integer array."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; special tokens are left out and broken UTF-8 becomes U+FFFD."""
        ...

    def chat_template(self) -> str | None:
        """The Jinja source of the chat template that came with the tokenizer; None: none did.

        Raises:
            DataError: it cannot be read.
        """
        ...

    def special_names(self) -> dict[str, str]:
        """How special tokens are spelled, by what chat templates call them: ``bos_token``, ...

        Raises:
            DataError: one is named that the tokenizer does not have.
        """
        ...


class BaseTokenizer:
    """What is the same in every kind of `Tokenizer`."""

    spec: str
    vocab_size: int
    eod: int
    pad: int = -1
    fingerprint: str

    @property
    def unique_identifiers(self) -> dict[str, Any]:
        # Without the path, so that moving the files does not rebuild megatron-core's caches.
        return {
            "class": type(self).__name__,
            "fingerprint": self.fingerprint,
            "vocab_size": self.vocab_size,
            "eod": self.eod,
        }

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def encode_array(self, text: str) -> np.ndarray:
        return np.asarray(self.encode(text), dtype=np.int32)

    def chat_template(self) -> str | None:
        return None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.spec!r}, vocab_size={self.vocab_size}, eod={self.eod})"


def fingerprint_of(*parts: bytes) -> str:
    """A short hash of `parts` and of where each ends."""
    h = hashlib.sha256()
    for part in parts:
        h.update(len(part).to_bytes(8, "little"))
        h.update(part)
    return h.hexdigest()[:16]


def characters(text: str, sizes: np.ndarray) -> np.ndarray:
    """Which characters tokens stand for that divide a text among them.

    Args:
        text: valid Unicode.
        sizes: [tokens] integer, bytes of UTF-8 of each token, each at least 1.

    Returns:
        [tokens, 2] int64: the first character, and the one behind the last. Tokens that share a
        character overlap.
    """
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)
    character = np.repeat(np.arange(len(points)), widths)  # of each byte
    ends = np.cumsum(sizes)
    return np.stack([character[ends - sizes], character[ends - 1] + 1], axis=1)


def valid_text(text: str) -> str:
    """`text`, in which half a surrogate pair is a question mark."""
    # It is not text, and the Rust tokenizers refuse it with a TypeError.
    return text.encode("utf-8", errors="replace").decode("utf-8")


def some(names: Sequence[str], most: int = 8) -> str:
    """The first names of a list, for an error message."""
    if not names:
        return "nothing"
    return ", ".join(map(str, names[:most])) + (", ..." if len(names) > most else "")


def first_line(e: BaseException) -> str:
    """What an exception says, in one line."""
    text = str(e).strip() or type(e).__name__
    return text.splitlines()[0][:300]
