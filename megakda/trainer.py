"""The training loop, and the one step."""

from __future__ import annotations

import dataclasses
import math
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
from megakda.config.timetable import Stage, Timetable
from megakda.data.datasets import Batch, Datasets, StreamPositions, micro_batches
from megakda.data.packed_dataset import packing_efficiency
from megakda.data.tokenizer import Tokenizer
from megakda.errors import CheckpointError, CommunicationError
from megakda.guard import Guard
from megakda.layers.context_parallel import ContextParallel
from megakda.metrics.report import Reporter
from megakda.metrics.step_metrics import KdaTelemetry, Telemetry
from megakda.models.context_batch import (
    SAME_DATA,
    SameBatches,
    rank_batch,
    sequence_parallel_share,
)
from megakda.models.init import initialize
from megakda.models.kimi_linear import build_chunks, context_parallel
from megakda.models.sharding import ModelChunk
from megakda.optim.build import assign_parameters, build_optimizer, clip_gradients
from megakda.optim.finalize import GradFinalizer
from megakda.optim.matrices import assignment_table
from megakda.optim.qk_clip import QKClip
from megakda.optim.schedule import Schedule
from megakda.optim.telemetry import UpdateTelemetry
from megakda.runtime.distributed import StopSignals, seed_step


@dataclass(frozen=True)
class StepResult:
    """What one step did; the same on every rank."""

    loss: float  # mean over the tokens of the global batch that count (data.loss), nats; NaN: none
    grad_norm: float  # before clipping
    lr: float
    tokens: int  # of the global batch, without padding
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
        self.timetable = derived.timetable
        self.tokenizer = tokenizer
        self.out = Path(config.train.out)
        self.chunks = _build_model(config, self.timetable.longest_context)
        self.assignments = assign_parameters(config, self.chunks)
        self.optimizer = build_optimizer(config, self.chunks, self.assignments)
        self.schedule = Schedule(self.optimizer, self.timetable, config.optim.weight_decay)
        self.finalizer = GradFinalizer(self.chunks)
        self.guard = Guard(config.train.guard)
        self.qk_clip = QKClip(config, self.chunks, self.optimizer)
        self.telemetry = Telemetry(
            KdaTelemetry(self.chunks, config.model.num_layers),
            UpdateTelemetry(self.optimizer, self.assignments),
        )
        self.same_batches = SameBatches()
        self.forward_backward = _forward_backward(
            config, self.timetable, self.chunks, self.finalizer, self.same_batches
        )
        self.stage_ends = _stage_ends(config, self.timetable)
        self.checkpoints = checkpoints.CheckpointManager(
            checkpoint_root(config), config.checkpoint, keep=self.stage_ends
        )
        self.signals = StopSignals()
        self.steps_done = 0
        self.positions = StreamPositions(self.timetable, datasets)
        self.tokens_seen = 0
        self._reading: tuple[Stage, list[Iterator[Batch]]] | None = None

    def step(self, batches: list[Iterator[Batch]]) -> StepResult:
        """One optimizer step: forward and backward over all micro-batches, then the update."""
        config, now = self.config, self.timetable.at(self.steps_done)
        seed_step(config.train.seed, self.steps_done)
        lr = self.schedule.set(self.steps_done)
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.qk_clip.begin_step()

        losses = self.forward_backward(batches, now.micro_batches, now.stage)
        loss, tokens, stop, differ = _agree(
            losses, self.signals.received is not None, self.same_batches.differ()
        )
        if differ:
            raise CommunicationError(
                f"ranks that share sequences have read others in step {self.steps_done + 1}: "
                f"{SAME_DATA}"
            )

        self.qk_clip.end_forward()
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        stream = self.timetable.streams[now.stage.stream]
        problem = self.guard.judge(loss, grad_norm, stream.identity)
        if problem is None:
            clip_gradients(self.optimizer, grad_norm, config.optim.clip_grad)
            self.optimizer.step_with_ready_grads()  # and clips the heads that `qk_clip` has found
            self.finalizer.update_expert_biases(now.expert_bias_rate)

        self.steps_done += 1
        self.positions.consumed[now.stage.stream] += now.global_batch
        self.tokens_seen += tokens
        return StepResult(_or_nan(loss), grad_norm, lr, tokens, problem, stop)

    def fit(self) -> None:
        """Trains from where the run is to its end, validating and saving on the way.

        Raises:
            TrainingDiverged: too many bad steps in a row.
            CheckpointError: a save failed, or the checkpoint to resume cannot be loaded.
        """
        config, train = self.config, self.config.train
        resumed = self.resume()
        with self.signals, self._reporter() as report:
            report.start(resumed, self.steps_done, self.tokens_seen, self.positions.reordered)
            stopped = False
            while self.steps_done < self.timetable.steps and not stopped:
                batches = self.batches()
                watched = _due(self.steps_done + 1, config.logging.telemetry_every)
                self.telemetry.watch(watched)
                started = time.perf_counter()
                result = self.step(batches)
                seconds = time.perf_counter() - started

                stopped, last = result.stop, self.steps_done == self.timetable.steps
                validates = train.eval_batches > 0 and (
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
                border = self.steps_done in self.stage_ends
                if last or stopped or border or _due(self.steps_done, train.save_every):
                    report.saved(self.save())
            self.checkpoints.close()
            report.end(self.steps_done, self.signals.received, stopped)

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss in nats per token over `train.eval_batches` global batches; NaN if none counts.

        Always the same sequences of the data and context of the stage that the last step was in.
        """
        stage = self.timetable.at(max(0, self.steps_done - 1)).stage
        batches = self._batches(self.datasets.streams[stage.stream].valid, 0, stage)
        micro_batches = stage.batch // (stage.micro_batch * self.derived.data_parallel)
        _sync_parameters(self.config, self.chunks, hooks=False)
        for chunk in self.chunks:
            chunk.eval()
        losses = self.forward_backward(
            batches, micro_batches * self.config.train.eval_batches, stage, forward_only=True
        )
        for chunk in self.chunks:
            chunk.train()
        _sync_parameters(self.config, self.chunks, hooks=True)
        return _or_nan(_agree(losses)[0])

    def save(self) -> Path:
        """Saves everything that the next step depends on."""
        _sync_parameters(self.config, self.chunks, hooks=False)
        path = self.checkpoints.save(
            self.steps_done,
            self.chunks,
            self.optimizer,
            trainer_state={
                "steps_done": self.steps_done,
                "tokens_seen": self.tokens_seen,
                "guard": self.guard.state_dict(),
                **self.positions.state_dict(),
            },
            manifest={
                "megakda": __version__,
                "model": dataclasses.asdict(self.config.model),
                "parallel": dataclasses.asdict(self.config.parallel),
                "precision": self.config.precision,
                "optimizer": self.config.optim.name,
                "tokenizer": {
                    "spec": self.tokenizer.spec,
                    "fingerprint": self.tokenizer.fingerprint,
                },
                "sequences_consumed": sum(self.positions.consumed),
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
        path = resume_point(self.config)
        if path is None:
            weights = self.config.train.weights
            if weights is not None:
                self._begin_with(_from_rank_0(checkpoints.find(weights, "train.weights")))
            return None
        checkpoints.check_resumable(path, self.config.optim.name)
        self._check_tokenizer(path)
        state = checkpoints.load(
            path, self.chunks, self.optimizer, dataclasses.asdict(self.config.model)
        )
        self.steps_done = state["steps_done"]
        self.tokens_seen = state["tokens_seen"]
        self.guard.load_state_dict(state["guard"])
        self.positions.load_state_dict(state)
        if self.positions.begun and torch.distributed.get_rank() == 0:
            numbers = ", ".join(map(str, self.positions.begun))
            print(f"WARNING: {path} has read nothing of the data of stage {numbers}: begun afresh")
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
        packing = {
            n: packing_efficiency(data.train)
            for n, data in self.datasets.streams.items()
            if self.timetable.streams[n].data.packing != "none"
        }
        return Reporter(
            self.config,
            self.derived,
            self.out,
            self.steps_done,
            self.chunks,
            self.finalizer,
            self.qk_clip,
            assignment_table(self.assignments),
            packing,
        )

    def batches(self) -> list[Iterator[Batch]]:
        """Micro-batches from the next step on; a stage may read other data, so each begins anew."""
        stage = self.timetable.at(self.steps_done).stage
        if self._reading is None or self._reading[0] is not stage:
            data, consumed = self.datasets.streams[stage.stream], self.positions.consumed
            self._reading = stage, self._batches(data.train, consumed[stage.stream], stage)
        return self._reading[1]

    def _batches(
        self, dataset: Any, consumed: int, stage: Stage | None = None
    ) -> list[Iterator[Batch]]:
        """One iterator per chunk of this rank: every chunk walks through the same micro-batches.

        Args:
            stage: whose micro-batches these are; None: of the next step's.
        """
        stage = stage or self.timetable.at(self.steps_done).stage
        return [
            micro_batches(
                dataset,
                consumed,
                stage.micro_batch,
                parallel_state.get_data_parallel_rank(),
                self.derived.data_parallel,
                self.timetable.streams[stage.stream].data.num_workers,
            )
            for _ in self.chunks
        ]


def checkpoint_root(config: Config) -> Path:
    """Where a run keeps its checkpoints."""
    return Path(config.train.out) / "checkpoints"


def resume_point(config: Config) -> Path | None:
    """The checkpoint that `train.resume` means, the same on every rank. Collective."""
    return _from_rank_0(checkpoints.resolve(config.train.resume, checkpoint_root(config)))


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
        [b, s], into (summed loss, tokens that count, both for the log with all real tokens).
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
        counted = batch.loss_mask.sum()
        real = torch.ones_like(batch.loss_mask)
        if batch.padding_mask is not None:
            real = real.masked_fill(batch.padding_mask, 0)
        sums = torch.stack([loss.detach(), counted, real.sum()]).double()
        return loss, counted.to(torch.int), {"loss": sums}

    return output, summed_loss


def _build_model(config: Config, context: int) -> list[ModelChunk]:
    """This rank's chunks for up to `context` tokens, initialised, wrapped for data parallelism."""
    parallel = config.parallel
    chunks = build_chunks(
        config.model, parallel, config.precision, context, config.runtime.attention
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
    config: Config,
    timetable: Timetable,
    chunks: list[ModelChunk],
    finalizer: GradFinalizer,
    same_batches: SameBatches,
) -> Any:
    """megatron-core's schedule for this layout, with everything that stays the same bound."""
    core = chunks[0].config
    core.finalize_model_grads_func = finalizer
    core.grad_scale_func = None  # bf16 and fp32 need no loss scaling
    if config.parallel.overlap_grad_reduce:
        core.no_sync_func = _per_chunk([chunk.no_sync for chunk in chunks])
    if config.parallel.overlap_param_gather:
        core.param_sync_func = _per_chunk([chunk.start_param_sync for chunk in chunks])
    schedule = partial(get_forward_backward_func(), model=chunks)
    step = partial(
        forward_step, context=context_parallel(config.parallel), same_batches=same_batches
    )

    def run(
        batches: list[Iterator[Batch]],
        num_microbatches: int,
        stage: Stage = timetable.stages[0],
        forward_only: bool = False,
    ) -> list[dict[str, torch.Tensor]]:
        packed = timetable.streams[stage.stream].data.packing != "none"
        return schedule(
            forward_step_func=partial(step, packed=packed),
            data_iterator=batches if len(chunks) > 1 else batches[0],
            num_microbatches=num_microbatches,
            seq_length=stage.context,
            micro_batch_size=stage.micro_batch,
            forward_only=forward_only,
        )

    return run


def _per_chunk(functions: list[Any]) -> Any:
    return functions if len(functions) > 1 else functions[0]


def _agree(
    losses: list[dict[str, torch.Tensor]], stop: bool = False, differ: bool = False
) -> tuple[float | None, int, bool, bool]:
    """The mean loss over the tokens that count, if any does, the number of real tokens, and whether
    any rank says so of the flags."""
    totals = torch.zeros(5, dtype=torch.float64, device=torch.cuda.current_device())
    # The last stage has the losses, the same on all its tensor-parallel ranks.
    if losses and parallel_state.get_tensor_model_parallel_rank() == 0:
        totals[:3] = sum(entry["loss"] for entry in losses)
    totals[3], totals[4] = float(stop), float(differ)
    torch.distributed.all_reduce(totals)
    loss, counted, tokens, stops, differs = totals.tolist()
    return loss / counted if counted else None, int(tokens), stops > 0, differs > 0


def _sync_parameters(config: Config, chunks: list[ModelChunk], hooks: bool) -> None:
    """With overlapped parameter gathering: completes it and pauses the hooks, or restores them."""
    if not config.parallel.overlap_param_gather:
        return
    for chunk in chunks:
        chunk.enable_forward_pre_hook() if hooks else chunk.disable_forward_pre_hook()


def _from_rank_0(path: Any) -> Any:
    """Rank 0's checkpoint: another run may be saving there, and ranks find different ones."""
    found = [path]
    torch.distributed.broadcast_object_list(found, src=0)
    return found[0]


def _stage_ends(config: Config, timetable: Timetable) -> set[int]:
    """Steps after which a stage of `schedule.stages` ends and another begins.

    Later runs begin there with another stage, and `train.save_every` seldom falls on them.
    """
    if config.schedule.stages is None or not config.train.save_every:
        return set()
    return {stage.first_step for stage in timetable.stages[1:]}


def _or_nan(loss: float | None) -> float:
    return math.nan if loss is None else loss


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
