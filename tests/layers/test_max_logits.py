"""Largest attention logits of a training step at every layout, against all scores on one rank."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch

from tests import jobs
from tests.parallel import context_jobs

TOLERANCE = 1e-5
MODEL = [
    "model.ffn=dense",
    "model.pattern=[full,linear,linear,full]",
    "train.global_batch=2",
    "train.micro_batch=1",
]
MLA_LAYERS = (1, 4)
PACKED = context_jobs.DOCUMENTS["uneven"]
RING = "parallel.context_attention=ring"
ZIGZAG, CONTIGUOUS = (f"parallel.context_layout={name}" for name in ("zigzag", "contiguous"))

LAYOUTS = {
    "one_full": (1, ["parallel.recompute=full"]),
    "dp2_selective": (2, ["parallel.recompute=selective"]),
    "tp2": (2, ["parallel=tp2", "parallel.recompute=selective"]),
    "pp2": (2, ["parallel=pp2", "parallel.recompute=full"]),
    "cp2_zigzag_ring": (2, ["parallel.context=2", ZIGZAG, RING]),
    "cp2_contiguous": (2, ["parallel.context=2", CONTIGUOUS, "parallel.recompute=full"]),
}
PACKED_LAYOUTS = {
    "one": (1, []),
    "cp2_zigzag": (2, ["parallel.context=2", ZIGZAG]),
    "cp2_contiguous_ring": (2, ["parallel.context=2", CONTIGUOUS, RING]),
    "tp2_no_sp": (2, ["parallel=tp2", "parallel.sequence=false", "parallel.recompute=full"]),
}


def logits_of_a_step(
    overrides: Sequence[str], corpus: Any, bounds: Sequence[int] | None, formula: bool = False
) -> dict[int, dict[int, torch.Tensor]]:
    """What this rank's MLA layers record in one step: [local heads] by layer and tensor rank.

    Args:
        bounds: of documents; None for rows of the corpus.
        formula: all scores in float64 instead, of whole sequences on one rank.
    """
    from megatron.core import parallel_state

    from megakda.layers.mla import MultiLatentAttention

    packing = [] if bounds is None else ["data.packing=documents"]
    with jobs.trainer([*MODEL, *packing, *overrides], corpus) as run:
        layers = [m for c in run.chunks for m in c.modules() if isinstance(m, MultiLatentAttention)]
        found = {}
        for layer in layers:
            if formula:
                found[layer.layer_number] = {0: largest_scores(layer, bounds)}
            else:
                assert layer.max_logits is None
                layer.record_max_logits()
                found[layer.layer_number] = {
                    parallel_state.get_tensor_model_parallel_rank(): layer.max_logits
                }
        if bounds is None:
            source = run._batches(run.datasets.train, 0)
        else:
            source = [context_jobs.batches(bounds) for _ in run.chunks]
        run.step(source)
        return found


def largest_scores(layer: Any, bounds: Sequence[int] | None) -> torch.Tensor:
    """A tensor [H] that grows with every forward pass of the layer, float64."""
    mla = layer.mla
    largest = torch.full((layer.local_heads,), -torch.inf, dtype=torch.float64)
    project = layer._project

    def watched(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, latent = project(hidden)
        weight = layer.kv_b_proj.weight.detach().double()
        sizes = [mla.kv_lora_rank, mla.qk_shared_head_dim]
        latent_64, shared = latent.detach().double().split(sizes, -1)
        k = (latent_64 @ weight.T).unflatten(-1, (layer.local_heads, -1))
        k = k[..., : mla.qk_nope_head_dim]
        k = torch.cat([k, shared.unsqueeze(2).expand(-1, -1, k.shape[2], -1)], -1)
        for start, end in pairwise(bounds or [0, len(q)]):
            part = slice(start, end)
            scores = torch.einsum("ibhd,jbhd->bhij", q[part].detach().double(), k[part])
            visible = torch.ones(end - start, end - start, dtype=torch.bool).tril()
            scores = scores[..., visible] * (q.shape[-1] ** -0.5)
            largest.copy_(torch.maximum(largest, scores.amax((0, 2))))
        return q, latent

    layer._project = watched
    return largest


@pytest.fixture(scope="module")
def expected(ranks, corpus):
    """By whether documents are packed; [H] by layer."""
    return {
        bounds is not None: {
            number: heads[0]
            for number, heads in ranks.run(1, logits_of_a_step, [], corpus, bounds, True)[0].items()
        }
        for bounds in (None, PACKED)
    }


def check(found: list[dict[int, dict[int, torch.Tensor]]], expected: dict[int, torch.Tensor]):
    """The maximum over ranks with the same heads."""
    assert tuple(expected) == MLA_LAYERS
    for number, theirs in expected.items():
        by_rank: dict[int, torch.Tensor] = {}
        for heads in (rank[number] for rank in found if number in rank):
            for place, logits in heads.items():
                assert logits.dtype == torch.float32
                by_rank[place] = torch.maximum(logits, by_rank.get(place, logits))
        ours = torch.cat([by_rank[place] for place in sorted(by_rank)]).double()
        torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows(ranks, corpus, expected, layout):
    world, overrides = LAYOUTS[layout]
    check(ranks.run(world, logits_of_a_step, overrides, corpus, None), expected[False])


@pytest.mark.parametrize("layout", PACKED_LAYOUTS)
def test_packed_documents(ranks, corpus, expected, layout):
    world, overrides = PACKED_LAYOUTS[layout]
    check(ranks.run(world, logits_of_a_step, overrides, corpus, PACKED), expected[True])
