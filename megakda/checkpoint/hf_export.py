"""A megakda checkpoint of any layout -> a Hugging Face folder, in one process."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm
from yaml import YAMLError

from megakda.checkpoint import hf_config, hf_tokenizer
from megakda.checkpoint.folders import check_space, claimed, find, reason, sync_folder
from megakda.checkpoint.hf_card import model_card
from megakda.checkpoint.hf_folder import FolderWriter
from megakda.checkpoint.hf_map import Tensor, tensors
from megakda.checkpoint.stored import StoredCheckpoint, is_finite
from megakda.config.compose import from_tree
from megakda.config.schema import Config, ModelConfig
from megakda.config.stages import longest_context
from megakda.data.tokenizer import Tokenizer
from megakda.errors import CheckpointError, ConfigError

DTYPES = ("keep", "bf16")
SPAN_BYTES = 128 << 20
"""Of one of megakda's tensors at a time."""


@dataclass
class Exported:
    """What an export has written."""

    folder: Path
    tensors: int
    bytes: int
    seconds: float
    nonfinite: list[str] = field(default_factory=list)  # published names with NaN or infinity
    warnings: list[str] = field(default_factory=list)  # what else a person should know

    def __str__(self) -> str:
        rate = self.bytes / max(self.seconds, 1e-9) / 2**20
        return (
            f"{self.folder}: {self.tensors:,} tensors, {self.bytes / 2**20:,.1f} MiB in "
            f"{self.seconds:.1f} s ({rate:,.0f} MiB/s)"
        )


def export_hf(
    checkpoint: str | Path,
    out: Path,
    dtype: str = "keep",
    max_shard_bytes: int = 5 * 10**9,
    tokenizer: str | None = None,
    context: int | None = None,
    progress: bool = False,
) -> Exported:
    """Writes the weights of a checkpoint in the published layout.

    `out` appears when everything in it is on disk.

    Args:
        checkpoint: a run's folder (its newest checkpoint) or a checkpoint folder.
        out: does not exist.
        dtype: "keep" for the checkpoint's, or "bf16", in which `A_log`, `dt_bias` and the routing
            biases still stay fp32.
        max_shard_bytes: a shard is not larger, unless one tensor is.
        tokenizer: where the tokenizer is now, if not where it was; it must give the same ids.
        context: tokens that the model is meant for; None for the longest of the run.
        progress: a bar on stderr.

    Raises:
        CheckpointError: no complete checkpoint, one that is damaged or of another model than it
            says, a tokenizer with other ids, a config.yaml of the run that cannot be read where
            `context` is not given, or an output that exists, that another process is writing, or
            that cannot be written.
        ConfigError: the model has no published format, or a `context` below 1.
        DataError: the tokenizer cannot be loaded.
    """
    _refuse_existing(out)
    if context is not None and context < 1:
        raise ConfigError(f"--context={context} must be at least 1")
    started = time.monotonic()
    source = _Source(str(checkpoint), context)
    hf_config.check_publishable(source.model)
    plan = _plan(source, dtype)
    said = source.manifest["tokenizer"]
    known = hf_tokenizer.checked(
        tokenizer or hf_tokenizer.located(said["spec"], source.stored.path),
        said["fingerprint"],
        str(source.stored.path),
    )
    total = sum(math.prod(shape) * kind.itemsize for _, kind, shape in plan)
    partial = out.parent / f".{out.name}.partial"
    result = Exported(out, len(plan), total, 0.0, warnings=source.warnings)
    with _completed(partial, out):
        check_space(partial, total)
        bar = tqdm(total=total, unit="B", unit_scale=True, disable=not progress, desc="export")
        with bar:
            writer = FolderWriter(partial, plan, max_shard_bytes)
            kinds = {name: kind for name, kind, _ in plan}
            for tensor in tensors(source.model):
                _write_tensor(source.stored, tensor, writer, kinds, bar, result.nonfinite)
            writer.close()
        _write_rest(partial, source, known, kinds, out.name)
    result.seconds = time.monotonic() - started
    return result


def _refuse_existing(out: Path) -> None:
    if out.exists():
        raise CheckpointError(f"--out={out} exists already: choose another folder, or remove it")


@contextmanager
def _completed(partial: Path, out: Path) -> Iterator[None]:
    """An empty folder `partial` to write, which gets the name `out`, or is removed on an error."""
    try:
        with claimed(partial):
            _refuse_existing(out)  # another process may have finished it just now
            shutil.rmtree(partial, ignore_errors=True)  # left by one that was killed
            try:
                partial.mkdir()
                yield
                for path in partial.iterdir():
                    with open(path, "rb") as stream:
                        os.fsync(stream.fileno())
                sync_folder(partial)
                os.rename(partial, out)
                sync_folder(out.parent)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    except OSError as error:
        raise CheckpointError(
            f"--out={out} cannot be written: {error.strerror or error}; make room, or choose "
            "another folder"
        ) from error


