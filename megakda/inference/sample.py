"""Text from a trained run, one token at a time, by running the whole context again for each.

Plain and exact, without caches: right for a look at a small model on one rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from megakda.checkpoint import manager as checkpoints
from megakda.config import Config
from megakda.config.compose import from_tree
from megakda.config.schema import ParallelConfig
from megakda.data.tokenizer import Tokenizer, load_tokenizer
from megakda.errors import CheckpointError, ConfigError
from megakda.models.kimi_linear import build_chunks
from megakda.models.sharding import ModelChunk
from megakda.runtime.distributed import process_groups


def run_config(run: Path) -> Config:
    """The config that a run was started with.

    Raises:
        CheckpointError: `run` is not the `train.out` folder of a run.
    """
    path = run / "config.yaml"
    try:
        tree = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(path))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}; name a run's train.out") from error
    assert isinstance(tree, DictConfig)
    return from_tree(tree)


@contextmanager
def loaded_model(run: Path, device: torch.device) -> Iterator[tuple[ModelChunk, Tokenizer]]:
    """The newest checkpoint of a run as one whole model on one rank, and its tokenizer.

    Raises:
        CheckpointError: no run, no complete checkpoint, or one that cannot be loaded.
    """
    config = run_config(run)
    path = checkpoints.resolve(str(run), run / "checkpoints")
    assert path is not None
    parallel = ParallelConfig()
    with process_groups(parallel, config.runtime, device):
        chunks = build_chunks(config.model, parallel, config.precision, config.train.context)
        checkpoints.load(path, chunks, None, dataclasses.asdict(config.model))
        yield chunks[0].eval(), load_tokenizer(config.data.tokenizer)


@torch.no_grad()
def sample(
    model: ModelChunk,
    tokenizer: Tokenizer,
    prompt: str,
    tokens: int,
    temperature: float = 0.8,
    seed: int = 0,
) -> Iterator[str]:
    """Continues `prompt`, yielding text as it becomes whole; stops at the end of a document.

    Args:
        model: a whole model on one rank, in eval mode.
        tokens: at most so many new ones.
        temperature: 0 takes the likeliest token.

    Raises:
        ConfigError: a negative temperature, or an empty prompt.
    """
    if temperature < 0:
        raise ConfigError(f"temperature={temperature}: must not be negative")
    ids = tokenizer.encode(prompt)
    if not ids:
        raise ConfigError("the prompt is empty: give at least one character")
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    start, shown = len(ids), ""
    for _ in range(tokens):
        window = torch.tensor([ids[-model.max_sequence_length :]], device=device)
        positions = torch.arange(window.shape[1], device=device)[None]
        logits = model(window, positions, None)[0, -1, : tokenizer.vocab_size].float().cpu()
        if temperature == 0:
            token = int(logits.argmax())
        else:
            probabilities = torch.softmax(logits / temperature, dim=-1)
            token = int(torch.multinomial(probabilities, 1, generator=generator))
        if token == tokenizer.eod:
            return
        ids.append(token)
        text = tokenizer.decode(ids[start:])
        # A character of several bytes shows as a replacement mark until its last byte is there.
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
