"""What goes wrong between ranks ends in a clear error on every rank, in time."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from megakda.config import compose, validate
from megakda.errors import CommunicationError, ConfigError
from tests import jobs
from tests.layers import context_jobs as op_jobs
from tests.parallel import context_jobs
from tests.ranks import free_port

TIMEOUT = 4  # seconds, of collectives


def _train_with_other_documents(overrides: list[str], corpus: Any, odd_rank: int) -> Any:
    """One step in which one rank has other documents than the rest."""
    import torch

    with jobs.trainer(["data.packing=documents", *overrides], corpus) as run:
        bounds = context_jobs.DOCUMENTS["uneven"]
        if torch.distributed.get_rank() == odd_rank:
            bounds = context_jobs.DOCUMENTS["one_token"]
        try:
            run.step([context_jobs.batches(bounds)])
        except CommunicationError as error:
            return str(error)
    raise AssertionError("nothing was noticed")


@pytest.mark.parametrize(
    ("world", "overrides"),
    [(3, ["parallel.context=3"]), (4, ["parallel.context=2", "parallel.tensor=2"])],
)
def test_ranks_that_disagree_about_documents(ranks, corpus, world, overrides):
    messages = ranks.run(world, _train_with_other_documents, overrides, corpus, odd_rank=1)
    for rank, message in enumerate(messages):
        assert "ranks [1] have other cu_seqlens" in message
        assert f"rank {rank}, with {10 if rank == 1 else 5} documents" in message
        assert "data.paths" in message


def _train_on_other_data(overrides: list[str], corpus: Any, packed: bool, odd_rank: int) -> Any:
    """A step in which one rank reads other tokens than those that it shares sequences with."""
    import torch

    packing = f"data.packing={'documents' if packed else 'none'}"
    with jobs.trainer([packing, "train.eval_batches=1", *overrides], corpus) as run:
        odd = torch.distributed.get_rank() == odd_rank
        run.step(run._batches(run.datasets.train, 0))
        run.validate()
        try:
            run.step(run._batches(run.datasets.train, 40 if odd else 4))
        except CommunicationError as error:
            return str(error)
    raise AssertionError("nothing was noticed")


OTHER_DATA = {
    "context": (2, ["parallel.context=2"], False),
    "tensor": (2, ["parallel=tp2"], False),
    "pipeline": (2, ["parallel=pp2"], False),
    "packed_pipeline": (2, ["parallel=pp2"], True),
    "interleaved": (4, ["parallel=pp2_vpp2", "parallel.context=2"], False),
}


@pytest.mark.parametrize("case", OTHER_DATA)
def test_ranks_that_read_other_data(ranks, corpus, case):
    world, overrides, packed = OTHER_DATA[case]
    messages = ranks.run(world, _train_on_other_data, overrides, corpus, packed, odd_rank=1)
    for message in messages:
        assert "cu_seqlens" in message or "have read others in step 2" in message
        assert "compare data.paths" in message


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_a_context_that_cannot_be_cut(layout):
    config = compose(
        ["parallel.context=4", f"parallel.context_layout={layout}", "train.context=50"]
    )
    with pytest.raises(ConfigError, match="train.context=50 must be a multiple of"):
        validate(config, 4)


def _work(mode: str, attention: str, corpus: Any) -> Any:
    """A function that does one step of something that all ranks take part in."""
    import torch

    import megakda.runtime

    megakda.runtime.install("cpu")
    if mode == "trainer":
        from megakda.runtime.distributed import named_failures

        overrides = ["parallel.context=3", f"runtime.timeout_minutes={TIMEOUT / 60}"]
        run = stack.enter_context(jobs.trainer([*overrides, "data.packing=documents"], corpus))
        source = [context_jobs.batches(context_jobs.DOCUMENTS["one"])]

        def step() -> None:
            with named_failures():
                run.step(source)

        return step
    timeout = timedelta(seconds=TIMEOUT)
    torch.distributed.init_process_group("gloo", timeout=timeout)
    context = op_jobs.make_context(mode, "zigzag", timeout=timeout, attention=attention)
    operator = op_jobs.any_operator(context, is_mla=bool(attention))
    return lambda: op_jobs.run_shared(*operator, context, gather=False)


stack = contextlib.ExitStack()  # left open: leaving the groups in order would wait for the dead


def _until_a_fault(
    rank: int, port: int, mode: str, attention: str, fault: str, corpus: Any, out: Path
) -> None:
    """Works until rank 1 dies, or stops to answer; writes what this rank then says."""
    warnings.filterwarnings("ignore")
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="3", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    step = _work(mode, attention, corpus)
    started = time.monotonic()
    try:
        for number in range(100):
            if number == 2 and rank == 1:
                if fault == "stuck":
                    time.sleep(20 * TIMEOUT)
                os._exit(1)
            started = time.monotonic()
            step()
    except CommunicationError as error:
        (out / str(rank)).write_text(f"{time.monotonic() - started:.1f} {error}")
    os._exit(0)


@pytest.mark.parametrize(
    ("mode", "attention", "fault"),
    [
        ("state", "", "dead"),
        ("heads", "", "stuck"),
        ("state", "all_gather", "dead"),
        ("state", "ring", "dead"),
        ("trainer", "", "dead"),
        ("trainer", "", "stuck"),
    ],
)
def test_a_peer_that_is_gone(tmp_path, corpus, mode, attention, fault):
    context = multiprocessing.get_context("spawn")
    args = (free_port(), mode, attention, fault, corpus, tmp_path)
    processes = [context.Process(target=_until_a_fault, args=(rank, *args)) for rank in range(3)]
    for process in processes:
        process.start()
    for rank in (0, 2):
        processes[rank].join(120)
        assert processes[rank].exitcode == 0
    processes[1].kill()
    for rank in (0, 2):
        seconds, _, message = (tmp_path / str(rank)).read_text().partition(" ")
        assert float(seconds) < 2.5 * TIMEOUT
        assert f"failed on rank {rank}" in message
        assert mode == "trainer" or "among 3 ranks that share sequences" in message
        assert "another rank has died or does not answer" in message
        assert "runtime.timeout_minutes" in message