class _Source:
    """A checkpoint and what is known about it."""

    def __init__(self, where: str, context: int | None):
        self.stored = StoredCheckpoint(find(where, "--checkpoint"))
        self.manifest = self.stored.manifest
        path = self.stored.path
        try:
            self.model: ModelConfig = hf_config.model_of(self.manifest["model"])
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} does not say of which model it is, in the words of this version: {error}"
            ) from error
        run = path.resolve().parent.parent
        self.warnings: list[str] = []
        self.config = self._run_config(run / "config.yaml", required=context is None)
        # Of an imported model: what its folder said that megakda's settings have no place for
        self.published: dict[str, Any] = self.manifest.get("huggingface") or {}
        known = self.published.get("context") or (self.config and longest_context(self.config))
        if context is None and not known:
            raise CheckpointError(
                f"{path} lies in no run with a config.yaml, so its context is not known: give "
                "--context, in tokens"
            )
        self.context = int(context or known or 0)

    def _run_config(self, path: Path, required: bool) -> Config | None:
        """The run's settings; None where there are none, or none readable and not `required`."""
        if not path.is_file():
            return None
        try:
            tree = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(path))
            assert isinstance(tree, DictConfig)
            return from_tree(tree)
        except (OSError, OmegaConfBaseException, TypeError, ValueError, YAMLError) as error:
            text = f"{path} cannot be read: {reason(error)}"
            if required:
                raise CheckpointError(
                    f"{text}; give --context, in tokens, to export without the run's settings"
                ) from error
            self.warnings.append(f"{text}; the model card goes without the run's settings")
            return None


def _plan(source: _Source, dtype: str) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Everything to write, after comparing the checkpoint's tensors with the model's.

    Raises:
        CheckpointError: tensors that are missing, unknown or of another shape.
    """
    stored = {name: source.stored.tensors[name] for name in source.stored.model_names()}
    plan, wrong, known = [], [], set()
    for tensor in tensors(source.model):
        known.add(tensor.name)
        found = stored.get(tensor.name)
        if found is None:
            wrong.append(f"{tensor.name} is missing")
            continue
        if tuple(found.shape) != tensor.shape:
            wrong.append(f"{tensor.name} is {list(found.shape)}, not {list(tensor.shape)}")
        kind = found.dtype
        if dtype == "bf16":
            kind = torch.float32 if tensor.fp32 == "always" else torch.bfloat16
        plan += [(block.name, kind, block.shape) for block in tensor.blocks]
    wrong += [f"{name} is not of this model" for name in sorted(stored.keys() - known)]
    if wrong:
        raise CheckpointError(
            f"{source.stored.path} does not hold the tensors of the model that its manifest "
            f"describes: {'; '.join(wrong[:5])}" + (", ..." if len(wrong) > 5 else "")
        )
    return plan


def _write_tensor(
    stored: StoredCheckpoint,
    tensor: Tensor,
    writer: FolderWriter,
    kinds: dict[str, torch.dtype],
    bar: Any,
    nonfinite: list[str],
) -> None:
    """One of megakda's tensors, as the published ones that it is made of."""
    itemsize = stored.tensors[tensor.name].dtype.itemsize
    inner = tensor.shape[1:]
    for first, last in tensor.spans(SPAN_BYTES, itemsize):
        rows = stored.read(tensor.name, first, last)
        offset = (first, *(0 for _ in inner))
        for block in tensor.blocks:
            overlap = block.overlap(offset, (last - first, *inner))
            if overlap is None:
                continue
            part = rows[overlap[0]]
            if block.rotation is not None:
                reordered = torch.empty_like(part)
                reordered[block.rotation.published_rows(first, last)] = part
                part = reordered
            if not is_finite(part) and block.name not in nonfinite:
                nonfinite.append(block.name)
            part = part.to(kinds[block.name])
            writer.write(block.name, part)
            bar.update(part.nbytes)


def _write_rest(
    folder: Path,
    source: _Source,
    tokenizer: Tokenizer,
    kinds: dict[str, torch.dtype],
    name: str,
) -> None:
    """Configurations, tokenizer and model card."""
    said = source.published.get("special_ids") or {}
    said = {key: value for key, value in said.items() if value is not None}
    ids = {**hf_tokenizer.special_ids(tokenizer), **said}
    bulk = str(kinds["lm_head.weight"]).removeprefix("torch.")
    _write_json(
        folder / hf_config.CONFIG, hf_config.write(source.model, bulk, source.context, **ids)
    )
    generation = source.published.get("generation_config") or {
        f"{key}_token_id": value for key, value in ids.items() if value is not None
    }
    _write_json(folder / hf_config.GENERATION, generation)
    files = hf_tokenizer.files_of(tokenizer)
    if files:
        hf_tokenizer.copy(files, folder)
    else:
        hf_tokenizer.write_byte(folder)
    card = model_card(name, source.model, source.manifest, source.config, source.context, bulk)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
