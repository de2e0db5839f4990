"""Jobs of the parity matrix: training on batches whose documents the test chooses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from tests import jobs

TOKENS = 48
VOCABULARY = 257

# Bounds in a row of 48 tokens, whose segments are 24, 12, 16, 8 or 6 tokens.
DOCUMENTS = {
    "one": [0, 48],
    "uneven": [0, 5, 25, 26, 45, 48],
    "over_all_ranks": [0, 3, 46, 48],
    "inside_a_chunk": [0, 7, 19, 33, 48],
    "at_segment_ends": [0, 6, 8, 12, 16, 24, 32, 36, 40, 48],
    "one_token": [0, 1, 2, 11, 12, 13, 23, 24, 25, 47, 48],
}


def batch(bounds: Sequence[int], number: int, rows: int = 1) -> dict[str, torch.Tensor]:
    """A micro-batch of random tokens with these documents, as a packed data set yields it.

    Every tenth label or so does not count; the last document is padding where `bounds` has more
    than two and `number` is odd.
    """
    generator = torch.Generator().manual_seed(1000 + number)
    shape = (rows, bounds[-1] // rows)
    tokens = torch.randint(VOCABULARY, shape, generator=generator)
    labels = torch.randint(VOCABULARY, shape, generator=generator)
    loss_mask = (torch.rand(shape, generator=generator) > 0.1).float()
    padding = torch.zeros(shape, dtype=torch.bool)
    if number % 2 and len(bounds) > 2:
        padding.view(-1)[bounds[-2] :] = True
    loss_mask[padding] = 0
    lengths = torch.tensor(bounds).diff()
    starts = torch.tensor(bounds[:-1]).repeat_interleave(lengths)
    positions = (torch.arange(bounds[-1]) - starts).view(shape)
    return {
        "tokens": tokens,
        "labels": labels,
        "position_ids": positions,
        "loss_mask": loss_mask,
        "padding_mask": padding,
        "cu_seqlens": torch.tensor(bounds, dtype=torch.int32),
    }


def batches(bounds: Sequence[int], rows: int = 1) -> Iterator[dict[str, torch.Tensor]]:
    number = 0
    while True:
        yield batch(bounds, number, rows)
        number += 1


def train_documents(
    overrides: Sequence[str],
    corpus: Any,
    bounds: Sequence[int],
    steps: int,
    rows: int = 1,
    global_batch: int = 2,
) -> dict[str, Any]:
    """`steps` steps on batches with these documents; every second micro-batch has padding.

    Returns:
        losses and gradient norms; of the first step, on rank 0, the gradients of all parameters,
        and of its first micro-batch the input gradients and outputs of the decoder [b, T, h].
    """
    settings = [
        f"train.context={bounds[-1] // rows}",
        f"train.global_batch={global_batch}",
        f"train.micro_batch={rows}",
        "data.packing=documents",
        *overrides,
    ]
    with jobs.trainer(settings, corpus) as run:
        gradients: dict[str, torch.Tensor] = {}
        jobs._capture_first_gradients(run, gradients)
        both_ends = run.config.parallel.pipeline == 1  # else its two ends are on different ranks
        seen = _watch_decoder(run) if both_ends else {}
        source = [batches(bounds, rows) for _ in run.chunks]
        results = [run.step(source) for _ in range(steps)]
        ends = {name: whole(x[0], run.config.parallel) for name, x in seen.items()}
    return {
        "loss": [result.loss for result in results],
        "grad_norm": [result.grad_norm for result in results],
        "gradients": gradients,
        "ends": ends,
    }


def _watch_decoder(run: Any) -> dict[str, list[torch.Tensor]]:
    """Collects what enters and leaves the decoder, and the gradient of what enters."""
    seen: dict[str, list[torch.Tensor]] = {"output": [], "input gradient": []}
    model = run.chunks[0].module

    def embedded(module: Any, inputs: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda grad: seen["input gradient"].append(grad.clone()))

    def decoded(module: Any, inputs: Any, output: torch.Tensor) -> None:
        seen["output"].append(output.detach().clone())

    model.embedding.register_forward_hook(embedded)
    model.decoder.register_forward_hook(decoded)
    return seen


def whole(x: torch.Tensor, parallel: Any) -> torch.Tensor | None:
    """[s, b, h] of every rank -> [b, T, h] on rank 0; data-parallel ranks are not expected."""
    from megatron.core import parallel_state

    from megakda.layers.context_layout import ContextLayout

    where = (
        parallel_state.get_context_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, (where, x.transpose(0, 1)))
    found = dict(everyone)
    tensor = range(parallel.tensor if parallel.sequence else 1)
    shares = [torch.cat([found[r, t] for t in tensor], 1) for r in range(parallel.context)]
    layout = ContextLayout(parallel.context_layout, parallel.context)
    by_segment = torch.stack([share.unflatten(1, (layout.per_rank, -1)) for share in shares])
    segments = layout.restore(by_segment.movedim(2, 1))
    return segments.movedim(0, 1).flatten(1, 2) if torch.distributed.get_rank() == 0 else None
