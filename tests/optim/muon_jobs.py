"""Jobs for the rank pool: Muon and QK-Clip at a layout."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from tests import jobs

MUON = ["optim=muon", "optim.lr=1e-3", "schedule.warmup_steps=0"]


def train(overrides: Sequence[str], corpus: Any, steps: int) -> dict:
    """`steps` steps of training.

    Returns:
        losses, weights (on rank 0), and of the optimizer on this rank: matrices owned, elements of
        momentum, elements of the matrices' local parameters, and the exchange's bytes per part.
    """
    from megakda.trainer import _sync_parameters

    with jobs.trainer([*MUON, *overrides], corpus) as run:
        batches = run._batches(run.datasets.train, 0)
        losses = [run.step(batches).loss for _ in range(steps)]
        _sync_parameters(run.config, run.chunks, hooks=False)
        weights = jobs.gather_global(run.chunks, lambda piece: piece.data)
        inner = [part.optimizer for part in run.optimizer.chained_optimizers]
        states = [state for muon in inner for state in muon.state.values()]
        return {
            "loss": losses,
            "weights": weights,
            "owned": [matrix.name for muon in inner for matrix in muon.exchange.owned],
            "momentum": sum(s["exp_avg"].numel() for s in states if "exp_avg_sq" not in s),
            "matrices": sum(a.param.numel() for a in run.assignments if a.blocks),
            "bytes": [muon.exchange.bytes for muon in inner],
        }


def assignment(overrides: Sequence[str], corpus: Any) -> list[str]:
    """The table, after a look at whether each of this rank's parameters is assigned once."""
    from megakda.optim.matrices import assignment_table

    with jobs.trainer([*MUON, *overrides], corpus) as run:
        params = [param for chunk in run.chunks for param in chunk.parameters()]
        assert len(params) == len(run.assignments)
        assert set(params) == {assignment.param for assignment in run.assignments}
        return assignment_table(run.assignments)


@contextmanager
def small_buckets(size: int) -> Iterator[None]:
    """Gradient buckets of about `size` elements, for models too small to have several."""
    import megakda.trainer

    settings = megakda.trainer.DistributedDataParallelConfig
    small = functools.partial(settings, bucket_size=size)
    with mock.patch.object(megakda.trainer, "DistributedDataParallelConfig", small):
        yield


def fit(overrides: Sequence[str], corpus: Any, out: str, bucket_size: int) -> dict:
    """`jobs.fit` with small buckets."""
    with small_buckets(bucket_size):
        return jobs.fit(overrides, corpus, out)


def padded_buckets(overrides: Sequence[str], corpus: Any, bucket_size: int) -> int:
    """How many buckets have padding at their end."""
    with small_buckets(bucket_size), jobs.trainer(overrides, corpus) as run:
        buffers = [buffer for chunk in run.chunks for buffer in chunk.buffers]
        buckets = [bucket for buffer in buffers for bucket in buffer.buckets]
        return sum(bucket.grad_data.numel() != bucket.numel_unpadded for bucket in buckets)


def telemetry(overrides: Sequence[str], corpus: Any) -> dict:
    """update_rms and weight_rms of one step."""
    with jobs.trainer([*MUON, *overrides], corpus) as run:
        run.telemetry.watch(True)
        run.step(run._batches(run.datasets.train, 0))
        found = run.telemetry.collect()
        return {name: found[name] for name in ("update_rms", "weight_rms")}


def skipped(corpus: Any) -> bool:
    """Whether a step with a loss that is not finite leaves momentum and update sizes alone."""
    with jobs.trainer([*MUON, "optim.qk_clip=0.01"], corpus) as run:
        run.step(run._batches(run.datasets.train, 0))
        before = [s["exp_avg"].clone() for s in _states(run)]
        weights = [param.detach().clone() for c in run.chunks for param in c.parameters()]

        def poisoned(batches: Iterator[Any]) -> Iterator[Any]:
            for batch in batches:
                yield {**batch, "loss_mask": batch["loss_mask"] * float("inf")}

        run.telemetry.watch(True)
        batches = [poisoned(b) for b in run._batches(run.datasets.train, 0)]
        assert run.step(batches).problem is not None
        after = [param for c in run.chunks for param in c.parameters()]
        return (
            all(torch.equal(x, s["exp_avg"]) for x, s in zip(before, _states(run), strict=True))
            and all(torch.equal(x, y) for x, y in zip(weights, after, strict=True))
            and "update_rms" not in run.telemetry.collect()
        )


def _states(run: Any) -> list[dict[str, torch.Tensor]]:
    return [s for part in run.optimizer.chained_optimizers for s in part.optimizer.state.values()]


