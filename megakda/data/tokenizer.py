"""Tokenizers: raw bytes, a local Hugging Face folder, or a tiktoken rank file.

All of them turn text into ids without ever reading special tokens out of the text, so a document
that quotes ``<|endoftext|>`` cannot end itself. Nothing here touches the network.
"""

from __future__ import annotations

import ast
import base64
import binascii
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from megakda.errors import DataError

SPECS = "byte, hf:DIR or tiktoken:FILE"
_SETTING = "set data.tokenizer (or --tokenizer)"

# How text is cut into pieces before merging, where a rank file comes without its own pattern:
# contractions, words with one leading character, up to three digits, punctuation, line ends,
# blanks.
DEFAULT_TIKTOKEN_PATTERN = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
_EOD_NAME = "<|endofdocument|>"

# Exercises what two tokenizers with the same vocabulary can still do differently.
_PROBE = (
    "The quick brown fox, it's 1234567 steps!  \n\n\tdef f(x):\n        return x**2  # ok\r\n"
    "na\u00efve cafe\u0301 \u00c5ngstr\u00f6m \u4f60\u597d\u4e16\u754c "
    "\u043f\u0440\u0438 \u0645\u0631 \U0001f469\u200d\U0001f4bb \ufb01 \u00bd   trailing "
)

# tiktoken's split regex recurses over a run of blanks, and a very long one overflows its stack.
_MAX_RUN = 25_000  # characters
_RUNS = re.compile(rf"\s{{1,{_MAX_RUN}}}|\S{{1,{_MAX_RUN}}}")
_MIXED = re.compile(r"\s+\S|\S+\s")


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

    def encode_array(self, text: str) -> np.ndarray:
        """`encode` as a one-dimensional integer array."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; special tokens are left out and broken UTF-8 becomes U+FFFD."""
        ...


class _Base:
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

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.spec!r}, vocab_size={self.vocab_size}, eod={self.eod})"


class ByteTokenizer(_Base):
    """The 256 bytes of UTF-8, and 256 for the end of a document."""

    spec = "byte"
    vocab_size = 257
    eod = 256

    def __init__(self) -> None:
        self.fingerprint = _fingerprint(b"byte", b"256", b"eod=256")

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", errors="replace"))

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


