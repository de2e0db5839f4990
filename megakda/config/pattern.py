"""Which layers mix tokens with linear attention (KDA or GDN) and which with full attention (MLA).

Kimi Linear (arXiv 2510.26692, section 4) repeats three KDA layers and one MLA layer; its 27-layer
model also makes the last layer full attention.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from megakda.errors import ConfigError

LINEAR = "linear"
FULL = "full"

_ALIASES = {LINEAR: LINEAR, "kda": LINEAR, "gdn": LINEAR, FULL: FULL, "mla": FULL}
_RATIO = re.compile(r"\s*([0-9]+)\s*:\s*([0-9]+)\s*")
_REMEDY = 'write "a:b" in quotes, such as "3:1", or a list with "linear" or "full" for each layer'


def _error(value: Any, rule: str, remedy: str = _REMEDY) -> ConfigError:
    return ConfigError(f"model.pattern={value!r}: {rule}; {remedy}.")


def layer_kinds(pattern: Any, num_layers: int, last_layer_full: bool = True) -> tuple[str, ...]:
    """Token mixer of every layer, first layer first: "linear" or "full".

    ``pattern`` is either "a:b", meaning a linear layers and then b full ones, repeated and cut at
    ``num_layers`` ("0:1": all full, "1:0": all linear), or a list that names each layer. With
    ``last_layer_full`` the last layer of an "a:b" pattern with b > 0 is full whatever the
    repetition gives; a list is taken as written.

    Raises `ConfigError` for a malformed pattern or a list of another length than ``num_layers``.
    """
    if isinstance(num_layers, bool) or not isinstance(num_layers, int) or num_layers < 1:
        raise ConfigError(
            f"model.num_layers={num_layers!r}: must be a whole number of at least 1; set it to the "
            "number of layers."
        )
    if isinstance(pattern, str):
        return _from_ratio(pattern, num_layers, last_layer_full)
    if isinstance(pattern, int) and not isinstance(pattern, bool) and pattern >= 60:
        # YAML 1.1 has base-60 integers, so an unquoted 3:1 arrives as 3 * 60 + 1.
        a, b = divmod(pattern, 60)
        raise _error(
            pattern,
            "must be text or a list, not a number (YAML reads an unquoted a:b as base 60)",
            f'if {a}:{b} was meant, quote it: pattern: "{a}:{b}"',
        )
    # Not a check for `list`: composed configurations hold their own sequence type.
    if isinstance(pattern, Sequence) and not isinstance(pattern, bytes):
        return _from_list(pattern, num_layers)
    raise _error(pattern, "must be text or a list")


def ratio(pattern: str) -> tuple[int, int]:
    """Linear and full layers in one period of an "a:b" pattern.

    Raises `ConfigError` for another form, or a period without layers.
    """
    match = _RATIO.fullmatch(pattern)
    if match is None:
        raise _error(pattern, 'must have the form "a:b" with whole numbers a and b')
    linear, full = (int(group) for group in match.groups())
    if linear + full == 0:
        raise _error(pattern, "at least one of a and b must be positive")
    return linear, full


def _from_ratio(pattern: str, num_layers: int, last_layer_full: bool) -> tuple[str, ...]:
    linear, full = ratio(pattern)
    kinds = [LINEAR if layer % (linear + full) < linear else FULL for layer in range(num_layers)]
    if last_layer_full and full > 0:
        kinds[-1] = FULL
    return tuple(kinds)


def _from_list(pattern: Sequence[Any], num_layers: int) -> tuple[str, ...]:
    names = list(pattern)
    if len(names) != num_layers:
        raise _error(
            names,
            f"a list needs one name per layer: {num_layers} by model.num_layers, not {len(names)}",
            'change the list or model.num_layers, or use the short form "a:b"',
        )
    for position, name in enumerate(names, start=1):
        if not isinstance(name, str) or name not in _ALIASES:
            raise _error(
                names,
                f"layer {position} is {name!r}, which is no kind of layer",
                f"use one of {', '.join(_ALIASES)}",
            )
    return tuple(_ALIASES[name] for name in names)
