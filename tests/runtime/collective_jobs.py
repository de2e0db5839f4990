"""Jobs for the rank pool: calls of torch.distributed that are recorded."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch.distributed import all_reduce  # a reference of this module's own

from megakda.runtime.collectives import record_collectives

Row = tuple[str, int, int, int, str, tuple[int, ...]]


@contextmanager
def world() -> Iterator[tuple[int, int]]:
    torch.distributed.init_process_group("gloo")
    try:
        yield torch.distributed.get_rank(), torch.distributed.get_world_size()
    finally:
        torch.distributed.destroy_process_group()


def recorded(run: Callable[[], Any]) -> list[Row]:
    with record_collectives() as calls:
        run()
    return [(c.operation, c.ranks, c.sent, c.received, str(c.dtype), c.shape) for c in calls]


def every_operation() -> dict[str, list[Row]]:
    """Tensors of 5 elements per rank, fp32 where nothing else is said; the root is rank 1."""
    with world() as (rank, ranks):
        mine = torch.full((5,), float(rank))
        parts = [torch.empty(5) for _ in range(ranks)]
        whole = torch.arange(5.0 * ranks)
        d = torch.distributed
        following, previous = (rank + 1) % ranks, (rank - 1) % ranks
        root = rank == 1

        def uneven() -> None:
            """Rank r sends r + 1 rows of 2 to each rank."""
            rows = [n + 1 for n in range(ranks)]
            sent = torch.zeros(ranks * rows[rank], 2, dtype=torch.bfloat16)
            received = torch.empty(sum(rows), 2, dtype=torch.bfloat16)
            d.all_to_all_single(received, sent, rows, [rows[rank]] * ranks)

        def pair() -> None:
            if rank == 0:
                d.send(mine.double(), 1)
            elif rank == 1:
                d.recv(torch.empty(5, dtype=torch.float64), 0)

        def ring() -> None:
            ops = [
                d.P2POp(d.isend, mine, following),
                d.P2POp(d.irecv, torch.empty(5), previous),
            ]
            for work in d.batch_isend_irecv(ops):
                work.wait()

        def one_way() -> None:
            work = d.isend(mine, following)
            d.irecv(torch.empty(5), previous).wait()
            work.wait()

        cases: dict[str, Callable[[], Any]] = {
            "all_gather": lambda: d.all_gather(parts, mine),
            "all_gather_into_tensor": lambda: d.all_gather_into_tensor(
                torch.empty(5 * ranks, dtype=torch.bfloat16), mine.bfloat16()
            ),
            "asynchronous": lambda: d.all_gather_into_tensor(
                output_tensor=torch.empty(5 * ranks), input_tensor=mine, async_op=True
            ).wait(),
            "reduce_scatter": lambda: d.reduce_scatter(torch.empty(5), list(whole.split(5))),
            "reduce_scatter_tensor": lambda: d.reduce_scatter_tensor(torch.empty(5), whole),
            "all_reduce": lambda: d.all_reduce(mine.clone()),
            "all_to_all_single": lambda: d.all_to_all_single(torch.empty_like(whole), whole),
            "uneven": uneven,
            "broadcast": lambda: d.broadcast(mine.clone(), 1),
            "reduce": lambda: d.reduce(mine.clone(), group_dst=1),
            "gather": lambda: d.gather(mine, parts if root else None, dst=1),
            "scatter": lambda: d.scatter(torch.empty(5), parts if root else None, src=1),
            "pair": pair,
            "isend_irecv": one_way,
            "batch": ring,
        }
        return {name: recorded(case) for name, case in cases.items()}


def groups() -> list[Row]:
    """In groups of ranks (1, 2) and (0,), the source named as in the world; rank 0 is not in the
    first."""
    with world() as (rank, _):
        two, one = torch.distributed.new_group([1, 2]), torch.distributed.new_group([0])

        def run() -> None:
            torch.distributed.all_reduce(torch.zeros(3), group=two if rank else one)
            if rank:
                torch.distributed.broadcast(torch.zeros(3), src=2, group=two)
                torch.distributed.broadcast(torch.zeros(3), group_src=0, group=two)
            torch.distributed.all_reduce(torch.zeros(7), group=one)

        return recorded(run)


def threads_and_names() -> dict[str, list[Row]]:
    """Calls in another thread, through references of modules, and in megatron-core's backward."""
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    later = ModuleType("later")
    sys.modules["later"] = later

    def in_a_thread() -> None:
        thread = threading.Thread(target=lambda: torch.distributed.all_reduce(torch.zeros(2)))
        thread.start()
        thread.join()

    def in_megatron() -> None:
        x = torch.zeros(4, 3, requires_grad=True)
        gather_from_sequence_parallel_region(
            x, group=torch.distributed.group.WORLD
        ).sum().backward()

    def imported_meanwhile() -> None:
        exec("from torch.distributed import all_reduce", later.__dict__)
        later.all_reduce(torch.zeros(4))

    with world():
        found = {
            "thread": recorded(in_a_thread),
            "by_name": recorded(lambda: all_reduce(torch.zeros(3))),
            "megatron": recorded(in_megatron),
            "imported": recorded(imported_meanwhile),
        }
        assert later.all_reduce is torch.distributed.all_reduce
        del sys.modules["later"]
        return found


def nested_and_failing() -> tuple[list[str], list[str], bool]:
    """What two nested contexts hold after calls between their bounds, one of which fails."""

    def functions() -> list[dict[str, Any]]:
        modules = (torch.distributed, torch.distributed.distributed_c10d)
        return [{k: v for k, v in vars(module).items() if callable(v)} for module in modules]

    before = functions()
    with world() as (_, ranks):
        x = torch.zeros(2)
        torch.distributed.all_reduce(x)
        try:
            with record_collectives() as outer:
                torch.distributed.all_reduce(x)
                with record_collectives() as inner:
                    torch.distributed.broadcast(x, 0)
                torch.distributed.all_gather([torch.empty(2) for _ in range(ranks)], x)
                torch.distributed.all_reduce("no tensor")
        except TypeError:
            pass
        torch.distributed.all_reduce(x)
    return [c.operation for c in outer], [c.operation for c in inner], functions() == before
