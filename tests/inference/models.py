"""Random-weight models to generate from, and plain forward passes to compare with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from megakda.config import Config, compose
from tests.jobs import SMALL

STD = 0.1
"""Of the weights: large enough that logits differ by more than rounding."""


@contextmanager
def random_model(overrides: Sequence[str] = (), std: float = STD, lean: bool = True) -> Iterator:
    """A LoadedModel of `SMALL` with random weights, in process groups of its own.

    Args:
        lean: as `open_model` makes it; else as training has it.
    """
    from megakda.data.tokenizer import ByteTokenizer
    from megakda.inference.loading import LoadedModel
    from megakda.layers.lean import make_lean
    from megakda.models.init import initialize
    from megakda.models.kimi_linear import build_chunks, routers
    from megakda.runtime.distributed import process_groups

    config: Config = compose([*SMALL, *overrides])
    with process_groups(config.parallel, config.runtime, torch.device("cpu")):
        (chunk,) = build_chunks(config.model, config.parallel, config.precision, 1)
        initialize([chunk], 1, std)
        for router in routers(chunk):  # experts that are chosen by their biases too
            router.expert_bias.copy_(torch.linspace(-0.2, 0.2, len(router.expert_bias)))
        chunk.eval()
        if lean:
            make_lean(chunk)
        yield LoadedModel(
            chunk,
            config.model,
            ByteTokenizer(),
            frozenset({256}),
            config.precision,
            Path("random"),
        )


@torch.no_grad()
def full_logprobs(model, tokens: Sequence[int]) -> torch.Tensor:
    """[len(tokens), vocabulary]: of what follows each token, by training's forward pass."""
    ids = torch.tensor([list(tokens)])
    logits = model.chunk(ids, torch.arange(len(tokens))[None], None)
    return logits[0].float().log_softmax(-1)


def random_prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Prompts of random bytes."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (n,), generator=generator).tolist() for n in lengths]
