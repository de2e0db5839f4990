"""Records what a process says to others: every collective and point-to-point call, with its bytes.

`record_collectives` puts a wrapper in the place of each function of `torch.distributed` listed in
`_OPERATIONS`, in every loaded module that refers to it: megatron-core keeps references of its own
(`dist_all_gather_func = torch.distributed.all_gather_into_tensor`). Wrappers are in modules and not
in one thread, so the calls of autograd's threads count too.

Not seen: collectives that do not go through these functions (`torch.distributed.
_functional_collectives`, DTensor, methods of process groups), and references that are no attribute
of a module, for example in a `functools.partial` made before.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Collective:
    """One call, as this rank sees it.

    Bytes are those of the operation's definition, whatever algorithm the backend uses. `sent` is
    what other ranks need of this rank's tensors, each byte once however many ranks need it;
    `received` is what this rank has to get from others. With n bytes in the tensor that it hands
    in, and P ranks:

        all_gather...               n                       all parts but its own: n (P - 1)
        reduce_scatter...           all parts but its own:  its part of the sum, once: n / P
                                    n (P - 1) / P
        all_reduce                  n                       n, the sum, once
        all_to_all...               what is not for itself  what is not from itself
        broadcast                   n, by the source        n, by the others
        reduce                      n, by the others        n, once, by the destination
        gather                      n, by the others        all parts but its own, by the root
        scatter                     all parts but its own,  its part, by the others
                                    by the root
        send, isend; recv, irecv    n                       n

    A group of one rank moves nothing.

    Attributes:
        operation: name of the function in `torch.distributed`; batch_isend_irecv appears as the
            isend and irecv that it consists of.
        ranks: of the group.
        sent, received: bytes.
        dtype, shape: of the tensor that the rank hands in, or of the one it receives into; of a
            list of tensors, the first one's.
    """

    operation: str
    ranks: int
    sent: int
    received: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@contextmanager
def record_collectives() -> Iterator[list[Collective]]:
    """Records the calls of all threads of this process until the context ends.

    A `P2POp` has to be used on the side of the context's bounds on which it was made: torch
    compares the function in it with its own.

    Yields:
        A list that grows by one `Collective` with each call that does not raise, in the order of
        the calls; an asynchronous one counts when it is issued. Contexts may be nested, and each
        has its own list. When the last one ends, all functions are as they were.
    """
    calls: list[Collective] = []
    with _lock:
        if not _recorders:
            _exchange_references(_wrappers())
        _recorders.append(calls)
    try:
        yield calls
    finally:
        with _lock:
            _recorders[:] = [other for other in _recorders if other is not calls]
            if not _recorders:
                _exchange_references({new: old for old, new in _wrappers().items()})


_lock = threading.RLock()
_recorders: list[list[Collective]] = []
_thread = threading.local()


# ------------------------------------------------------------------ what each operation moves


def _size(tensors: torch.Tensor | Sequence[torch.Tensor] | None) -> int:
    """Bytes."""
    if tensors is None:
        return 0
    if isinstance(tensors, torch.Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(_size(x) for x in tensors)


def _all_gather(a: Arguments, rank: int, ranks: int) -> tuple[Any, int, int]:
    own = _size(a["tensor"])
    return a["tensor"], own, _size(a["tensor_list"]) - own


def _all_gather_into_tensor(a: Arguments, rank: int, ranks: int) -> tuple[Any, int, int]:
    own = _size(a["input_tensor"])
    return a["input_tensor"], own, _size(a["output_tensor"]) - own


def _reduce_scatter(a: Arguments, rank: int, ranks: int) -> tuple[Any, int, int]:
    own = _size(a["output"])
    return a["input_list"], _size(a["input_list"]) - own, own


def _reduce_scatter_tensor(a: Arguments, rank: int, ranks: int) -> tuple[Any, int, int]:
    own = _size(a["output"])
    return a["input"], _size(a["input"]) - own, own


def _all_reduce(a: Arguments, rank: int, ranks: int) -> tuple[Any, int, int]:
    return a["tensor"], _size(a["tensor"]), _size(a["tensor"])


def _all_to_all(a: Arguments, rank: int, ranks: int) -> tuple[Any, int, int]:
    out, received = a["input_tensor_list"], a["output_tensor_list"]
    return out, _size(out) - _size(out[rank]), _size(received) - _size(received[rank])


def _all_to_all_single(a: Arguments, rank: int, ranks: int) -> tuple[Any, int, int]:
    def foreign(x: torch.Tensor, rows: Sequence[int] | None) -> int:
        if rows is None or len(rows) == 0:  # megatron-core's dispatcher passes arrays
            return _size(x) - _size(x) // ranks
        return _size(x) // max(x.shape[0], 1) * (x.shape[0] - int(rows[rank]))

    return (
        a["input"],
        foreign(a["input"], a.get("input_split_sizes")),
        foreign(a["output"], a.get("output_split_sizes")),
    )


def _broadcast(a: Arguments, rank: int, ranks: int) -> tuple[Any, int, int]:
    size = _size(a["tensor"])
    return (a["tensor"], size, 0) if rank == _root(a, "src") else (a["tensor"], 0, size)


def _reduce(a: Arguments, rank: int, ranks: int) -> tuple[Any, int, int]:
    size = _size(a["tensor"])
    return (a["tensor"], 0, size) if rank == _root(a, "dst") else (a["tensor"], size, 0)


def _gather(a: Arguments, rank: int, ranks: int) -> tuple[Any, int, int]:
    own = _size(a["tensor"])
    if rank == _root(a, "dst"):
        return a["tensor"], 0, _size(a.get("gather_list")) - own
    return a["tensor"], own, 0


def _scatter(a: Arguments, rank: int, ranks: int) -> tuple[Any, int, int]:
    own = _size(a["tensor"])
    if rank == _root(a, "src"):
        return a["scatter_list"], _size(a.get("scatter_list")) - own, 0
    return a["tensor"], 0, own


def _send(a: Arguments, rank: int, ranks: int) -> tuple[Any, int, int]:
    return a["tensor"], _size(a["tensor"]), 0


def _receive(a: Arguments, rank: int, ranks: int) -> tuple[Any, int, int]:
    return a["tensor"], 0, _size(a["tensor"])


def _root(a: Arguments, name: str) -> int:
    """The root's rank in the group: `src` counts in the world, `group_src` in the group."""
    if a.get(f"group_{name}") is not None:
        return a[f"group_{name}"]
    if a.get(name) is None:
        return 0
    group = a.get("group")
    return a[name] if group is None else torch.distributed.get_group_rank(group, a[name])


