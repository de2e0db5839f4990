"""Launch configurations of the Triton kernels: one table per architecture, read, never searched.

A table is `launch_tables/sm_90.json` and so on, written by `tools/tune_kernels.py`:

    {"measured_on": null,
     "kernels": {"kda_state": [{"when": {"K": 128, "V": 128}, "BV": 64, "num_warps": 4, ...},
                               {"BV": 32, "num_warps": 4, "num_stages": 2}]}}

The first entry whose `when` agrees with the launch is taken; the last has none and fits always.
Nothing is tuned at run time, so equal inputs run equal code and give equal bits.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from megakda.kernels.backend import interpreting

TABLES = Path(__file__).parent / "launch_tables"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
DEFAULT = "sm_80"
"""The table with the smallest tiles: what an architecture without a table of its own uses."""

_forced: list[tuple[str, dict[str, dict[str, int]]]] = []


def launch_config(kernel: str, device: torch.device, **shape: int | str) -> dict[str, int]:
    """Block sizes, num_warps and num_stages for one launch of `kernel`.

    Args:
        kernel: its name in the tables.
        device: where it is launched; in the interpreter and on the meta device sm_90 is assumed,
            unless `force` says otherwise.
        shape: what the entries' `when` may ask about, such as K=128.

    Raises:
        KeyError: a kernel that the table lacks.
    """
    architecture, overrides = _forced[-1] if _forced else (_architecture(device), {})
    if kernel in overrides:
        return dict(overrides[kernel])
    for entry in read_table(architecture)["kernels"][kernel]:
        when = entry.get("when", {})
        if all(shape.get(name) == value for name, value in when.items()):
            return {name: value for name, value in entry.items() if name != "when"}
    raise KeyError(
        f"{architecture}.json: no entry of {kernel} fits {shape}; add one without 'when'"
    )


@contextmanager
def force(architecture: str, **overrides: dict[str, int]) -> Iterator[None]:
    """Within the block, use the table of `architecture`, and for kernels named the values given.

    For compiling for another GPU, for tuning, and for tests.
    """
    _forced.append((architecture, overrides))
    try:
        yield
    finally:
        _forced.pop()


@lru_cache
def read_table(architecture: str) -> dict[str, Any]:
    """The table of "sm_80", "sm_90" or "sm_100", as parsed."""
    return json.loads((TABLES / f"{architecture}.json").read_text())


@lru_cache
def _architecture(device: torch.device) -> str:
    if interpreting() or device.type != "cuda":
        return "sm_90"
    major, minor = torch.cuda.get_device_capability(device)
    name = f"sm_{major}{minor}"
    if name in ARCHITECTURES:
        return name
    warnings.warn(
        f"no kernel launch table for {torch.cuda.get_device_name(device)} ({name}): using that of "
        f"{DEFAULT}, which is right but perhaps slow; tools/tune_kernels.py makes one",
        stacklevel=2,
    )
    return DEFAULT
