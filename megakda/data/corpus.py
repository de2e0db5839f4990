"""A data set that every machine already has: the source text of Python's standard library."""

from __future__ import annotations

import hashlib
import os
import platform
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from megakda.data.indexed import check_answers, check_indexed, read_sidecar
from megakda.data.preprocess import ChatInput, OutputBusyError, preprocess
from megakda.data.tokenizer import load_tokenizer
from megakda.errors import DataError

_EXCLUDED = {"site-packages", "dist-packages", "__pycache__"}
_EXCLUDED |= {"test", "tests", "idle_test", "idlelib", "lib2to3"}
_SEED = "megakda-stdlib-1"
_WAIT = 600.0  # seconds for another process that prepares the same data set


def prepare_stdlib(
    out_dir: str | Path, tokenizer_spec: str = "byte", max_bytes: int | None = None
) -> Path:
    """Makes ``out_dir/stdlib.{bin,idx,json}`` from the running interpreter's standard library.

    One document per .py file, in an order that depends on the relative paths alone, so that the
    train and valid splits are alike. Tests, idlelib and installed packages are left out. Does
    nothing where the data set is whole and was made with the same tokenizer and `max_bytes`; makes
    it again otherwise. Safe to call from several processes at once.

    Args:
        out_dir: folder of the data set; made if it is not there.
        tokenizer_spec: see `megakda.data.tokenizer.load_tokenizer`.
        max_bytes: upper bound on the bytes of source text; None: all of it.

    Returns:
        The prefix, ``out_dir/stdlib``.

    Raises:
        DataError: there is no source text, nothing fits `max_bytes`, or the folder cannot be
            written.
    """
    prefix = Path(out_dir) / "stdlib"
    return prepare(prefix, tokenizer_spec, max_bytes, lambda: stdlib_sources(max_bytes))


def prepare(
    prefix: Path,
    tokenizer_spec: str,
    max_bytes: int | None,
    sources: Callable[[], Sequence[Path]],
    chat: ChatInput | None = None,
) -> Path:
    """Makes a data set out of this interpreter's standard library, unless it is there and whole.

    Args:
        prefix: of the data set; its last part says what it holds.
        max_bytes: of source text, at most.
        sources: makes or finds what is tokenized, always the same for the same arguments.
        chat: as in `preprocess`.

    Returns:
        `prefix`.

    Raises:
        DataError: as `preprocess`, and what `sources` raises.
    """
    extra: dict[str, object] = {"corpus": prefix.name, "max_bytes": max_bytes, "order": _SEED}
    deadline = time.monotonic() + _WAIT
    while not _complete(prefix, tokenizer_spec, extra, chat is not None):
        files = sources()
        try:
            preprocess(
                files,
                prefix,
                tokenizer_spec,
                workers=1,  # callers may lack a __main__ guard, and this takes seconds
                overwrite=True,
                progress=False,
                extra={**extra, "python": platform.python_version()},
                chat=chat,
            )
        except OutputBusyError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
    return prefix


def _complete(prefix: Path, tokenizer_spec: str, extra: dict[str, object], answers: bool) -> bool:
    tokenizer = load_tokenizer(tokenizer_spec)
    try:
        info = check_indexed(prefix, tokenizer, tokenizer.vocab_size)
        if answers:
            check_answers(info)
        sidecar = read_sidecar(prefix)
    except DataError:
        return False
    # Another Python release does not count: a resumed run has to see the tokens it started with.
    made = (sidecar or {}).get("extra") or {}
    return all(made.get(key) == value for key, value in extra.items())


def stdlib_root() -> Path:
    """The folder of this interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def stdlib_sources(max_bytes: int | None) -> list[Path]:
    """The .py files of the standard library in an order of their names, `max_bytes` at most.

    Raises:
        DataError: there are none, or none is so small.
    """
    root = stdlib_root()
    names = sorted(
        _readable(root), key=lambda name: hashlib.sha256(f"{_SEED}:{name}".encode()).digest()
    )
    if not names:
        raise DataError(
            f"the standard library at {root} has no .py files (a stripped Python?): use "
            "data.prepare=none and data.paths with your own data set"
        )
    if max_bytes is None:
        return [root / name for name in names]
    chosen, total = [], 0
    for name in names:
        size = (root / name).stat().st_size
        if total + size <= max_bytes:
            chosen.append(root / name)
            total += size
    if not chosen:
        raise DataError(f"max_bytes={max_bytes} is less than any source file has: raise it")
    return chosen


def _readable(root: Path) -> Iterator[str]:
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in _EXCLUDED]
        for file in files:
            path = Path(folder, file)
            # _sysconfigdata_*.py lists how this one interpreter was compiled.
            if path.suffix != ".py" or file.startswith("_sysconfigdata"):
                continue
            try:
                if path.read_bytes().decode("utf-8").strip():
                    yield path.relative_to(root).as_posix()
            except (OSError, UnicodeDecodeError):
                continue