_OPERATIONS: dict[str, Callable[[Arguments, int, int], tuple[Any, int, int]]] = {
    "all_gather": _all_gather,
    "all_gather_into_tensor": _all_gather_into_tensor,
    "reduce_scatter": _reduce_scatter,
    "reduce_scatter_tensor": _reduce_scatter_tensor,
    "all_reduce": _all_reduce,
    "all_to_all": _all_to_all,
    "all_to_all_single": _all_to_all_single,
    "broadcast": _broadcast,
    "reduce": _reduce,
    "gather": _gather,
    "scatter": _scatter,
    "send": _send,
    "recv": _receive,
    "isend": _send,
    "irecv": _receive,
}
"""From the arguments by name, this rank in the group and the group's ranks: the tensor or tensors
handed in, bytes sent, bytes received. The functions that these are built on, such as
all_gather_object, need no entry."""


# ------------------------------------------------------------------ wrappers


@functools.cache
def _wrappers() -> dict[Any, Any]:
    """From each function of torch to what takes its place."""
    return {
        function: _wrapper(name, function, inspect.signature(function))
        for name in _OPERATIONS
        for function in [getattr(torch.distributed, name)]
    }


def _wrapper(
    name: str, function: Callable[..., Any], signature: inspect.Signature
) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        # What torch calls to do this call is part of it.
        if getattr(_thread, "busy", False):
            return function(*args, **kwargs)
        _thread.busy = True
        try:
            result = function(*args, **kwargs)
        finally:
            _thread.busy = False
        made = _collective(name, signature.bind(*args, **kwargs).arguments)
        if made is not None:
            with _lock:
                for calls in _recorders:
                    calls.append(made)
        return result

    return call


def _collective(name: str, arguments: Arguments) -> Collective | None:
    """What a call was, or None if this rank is not in its group."""
    group = arguments.get("group")
    ranks = torch.distributed.get_world_size(group)
    if ranks < 1:
        return None
    rank = torch.distributed.get_rank(group)
    tensors, sent, received = _OPERATIONS[name](arguments, rank, ranks)
    first = tensors if isinstance(tensors, torch.Tensor) else tensors[0]
    if ranks == 1:
        sent = received = 0
    return Collective(name, ranks, sent, received, first.dtype, tuple(first.shape))


def _exchange_references(replacements: dict[Any, Any]) -> None:
    """Replaces functions in the names of all loaded modules, torch's own included."""
    for module in list(sys.modules.values()):
        # Not getattr: some modules load others when they are asked for a name.
        names = getattr(module, "__dict__", None)
        if not isinstance(names, dict):
            continue
        for name, value in list(names.items()):
            if inspect.isfunction(value) and value in replacements:
                names[name] = replacements[value]
