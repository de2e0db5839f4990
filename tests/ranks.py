"""A pool of processes that act as the ranks of distributed tests, kept alive between tests.

Importing torch and megatron-core takes seconds; a job on a warm pool takes tenths. A job is a
module-level function that runs on every rank of a fresh world and returns something picklable.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import psutil
from torch.distributed import TCPStore

JOB_SECONDS = 240


class RankError(AssertionError):
    """A job raised on some rank; the message holds that rank's traceback."""


class RankPool:
    """Up to `size` processes; `run` uses as many as it needs."""

    def __init__(self, size: int):
        self.size = size
        self._workers: list[tuple[Any, Connection]] = []

    def run(self, ranks: int, job: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """``job(*args, **kwargs)`` on each of `ranks` ranks; the results in rank order.

        Raises:
            RankError: the job raised, or did not end in time. The pool starts afresh.
        """
        self._start(ranks)
        # Made here, as torchrun does, it is there when the ranks look for it.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        pipes = [pipe for _, pipe in self._workers[:ranks]]
        for rank, pipe in enumerate(pipes):
            pipe.send((rank, ranks, store.port, job, args, kwargs))
        results: dict[int, Any] = {}
        pending = {pipe: rank for rank, pipe in enumerate(pipes)}
        while pending:
            ready = wait(list(pending), timeout=JOB_SECONDS)
            if not ready:
                self.close()
                raise RankError(f"ranks {sorted(pending.values())} did not end in {JOB_SECONDS} s")
            for pipe in ready:
                rank = pending.pop(pipe)
                try:
                    ok, value = pipe.recv()
                except EOFError:
                    ok, value = False, "the process died"
                if not ok:
                    self.close()
                    raise RankError(f"rank {rank} of {ranks}: {value}")
                results[rank] = value
        return [results[rank] for rank in range(ranks)]

    def close(self) -> None:
        """Ends all processes."""
        for process, pipe in self._workers:
            pipe.close()
            # A rank that has saved has helpers of its own, which would outlive it.
            with contextlib.suppress(psutil.NoSuchProcess):
                for helper in psutil.Process(process.pid).children(recursive=True):
                    helper.kill()
            process.kill()
            process.join()
        self._workers = []

    def _start(self, ranks: int) -> None:
        assert ranks <= self.size
        context = multiprocessing.get_context("spawn")
        while len(self._workers) < ranks:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,))
            process.start()
            theirs.close()
            self._workers.append((process, ours))


def _serve(pipe: Connection) -> None:
    import warnings

    warnings.filterwarnings("ignore")
    import torch

    import megakda.runtime

    torch.set_num_threads(1)
    megakda.runtime.install("cpu")
    import megakda.trainer  # noqa: F401 - what most jobs need

    gc.freeze()  # every job ends with a collection, which need not look through the libraries
    while True:
        try:
            rank, ranks, port, job, args, kwargs = pipe.recv()
        except EOFError:
            return
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(ranks),
            LOCAL_WORLD_SIZE=str(ranks),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            TORCHELASTIC_USE_AGENT_STORE="True",
            TORCHELASTIC_RESTART_COUNT="0",
        )
        try:
            pipe.send((True, job(*args, **kwargs)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


def free_port() -> int:
    """A TCP port that nobody takes before it is listened on.

    Not one that the system would hand out: in the meantime it might, to any connection. These lie
    below, and each worker of pytest has its own, one after the other.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    for _ in range(_PORTS):
        port = 20_000 + worker % 10 * _PORTS + next(_ports) % _PORTS
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError(f"none of worker {worker}'s {_PORTS} ports is free")


_PORTS = 1000
_ports = itertools.count(os.getpid() * 37)  # apart from those of another pytest
