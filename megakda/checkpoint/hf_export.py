"""A megakda checkpoint of any layout -> a Hugging Face folder, in one process."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm

from megakda.checkpoint import hf_config, hf_tokenizer
from megakda.checkpoint.folders import find, sync_folder
from megakda.checkpoint.hf_card import model_card
from megakda.checkpoint.hf_folder import FolderWriter
from megakda.checkpoint.hf_map import Tensor, tensors
from megakda.checkpoint.stored import StoredCheckpoint
from megakda.config.compose import from_tree
from megakda.config.schema import Config, ModelConfig
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
        context: tokens that the model is meant for; None for the run's `train.context`.
        progress: a bar on stderr.

    Raises:
        CheckpointError: no complete checkpoint, one that is damaged or of another model than it
            says, a tokenizer with other ids, or an output that exists or cannot be written.
        ConfigError: the model has no published format.
        DataError: the tokenizer cannot be loaded.
    """
    if out.exists():
        raise CheckpointError(f"--out={out} exists already: choose another folder, or remove it")
    started = time.monotonic()
    source = _Source(str(checkpoint), context)
    hf_config.check_publishable(source.model)
    plan = _plan(source, dtype)
    said = source.manifest["tokenizer"]
    known = hf_tokenizer.checked(
        tokenizer or said["spec"], said["fingerprint"], str(source.stored.path)
    )
    total = sum(math.prod(shape) * kind.itemsize for _, kind, shape in plan)
    partial = out.parent / f".{out.name}.partial"
    result = Exported(out, len(plan), total, 0.0)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _check_space(partial, total)
        bar = tqdm(total=total, unit="B", unit_scale=True, disable=not progress, desc="export")
        with bar:
            writer = FolderWriter(partial, plan, max_shard_bytes)
            kinds = {name: kind for name, kind, _ in plan}
            for tensor in tensors(source.model):
                _write_tensor(source.stored, tensor, writer, kinds, bar, result.nonfinite)
            writer.close()
        _write_rest(partial, source, known, kinds, out.name)
        for path in partial.iterdir():
            with open(path, "rb") as stream:
                os.fsync(stream.fileno())
        sync_folder(partial)
        os.rename(partial, out)
        sync_folder(out.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"--out={out} cannot be written: {error.strerror or error}; make room, or choose "
            "another folder"
        ) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    result.seconds = time.monotonic() - started
    return result


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
        self.config = _run_config(run) if (run / "config.yaml").is_file() else None
        # Of an imported model: what its folder said that megakda's settings have no place for
        self.published: dict[str, Any] = self.manifest.get("huggingface") or {}
        known = self.published.get("context") or (self.config and self.config.train.context)
        if context is None and not known:
            raise CheckpointError(
                f"{path} lies in no run with a config.yaml, so its context is not known: give "
                "--context, in tokens"
            )
        self.context = int(context or known or 0)


def _run_config(run: Path) -> Config:
    path = run / "config.yaml"
    try:
        tree = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(path))
        assert isinstance(tree, DictConfig)
        return from_tree(tree)
    except (OSError, OmegaConfBaseException) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


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


def is_finite(part: torch.Tensor) -> bool:
    """No NaN and no infinity. One fast pass where that is so, as nearly always."""
    return bool(part.sum().isfinite()) or bool(part.isfinite().all())


def _write_rest(
    folder: Path,
    source: _Source,
    tokenizer: Tokenizer,
    kinds: dict[str, torch.dtype],
    name: str,
) -> None:
    """Configurations, tokenizer and model card."""
    ids = {**hf_tokenizer.special_ids(tokenizer), **source.published.get("special_ids", {})}
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


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(f"{needed / 2**20:,.0f} MiB are needed, {free / 2**20:,.0f} MiB are free")


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB, 500MB or 2GiB.

    Raises:
        ConfigError: not such a size.
    """
    match = re.fullmatch(r"(\d+)\s*([kMGT]?)(i?)B", text.strip())
    size = 0
    if match:
        base = 1024 if match[3] else 1000
        size = int(match[1]) * base ** " kMGT".index(match[2] or " ")
    if size < 1:
        raise ConfigError(f"--max-shard-size={text}: must be a size such as 5GB or 500MiB")
    return size