def against_reference(corpus: Any, steps: int) -> dict[str, float]:
    """One rank's weights after `steps` steps against plain updates with the same gradients.

    Returns:
        largest difference of any element, by tensor name.
    """
    from megakda.models.sharding import pieces

    with jobs.trainer(MUON, corpus) as run:
        pairs = []  # (name, piece of the run's model, weight of the reference)
        for chunk in run.chunks:
            for piece in pieces(chunk.module):
                pairs.append((piece.name, piece, piece.data.detach().clone()))
        matrices = {a.tensor.name for a in run.assignments if a.blocks}
        optim = run.config.optim
        momenta = [torch.zeros_like(w) for _, _, w in pairs]
        rest = {name: w.requires_grad_() for name, _, w in pairs if name not in matrices}
        adamw = torch.optim.AdamW(
            [
                {"params": [w for w in rest.values() if w.dim() > 1], "weight_decay": 0.1},
                {"params": [w for w in rest.values() if w.dim() == 1], "weight_decay": 0.0},
            ],
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
        )
        update = run.optimizer.step_with_ready_grads

        @torch.no_grad()
        def both() -> bool:
            for (name, piece, weight), momentum in zip(pairs, momenta, strict=True):
                grad = jobs._gradient(piece).clone()
                if name in rest:
                    weight.grad = grad
                else:
                    stacked = (x.view(-1, *x.shape[-2:]) for x in (weight, grad, momentum))
                    for w, g, m in zip(*stacked, strict=True):
                        reference_muon(w, g, m, optim.lr, optim.weight_decay)
            adamw.step()
            return update()

        run.optimizer.step_with_ready_grads = both
        batches = run._batches(run.datasets.train, 0)
        for _ in range(steps):
            run.step(batches)
        with torch.no_grad():
            errors: dict[str, float] = {}
            for name, piece, weight in pairs:  # gate and up are two pieces of one name
                error = float((piece.data - weight).abs().max())
                errors[name] = max(error, errors.get(name, 0.0))
            return errors


def reference_muon(
    w: torch.Tensor, g: torch.Tensor, m: torch.Tensor, lr: float, decay: float
) -> None:
    """Muon of one matrix, as the report's reference gives it; changes w and m."""
    m.mul_(0.95).add_(g)
    x = g + 0.95 * m
    x = x.T if x.shape[0] > x.shape[1] else x
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    x = x.T if w.shape[0] > w.shape[1] else x
    w.mul_(1 - lr * decay).sub_(lr * 0.2 * max(w.shape) ** 0.5 * x)


def against_torch(steps: int) -> float:
    """The largest difference between `Muon` and `torch.optim.Muon`, both with bf16 iterations."""
    from megakda.config.schema import MuonConfig, OptimConfig
    from megakda.optim.matrices import Assignment, Block, Matrix
    from megakda.optim.muon import Muon
    from megakda.optim.shards import Shard

    torch.distributed.init_process_group("gloo")
    try:
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(shape, generator=generator) for shape in ((16, 48), (48, 16))]
        ours = [torch.nn.Parameter(weight.clone()) for weight in weights]
        theirs = [torch.nn.Parameter(weight.clone()) for weight in weights]
        optim = OptimConfig(name="muon", lr=0.02, muon=MuonConfig(dtype="bf16"))
        assignments = {
            p: Assignment(
                p, "experts", ((0, Block(Matrix(str(i), *p.shape), 0, 0, *p.shape)),), None
            )
            for i, p in enumerate(ours)
        }
        muon = Muon(
            [{"params": ours, "lr": optim.lr, "weight_decay": optim.weight_decay}],
            [Shard(p, p, 0, p.numel()) for p in ours],
            assignments,
            optim,
            torch.distributed.group.WORLD,
        )
        reference = torch.optim.Muon(
            theirs, lr=optim.lr, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        )
        for _ in range(steps):
            for p, q in zip(ours, theirs, strict=True):
                p.grad = torch.randn(p.shape, generator=generator)
                q.grad = p.grad.clone()
            muon.step()
            reference.step()
        return max(float((p - q).abs().max()) for p, q in zip(ours, theirs, strict=True))
    finally:
        torch.distributed.destroy_process_group()


def optimizer_bytes(overrides: Sequence[str], corpus: Any) -> dict[str, int]:
    """Bytes of one optimizer step on this rank.

    Returns:
        "parameters" gathered over data parallelism (as many as of fp32 gradients before, in fp32
        models), and "matrices" sent for Newton-Schulz and back.
    """
    from megakda.runtime.collectives import record_collectives

    with jobs.trainer(overrides, corpus) as run:
        calls = []
        update = run.optimizer.step_with_ready_grads

        def recorded() -> bool:
            with record_collectives() as made:
                done = update()
            calls.extend(made)
            return done

        run.optimizer.step_with_ready_grads = recorded
        run.step(run._batches(run.datasets.train, 0))
    return {
        "parameters": sum(c.received for c in calls if c.operation == "all_gather_into_tensor"),
        "matrices": sum(c.sent for c in calls if c.operation == "all_to_all_single"),
    }


def clip(overrides: Sequence[str], corpus: Any, steps: int, still: bool = False) -> dict:
    """Training with QK-Clip.

    Args:
        still: train on the same batch, with a learning rate at which nothing but the clip moves.

    Returns:
        largest logits of each step by layer and head (of this rank's layers and heads), metrics of
        each step, weights at the end, and whether the model's weights are the fp32 ones, rounded.
    """
    from megakda.optim.shards import shards
    from megakda.trainer import _sync_parameters

    frozen = ["optim.lr=1e-30", "optim.weight_decay=0", "model.moe.bias_update_rate=0"]
    frozen = frozen if still else []
    with jobs.trainer([*MUON, *frozen, *overrides], corpus) as run:
        batches = run._batches(run.datasets.train, 0)
        logits, metrics = [], []
        for _ in range(steps):
            if still:
                batches = run._batches(run.datasets.train, 0)
            run.step(batches)
            logits.append(run.qk_clip._found.clone())
            metrics.append(run.qk_clip.metrics())
        _sync_parameters(run.config, run.chunks, hooks=False)
        weights = jobs.gather_global(run.chunks, lambda piece: piece.data)
        return {
            "logits": logits,
            "metrics": metrics,
            "weights": weights,
            "agree": all(
                torch.equal(
                    shard.main.flatten().to(shard.param.dtype),
                    shard.param.detach().flatten()[shard.start : shard.end],
                )
                for part in run.optimizer.chained_optimizers
                for shard in shards(part)
            ),
        }
