"""Checkpoint folders: atomic, rotating, and never torn.

checkpoints/
  step_00000200/      complete: it gets this name after its last byte is on disk
  step_00000400/
  latest              the name of the newest complete checkpoint
  .step_00000600.partial/   a save in progress, or what a killed one left; never read
"""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from torch.distributed.checkpoint.api import CheckpointException

from megakda.checkpoint import state
from megakda.checkpoint.folders import (
    FORMAT,
    MANIFEST,
    check_architecture,
    check_resumable,
    complete,
    find,
    latest,
    read_manifest,
    reason,
    resolve,
    step_of,
    sync_folder,
    write_json,
    write_text,
)
from megakda.config.schema import CheckpointConfig
from megakda.errors import CheckpointError
from megakda.models.sharding import ModelChunk

__all__ = [
    "MANIFEST",
    "CheckpointManager",
    "check_architecture",
    "check_resumable",
    "complete",
    "find",
    "latest",
    "load",
    "read_manifest",
    "resolve",
    "step_of",
]

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
        keep: steps whose checkpoints stay, whatever the rotation.
    """

    def __init__(self, root: Path, config: CheckpointConfig, keep: Collection[int] = ()):
        self.root, self.config, self.keep = root, config, keep
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
                sync_folder(partial)
                if target.exists():  # saved before, by a run that was resumed from further back
                    shutil.rmtree(target)
                os.replace(partial, target)
                write_text(self.root / "latest", f"{target.name}\n")
                self._rotate(newest=target)
            torch.distributed.barrier()

        return commit

    def _rotate(self, newest: Path) -> None:
        rotating = [path for path in complete(self.root) if not self._stays(step_of(path))]
        for path in rotating[: max(0, len(rotating) - self.config.keep_last)]:
            if path != newest:
                shutil.rmtree(path)

    def _stays(self, step: int) -> bool:
        every = self.config.keep_every
        return step in self.keep or (every > 0 and step % every == 0)

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
            f"saving {target} failed: {reason(error)}; {kept}. Free some space, lower "
            "checkpoint.keep_last, or set train.out to a larger disk"
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
            f"{path} cannot be loaded: {reason(error)}; if its files are damaged, set "
            "train.resume to an earlier checkpoint"
        ) from error


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
        4 * p.numel() * (1 + len(part.optimizer.state.get(p, (None, None))))
        for part in optimizer.chained_optimizers
        for group in part.optimizer.param_groups
        for p in group["params"]
    )  # fp32 main parameter and its moments; two before the first step
    total = torch.tensor(
        [float(local), float(shards)], dtype=torch.float64, device=torch.cuda.current_device()
    )
    torch.distributed.all_reduce(total)
    replicas = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    sharded = bool(getattr(optimizer.config, "use_distributed_optimizer", False))
    return int(total[0] / replicas + total[1] / (1 if sharded else replicas))


def _rank() -> int:
    return torch.distributed.get_rank()