class HFTokenizer(_Base):
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
                f"that holds tokenizer.json (model names are not downloaded): {_SETTING}"
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
                f"{some(names)}){hint}: {_SETTING}. transformers says: {first_line(e)}"
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
        self.fingerprint = _fingerprint(
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
        text = _valid(text)
        if self._fast is not None:
            # Three times as fast as `encode`, which also works out the offsets of each token.
            return self._fast.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return self._tok.encode(
            text, add_special_tokens=False, split_special_tokens=True, truncation=False
        )

    def decode(self, ids: Iterable[int]) -> str:
        return self._tok.decode(
            [int(i) for i in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


class TiktokenTokenizer(_Base):
    """A tiktoken rank file: one ``base64(token) rank`` per line.

    The split pattern and the special tokens come from ``tiktoken_config.json`` and
    ``tokenizer_config.json`` beside the file, the first one winning:

    - ``pattern`` (or ``pat_str``): the split regex. A ``tokenizer_config.json`` whose ``auto_map``
      names a Python module has its pattern there; the literal ``pat_str`` of that module is read,
      and the module is never run. Without any of these: `DEFAULT_TIKTOKEN_PATTERN`.
    - ``special_tokens`` ``{text: id}``, or ``added_tokens_decoder`` ``{id: {"content": text}}``.
    - ``eod_token`` (or ``eos_token``) and ``pad_token``: names of special tokens. Without an end
      token one is appended after the largest id.
    """

    def __init__(self, file: Path, spec: str) -> None:
        try:
            import tiktoken
        except ImportError as e:
            raise DataError(
                f"data.tokenizer={spec!r} needs the tiktoken package ({e}): pip install tiktoken"
            ) from e
        ranks = _read_ranks(file, spec)
        config = _tiktoken_config(file, spec)
        pattern = _pattern(file, config, spec)
        special = _special_tokens(config, ranks, spec)
        eod_name = _token_name(config, "eod_token", "eos_token")
        pad_name = _token_name(config, "pad_token")
        if eod_name is None:
            eod_name = _EOD_NAME
            special[eod_name] = max(max(ranks.values()), *special.values(), -1) + 1
        for key, name in (("eod_token/eos_token", eod_name), ("pad_token", pad_name)):
            if name is not None and name not in special:
                raise DataError(
                    f"data.tokenizer={spec!r}: {key} {name!r} beside {file.name} is not one of its "
                    f"special tokens ({some(list(special))}): add it to special_tokens in "
                    f"{file.parent / 'tiktoken_config.json'}"
                )
        try:
            self._enc = tiktoken.Encoding(
                name=file.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
            )
        except Exception as e:
            raise DataError(
                f"data.tokenizer={spec!r}: tiktoken refuses the pattern {pattern!r} or the special "
                f"tokens beside {file.name}: {first_line(e)}; correct "
                f"{file.parent / 'tiktoken_config.json'}"
            ) from e
        self._special = frozenset(special.values())
        self._known = frozenset(ranks.values())
        self.spec = spec
        self.vocab_size = max(max(ranks.values()), *special.values()) + 1
        self.eod = special[eod_name]
        pad = special.get(pad_name, -1) if pad_name is not None else -1
        self.pad = -1 if pad == self.eod else pad  # as in HFTokenizer
        self.fingerprint = _fingerprint(
            b"tiktoken",
            b"".join(b"%d %s\n" % (r, base64.b64encode(t)) for t, r in sorted(ranks.items())),
            pattern.encode(),
            json.dumps(sorted(special.items())).encode(),
            f"eod={self.eod}".encode(),
        )

    def encode(self, text: str) -> list[int]:
        text = _valid(text)
        if not _may_hold_long_run(text):
            return self._enc.encode_ordinary(text)
        return [i for part in _split_runs(text) for i in self._enc.encode_ordinary(part)]

    def decode(self, ids: Iterable[int]) -> str:
        out = bytearray()
        for i in map(int, ids):
            if i in self._known:
                out += self._enc.decode_single_token_bytes(i)
            elif i not in self._special:
                out += "\ufffd".encode()
        return out.decode("utf-8", errors="replace")


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
    raise DataError(f"data.tokenizer={spec!r} is not one of {SPECS}: {_SETTING}")


def _fingerprint(*parts: bytes) -> str:
    h = hashlib.sha256()
    for part in parts:
        h.update(len(part).to_bytes(8, "little"))
        h.update(part)
    return h.hexdigest()[:16]


def _valid(text: str) -> str:
    # Half a surrogate pair is not text; the Rust tokenizers refuse it with a TypeError.
    return text.encode("utf-8", errors="replace").decode("utf-8")


def _may_hold_long_run(text: str) -> bool:
    # A run longer than the limit covers at least one of these slices entirely.
    half = _MAX_RUN // 2
    return any(
        _MIXED.match(text, i, i + half) is None for i in range(0, len(text) - half + 1, half)
    )


def _split_runs(text: str) -> list[str]:
    """Cuts `text` so that no piece holds a longer run of blanks or of non-blanks than allowed."""
    parts: list[str] = []
    start = run = 0
    blank: bool | None = None
    for m in _RUNS.finditer(text):
        piece_blank = m.group()[0].isspace()
        run = run + len(m.group()) if piece_blank == blank else len(m.group())
        if run > _MAX_RUN:
            parts.append(text[start : m.start()])
            start, run = m.start(), len(m.group())
        blank = piece_blank
    parts.append(text[start:])
    return parts


def _read_ranks(file: Path, spec: str) -> dict[bytes, int]:
    # tiktoken's own reader caches by path in a shared temporary folder, and so can return what the
    # file held earlier.
    try:
        lines = file.read_bytes().splitlines()
    except OSError as e:
        raise DataError(
            f"data.tokenizer={spec!r}: cannot read the tiktoken rank file {file} ({e.strerror}): "
            f"{_SETTING} to tiktoken:FILE with an existing file"
        ) from e
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as e:
            raise DataError(
                f"data.tokenizer={spec!r}: line {number} of {file} is {line[:60]!r}, not a base64 "
                f"token and its rank: {_SETTING} to a tiktoken rank file"
            ) from e
    absent = [b for b in range(256) if bytes([b]) not in ranks]
    if absent:
        raise DataError(
            f"data.tokenizer={spec!r}: {file} has no token for {len(absent)} of the 256 bytes "
            f"(first: {absent[0]}), so it cannot encode all text: {_SETTING} to a complete rank "
            "file"
        )
    if len(set(ranks.values())) != len(ranks) or min(ranks.values()) < 0:
        raise DataError(
            f"data.tokenizer={spec!r}: {file} gives two tokens the same rank, or a negative one: "
            f"{_SETTING} to a valid rank file"
        )
    return ranks


def _tiktoken_config(file: Path, spec: str) -> dict[str, Any]:
    config: dict[str, Any] = {}
    for name in ("tokenizer_config.json", "tiktoken_config.json"):
        path = file.parent / name
        if not path.exists():
            continue
        try:
            loaded = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(loaded, dict):
                raise ValueError("not a JSON object")
        except (OSError, ValueError) as e:
            raise DataError(
                f"data.tokenizer={spec!r}: cannot read {path}: {first_line(e)}; correct or "
                "remove it"
            ) from e
        config.update(loaded)
    return config


def _pattern(file: Path, config: dict[str, Any], spec: str) -> str:
    for key in ("pattern", "pat_str"):
        if isinstance(config.get(key), str):
            return config[key]
    auto = (config.get("auto_map") or {}).get("AutoTokenizer")
    names = [n for n in (auto if isinstance(auto, list) else [auto]) if isinstance(n, str)]
    if not names:
        return DEFAULT_TIKTOKEN_PATTERN
    module = file.parent / (names[0].split("--")[-1].split(".")[0] + ".py")
    found = _literal_pattern(module) if module.exists() else None
    if found is None:
        # Falling back to the default pattern would give almost, but not quite, the right ids.
        why = "has no literal pat_str" if module.exists() else "is not there"
        raise DataError(
            f"data.tokenizer={spec!r}: tokenizer_config.json says that the split pattern is in "
            f'{module}, which {why}: put the file there, or write the pattern as "pattern" into '
            f"{file.parent / 'tiktoken_config.json'}"
        )
    return found


def _literal_pattern(module: Path) -> str | None:
    """The string constant `pat_str` of a Python file, found without running the file."""
    try:
        tree = ast.parse(module.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            targets, value = node.targets, node.value
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            targets, value = [node.target], node.value
        else:
            continue
        if any(isinstance(t, ast.Name) and t.id == "pat_str" for t in targets):
            text = _literal_string(value)
            if text is not None:
                return text
    return None


def _literal_string(node: ast.expr) -> str | None:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _literal_string(node.left), _literal_string(node.right)
        return None if left is None or right is None else left + right
    if (  # "|".join([...])
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "join"
        and len(node.args) == 1
        and isinstance(node.args[0], ast.List | ast.Tuple)
    ):
        sep = _literal_string(node.func.value)
        parts = [_literal_string(e) for e in node.args[0].elts]
        if sep is not None and None not in parts:
            return sep.join(p for p in parts if p is not None)
    return None


def _special_tokens(config: dict[str, Any], ranks: dict[bytes, int], spec: str) -> dict[str, int]:
    try:
        special = {
            (entry["content"] if isinstance(entry, dict) else str(entry)): int(i)
            for i, entry in (config.get("added_tokens_decoder") or {}).items()
        }
        special.update({str(t): int(i) for t, i in (config.get("special_tokens") or {}).items()})
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise DataError(
            f"data.tokenizer={spec!r}: its config gives special tokens in an unknown form "
            f'({first_line(e)}); use "special_tokens": {{text: id}} in tiktoken_config.json'
        ) from e
    taken = set(ranks.values())
    clash = [t for t, i in special.items() if i in taken or i < 0]
    if clash or len(set(special.values())) != len(special):
        raise DataError(
            f"data.tokenizer={spec!r}: special token ids must be unique and outside the "
            f"{len(ranks)} ranks, but {some(clash or list(special))} are not: correct "
            "special_tokens in tiktoken_config.json"
        )
    return special


def _token_name(config: dict[str, Any], *keys: str) -> str | None:
    for key in keys:
        value = config.get(key)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            return value
    return None


def some(names: Sequence[str], most: int = 8) -> str:
    """The first names of a list, for an error message."""
    if not names:
        return "nothing"
    return ", ".join(map(str, names[:most])) + (", ..." if len(names) > most else "")


def first_line(e: BaseException) -> str:
    """What an exception says, in one line."""
    text = str(e).strip() or type(e).__name__
    return text.splitlines()[0][:300]
