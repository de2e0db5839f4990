"""Checkpoint folders: atomic, rotating, and never torn.

checkpoints/
  step_00000200/      complete: it gets this name after its last byte is on disk
  step_00000400/
  latest              the name of the newest complete checkpoint
  .step_00000600.partial/   a save in progress, or what a killed one left; never read
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from torch.distributed.checkpoint.api import CheckpointException

from megakda.checkpoint import state
from megakda.config.schema import CheckpointConfig
from megakda.errors import CheckpointError, ConfigError
from megakda.models.sharding import ModelChunk

MANIFEST = "manifest.json"
FORMAT = 1
_NAME = re.compile(r"step_(\d{8,})")

# What reading or writing a damaged or unwritable checkpoint raises, in torch and megatron-core
_STORAGE_ERRORS = (
    OSError,
    EOFError,
    KeyError,
    ValueError,
    RuntimeError,
    AssertionError,
    pickle.UnpicklingError,
    CheckpointException,
    CheckpointingException,
)


class CheckpointManager:
    """The checkpoints of one run. Every method is collective unless it says otherwise.

    Args:
        root: the `checkpoints` folder.
        config: rotation and asynchronous saving.
    """

    def __init__(self, root: Path, config: CheckpointConfig):
        self.root, self.config = root, config
        self._queue = AsyncCallsQueue(persistent=False) if config.async_save else None

    def save(
        self,
        step: int,
        chunks: list[ModelChunk],
        optimizer: Any,
        trainer_state: dict[str, Any],
        manifest: dict[str, Any],
    ) -> Path:
        """Saves after `step` steps; with async_save it is complete only after `finish`.

        Args:
            manifest: facts about the run, readable without torch; `format` and `step` are added.

        Raises:
            CheckpointError: nothing was saved; earlier checkpoints are as they were.
        """
        target = self.root / f"step_{step:08d}"
        partial = self.root / f".{target.name}.partial"
        try:
            self.finish()
            self._check_space(chunks, optimizer)
            if _rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            torch.distributed.barrier()
            facts = {"format": FORMAT, "step": step, **manifest}
            request = state.write(partial, chunks, optimizer, trainer_state, self.config.async_save)
            commit = self._commit(partial, target, facts)
            if request is None:
                commit()
            else:
                self._schedule(request, commit)
        except _STORAGE_ERRORS as error:
            if _rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(self._save_failed(target, error)) from error
        return target

    def poll(self) -> None:
        """Completes an asynchronous save if it has come to its end."""
        self._finalize(blocking=False)

    def finish(self) -> None:
        """Waits for an asynchronous save and completes it."""
        self._finalize(blocking=True)

    def close(self) -> None:
        """`finish`, and ends the helper processes."""
        self.finish()
        if self._queue is not None:
            self._queue.close()

    def _finalize(self, blocking: bool) -> None:
        if self._queue is None:
            return
        try:
            self._queue.maybe_finalize_async_calls(blocking=blocking)
        except _STORAGE_ERRORS as error:
            raise CheckpointError(self._save_failed(self.root, error)) from error

    def _schedule(self, request: AsyncRequest, commit: Callable[[], None]) -> None:
        assert self._queue is not None
        request.add_finalize_fn(commit)
        self._queue.schedule_async_request(request)

    def _commit(self, partial: Path, target: Path, facts: dict[str, Any]) -> Callable[[], None]:
        def commit() -> None:
            if _rank() == 0:
                write_json(partial / MANIFEST, facts)
                _sync_folder(partial)
                if target.exists():  # saved before, by a run that was resumed from further back
                    shutil.rmtree(target)
                os.replace(partial, target)
                write_text(self.root / "latest", f"{target.name}\n")
                self._rotate(keep=target)
            torch.distributed.barrier()

        return commit

    def _rotate(self, keep: Path) -> None:
        every, last = self.config.keep_every, self.config.keep_last
        rotating = [p for p in complete(self.root) if not (every and step_of(p) % every == 0)]
        for path in rotating[: max(0, len(rotating) - last)]:
            if path != keep:
                shutil.rmtree(path)

    def _check_space(self, chunks: list[ModelChunk], optimizer: Any) -> None:
        """Refuses a save that cannot fit, before it writes anything."""
        needed = _bytes_to_write(chunks, optimizer)
        free = shutil.disk_usage(_existing_parent(self.root)).free
        if needed > free:
            raise OSError(
                f"needs about {needed / 2**20:,.0f} MiB, {free / 2**20:,.0f} MiB are free"
            )

    def _save_failed(self, target: Path, error: BaseException) -> str:
        newest = latest(self.root)
        kept = f"{newest} is intact" if newest else "there is no earlier checkpoint"
        return (
            f"saving {target} failed: {_reason(error)}; {kept}. Free some space, lower "
            "checkpoint.keep_last, or set train.out to a larger disk"
        )


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


def load(
    path: Path, chunks: list[ModelChunk], optimizer: Any | None, model: dict[str, Any]
) -> dict[str, Any]:
    """Loads a complete checkpoint at this run's layout; returns the trainer's state. Collective.

    Args:
        model: this run's model settings; the checkpoint's must be the same, but for the name.

    Raises:
        CheckpointError: another architecture, or files that are missing or damaged.
    """
    check_architecture(path, model)
    try:
        return state.read(path, chunks, optimizer)
    except _STORAGE_ERRORS as error:
        raise CheckpointError(
            f"{path} cannot be loaded: {_reason(error)}; if its files are damaged, set "
            "train.resume to an earlier checkpoint"
        ) from error


def check_architecture(path: Path, model: dict[str, Any]) -> None:
    """Refuses a checkpoint of another model, naming what differs. Not collective."""
    saved = read_manifest(path).get("model", {})
    theirs, ours = _flatten(saved), _flatten(model)
    differences = [
        f"model.{key} is {theirs.get(key)} there and {ours.get(key)} here"
        for key in sorted(theirs.keys() | ours.keys())
        if key not in ("name", "init_std") and theirs.get(key) != ours.get(key)
    ]
    if differences:
        raise CheckpointError(
            f"{path} holds another architecture: {'; '.join(differences[:6])}. Choose the recipe "
            "that it was trained with, or another train.resume or train.out"
        )


def read_manifest(path: Path) -> dict[str, Any]:
    """The facts saved beside the tensors.

    Raises:
        CheckpointError: missing, damaged, or of a format that this version does not know.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / MANIFEST} cannot be read: {error}") from error
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {manifest.get('format')}; this version reads {FORMAT}"
        )
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
    _sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of indented JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _existing_parent(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _bytes_to_write(chunks: list[ModelChunk], optimizer: Any) -> int:
    """Bytes of weights and optimizer state over all ranks, each tensor once."""
    # Replicas are counted by every tensor- or data-parallel rank, so this overestimates small
    # replicated weights; the sum over ranks is divided by the replication of the bulk.
    local = sum(p.numel() * p.element_size() for c in chunks for p in c.parameters())
    shards = sum(
        p.numel() * 12  # fp32 main parameter and two moments
        for group in optimizer.param_groups
        for p in group["params"]
    )
    total = torch.tensor(
        [float(local), float(shards)], dtype=torch.float64, device=torch.cuda.current_device()
    )
    torch.distributed.all_reduce(total)
    replicas = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    sharded = bool(getattr(optimizer.config, "use_distributed_optimizer", False))
    return int(total[0] / replicas + total[1] / (1 if sharded else replicas))


def _reason(error: BaseException) -> str:
    """The first line of the innermost cause."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    reason = lines[0] if lines else type(error).__name__
    if "inline_container" in reason:  # torch's zip writer hides why a write came up short
        reason += " (a file could not be written to its end: the disk or a quota is full)"
    return reason


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _rank() -> int:
    return torch.distributed.get_rank()
