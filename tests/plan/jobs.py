"""What one rank of a small run really allocates, for comparison with the planner."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from megakda.optim.muon import Muon
from megakda.runtime.collectives import record_collectives
from tests import jobs


def storages(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the memory that lies under some tensors, each once."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(found.values())


def measure(overrides: Sequence[str], corpus: Any, messages: bool = False) -> dict[str, Any]:
    """Bytes of parameters, gradients and optimizer state, and of activations at their peak; what
    the second step's passes say to other ranks, with `messages`, and the bytes that Muon sends in
    each direction.

    The first three are the storages under the real tensors after a step. Activations are what
    torch's CPU allocator reports to its profiler during the forward and backward passes of a
    second step: each allocation and release, in their order, also those inside operations. The
    peak is the highest sum, counted from the beginning of the step.
    """
    with jobs.trainer(overrides, corpus) as run:
        batches = run.batches()
        run.step(batches)
        parameters = [p for chunk in run.chunks for p in chunk.parameters()]
        weights = storages(parameters)
        held = [t for part in run.optimizer.chained_optimizers for t in _state(part)]
        own = {p.untyped_storage().data_ptr() for p in parameters}
        for chunk in run.chunks:
            chunk.zero_grad_buffer()
        run.optimizer.zero_grad()
        with (
            record_collectives() if messages else nullcontext([]) as calls,
            profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
        ):
            run.forward_backward(batches, num_microbatches=run.derived.micro_batches)
        return {
            "weights": weights,
            "gradients": storages(p.main_grad for p in parameters),
            "optimizer": storages(t for t in held if t.untyped_storage().data_ptr() not in own),
            "activations": _peak(profiler),
            "calls": [(call.operation, call.ranks, call.sent) for call in calls],
            "muon": [
                (part.optimizer.exchange.bytes.gathered, part.optimizer.exchange.bytes.returned)
                for part in run.optimizer.chained_optimizers
                if isinstance(part.optimizer, Muon)
            ],
        }


def _state(part: Any) -> Iterable[torch.Tensor]:
    """Main parameters and moments of one of the optimizers in a chain."""
    inner = getattr(part, "optimizer", None)
    if inner is None:
        return
    for group in inner.param_groups:
        for param in group["params"]:
            yield param.detach()
            yield from (x for x in inner.state[param].values() if torch.is_tensor(x))


def _peak(profiler: Any) -> int:
    """Highest sum of all allocations and releases.

    What gloo's threads release is not in the log. A block that is never released belongs to nobody
    once its address is handed out again; and a copy that gloo made of a collective's tensors counts
    during the collective alone.
    """
    log: list[tuple[int, int, int, bool]] = []  # time, address, bytes, inside a collective

    def walk(node: Any, collective: bool) -> None:
        if node.tag == _EventType.Allocation:
            fields = node.extra_fields
            log.append((node.start_time_ns, fields.ptr, fields.alloc_size, collective))
        for child in node.children:
            walk(child, collective or node.name.startswith("c10d::"))

    for root in profiler.profiler.kineto_results.experimental_event_tree():
        walk(root, False)
    log.sort(key=lambda entry: entry[0])
    released = set()  # indices of blocks whose release is in the log
    at: dict[int, int] = {}
    for index, (_, address, size, _) in enumerate(log):
        if size > 0:
            at[address] = index
        elif address in at:
            released.add(at.pop(address))
    now = peak = 0
    live: dict[int, int] = {}
    for index, (_, address, size, collective) in enumerate(log):
        now -= live.pop(address, 0)
        if size > 0:
            now += size
            peak = max(peak, now)
            if collective and index not in released:
                now -= size
            else:
                live[address] = size
    return peak


def count_forward(overrides: Sequence[str], corpus: Any) -> int:
    """FLOPs of one micro-batch's forward pass, as torch counts them."""
    with jobs.trainer(overrides, corpus) as run:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run.forward_backward(run.batches(), 1, forward_only=True)
        return counter.get_total_flops()
