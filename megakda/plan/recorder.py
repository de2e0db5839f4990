"""What a piece of a model allocates, computes and sends, seen at torch's dispatcher.

Tensors may be real or on the meta device; nothing here looks at their values. A storage counts from
the operation that returns it until nothing refers to it any more, so views and tensors changed in
place count once, and what autograd saves counts as long as it is saved. Scratch memory inside an
operation is not seen.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten

DENSE, GROUPED, ATTENTION, KDA, OTHER = "dense", "grouped", "attention", "kda", "other"
"""Kinds of work: matrix products, those of experts, softmax attention, KDA's kernels, the rest."""


@dataclass(frozen=True)
class Operation:
    """One kind of operation at one size: `flops` of matrix products, `bytes` read and written."""

    kind: str
    flops: int
    bytes: int


@dataclass(frozen=True)
class Message:
    """One collective call.

    Attributes:
        operation: "all_gather", "reduce_scatter", "all_reduce", "all_to_all" or "send".
        group: the name that the process group has in `Recorder.groups`.
        ranks: of the group.
        bytes: of the whole tensor: all parts of an all-gather, reduce-scatter or all-to-all.
    """

    operation: str
    group: str
    ranks: int
    bytes: int


@dataclass
class Work:
    """What ran: how often each operation, and each message."""

    operations: Counter[Operation] = field(default_factory=Counter)
    messages: Counter[Message] = field(default_factory=Counter)

    def flops(self, *kinds: str) -> int:
        """Of matrix products of some kinds; of all without any."""
        return sum(
            op.flops * n for op, n in self.operations.items() if not kinds or op.kind in kinds
        )

    def __add__(self, other: Work) -> Work:
        return Work(self.operations + other.operations, self.messages + other.messages)


_MESSAGES = {
    "_allgather_base_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "alltoall_base_": ("all_to_all", 1),
    "allreduce_": ("all_reduce", 0),
}
"""From the dispatcher's name to ours, and to the argument that holds the whole tensor."""

_WITHOUT_DATA = ("barrier", "monitored_barrier_")

_PRODUCTS = {
    aten.mm: DENSE,
    aten.addmm: DENSE,
    aten.bmm: DENSE,
    aten.baddbmm: DENSE,
    aten._grouped_mm: GROUPED,
    aten._scaled_dot_product_efficient_attention: ATTENTION,
    aten._scaled_dot_product_efficient_attention_backward: ATTENTION,
    aten._efficient_attention_forward: ATTENTION,
    aten._efficient_attention_backward: ATTENTION,
    aten._scaled_dot_product_flash_attention_for_cpu: ATTENTION,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: ATTENTION,
}


