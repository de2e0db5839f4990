"""Process groups, per-step seeds and stop signals."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
from collections.abc import Iterator
from datetime import timedelta
from types import FrameType

import torch

from megakda.config.schema import ParallelConfig, RuntimeConfig
from megakda.errors import CommunicationError


def world_size() -> int:
    """Ranks of this run, from torchrun's environment; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's rank, from torchrun's environment; 0 without it."""
    return int(os.environ.get("RANK", "0"))


@contextlib.contextmanager
def process_groups(
    parallel: ParallelConfig, runtime: RuntimeConfig, device: torch.device
) -> Iterator[None]:
    """torch's and megatron-core's process groups, made on entry and taken down on exit.

    gloo on CPU, nccl on CUDA. `megakda.runtime.install` comes first.
    """
    _limit_threads(runtime, device)
    if "MASTER_ADDR" not in os.environ:  # started without torchrun: a world of one
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
    torch.distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        timeout=timedelta(minutes=runtime.timeout_minutes),
    )
    try:
        with model_parallel_groups(parallel, runtime.timeout_minutes):
            yield
    finally:
        torch.distributed.destroy_process_group()
        gc.collect()  # a group's threads end with the last object that refers to it


@contextlib.contextmanager
def model_parallel_groups(
    parallel: ParallelConfig, timeout_minutes: float = 30.0, gloo: bool = True
) -> Iterator[None]:
    """megatron-core's process groups inside torch's, for as long as the context lasts.

    Args:
        timeout_minutes: of their collectives; they do not inherit that of the world.
        gloo: also make CPU groups beside the main ones.
    """
    from megatron.core import parallel_state, tensor_parallel

    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=(
                parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
            ),
            context_parallel_size=parallel.context,
            hierarchical_context_parallel_sizes=(
                [parallel.context_heads, parallel.context // parallel.context_heads]
                if parallel.context_heads
                else None
            ),
            expert_model_parallel_size=parallel.expert,
            expert_tensor_parallel_size=parallel.expert_tensor,
            distributed_timeout_minutes=timeout_minutes,
            create_gloo_process_groups=gloo,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(1)  # creates the generators' tracker
        yield
    finally:
        parallel_state.destroy_model_parallel()


DEAD_OR_STUCK = (
    "another rank has died or does not answer: its own output says why "
    "(runtime.timeout_minutes sets how long to wait)"
)
_GLOO_FAILURES = ("gloo/transport", "pair closure", "Connection closed by peer", "Connection reset")


def first_line(error: BaseException) -> str:
    """What an error says, without the stack that backends append."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def named_failures() -> Iterator[None]:
    """Turns what a backend raises when a peer is gone into one typed error.

    Raises:
        CommunicationError: in the place of torch's DistError, or gloo's bare RuntimeError.
    """
    try:
        yield
    except RuntimeError as error:
        is_gloo = type(error) is RuntimeError and any(x in str(error) for x in _GLOO_FAILURES)
        if not is_gloo and not isinstance(error, torch.distributed.DistError):
            raise
        raise CommunicationError(
            f"communication failed on rank {rank()}: {first_line(error)}; {DEAD_OR_STUCK}"
        ) from error


def seed_step(seed: int, step: int) -> None:
    """Seeds every random generator from the run's seed and the step.

    A resumed run draws what the uninterrupted one would have drawn, so no generator state has to be
    saved, and a change of layout does not matter to it.
    """
    from megatron.core import tensor_parallel

    tensor_parallel.model_parallel_cuda_manual_seed((seed * 1_000_003 + step) % 2**31)


class StopSignals:
    """Remembers SIGTERM and SIGINT instead of dying; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == "SIGINT":
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name


def _limit_threads(runtime: RuntimeConfig, device: torch.device) -> None:
    if runtime.threads is not None:
        torch.set_num_threads(runtime.threads)
    elif device.type == "cpu":
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_ranks))
