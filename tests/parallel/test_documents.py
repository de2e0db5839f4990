"""Documents that share a row do not know of each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests import jobs
from tests.parallel import context_jobs

BOUNDS = [0, 7, 8, 24, 33, 48]
DENSE = ["model.ffn=dense"]


def evaluate(run: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whole outputs, loss terms and input gradients of one micro-batch, on rank 0 [T, ...]."""
    from megakda.models.context_batch import rank_batch
    from megakda.models.kimi_linear import context_parallel

    seen = context_jobs._watch_decoder(run)
    parallel = run.config.parallel
    own = rank_batch(batch, context_parallel(parallel), torch.device("cpu"))
    losses = run.chunks[0].module(
        own.tokens,
        own.position_ids,
        None,
        labels=own.labels,
        packed_seq_params=own.documents,
        padding_mask=own.padding_mask,
    )
    (losses * own.loss_mask).sum().backward()
    found = {name: context_jobs.whole(x[-1], parallel) for name, x in seen.items()}
    losses = losses.detach().T.unsqueeze(-1)
    if parallel.tensor > 1 and parallel.sequence:  # every rank has all of them: take its part
        losses = losses.chunk(parallel.tensor)[torch.distributed.get_rank() % parallel.tensor]
    found["loss"] = context_jobs.whole(losses, parallel)
    return {name: x[0] for name, x in found.items() if x is not None}


def change_every_document(overrides: list[str], corpus: Any) -> Any:
    """For each document and three of its tokens: how far the results of the others move.

    Returns:
        On rank 0 {result: (largest change of others, whether the document itself moved)}.
    """
    with jobs.trainer(["data.packing=documents", "train.context=48", *overrides], corpus) as run:
        batch = context_jobs.batch(BOUNDS, 0)
        before = evaluate(run, batch)
        moved: dict[str, tuple[float, bool]] = {}
        for start, end in zip(BOUNDS[:-1], BOUNDS[1:], strict=True):
            for token in sorted({start, (start + end) // 2, end - 1}):
                changed = {name: x.clone() for name, x in batch.items()}
                changed["tokens"][0, token] = (changed["tokens"][0, token] + 1) % 257
                changed["labels"][0, token] = (changed["labels"][0, token] + 1) % 257
                after = evaluate(run, changed)
                for name, x in after.items():
                    change = (x - before[name]).abs().flatten(1).amax(1)
                    inside = bool(change[start:end].max() > 0)
                    change[start:end] = 0
                    size = float(before[name].abs().max())
                    old, always = moved.get(name, (0.0, True))
                    moved[name] = (max(old, float(change.max()) / size), always and inside)
        return moved


LAYOUTS = {
    "alone": (1, []),
    "state": (2, ["parallel.context=2"]),
    "ring_of_4": (4, ["parallel.context=4", "parallel.context_attention=ring"]),
    "heads": (2, ["parallel.context=2", "parallel.context_mode=heads"]),
    "tp": (4, ["parallel.context=2", "parallel.tensor=2"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ffn", ["dense", "moe"])
def test_nothing_leaks(ranks, corpus, ffn, layout):
    """Bit for bit; with experts up to the rounding that the batch's composition moves."""
    world, overrides = LAYOUTS[layout]
    overrides = [f"model.ffn={ffn}", *overrides]
    moved = ranks.run(world, change_every_document, overrides, corpus)[0]
    assert moved.keys() == {"output", "loss", "input gradient"}
    for name, (change, inside) in moved.items():
        assert inside, name  # the change was seen where it was made
        assert change == 0 if ffn == "dense" else change < 1e-6, (name, change)


def losses_packed_and_apart(overrides: list[str], corpus: Any) -> Any:
    """Per-token losses of the same documents packed, and each in a row of its own."""
    with jobs.trainer(["data.packing=documents", "train.context=48", *overrides], corpus) as run:
        batch = context_jobs.batch(BOUNDS, 0)
        packed = evaluate(run, batch)
        if run.config.parallel.context > 1:
            return packed, None
        apart = []
        for start, end in zip(BOUNDS[:-1], BOUNDS[1:], strict=True):
            own = {name: x[:, start:end] for name, x in batch.items() if name != "cu_seqlens"}
            del own["padding_mask"]
            own["position_ids"] = own["position_ids"].clone()
            apart.append(evaluate(run, own))
        return packed, {name: torch.cat([x[name] for x in apart]) for name in packed}


@pytest.mark.parametrize("model", ["moe", "dense", "rope"])
@pytest.mark.parametrize("world", [2, 4])
def test_packed_equals_apart(ranks, corpus, world, model):
    overrides = {
        "moe": [],
        "dense": DENSE,
        "rope": [*DENSE, "model.pattern='1:1'", "model.mla.rope=true"],
    }[model]
    packed, apart = ranks.run(1, losses_packed_and_apart, overrides, corpus)[0]
    shared = ranks.run(
        world, losses_packed_and_apart, [*overrides, f"parallel.context={world}"], corpus
    )[0][0]
    for name, expected in apart.items():
        for found in (packed, shared):
            error = (found[name] - expected).abs().max() / expected.abs().max()
            assert error < 1e-5, (name, float(error))


def test_documents_of_a_data_set(ranks, corpus):
    """The same rows through the real data path, on one rank and on two."""
    for packing in ("documents", "best_fit"):
        overrides = [f"data.packing={packing}", "train.context=48", "train.micro_batch=2"]
        alone = ranks.run(1, jobs.train, overrides, corpus, 3, gradients=True)[0]
        shared = ranks.run(
            2, jobs.train, [*overrides, "parallel.context=2"], corpus, 3, gradients=True
        )[0]
        assert shared["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        for name, theirs in alone["gradients"].items():
            error = (shared["gradients"][name] - theirs).norm() / theirs.norm().clamp_min(1e-12)
            assert error < 1e-5, name


def test_padding_reaches_no_expert(ranks, corpus):
    """Loads and losses count real tokens only, whatever padding holds, at any pipeline stage."""
    layouts = {1: [], 2: ["parallel.pipeline=2", "parallel.pipeline_layers=[1,3]"], 4: TP_CP}
    found = {
        world: ranks.run(world, expert_loads, overrides, corpus)
        for world, overrides in layouts.items()
    }
    for per_rank in found.values():
        loads = [x for x in per_rank if x is not None]
        for load in loads:
            # 33 + 48 real tokens of two micro-batches choose 2 experts each.
            assert (load.sum(-1) == 2 * (33 + 48)).all()


TP_CP = ["parallel.tensor=2", "parallel.context=2"]


def expert_loads(overrides: list[str], corpus: Any) -> torch.Tensor | None:
    settings = ["data.packing=documents", "train.context=48", *overrides]
    settings += ["train.global_batch=2", "train.micro_batch=1"]
    with jobs.trainer(settings, corpus) as run:
        padded, full = context_jobs.batch(BOUNDS, 1), context_jobs.batch(BOUNDS, 0)
        assert padded["padding_mask"].sum() == 15
        run.step([iter([padded, full]) for _ in run.chunks])
        return run.finalizer.expert_loads