class Recorder(TorchDispatchMode):
    """Live bytes, their peak, and the work done, while it is the active mode.

    Attributes:
        live, peak: bytes; `peak` may be set, to begin a new measurement.
        work: what has run since it was last set.
        groups: names of process groups, by torch's group name.
        staged: operations that the backend runs through a copy of the whole tensor, as gloo does.
        rows: of a micro-batch.
        mixed: whether real tensors meet meta ones.
        selected: elements that `masked_select` returns for a meta tensor, whose values cannot say.
    """

    def __init__(self, groups: dict[str, str] | None = None):
        super().__init__()
        self.live = self.peak = 0
        self.work = Work()
        self.groups = groups or {}
        self.staged: tuple[str, ...] = ()
        self.rows = 1
        self.mixed = False
        self.selected = 0
        self._known: dict[int, int] = {}

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        """Storages that are there anyway, such as parameters, count as nothing."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._known.setdefault(storage._cdata, 0)
            weakref.finalize(storage, self._known.pop, storage._cdata, None)

    def knows(self, storage: int) -> bool:
        """Whether a storage, by the number that torch gives it, is still in use."""
        return storage in self._known

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Starts a new peak and new work."""
        self.peak = self.live
        self.work = Work()
        yield

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if self.mixed:
            args, kwargs = _without_mixture(args, kwargs)
        if func is aten.masked_select.default and args[0].is_meta:
            out = args[0].new_empty(self.selected)
        elif func is aten._efficient_attention_backward.default and args[0].is_meta:
            # torch's own meta function lacks an argument of the operator.
            out = (*(torch.empty_like(x) for x in args[1:4]), args[0].new_empty(0))
        else:
            out = func(*args, **kwargs)
        new = False
        for tensor in _tensors((out,)):
            new |= self._count(tensor)
        if func.namespace == "c10d":
            self._message(func, args)
        else:
            self._operation(func, args, kwargs, out, new)
        return out

    def _count(self, tensor: torch.Tensor) -> bool:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return False
        size = storage.nbytes()
        self._known[key] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, key)
        return True

    def _freed(self, key: int) -> None:
        self.live -= self._known.pop(key)

    def _message(self, func: Any, args: tuple[Any, ...]) -> None:
        name = func._overloadpacket.__name__
        if name in _WITHOUT_DATA:
            return
        assert name in _MESSAGES, f"{name}: a collective that nobody has said how to count"
        operation, place = _MESSAGES[name]
        group = next(
            torch.distributed.ProcessGroup.unbox(a)
            for a in args
            if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type())
        )
        whole = sum(_nbytes(t) for t in _tensors((args[place],)))
        self.send(operation, group, whole)

    def send(self, operation: str, group: torch.distributed.ProcessGroup, size: int) -> None:
        """Counts a message of `size` bytes; a group of one rank sends nothing."""
        if group.size() > 1:
            name = self.groups.get(group.group_name, "other")
            if operation in self.staged:
                self.peak = max(self.peak, self.live + size)
            self.work.messages[Message(operation, name, group.size(), size)] += 1

    def kernel(self, kind: str, flops: int, size: int) -> None:
        """Counts a kernel that the dispatcher does not see."""
        self.work.operations[Operation(kind, flops, size)] += 1

    def _operation(self, func: Any, args: Any, kwargs: Any, out: Any, new: bool) -> None:
        packet = func._overloadpacket
        kind = _PRODUCTS.get(packet, OTHER)
        if packet in _FREE or (kind == OTHER and not new and not func._schema.is_mutable):
            return  # the second: views
        moved = sum(_nbytes(t) for t in _tensors((*args, *kwargs.values(), out)))
        flops = 0
        if kind != OTHER:
            flops = _flops(func, packet, args, kwargs, out)
        self.kernel(kind, flops, moved)


def _without_mixture(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Real tensors beside meta ones, as a mask or an index, become meta tensors; a mask that
    indexes becomes the numbers it stands for, since only its values say how many there are."""
    tensors = list(_tensors((*args, *kwargs.values())))
    if not any(t.is_meta for t in tensors) or all(t.is_meta or not t.ndim for t in tensors):
        return args, kwargs

    def unmixed(x: Any) -> Any:
        if isinstance(x, (list, tuple)):
            masks = [isinstance(t, torch.Tensor) and t.dtype == torch.bool for t in x]
            parts = [t.nonzero(as_tuple=True) if m else (t,) for t, m in zip(x, masks, strict=True)]
            return [unmixed(t) for part in parts for t in part]
        return x.to("meta") if isinstance(x, torch.Tensor) and x.ndim else x

    return tuple(unmixed(x) for x in args), {name: unmixed(x) for name, x in kwargs.items()}


_FREE = {aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten.detach}


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """The tensors among an operation's arguments or results; much faster than torch's pytrees."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _flops(func: Any, packet: Any, args: Any, kwargs: Any, out: Any) -> int:
    if packet is aten._grouped_mm:
        x, weight = args[0], args[1]
        if x.ndim == weight.ndim == 2:  # a gradient of the weight: x^T [in, T] @ grad [T, out]
            return 2 * x.shape[0] * x.shape[1] * weight.shape[1]
        return 2 * x.shape[0] * x.shape[1] * weight.shape[-1]
    if _PRODUCTS[packet] == ATTENTION:
        return _attention_flops(func, args, kwargs)
    return flop_registry[packet](*args, **kwargs, out_val=out)


def _attention_flops(func: Any, args: Any, kwargs: Any) -> int:
    """Forward two products, backward five, one of them the scores again; the half above the
    diagonal is skipped. (torch's formulas count all of it.)"""
    names = [argument.name for argument in func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    query, key, value = given["query"], given["key"], given["value"]
    by_token = "_efficient_attention" in func.__name__ and "scaled" not in func.__name__
    heads, tokens = (2, 1) if by_token else (1, 2)  # [n, L, H, D] or [n, H, L, D]
    pairs = query.shape[0] * query.shape[heads] * query.shape[tokens] * key.shape[tokens]
    if given.get("is_causal") or given.get("custom_mask_type"):
        pairs //= 2
    wide, narrow = query.shape[-1], value.shape[-1]
    if "backward" in func.__name__:
        return 2 * pairs * (3 * wide + 2 * narrow)
    return 2 * pairs * (wide + narrow)
