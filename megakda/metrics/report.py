"""Everything a run tells: the opening summary, the progress line, metric rows, closing words."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megakda.config import Config, Derived, to_yaml
from megakda.metrics.progress import Progress, format_count
from megakda.metrics.step_metrics import Telemetry, memory_gib, parameter_and_expert_metrics
from megakda.metrics.writers import MetricWriters, open_writers
from megakda.models.flops import flops_per_token, mfu, peak_flops
from megakda.models.params import count_parameters
from megakda.models.sharding import ModelChunk

if TYPE_CHECKING:
    from megakda.data.packed_dataset import PackingEfficiency
    from megakda.optim.finalize import GradFinalizer
    from megakda.optim.qk_clip import QKClip
    from megakda.trainer import StepResult


class Reporter:
    """Speaks on rank 0; the other ranks take part in the reductions and stay silent.

    A context manager: files and the live line are closed however the run ends.
    """

    def __init__(
        self,
        config: Config,
        derived: Derived,
        out: Path,
        start_step: int,
        chunks: list[ModelChunk],
        finalizer: GradFinalizer,
        qk_clip: QKClip,
        assignment_table: list[str],
        packing: dict[int, PackingEfficiency],
    ):
        self.config, self.derived, self.out = config, derived, out
        self.chunks, self.finalizer, self.qk_clip = chunks, finalizer, qk_clip
        self.assignment_table = assignment_table
        self.packing = packing
        # Attention ends with a document, so that its length counts, not that of the sequence.
        self.flops = [
            flops_per_token(
                config.model, packing[n].document_tokens if n in packing else stream.context
            )
            for n, stream in enumerate(derived.timetable.streams)
        ]
        self.peak = _peak_flops(config)
        self.progress: Progress | None = None
        self.writers: MetricWriters | None = None
        if torch.distributed.get_rank() == 0:
            out.mkdir(parents=True, exist_ok=True)
            (out / "config.yaml").write_text(to_yaml(config))
            self.writers = open_writers(
                config.logging, out, dataclasses.asdict(config), resume_step=start_step
            )
            self.progress = Progress(derived.steps, start_step)

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.progress:
            self.progress.close()
        if self.writers:
            self.writers.close()

    def start(
        self,
        resumed: Path | None,
        steps_done: int,
        tokens_seen: int,
        data_reordered: bool,
    ) -> None:
        """What will run, and how the derived numbers came about."""
        model = self.config.model
        count = count_parameters(model)
        self._note(f"megakda: {model.name}, {self.config.precision}, into {self.out}")
        self._note(
            f"  parameters {count.total:,}, active per token {count.active:,} (top-k and shared "
            "experts, without the input embedding)"
        )
        for line in self.derived.lines(self.config):
            self._note(f"  {line}")
        for number in self.derived.timetable.streams_from(steps_done):
            for line in self._stream_lines(number):
                self._note(f"  {line}")
        for line in self.assignment_table:
            self._note(f"    {line}")
        if resumed:
            self._note(f"  resumed from {resumed} after step {steps_done}, {tokens_seen:,} tokens")
        if data_reordered:
            self._note(
                "  WARNING: the sequences come in another order than before this resume (another "
                "length over several epochs, train.context, train.seed, data.split, "
                "data.packing, data.overlong or corpus): some may repeat, some may be left out"
            )

    def _stream_lines(self, number: int) -> list[str]:
        """What a token of a stream costs, and how its rows are filled."""
        timetable, flops, packing = (
            self.derived.timetable,
            self.flops[number],
            self.packing.get(number),
        )
        stages = [str(stage.number) for stage in timetable.stages if stage.stream == number]
        several = "s" if len(stages) > 1 else ""
        whose = f"stage{several} {', '.join(stages)}: " if len(timetable.streams) > 1 else ""
        lines = [
            f"{whose}FLOPs per token {format_count(flops.training)} = 3 x "
            f"{format_count(flops.forward)} forward at "
            f"{'documents of' if packing else 'context'} {flops.context:,}; MFU "
            + (f"against {self.peak / 1e12:,.0f} TFLOP/s" if self.peak else "not known here")
        ]
        if packing:
            lines.append(f"{whose}data.packing={timetable.streams[number].data.packing}: {packing}")
        return lines

    def step(
        self,
        step: int,
        tokens_seen: int,
        result: StepResult,
        seconds: float,
        *,
        skipped: int,
        valid_loss: float | None,
        telemetry: Telemetry | None,
    ) -> None:
        """The progress line, and a row of metrics where one is due. Collective when it is.

        Args:
            step: 1-based.
            tokens_seen: real tokens since the start of the run.
            seconds: of this step.
            skipped: steps whose update was skipped since the start of the run.
            valid_loss: nats per token, on the steps that validate.
            telemetry: given on the steps that recorded it.
        """
        tokens_per_s = result.tokens / seconds
        if self.progress:
            self.progress.update(step, result.loss, tokens_per_s, result.grad_norm, result.lr)
        if result.problem:
            self._note(f"step {step} skipped: {result.problem}")
        if valid_loss is not None:
            self._note(f"step {step}: validation loss {valid_loss:.4f}")
        extra = telemetry is not None or valid_loss is not None or result.problem is not None
        if step % self.config.logging.every and not extra:
            return
        planned = self.derived.timetable.at(step - 1)
        flops = self.flops[planned.stage.stream].training
        per_device = tokens_per_s * flops / self.derived.world_size
        row: dict[str, Any] = {
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            "tokens": tokens_seen,
            "tokens_per_s": tokens_per_s,
            "step_time_s": seconds,
            "tflops_per_s": per_device / 1e12,
            "memory_gib": memory_gib(torch.device(torch.cuda.current_device())),
            "skipped_steps": skipped,
            **parameter_and_expert_metrics(self.chunks, self.finalizer),
            **self.qk_clip.metrics(),
        }
        if self.peak:
            row["mfu"] = mfu(tokens_per_s, flops, self.derived.world_size, self.peak)
        if self.config.schedule.stages is not None:
            row["stage"] = planned.stage.number
            row["context"], row["batch"] = planned.context, planned.global_batch
        if valid_loss is not None:
            row["valid_loss"] = valid_loss
        if telemetry is not None:
            row.update(telemetry.collect())
        if self.writers:
            self.writers.write(step, row)

    def saved(self, path: Path) -> None:
        """A checkpoint was written, or is being written in the background."""
        verb = "saving in the background" if self.config.checkpoint.async_save else "saved"
        self._note(f"{verb} {path}")

    def end(self, step: int, signal: str | None, stopped: bool) -> None:
        """How the run ended."""
        if stopped:
            self._note(
                f"stopped by {signal or 'a signal on another rank'} after step {step}; the same "
                "command continues from the checkpoint"
            )
        else:
            self._note(f"done: {step} steps; metrics in {self.out / 'metrics.jsonl'}")

    def _note(self, text: str) -> None:
        if self.progress:
            self.progress.note(text)


def _peak_flops(config: Config) -> float | None:
    """FLOP/s of one device, for MFU: the recipe's number, or the GPU's data sheet."""
    if config.runtime.peak_tflops is not None:
        return config.runtime.peak_tflops * 1e12
    if torch.device(torch.cuda.current_device()).type != "cuda":
        return None
    return peak_flops(torch.cuda.get_device_name())
