"""Tokenizers: raw bytes, a local Hugging Face folder, or a tiktoken rank file.

`encode` never reads special tokens out of the text, so a document that quotes ``<|endoftext|>``
cannot end itself; `encode_with_special` does, for chat templates. Nothing here touches the
network.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megakda.data.tiktoken_tokenizer import DEFAULT_TIKTOKEN_PATTERN, TiktokenTokenizer
from megakda.data.tokenizer_base import (
    SETTING,
    BaseTokenizer,
    Tokenizer,
    characters,
    fingerprint_of,
    first_line,
    some,
    valid_text,
)
from megakda.errors import DataError

__all__ = [
    "DEFAULT_TIKTOKEN_PATTERN",
    "SPECS",
    "ByteTokenizer",
    "HFTokenizer",
    "TiktokenTokenizer",
    "Tokenizer",
    "first_line",
    "load_tokenizer",
    "some",
]

SPECS = "byte, hf:DIR or tiktoken:FILE"

# Exercises what two tokenizers with the same vocabulary can still do differently.
_PROBE = (
    "The quick brown fox, it's 1234567 steps!  \n\n\tdef f(x):\n        return x**2  # ok\r\n"
    "na\u00efve cafe\u0301 \u00c5ngstr\u00f6m \u4f60\u597d\u4e16\u754c "
    "\u043f\u0440\u0438 \u0645\u0631 \U0001f469\u200d\U0001f4bb \ufb01 \u00bd   trailing "
)


class ByteTokenizer(BaseTokenizer):
    """The 256 bytes of UTF-8, and 256 for the end of a document.

    The end has no spelling, so there is no text that `encode_with_special` reads another way.
    """

    spec = "byte"
    vocab_size = 257
    eod = 256

    def __init__(self) -> None:
        self.fingerprint = fingerprint_of(b"byte", b"256", b"eod=256")

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", errors="replace"))

    def encode_with_special(self, text: str) -> list[int]:
        return self.encode(text)

    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        ids = self.encode_array(text)
        return ids, characters(text, np.ones(len(ids), np.int64))

    def special_names(self) -> dict[str, str]:
        return {"bos_token": "", "eos_token": ""}  # templates may put them together with text

    def encode_array(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8", errors="replace"), dtype=np.uint8)

    def decode(self, ids: Iterable[int]) -> str:
        out = bytearray()
        for i in map(int, ids):
            if 0 <= i < 256:
                out.append(i)
            elif i != self.eod:  # a model with a padded vocabulary can sample such ids
                out += "\ufffd".encode()
        return out.decode("utf-8", errors="replace")


class HFTokenizer(BaseTokenizer):
    """A local Hugging Face tokenizer folder."""

    def __init__(self, folder: Path, spec: str) -> None:
        try:
            from transformers import AutoTokenizer
        except ImportError as e:
            raise DataError(
                f"data.tokenizer={spec!r} needs the transformers package ({e}): "
                "pip install megakda[hf]"
            ) from e
        if not folder.is_dir():
            raise DataError(
                f"data.tokenizer={spec!r}: {folder} is not a folder; hf:DIR needs the local folder "
                f"that holds tokenizer.json (model names are not downloaded): {SETTING}"
            )
        try:
            tok = AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
        except Exception as e:  # transformers raises many types for a folder that it cannot read
            names = sorted(p.name for p in folder.iterdir())
            hint = (
                "; a tiktoken.model is read with tiktoken:FILE" if "tiktoken.model" in names else ""
            )
            raise DataError(
                f"data.tokenizer={spec!r}: transformers cannot load {folder} (it holds "
                f"{some(names)}){hint}: {SETTING}. transformers says: {first_line(e)}"
            ) from e
        self._tok = tok
        self._fast = getattr(tok, "backend_tokenizer", None) if tok.is_fast else None
        if self._fast is not None:
            self._fast.no_truncation()  # a saved truncation would silently cut every document
            self._fast.no_padding()
            self._fast.encode_special_tokens = True
        vocab: dict[str, int] = tok.get_vocab()
        if tok.eos_token_id is None:
            raise DataError(
                f"data.tokenizer={spec!r}: the tokenizer in {folder} has no eos_token, but "
                "documents must end with one: set eos_token in its tokenizer_config.json"
            )
        self.spec = spec
        self.eod = int(tok.eos_token_id)
        self.vocab_size = max([*vocab.values(), self.eod]) + 1
        # megatron-core blanks the padding id out of inputs and labels; where padding is the
        # end-of-document token that would remove every document end.
        pad = tok.pad_token_id
        self.pad = -1 if pad is None or pad == self.eod else int(pad)
        self.fingerprint = fingerprint_of(
            b"hf",
            json.dumps(sorted(vocab.items(), key=lambda kv: (kv[1], kv[0]))).encode(),
            self._merges(),
            json.dumps(self.encode(_PROBE)).encode(),
            f"eod={self.eod}".encode(),
        )

    def _merges(self) -> bytes:
        if self._fast is None:
            return b""
        merges = json.loads(self._fast.to_str()).get("model", {}).get("merges") or []
        # "a b" or ["a", "b"], by the version of the tokenizers library
        return json.dumps([m if isinstance(m, str) else " ".join(m) for m in merges]).encode()

    def encode(self, text: str) -> list[int]:
        return self._encode(text, self._fast, split_special_tokens=True)

    def encode_with_special(self, text: str) -> list[int]:
        return self._encode(text, self._fast_special, split_special_tokens=False)

    @cached_property
    def _fast_special(self) -> Any:
        # `encode_special_tokens` is a switch of the whole backend. Flipping it would change what
        # `encode` gives other threads at that moment, so there is a backend for each position.
        other = copy.deepcopy(self._fast)
        if other is not None:
            other.encode_special_tokens = False
        return other

    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        if self._fast_offsets is None:
            raise DataError(
                f"data.tokenizer={self.spec!r}: it is written in Python alone, and does not say "
                "which characters its tokens stand for: convert it to a tokenizer.json "
                "(save_pretrained of transformers' fast class), and name that folder"
            )
        found = self._fast_offsets.encode(text, add_special_tokens=False)
        return np.array(found.ids, np.int64), np.array(found.offsets, np.int64).reshape(-1, 2)

    @cached_property
    def _fast_offsets(self) -> Any:
        other = copy.deepcopy(self._fast_special)
        if other is not None:
            from tokenizers.processors import ByteLevel

            # Without special tokens to add a processor does one thing, and not every one does it:
            # it takes blanks off what a token stands for.
            other.post_processor = ByteLevel(trim_offsets=False)
        return other

    def _encode(self, text: str, fast: Any, split_special_tokens: bool) -> list[int]:
        text = valid_text(text)
        if fast is not None:
            # Three times as fast as `encode`, which also works out the offsets of each token.
            return fast.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return self._tok.encode(
            text,
            add_special_tokens=False,
            split_special_tokens=split_special_tokens,
            truncation=False,
        )

    def decode(self, ids: Iterable[int]) -> str:
        return self._tok.decode(
            [int(i) for i in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def chat_template(self) -> str | None:
        found = self._tok.chat_template
        return found.get("default") if isinstance(found, dict) else found

    def special_names(self) -> dict[str, str]:
        return dict(self._tok.special_tokens_map)


def load_tokenizer(spec: str) -> Tokenizer:
    """Loads the tokenizer that `spec` names.

    Args:
        spec: ``byte`` (the 256 bytes, end of document 256, vocabulary 257), ``hf:DIR`` (a local
            Hugging Face tokenizer folder) or ``tiktoken:FILE`` (a tiktoken rank file, see
            `TiktokenTokenizer`).

    Raises:
        DataError: an unknown spec, files that are missing or unreadable, or a package that the
            kind of tokenizer needs and that is not installed.
    """
    kind, _, rest = str(spec).partition(":")
    if spec == "byte":
        return ByteTokenizer()
    if kind in ("hf", "tiktoken") and rest:
        path = Path(rest).expanduser()
        return HFTokenizer(path, spec) if kind == "hf" else TiktokenTokenizer(path, spec)
    raise DataError(f"data.tokenizer={spec!r} is not one of {SPECS}: {SETTING}")
