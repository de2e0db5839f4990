"""The tokenizer's files in a Hugging Face folder."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from megakda.checkpoint.folders import read_json
from megakda.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from megakda.errors import CheckpointError

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tiktoken_config.json",
    "tokenization_*.py",
    "chat_template.*",
)
"""What belongs to a tokenizer. Python files are copied for those who load with them, never run."""

_TOKENIZER, _CONFIG = "tokenizer.json", "tokenizer_config.json"
_MARK = "megakda_tokenizer"  # in tokenizer_config.json of the tokenizer that `write_byte` makes
_END = "<|endofdocument|>"


def find_spec(folder: Path) -> str | None:
    """What `data.tokenizer` says to read a Hugging Face folder's tokenizer; None: it has none.

    Raises:
        CheckpointError: several rank files of tiktoken, or a damaged tokenizer_config.json.
    """
    config = folder / _CONFIG
    if config.is_file() and read_json(config).get(_MARK) == ByteTokenizer.spec:
        return ByteTokenizer.spec
    ranks = sorted([*folder.glob("tiktoken.model"), *folder.glob("*.tiktoken")])
    if not (folder / _TOKENIZER).is_file() and ranks:
        if len(ranks) > 1:
            names = ", ".join(path.name for path in ranks)
            raise CheckpointError(f"{folder} has several tokenizers, {names}: give --tokenizer")
        # Not through a link to the file: what belongs to it lies beside the link.
        return f"tiktoken:{folder.resolve() / ranks[0].name}"
    if any(list(folder.glob(name)) for name in (_TOKENIZER, "vocab.*", "*.model")):
        return f"hf:{folder.resolve()}"
    return None


def files_of(tokenizer: Tokenizer) -> list[Path]:
    """The files that a tokenizer was loaded from, and those beside them that belong to it."""
    kind, _, rest = tokenizer.spec.partition(":")
    if kind == "byte":
        return []
    path = Path(rest).expanduser()
    folder = path if kind == "hf" else path.parent
    found = [] if kind == "hf" else [path]
    # Of a rank file the others are other tokenizers.
    others = (".model", ".tiktoken") if kind == "tiktoken" else ()
    found += [p for p in in_folder(folder) if p not in found and p.suffix not in others]
    return found


def in_folder(folder: Path) -> list[Path]:
    """The tokenizer's files in a folder."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in FILES)
    ]


def copy(files: list[Path], folder: Path) -> None:
    """Copies a tokenizer's files into an existing folder."""
    for path in files:
        shutil.copyfile(path, folder / path.name)


def checked(spec: str, fingerprint: str | None, where: str) -> Tokenizer:
    """Loads the tokenizer `spec`, which must give the ids of `fingerprint`.

    Args:
        fingerprint: None for one that is not known.
        where: what was trained with it, for the message.

    Raises:
        CheckpointError: it gives other ids.
        DataError: it cannot be loaded.
    """
    tokenizer = load_tokenizer(spec)
    if fingerprint is not None and tokenizer.fingerprint != fingerprint:
        raise CheckpointError(
            f"{where} was trained with another tokenizer than {spec}, which gives other ids: name "
            "the right one with --tokenizer"
        )
    return tokenizer


def located(spec: str, checkpoint: Path) -> str:
    """Where a checkpoint's tokenizer is now.

    Args:
        spec: as the checkpoint's manifest names it.
        checkpoint: the folder; RUN/checkpoints/step_*.

    Returns:
        `spec`, or if its path is gone and RUN/tokenizer is there, that one: an imported run has its
        tokenizer along, and may have been moved. Its fingerprint is for `checked` to compare.
    """
    kind, _, rest = spec.partition(":")
    own = checkpoint.resolve().parent.parent / "tokenizer"
    if not rest or Path(rest).expanduser().exists() or not own.is_dir():
        return spec
    return f"{kind}:{own / Path(rest).name if kind == 'tiktoken' else own}"


def absolute(spec: str) -> str:
    """`spec` for another working folder. A link to a rank file stays one, as in `find_spec`."""
    kind, _, rest = spec.partition(":")
    path = Path(rest).expanduser()
    if kind == "tiktoken":
        return f"{kind}:{path.parent.resolve() / path.name}"
    return f"{kind}:{path.resolve()}" if rest else spec


def special_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    """bos, eos and pad as `config.json` names them."""
    config: dict[str, Any] = {}
    added: dict[str, int] = {}
    for path in files_of(tokenizer):
        if path.name == _CONFIG:
            config = read_json(path)
            decoder = config.get("added_tokens_decoder") or {}
            added |= {token["content"]: int(number) for number, token in decoder.items()}
        elif path.name == _TOKENIZER:  # where transformers 5 has them
            tokens = read_json(path).get("added_tokens") or []
            added |= {token["content"]: token["id"] for token in tokens}
    bos = config.get("bos_token")
    return {
        "bos": added.get(bos["content"] if isinstance(bos, dict) else str(bos)),
        "eos": tokenizer.eod,
        "pad": tokenizer.pad if tokenizer.pad >= 0 else None,
    }


def write_byte(folder: Path) -> None:
    """Writes megakda's byte tokenizer in the form that `transformers` loads.

    A byte-level BPE without merges: ids 0..255 are the bytes, 256 ends a document.
    """
    vocabulary = {character: byte for byte, character in enumerate(_characters())}
    end = {
        "id": ByteTokenizer.eod,
        "content": _END,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [],
        },
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": _END,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
        _MARK: ByteTokenizer.spec,
    }
    for name, value in ((_TOKENIZER, tokenizer), (_CONFIG, config)):
        text = json.dumps(value, ensure_ascii=False, indent=2)
        (folder / name).write_text(text + "\n", encoding="utf-8")


def _characters() -> list[str]:
    """The printable character that byte-level BPE writes for each byte (GPT-2, Radford 2019).

    Bytes that print as one character stand for themselves, the others for the characters from 256.
    """
    printing = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printing else chr(next(others)) for byte in range(256)]
