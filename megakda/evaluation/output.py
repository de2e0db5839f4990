"""Where results go: checked before anything is computed, and written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megakda.checkpoint import folders
from megakda.errors import ConfigError


def check_file(out: Path) -> None:
    """Refuses an `--out` that cannot become a file, or be replaced by one.

    Raises:
        ConfigError: a folder or a device is there, or its folder cannot be made or written to.
    """
    if os.path.lexists(out) and not os.path.isfile(out):
        raise ConfigError(f"--out {out} exists and is no regular file: name a file to write")
    _check_writable(out.absolute().parent, out)


def check_folder(out: Path) -> None:
    """Refuses an `--out` that cannot become a folder of results.

    Raises:
        ConfigError: something else is there, or it cannot be made or written to.
    """
    if os.path.lexists(out) and not os.path.isdir(out):
        raise ConfigError(f"--out {out} exists and is no folder: name a folder to write to")
    _check_writable(out.absolute(), out)


def write_text(path: Path, text: str) -> None:
    """Replaces a file in one step, after making its folder.

    Raises:
        ConfigError: it cannot be written.
    """
    with writing(path):
        path = path.resolve()  # what a link names is replaced, and the link stays
        path.parent.mkdir(parents=True, exist_ok=True)
        folders.write_text(path, text)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns the system's errors into a ConfigError that names `--out`."""
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        raise ConfigError(
            f"--out: {path} cannot be written ({why}): name another place, or make room there"
        ) from error


def _check_writable(folder: Path, out: Path) -> None:
    there = folder
    while not os.path.lexists(there):
        there = there.parent
    if not os.path.isdir(there):
        raise ConfigError(f"--out {out}: {there} is no folder: name another place")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"--out {out}: {there} cannot be written to: name another place")
