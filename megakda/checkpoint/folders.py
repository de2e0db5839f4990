"""A run's checkpoint folders on disk: which are complete, and what their manifests say.

Nothing here is collective or needs megatron-core, so tools can look at checkpoints with it.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import MISSING
from torch.distributed.checkpoint.api import CheckpointException

from megakda.config.schema import ModelConfig
from megakda.errors import CheckpointError, ConfigError
from megakda.locks import exclusive

MANIFEST = "manifest.json"
FORMAT = 1
COMMON = "common.pt"
OPTIMIZER = "optimizer."
"""What the names of the optimizer's tensors begin with."""
CONTENT = {
    "non_homogeneous_layers": True,
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}
"""megatron-core's names for: per-layer keys, and optimizer state that loads at any layout."""
_DISK_FULL = [f"[Errno {code}]" for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]
_NAME = re.compile(r"step_(\d{8,})")
_NO_ARCHITECTURE = ("name", "init_std", "moe.bias_update_rate")
"""Settings of the model that say how it is trained, or nothing."""


def resolve(resume: str, root: Path) -> Path | None:
    """The checkpoint that `train.resume` means, or None for a fresh start. Not collective.

    Args:
        resume: ``auto`` (the newest in `root`, if any), ``none``, or a checkpoint or run folder.

    Raises:
        ConfigError: ``none`` where `root` already holds checkpoints.
        CheckpointError: the folder named holds no complete checkpoint.
    """
    if resume == "auto":
        return latest(root)
    if resume == "none":
        existing = latest(root)
        if existing:
            raise ConfigError(
                f"train.resume=none, but {existing} exists and a fresh run would rotate it away: "
                "set another train.out, or train.resume=auto to continue"
            )
        return None
    return find(resume, "train.resume")


def find(where: str, setting: str) -> Path:
    """The checkpoint in `where`: itself, or the newest of a run. Not collective.

    Args:
        where: a checkpoint, checkpoints or run folder.
        setting: the setting that names it.

    Raises:
        CheckpointError: it holds no complete checkpoint.
    """
    path = Path(where)
    for folder in (path, path / "checkpoints"):
        if (folder / MANIFEST).is_file():
            return folder
        found = latest(folder) if folder.is_dir() else None
        if found:
            return found
    raise CheckpointError(
        f"{setting}={where}: not a complete checkpoint (no {MANIFEST}) and no run with one; name a "
        "run's folder or a checkpoints/step_* folder in it"
    )


def check_architecture(path: Path, model: dict[str, Any]) -> None:
    """Refuses a checkpoint of another model, naming what differs. Not collective."""
    differences = architecture_differences(read_manifest(path).get("model", {}), model)
    if differences:
        raise CheckpointError(
            f"{path} holds another architecture: {'; '.join(differences[:6])}. Choose the recipe "
            "that it was trained with, or another train.resume or train.out"
        )


def architecture_differences(saved: dict[str, Any], model: dict[str, Any]) -> list[str]:
    """What tells a checkpoint's model settings from others, in words. Empty: the same model.

    A setting that is missing, because it is newer than the checkpoint, counts as being at its
    default.
    """
    defaults = _flatten(dataclasses.asdict(ModelConfig()))
    defaults = {key: value for key, value in defaults.items() if value != MISSING}
    theirs, ours = {**defaults, **_flatten(saved)}, {**defaults, **_flatten(model)}
    return [
        f"model.{key} is {theirs.get(key)} there and {ours.get(key)} here"
        for key in sorted(theirs.keys() | ours.keys())
        if key not in _NO_ARCHITECTURE and theirs.get(key) != ours.get(key)
    ]


def check_resumable(path: Path, optimizer: str) -> None:
    """Refuses a checkpoint without the state that `optimizer` goes on from. Not collective."""
    manifest = read_manifest(path)
    if manifest.get("weights_only"):
        raise CheckpointError(
            f"train.resume: {path} holds weights only, no optimizer state to go on from: set "
            f"train.weights={path} and another train.out to begin a run of its own with them"
        )
    saved_with = manifest.get("optimizer", "adamw")  # all that there was before it was noted
    if saved_with != optimizer:
        raise CheckpointError(
            f"train.resume: {path} holds the state of optim.name={saved_with}, and this run has "
            f"optim.name={optimizer}: set it back, or set train.weights={path} and another "
            "train.out to begin a run of its own with these weights"
        )


def read_manifest(path: Path) -> dict[str, Any]:
    """The facts saved beside the tensors.

    Raises:
        CheckpointError: missing, damaged, or of a format that this version does not know.
    """
    manifest = read_json(path / MANIFEST)
    found = manifest.get("format")
    if found != FORMAT:
        raise CheckpointError(f"{path} has checkpoint format {found}; this version reads {FORMAT}")
    return manifest


def complete(root: Path) -> list[Path]:
    """Complete checkpoints, oldest first. Not collective."""
    if not root.is_dir():
        return []
    found = [p for p in root.iterdir() if _NAME.fullmatch(p.name) and (p / MANIFEST).is_file()]
    return sorted(found, key=step_of)


def latest(root: Path) -> Path | None:
    """The checkpoint that `latest` names, or the newest complete one if it names none."""
    try:
        named = root / (root / "latest").read_text().strip()
    except OSError:
        named = None
    if named is not None and named != root and (named / MANIFEST).is_file():
        return named
    found = complete(root)
    return found[-1] if found else None


def step_of(path: Path) -> int:
    """The step in a checkpoint folder's name."""
    match = _NAME.fullmatch(path.name)
    assert match, path
    return int(match.group(1))


def write_text(path: Path, text: str) -> None:
    """Replaces `path` in one step, durably: a reader sees the old text or the new."""
    scratch = path.with_name(f".{path.name}.tmp")
    with open(scratch, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of indented JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object.

    Raises:
        CheckpointError: it cannot be read, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read, it is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return value


def check_space(folder: Path, needed: int) -> None:
    """Refuses to write `needed` bytes into an existing folder whose file system has not so many.

    Raises:
        CheckpointError: names both numbers.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"{folder}: about {needed / 2**20:,.0f} MiB are needed, {free / 2**20:,.0f} MiB are "
            "free: make room, or choose another --out"
        )


@contextmanager
def claimed(partial: Path) -> Iterator[None]:
    """Keeps other processes from writing `partial` meanwhile, by a lock on a file beside it.

    The system frees the lock if this process is killed; the file then stays for the next one.

    Raises:
        CheckpointError: another process is writing there.
        OSError: the file cannot be made.
    """
    busy = CheckpointError(
        f"{partial}: another process is writing there: wait for it, or choose another --out"
    )

    def unlocked(error: OSError) -> None:
        text = f"{partial} cannot be locked ({error}): start one command there at a time"
        print(text, file=sys.stderr)

    with exclusive(lock_of(partial), busy, unlocked):
        yield


def lock_of(partial: Path) -> Path:
    """The file that `claimed` locks."""
    return partial.with_name(f"{partial.name}.lock")


def sync_folder(path: Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reason(error: BaseException) -> str:
    """The first line of the innermost cause."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else type(error).__name__
    # torch's zip writer hides why a write came up short; a worker process passes on the text alone.
    if any(mark in text for mark in ("inline_container", *_DISK_FULL)):
        text += " (a file could not be written to its end: the disk or a quota is full)"
    return text


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
