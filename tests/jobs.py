"""Jobs for the rank pool: what distributed tests run on every rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from megakda.config import Config, compose, validate

SMALL = (
    "model=tiny",
    "model.hidden_size=64",
    "model.num_heads=4",
    "model.linear.head_dim_k=24",
    "model.linear.head_dim_v=16",
    "model.linear.gate_rank=16",
    "model.linear.output_gate_rank=16",
    "model.mla.kv_lora_rank=32",
    "model.mla.qk_nope_head_dim=16",
    "model.mla.qk_shared_head_dim=8",
    "model.mla.v_head_dim=16",
    "model.dense_ffn=128",
    "model.moe.expert_ffn=32",
    # A seed at which no token's choice of experts hangs on rounding (in about one seed of five, one
    # does in five steps: the gradient norm of that step then moves by some 1e-5).
    "train.seed=1",
    "train.context=48",
    "train.global_batch=4",
    "train.micro_batch=2",
    "train.eval_batches=0",
    "runtime.threads=1",
    "runtime.timeout_minutes=1",
)
"""A model with every part of the large one, and key heads wider than value heads."""


def trainer(overrides: Sequence[str], corpus: Any) -> AbstractContextManager[Any]:
    """A Trainer in its process groups, ready for its first step."""
    return trainer_of(compose([*SMALL, f"data.paths=[{corpus}]", "data.prepare=none", *overrides]))


@contextmanager
def trainer_of(config: Config) -> Iterator[Any]:
    """The Trainer of any config."""
    import torch.distributed

    from megakda.runtime.distributed import process_groups, world_size

    derived = validate(config, world_size())
    from megakda.data.datasets import build_datasets, prepare_data
    from megakda.trainer import Trainer

    with process_groups(config.parallel, config.runtime, torch.device("cpu")):
        data = prepare_data(config)
        run = Trainer(config, derived, data.tokenizer, build_datasets(config, data))
        try:
            yield run
            torch.distributed.barrier()
        finally:
            run.close()


def train(overrides: Sequence[str], corpus: Any, steps: int, gradients: bool = False) -> dict:
    """Losses and gradient norms of `steps` steps; on rank 0 the first step's gradients too.

    Returns:
        {"loss": [...], "grad_norm": [...], "gradients": {global name: global tensor}}.
    """
    with trainer(overrides, corpus) as run:
        found: dict[str, torch.Tensor] = {}
        if gradients:
            _capture_first_gradients(run, found)
        batches = run._batches(run.datasets.train, 0)
        results = [run.step(batches) for _ in range(steps)]
    return {
        "loss": [result.loss for result in results],
        "grad_norm": [result.grad_norm for result in results],
        "gradients": found,
    }


def fit(overrides: Sequence[str], corpus: Any, out: str) -> dict:
    """A whole run through `Trainer.fit`; its metric rows and, on rank 0, its final weights."""
    from pathlib import Path

    from megakda.metrics.writers import read_metrics

    with trainer([*overrides, f"train.out={out}"], corpus) as run:
        run.fit()
        weights = gather_global(run.chunks, lambda piece: piece.data)
    rows = read_metrics(Path(out) / "metrics.jsonl")
    return {
        "loss": [row["loss"] for row in rows],
        "weights": weights,
        "data_reordered": run.positions.reordered,
    }


def fit_recipe(overrides: Sequence[str], corpora: dict[str, str], out: str) -> list[dict[str, Any]]:
    """A whole run of a recipe, on another corpus of the same kind; its metric rows.

    Args:
        corpora: the prefix of a data set by what `data.prepare` would have made.
    """
    from dataclasses import replace
    from pathlib import Path

    from megakda.metrics.writers import read_metrics

    config = compose([*overrides, f"train.out={out}", "runtime.threads=1"])
    data = replace(config.data, paths=[corpora[config.data.prepare]], prepare="none")
    with trainer_of(replace(config, data=data)) as run:
        run.fit()
    return read_metrics(Path(out) / "metrics.jsonl")


def gather_global(chunks: list[torch.nn.Module], value: Any) -> dict[str, torch.Tensor]:
    """Global tensors assembled on rank 0 from `value(piece)` of every piece on every rank.

    Blocks that several ranks hold must agree.
    """
    from megakda.models.sharding import pieces

    local = [
        (piece.name, piece.global_shape, piece.global_offset, value(piece).detach().float().clone())
        for chunk in chunks
        for piece in pieces(getattr(chunk, "module", chunk))
    ]
    world = torch.distributed.get_world_size()
    everyone: list[Any] | None = [None] * world if torch.distributed.get_rank() == 0 else None
    torch.distributed.gather_object(local, everyone)
    whole: dict[str, torch.Tensor] = {}
    for name, shape, offset, block in (entry for entries in everyone or [] for entry in entries):
        target = whole.setdefault(name, torch.full(shape, float("nan")))
        where = tuple(slice(o, o + n) for o, n in zip(offset, block.shape, strict=True))
        held = target[where]
        if not held.isnan().all():
            # Replicas may round differently: BLAS kernels depend on how memory is aligned.
            error = (held - block).norm() / block.norm().clamp_min(1e-12)
            assert error < 1e-5, f"ranks disagree about {name} by {error:.1e}"
        target[where] = block
    assert not any(tensor.isnan().any() for tensor in whole.values())
    return whole


def _capture_first_gradients(run: Any, found: dict[str, torch.Tensor]) -> None:
    """Fills `found` with the final gradients of the next step, before the optimizer reads them."""
    prepare = run.optimizer.prepare_grads

    def capture() -> bool:
        if run.steps_done == 0:
            for chunk in run.chunks:
                _complete_gradients(chunk)
            found.update(gather_global(run.chunks, _gradient))
        return prepare()

    run.optimizer.prepare_grads = capture


def _complete_gradients(chunk: Any) -> None:
    """Undoes the distributed optimizer's reduce-scatter: every rank gets every shard."""
    if not chunk.ddp_config.use_distributed_optimizer:
        return
    for groups in (chunk.bucket_groups, chunk.expert_parallel_bucket_groups):
        for group in groups:
            ranks = group.intra_distributed_optimizer_instance_group
            for bucket in group.buckets:
                shard = bucket.grad_data.chunk(ranks.size())[ranks.rank()].clone()
                torch.distributed.all_gather_into_tensor(bucket.grad_data, shard, group=ranks)


