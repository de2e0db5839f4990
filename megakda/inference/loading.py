"""A model to generate from: a run's newest checkpoint, a checkpoint, or a Hugging Face folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from megakda.checkpoint import hf_config, hf_load, hf_tokenizer
from megakda.checkpoint import manager as checkpoints
from megakda.config import Config, validate
from megakda.config.schema import (
    ModelConfig,
    ParallelConfig,
    RuntimeConfig,
)
from megakda.data.tokenizer import Tokenizer
from megakda.errors import CheckpointError, ConfigError
from megakda.kernels.mla_decode import MAX_SHARED_DIM, MAX_VALUE_DIM
from megakda.layers.lean import make_lean
from megakda.models.kimi_linear import build_chunks
from megakda.models.sharding import ModelChunk
from megakda.runtime.distributed import process_groups, world_size


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode on this rank, and what generation needs beside it.

    Attributes:
        chunk: this rank's pipeline stage.
        config: architecture.
        tokenizer: of the data that it was trained on.
        end_tokens: ids that end an answer.
        precision: "fp32" or "bf16".
        source: the folder that it came from.
    """

    chunk: ModelChunk
    config: ModelConfig
    tokenizer: Tokenizer
    end_tokens: frozenset[int]
    precision: str
    source: Path


@contextmanager
def open_model(
    path: str | Path,
    parallel: ParallelConfig | None = None,
    runtime: RuntimeConfig | None = None,
    *,
    device: torch.device,
    precision: str | None = None,
    tokenizer: str | None = None,
) -> Iterator[LoadedModel]:
    """Loads a model at a layout, in process groups of its own. Collective.

    Args:
        path: a run's folder, a checkpoint folder, or a folder in the published Hugging Face layout.
        parallel: the layout; it need not be that of training. No context or virtual pipeline
            parallelism.
        runtime: threads and timeouts.
        device: from `megakda.runtime.install`.
        precision: "fp32" or "bf16"; None for that of the checkpoint.
        tokenizer: another one than the checkpoint names, as `load_tokenizer` takes it.

    Raises:
        CheckpointError: no such folder, or one that cannot be loaded.
        ConfigError: a layout that does not fit the model or the ranks.
        DataError: a tokenizer that cannot be loaded.
    """
    path = Path(path)
    parallel, runtime = parallel or ParallelConfig(), runtime or RuntimeConfig()
    is_hf = (path / "config.json").is_file()
    found = path if is_hf else checkpoints.find(str(path), "MODEL")
    model, saved_precision, spec, fingerprint = (_described_hf if is_hf else _described)(found)
    precision = precision or saved_precision
    _check_layout(model, parallel, precision)
    if spec is not None and not is_hf:
        spec = hf_tokenizer.located(spec, found)
    spec = tokenizer or spec
    if spec is None:
        raise ConfigError(f"{found} holds no tokenizer: name one with --tokenizer, as hf:DIR")
    loaded = hf_tokenizer.checked(spec, fingerprint, str(found))
    _check_tokenizer(loaded, model, found)
    ends = frozenset(
        {loaded.eod} | (hf_config.end_tokens(found) if is_hf else _imported_ends(found))
    )
    with process_groups(parallel, runtime, device):
        (chunk,) = build_chunks(model, parallel, precision, context=1)
        if is_hf:
            hf_load.load_hf(found, [chunk], model)
        else:
            checkpoints.load(found, [chunk], None, dataclasses.asdict(model))
        make_lean(chunk.eval())
        yield LoadedModel(chunk, model, loaded, ends, precision, found)


_Description = tuple[ModelConfig, str, str | None, str | None]


def _described(checkpoint: Path) -> _Description:
    """Architecture, precision, tokenizer and its fingerprint, of a megakda checkpoint."""
    manifest = checkpoints.read_manifest(checkpoint)
    try:
        model, tokenizer = hf_config.model_of(manifest["model"]), manifest["tokenizer"]
        return model, manifest["precision"], tokenizer["spec"], tokenizer["fingerprint"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint / checkpoints.MANIFEST} does not describe a model of this version: "
            f"{error}"
        ) from error


def _described_hf(folder: Path) -> _Description:
    """The same of a Hugging Face folder, which has no fingerprint."""
    spec = hf_tokenizer.find_spec(folder)
    return hf_config.read(folder), hf_config.precision(folder), spec, None


def _imported_ends(checkpoint: Path) -> set[int]:
    """End tokens that an imported checkpoint has from its Hugging Face folder."""
    said = checkpoints.read_manifest(checkpoint).get("huggingface") or {}
    sections = (("special_ids", "eos"), ("generation_config", "eos_token_id"))
    return hf_config.ids_in(*((said.get(section) or {}).get(key) for section, key in sections))


def _check_layout(model: ModelConfig, parallel: ParallelConfig, precision: str) -> None:
    for name in ("context", "virtual_pipeline"):
        if getattr(parallel, name) != 1:
            raise ConfigError(
                f"parallel.{name}={getattr(parallel, name)}: generation works with tensor, "
                f"pipeline and expert parallelism; set parallel.{name}=1"
            )
    if precision not in ("fp32", "bf16"):
        raise ConfigError(f"precision={precision!r} must be fp32 or bf16")
    config = Config(model=model, parallel=parallel, precision=precision)
    config.data.name, config.optim.name = "none", "adamw"
    ranks = world_size()
    copies = ranks // (parallel.tensor * parallel.pipeline) or 1
    config.train.context = parallel.tensor
    config.train.global_batch = copies
    validate(config, ranks)
    if model.mla.kv_lora_rank > MAX_VALUE_DIM or model.mla.qk_shared_head_dim > MAX_SHARED_DIM:
        raise ConfigError(
            f"model.mla.kv_lora_rank={model.mla.kv_lora_rank}, model.mla.qk_shared_head_dim="
            f"{model.mla.qk_shared_head_dim}: decoding works up to {MAX_VALUE_DIM} and "
            f"{MAX_SHARED_DIM}"
        )


def _check_tokenizer(tokenizer: Tokenizer, model: ModelConfig, path: Path) -> None:
    if tokenizer.vocab_size > model.vocab_size:
        raise CheckpointError(
            f"{path}: the tokenizer {tokenizer.spec} has {tokenizer.vocab_size} ids, and the model "
            f"was made for {model.vocab_size}: name the one it was trained with"
        )
