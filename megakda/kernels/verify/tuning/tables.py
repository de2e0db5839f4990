"""Launch tables with other entries: put to use for a while, or written."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from megakda.kernels import launch

Table = dict[str, Any]
When = Mapping[str, int | str]
Config = dict[str, int]


def architecture_of(device: torch.device) -> str:
    """ "sm_90" and the like, of a GPU."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def read(architecture: str) -> Table:
    """The table of an architecture, or a copy of the one used in its place."""
    known = (launch.TABLES / f"{architecture}.json").exists()
    return copy.deepcopy(launch.read_table(architecture if known else launch.DEFAULT))


def lookup(table: Table, kernel: str, when: When) -> Config:
    """What a launch of `kernel` with these sizes takes from the table.

    Raises:
        KeyError: no entry fits.
    """
    with using(table):
        return launch.launch_config(kernel, torch.device("meta"), **when)


def with_entry(table: Table, kernel: str, when: When, config: Config) -> Table:
    """The table with `config` for launches of `kernel` with exactly these sizes.

    It stands first, so that no wider entry is found before it; one for the same sizes gives way.
    """
    changed = copy.deepcopy(table)
    others = [x for x in changed["kernels"][kernel] if x.get("when", {}) != dict(when)]
    entries = [{"when": dict(when), **config}, *others] if when else [*others, dict(config)]
    changed["kernels"][kernel] = entries
    return changed


@contextmanager
def using(table: Table) -> Iterator[None]:
    """Within the block, every launch takes its configuration from `table`."""
    with mock.patch.object(launch, "read_table", lambda architecture: table):
        yield


def write(path: Path, table: Table, measured_on: dict[str, Any]) -> None:
    """The table as a file, with what it was measured on.

    Kernels that an earlier run on the same device measured stay listed.
    """
    before = table.get("measured_on") or {}
    if before.get("device") == measured_on["device"]:
        kernels = {*before.get("kernels", ()), *measured_on["kernels"]}
        measured_on = {**measured_on, "kernels": sorted(kernels)}
    path.write_text(json.dumps({**table, "measured_on": measured_on}, indent=1))
