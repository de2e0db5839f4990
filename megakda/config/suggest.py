"""What a person may have meant by a name that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


def suggest(wrong: str, known: Sequence[str]) -> str:
    """` (did you mean X?)`, or nothing where no known name is close.

    Dotted names also match by their last part.
    """
    close = difflib.get_close_matches(wrong, known, n=1, cutoff=0.6)
    if not close:
        last = wrong.rsplit(".", 1)[-1]
        close = [name for name in known if name.rsplit(".", 1)[-1] == last]
    return f" (did you mean {close[0]}?)" if close else ""
