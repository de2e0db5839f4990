"""The training loop, and the one step."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

from megakda import __version__
from megakda.checkpoint import manager as checkpoints
from megakda.config import Config, Derived
from megakda.data.datasets import Batch, Datasets, micro_batches, order_probe
from megakda.data.packed_dataset import packing_efficiency
from megakda.data.tokenizer import Tokenizer
from megakda.errors import CheckpointError, CommunicationError
from megakda.guard import Guard
from megakda.layers.context_parallel import ContextParallel
from megakda.metrics.report import Reporter
from megakda.metrics.step_metrics import KdaTelemetry
from megakda.models.context_batch import (
    SAME_DATA,
    SameBatches,
    rank_batch,
    sequence_parallel_share,
)
from megakda.models.init import initialize
from megakda.models.kimi_linear import build_chunks, context_parallel
from megakda.models.sharding import ModelChunk
from megakda.optim.build import Schedule, build_optimizer, clip_gradients
from megakda.optim.finalize import GradFinalizer
from megakda.runtime.distributed import StopSignals, seed_step


@dataclass(frozen=True)
class StepResult:
    """What one step did; the same on every rank."""

    loss: float  # mean over the real tokens of the global batch, nats
    grad_norm: float  # before clipping
    lr: float
    tokens: int  # real tokens of the global batch
    problem: str | None  # why the update was skipped
    stop: bool  # some rank was asked to stop


class Trainer:
    """A model, its optimizer and its data on this rank, inside megatron-core's process groups.

    Args:
        config: validated.
        derived: numbers that follow from `config` and the number of ranks.
        tokenizer: of the data.
        datasets: sequences to train and validate on.
    """

    def __init__(self, config: Config, derived: Derived, tokenizer: Tokenizer, datasets: Datasets):
        self.config, self.derived, self.datasets = config, derived, datasets
        self.tokenizer = tokenizer
        self.out = Path(config.train.out)
        self.chunks = _build_model(config)
        self.optimizer = build_optimizer(config, self.chunks)
        self.schedule = Schedule(self.optimizer, config.optim, config.schedule, config.train.steps)
        self.finalizer = GradFinalizer(self.chunks)
        self.guard = Guard(config.train.guard)
        self.telemetry = KdaTelemetry(self.chunks, config.model.num_layers)
        self.same_batches = SameBatches()
        self.forward_backward = _forward_backward(
            config, self.chunks, self.finalizer, self.same_batches
        )
        self.checkpoints = checkpoints.CheckpointManager(checkpoint_root(config), config.checkpoint)
        self.signals = StopSignals()
        self.steps_done = 0
        self.sequences_consumed = 0
        self.tokens_seen = 0
        self.data_reordered = False

    def step(self, batches: list[Iterator[Batch]]) -> StepResult:
        """One optimizer step: forward and backward over all micro-batches, then the update."""
        config = self.config
        seed_step(config.train.seed, self.steps_done)
        lr = self.schedule.set(self.steps_done)
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

        losses = self.forward_backward(batches, num_microbatches=self.derived.micro_batches)
        loss, stop, differ = _agree(
            losses, self.signals.received is not None, self.same_batches.differ()
        )
        if differ:
            raise CommunicationError(
                f"ranks that share sequences have read others in step {self.steps_done + 1}: "
                f"{SAME_DATA}"
            )

        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        problem = self.guard.judge(loss, grad_norm)
        if problem is None:
            clip_gradients(self.optimizer, grad_norm, config.optim.clip_grad)
            self.optimizer.step_with_ready_grads()
            self.finalizer.update_expert_biases(config.model.moe.bias_update_rate)

        self.steps_done += 1
        self.sequences_consumed += config.train.global_batch
        self.tokens_seen += self.finalizer.tokens
        return StepResult(loss, grad_norm, lr, self.finalizer.tokens, problem, stop)

    def fit(self) -> None:
        """Trains from where the run is to `train.steps`, validating and saving on the way.

        Raises:
            TrainingDiverged: too many bad steps in a row.
            CheckpointError: a save failed, or the checkpoint to resume cannot be loaded.
        """
        config, train = self.config, self.config.train
        resumed = self.resume()
        with self.signals, self._reporter() as report:
            report.start(resumed, self.steps_done, self.tokens_seen, self.data_reordered)
            batches = self._batches(self.datasets.train, self.sequences_consumed)
            stopped = False
            while self.steps_done < train.steps and not stopped:
                watched = _due(self.steps_done + 1, config.logging.telemetry_every)
                self.telemetry.watch(watched)
                started = time.perf_counter()
                result = self.step(batches)
                seconds = time.perf_counter() - started

                stopped, last = result.stop, self.steps_done == train.steps
                validates = self.datasets.valid is not None and (
                    last or _due(self.steps_done, train.eval_every)
                )
                report.step(
                    self.steps_done,
                    self.tokens_seen,
                    result,
                    seconds,
                    skipped=self.guard.skipped,
                    valid_loss=self.validate() if validates else None,
                    telemetry=self.telemetry if watched else None,
                )
                self.guard.check(self.steps_done, result.problem)
                self.checkpoints.poll()
                if last or stopped or _due(self.steps_done, train.save_every):
                    report.saved(self.save())
            self.checkpoints.close()
            report.end(self.steps_done, self.signals.received, stopped)

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss in nats per token over `train.eval_batches` global batches, always the same."""
        _sync_parameters(self.config, self.chunks, hooks=False)
        for chunk in self.chunks:
            chunk.eval()
        batches = self._batches(self.datasets.valid, consumed=0)
        losses = self.forward_backward(
            batches,
            num_microbatches=self.derived.micro_batches * self.config.train.eval_batches,
            forward_only=True,
        )
        for chunk in self.chunks:
            chunk.train()
        _sync_parameters(self.config, self.chunks, hooks=True)
        return _agree(losses)[0]

    def save(self) -> Path:
        """Saves everything that the next step depends on."""
        _sync_parameters(self.config, self.chunks, hooks=False)
        path = self.checkpoints.save(
            self.steps_done,
            self.chunks,
            self.optimizer,
            trainer_state={
                "steps_done": self.steps_done,
                "sequences_consumed": self.sequences_consumed,
                "tokens_seen": self.tokens_seen,
                "guard": self.guard.state_dict(),
                "data_order": order_probe(self.datasets.train, self.sequences_consumed),
            },
            manifest={
                "megakda": __version__,
                "model": dataclasses.asdict(self.config.model),
                "parallel": dataclasses.asdict(self.config.parallel),
                "precision": self.config.precision,
                "tokenizer": {
                    "spec": self.tokenizer.spec,
                    "fingerprint": self.tokenizer.fingerprint,
                },
                "sequences_consumed": self.sequences_consumed,
                "tokens_seen": self.tokens_seen,
            },
        )
        _sync_parameters(self.config, self.chunks, hooks=True)
        return path

    def resume(self) -> Path | None:
        """Loads what `train.resume` asks for; returns the checkpoint, or None for a fresh start.

        Raises:
            CheckpointError: it cannot be loaded, or holds weights alone.
        """
        path = checkpoints.resolve(self.config.train.resume, self.checkpoints.root)
        if path is None:
            if self.config.train.weights is not None:
                self._begin_with(_found_by_rank_0(self.config.train.weights))
            return None
        checkpoints.check_resumable(path)
        self._check_tokenizer(path)
        state = checkpoints.load(
            path, self.chunks, self.optimizer, dataclasses.asdict(self.config.model)
        )
        self.steps_done = state["steps_done"]
        self.sequences_consumed = state["sequences_consumed"]
        self.tokens_seen = state["tokens_seen"]
        self.guard.load_state_dict(state["guard"])
        probe = order_probe(self.datasets.train, self.sequences_consumed)
        self.data_reordered = probe != state["data_order"]
        return path

    def _begin_with(self, path: Path) -> None:
        """Loads the weights and expert biases of a checkpoint, and nothing else of it."""
        self._check_tokenizer(path)
        checkpoints.load(path, self.chunks, None, dataclasses.asdict(self.config.model))
        self.optimizer.reload_model_params()  # the optimizer's fp32 copies

    def _check_tokenizer(self, path: Path) -> None:
        saved_with = checkpoints.read_manifest(path)["tokenizer"]
        if saved_with["fingerprint"] != self.tokenizer.fingerprint:
            raise CheckpointError(
                f"{path} was trained with the tokenizer {saved_with['spec']}, and data.tokenizer="
                f"{self.tokenizer.spec} gives other ids: set data.tokenizer back, or start a new "
                "run in another train.out"
            )

    def close(self) -> None:
        """Frees the model and, with it, its process groups' threads.

        Gradient hooks refer to the model, and the last autograd graph, which the token dispatchers
        keep, refers to the hooks: a cycle that Python cannot collect. A process that builds
        several models, as a sweep does, would keep them all.
        """
        for chunk in self.chunks:
            chunk.grad_accs.clear()
            for module in chunk.modules():
                if hasattr(module, "token_dispatcher"):
                    module.token_dispatcher = None
        self.chunks.clear()

    def _reporter(self) -> Reporter:
        packing = None
        if self.config.data.packing != "none":
            packing = packing_efficiency(self.datasets.train)
        return Reporter(
            self.config,
            self.derived,
            self.out,
            self.steps_done,
            self.chunks,
            self.finalizer,
            packing,
        )

    def _batches(self, dataset: Any, consumed: int) -> list[Iterator[Batch]]:
        """One iterator per chunk of this rank: every chunk walks through the same micro-batches."""
        return [
            micro_batches(
                dataset,
                consumed,
                self.config.train.micro_batch,
                parallel_state.get_data_parallel_rank(),
                self.derived.data_parallel,
                self.config.data.num_workers,
            )
            for _ in self.chunks
        ]


