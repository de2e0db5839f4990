"""One process at a time, by a lock that the system frees when its holder dies."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on every system; it only guards against two runs at the same time
    fcntl = None  # type: ignore[assignment]


@contextmanager
def exclusive(
    path: Path, busy: Exception, unlocked: Callable[[OSError], None] | None = None
) -> Iterator[None]:
    """Holds a lock on the file `path`, which is made for it, and removed at the end.

    Of a process that is killed the file stays, unlocked, for the next one.

    Args:
        busy: raised where another process holds it.
        unlocked: told where the file system has no locks; then this goes on without.

    Raises:
        OSError: the file cannot be made.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as stream:
            if fcntl is not None:
                try:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise busy from None
                except OSError as error:
                    if unlocked is not None:
                        unlocked(error)
            try:
                ours = os.path.samestat(os.fstat(stream.fileno()), os.stat(path))
            except FileNotFoundError:
                ours = False
            if ours:  # else its last holder removed it in between, and a new one is needed
                try:
                    yield
                finally:
                    with suppress(OSError):
                        path.unlink()  # while it is held, so that nobody waits on it
                return