def _gradient(piece: Any) -> torch.Tensor:
    """The part of the parameter's main gradient that belongs to `piece`."""
    grad = piece.param.main_grad  # as contiguous as the parameter
    inside = piece.data.storage_offset() - piece.param.storage_offset()
    return grad.as_strided(piece.data.shape, piece.data.stride(), grad.storage_offset() + inside)


def error_of(job: Any, *args: Any, **kwargs: Any) -> tuple[str, str]:
    """The type and message of the MegakdaError that a job raises."""
    from megakda.errors import MegakdaError

    try:
        job(*args, **kwargs)
    except MegakdaError as error:
        return type(error).__name__, str(error)
    raise AssertionError("the job raised nothing")


def fit_with_small_files(overrides: Sequence[str], corpus: Any, out: str, limit: int) -> Any:
    """`fit` where no file may grow past `limit` bytes, as on a disk that is full."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        return fit(overrides, corpus, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def fit_with_free_space(overrides: Sequence[str], corpus: Any, out: str, free: int) -> Any:
    """`fit` on a disk that says it has `free` bytes left."""
    import shutil
    from unittest import mock

    usage = shutil._ntuple_diskusage(10**12, 10**12 - free, free)
    with mock.patch("shutil.disk_usage", lambda path: usage):
        return fit(overrides, corpus, out)


def train_with_bad_batches(
    overrides: Sequence[str], corpus: Any, bad: set[int], steps: int
) -> dict:
    """`steps` steps where the loss of those in `bad` (0-based) is not finite.

    Returns:
        problems per step, the guard's count, and whether the weights moved in each step.
    """
    with trainer(overrides, corpus) as run:
        micro = run.derived.micro_batches

        def poisoned(batches: Iterator[Any]) -> Iterator[Any]:
            for number, batch in enumerate(batches):
                if number // micro in bad:
                    batch["loss_mask"] = batch["loss_mask"] * float("inf")
                yield batch

        batches = [poisoned(b) for b in run._batches(run.datasets.train, 0)]
        problems, moved = [], []
        for _ in range(steps):
            before = [p.detach().clone() for c in run.chunks for p in c.parameters()]
            biases = [b.clone() for c in run.chunks for n, b in c.named_buffers() if "bias" in n]
            problems.append(run.step(batches).problem)
            after = [p for c in run.chunks for p in c.parameters()]
            biases_after = [b for c in run.chunks for n, b in c.named_buffers() if "bias" in n]
            moved.append(
                any(
                    not torch.equal(x, y)
                    for x, y in zip(before + biases, after + biases_after, strict=True)
                )
            )
            run.guard.check(run.steps_done, problems[-1])
        return {"problems": problems, "skipped": run.guard.skipped, "moved": moved}