def checkpoint_root(config: Config) -> Path:
    """Where a run keeps its checkpoints."""
    return Path(config.train.out) / "checkpoints"


def forward_step(
    batches: Iterator[Batch],
    chunk: ModelChunk,
    context: ContextParallel,
    packed: bool,
    same_batches: SameBatches,
) -> tuple[torch.Tensor, Any]:
    """One micro-batch through one chunk, as megatron-core's schedules call it.

    Args:
        context: how this rank shares sequences with others.
        packed: whether batches say where documents begin, which every chunk has to know.
        same_batches: compares what ranks read.

    Returns:
        The chunk's output and the function that turns the last chunk's output, per-token losses
        [b, s], into (summed loss, real tokens, both for the log).
    """
    model = chunk.module
    if not (model.pre_process or model.post_process or packed):
        return chunk(None, None, None), None
    whole = next(batches)
    batch = rank_batch(whole, context, torch.device(torch.cuda.current_device()))
    same_batches.see(whole, batch.documents)
    padding_mask = batch.padding_mask
    if padding_mask is not None and model.config.sequence_parallel and not model.pre_process:
        padding_mask = sequence_parallel_share(padding_mask)
    output = chunk(
        batch.tokens,
        batch.position_ids,
        None,
        labels=batch.labels,
        packed_seq_params=batch.documents,
        padding_mask=padding_mask,
    )

    def summed_loss(
        per_token: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        loss = (per_token.float() * batch.loss_mask).sum()
        tokens = batch.loss_mask.sum()
        return loss, tokens.to(torch.int), {"loss": torch.stack([loss.detach(), tokens]).double()}

    return output, summed_loss


def _build_model(config: Config) -> list[ModelChunk]:
    """This rank's chunks, initialised and wrapped for data parallelism."""
    parallel = config.parallel
    chunks = build_chunks(
        config.model, parallel, config.precision, config.train.context, config.runtime.attention
    )
    initialize(chunks, config.train.seed, config.model.init_std)
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.distributed_optimizer,
        check_for_nan_in_grad=False,  # the guard looks at the gradient norm, and skips
    )
    return [
        DistributedDataParallel(chunk.config, settings, chunk, disable_bucketing=i > 0)
        for i, chunk in enumerate(chunks)
    ]


