"""A tokenizer out of a tiktoken rank file."""

from __future__ import annotations

import ast
import base64
import binascii
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from megakda.data.tokenizer_base import (
    SETTING,
    BaseTokenizer,
    characters,
    fingerprint_of,
    first_line,
    some,
    valid_text,
)
from megakda.errors import DataError

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
_ROLES = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_EOD_NAME = "<|endofdocument|>"


# tiktoken's split regex recurses over a run of blanks, and a very long one overflows its stack.
_MAX_RUN = 25_000  # characters
_RUNS = re.compile(rf"\s{{1,{_MAX_RUN}}}|\S{{1,{_MAX_RUN}}}")
_MIXED = re.compile(r"\s+\S|\S+\s")


class TiktokenTokenizer(BaseTokenizer):
    """A tiktoken rank file: one ``base64(token) rank`` per line.

    The split pattern and the special tokens come from ``tiktoken_config.json`` and
    ``tokenizer_config.json`` beside the file, the first one winning:

    - ``pattern`` (or ``pat_str``): the split regex. A ``tokenizer_config.json`` whose ``auto_map``
      names a Python module has its pattern there; the literal ``pat_str`` of that module is read,
      and the module is never run. Without any of these: `DEFAULT_TIKTOKEN_PATTERN`.
    - ``special_tokens`` ``{text: id}``, or ``added_tokens_decoder`` ``{id: {"content": text}}``.
    - ``eod_token`` (or ``eos_token``) and ``pad_token``: names of special tokens. Without an end
      token one is appended after the largest id.
    - ``chat_template``: a text, or a list of ``{"name": ..., "template": ...}`` with one named
      ``default``. A file ``chat_template.jinja`` beside the rank file goes before it.
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
        self.spec = spec
        self._file, self._config, self._special = file, config, special
        self._check_special("eod_token/eos_token", eod_name)
        if pad_name is not None:
            self._check_special("pad_token", pad_name)
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
        self._special_ids = frozenset(special.values())
        # Of two that begin alike the longer one; tiktoken's own choice is left to a hash table.
        longest_first = sorted(filter(None, special), key=len, reverse=True)
        self._spelled = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self._known = frozenset(ranks.values())
        self._names = {"eos_token": eod_name} | {
            role: name for role in _ROLES if (name := _token_name(config, role)) is not None
        }
        self.vocab_size = max(max(ranks.values()), *special.values()) + 1
        self.eod = special[eod_name]
        pad = special.get(pad_name, -1) if pad_name is not None else -1
        self.pad = -1 if pad == self.eod else pad  # as in HFTokenizer
        self.fingerprint = fingerprint_of(
            b"tiktoken",
            b"".join(b"%d %s\n" % (r, base64.b64encode(t)) for t, r in sorted(ranks.items())),
            pattern.encode(),
            json.dumps(sorted(special.items())).encode(),
            f"eod={self.eod}".encode(),
        )

    def encode(self, text: str) -> list[int]:
        text = valid_text(text)
        if not _may_hold_long_run(text):
            return self._enc.encode_ordinary(text)
        return [i for part in _split_runs(text) for i in self._enc.encode_ordinary(part)]

    def encode_with_special(self, text: str) -> list[int]:
        ids: list[int] = []
        for number, part in enumerate(self._spelled.split(valid_text(text))):
            # Every second part is a special token.
            ids += [self._special[part]] if number % 2 else self.encode(part)
        return ids

    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        ids = self.encode_with_special(text)
        sizes = np.array([len(token) for token in self._enc.decode_tokens_bytes(ids)], np.int64)
        return np.array(ids, np.int64), characters(text, sizes)

    def decode(self, ids: Iterable[int]) -> str:
        out = bytearray()
        for i in map(int, ids):
            if i in self._known:
                out += self._enc.decode_single_token_bytes(i)
            elif i not in self._special_ids:
                out += "\ufffd".encode()
        return out.decode("utf-8", errors="replace")

    def chat_template(self) -> str | None:
        path = self._file.parent / "chat_template.jinja"
        if path.exists():
            try:
                return path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as e:
                raise DataError(
                    f"data.tokenizer={self.spec!r}: cannot read {path}: {first_line(e)}; correct "
                    "or remove it"
                ) from e
        found = self._config.get("chat_template")
        try:
            if isinstance(found, list):
                found = {entry["name"]: entry["template"] for entry in found}.get("default")
            if not isinstance(found, str | None):
                raise TypeError(f"{type(found).__name__} is no text")
        except (KeyError, TypeError) as e:
            raise DataError(
                f"data.tokenizer={self.spec!r}: the chat_template beside {self._file.name} has an "
                f'unknown form ({first_line(e)}); give a text, or [{{"name": "default", '
                '"template": text}] in tokenizer_config.json'
            ) from e
        return found

    def special_names(self) -> dict[str, str]:
        for role, name in self._names.items():
            self._check_special(role, name)  # or a template's token would be ordinary text
        return dict(self._names)

    def _check_special(self, key: str, name: str) -> None:
        if name not in self._special:
            raise DataError(
                f"data.tokenizer={self.spec!r}: {key} {name!r} beside {self._file.name} is not one "
                f"of its special tokens ({some(list(self._special))}): add it to special_tokens in "
                f"{self._file.parent / 'tiktoken_config.json'}"
            )


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
            f"{SETTING} to tiktoken:FILE with an existing file"
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
                f"token and its rank: {SETTING} to a tiktoken rank file"
            ) from e
    absent = [b for b in range(256) if bytes([b]) not in ranks]
    if absent:
        raise DataError(
            f"data.tokenizer={spec!r}: {file} has no token for {len(absent)} of the 256 bytes "
            f"(first: {absent[0]}), so it cannot encode all text: {SETTING} to a complete rank "
            "file"
        )
    if len(set(ranks.values())) != len(ranks) or min(ranks.values()) < 0:
        raise DataError(
            f"data.tokenizer={spec!r}: {file} gives two tokens the same rank, or a negative one: "
            f"{SETTING} to a valid rank file"
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
