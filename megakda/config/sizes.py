"""Sizes in bytes, as command lines take them."""

from __future__ import annotations

import re

from megakda.errors import ConfigError

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kmg])(i?)b?|b)?", re.IGNORECASE)


def parse_size(text: str, setting: str = "") -> int:
    """Bytes of a size such as ``500000``, ``500KB``, ``0.5MB``, ``2MiB`` or ``5GB``.

    Args:
        text: a number of bytes, or of decimal or binary units in any case.
        setting: that holds it, for the message.

    Raises:
        ConfigError: another text, or less than a byte.
    """
    found = _SIZE.fullmatch(text.strip())
    size = 0
    if found:
        unit, binary = (found[2] or "").lower(), found[3]
        size = int(float(found[1]) * (1024 if binary else 1000) ** ["", *"kmg"].index(unit))
    if size < 1:
        given = f"{setting}={text}" if setting else repr(text)
        raise ConfigError(f"{given} is no size: write it like 500000, 500KB, 2MiB or 5GB")
    return size