def _forward_backward(
    config: Config, chunks: list[ModelChunk], finalizer: GradFinalizer, same_batches: SameBatches
) -> Any:
    """megatron-core's schedule for this layout, with everything that stays the same bound."""
    core = chunks[0].config
    core.finalize_model_grads_func = finalizer
    core.grad_scale_func = None  # bf16 and fp32 need no loss scaling
    if config.parallel.overlap_grad_reduce:
        core.no_sync_func = _per_chunk([chunk.no_sync for chunk in chunks])
    if config.parallel.overlap_param_gather:
        core.param_sync_func = _per_chunk([chunk.start_param_sync for chunk in chunks])
    schedule = partial(
        get_forward_backward_func(),
        forward_step_func=partial(
            forward_step,
            context=context_parallel(config.parallel),
            packed=config.data.packing != "none",
            same_batches=same_batches,
        ),
        model=chunks,
        seq_length=config.train.context,
        micro_batch_size=config.train.micro_batch,
    )

    def run(
        batches: list[Iterator[Batch]], num_microbatches: int, forward_only: bool = False
    ) -> list[dict[str, torch.Tensor]]:
        return schedule(
            data_iterator=batches if len(chunks) > 1 else batches[0],
            num_microbatches=num_microbatches,
            forward_only=forward_only,
        )

    return run


def _per_chunk(functions: list[Any]) -> Any:
    return functions if len(functions) > 1 else functions[0]


def _agree(
    losses: list[dict[str, torch.Tensor]], stop: bool = False, differ: bool = False
) -> tuple[float, bool, bool]:
    """The mean loss over all real tokens, and whether any rank says so of the flags."""
    totals = torch.zeros(4, dtype=torch.float64, device=torch.cuda.current_device())
    # The last stage has the losses, the same on all its tensor-parallel ranks.
    if losses and parallel_state.get_tensor_model_parallel_rank() == 0:
        totals[:2] = sum(entry["loss"] for entry in losses)
    totals[2], totals[3] = float(stop), float(differ)
    torch.distributed.all_reduce(totals)
    loss, tokens, stops, differs = totals.tolist()
    return loss / max(tokens, 1.0), stops > 0, differs > 0


def _sync_parameters(config: Config, chunks: list[ModelChunk], hooks: bool) -> None:
    """With overlapped parameter gathering: completes it and pauses the hooks, or restores them."""
    if not config.parallel.overlap_param_gather:
        return
    for chunk in chunks:
        chunk.enable_forward_pre_hook() if hooks else chunk.disable_forward_pre_hook()


def _found_by_rank_0(weights: str) -> Path:
    """The checkpoint of `train.weights`; that run may be saving, and ranks find different ones."""
    path = [checkpoints.find(weights, "train.weights")]
    torch.distributed.broadcast_object_list(path, src=0)
    return path[0]


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
