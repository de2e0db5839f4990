"""How many bytes each exchange of a step moves, over which links, and how long that takes.

megatron-core numbers ranks with tensor parallelism innermost, then context, data and pipeline
parallelism; for experts, expert-tensor, expert and expert-data parallelism instead. So the ranks of
a group lie a fixed stride apart, and whether they share a node follows from it.

Bytes are those that one rank sends. A collective over several nodes brings each byte into a node
once, shared among the adapters of the GPUs of the group there, and passes it on inside.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from megakda.config import Config, Derived
from megakda.plan.cluster import Cluster
from megakda.plan.recorder import Message
from megakda.plan.state import FP32, Buffer

UPDATE_BYTES = 2
"""Of an element of a matrix that Muon sends, on a GPU."""


@dataclass(frozen=True)
class Group:
    """Ranks `stride` apart.

    Attributes:
        ranks: how many.
        near: of them in one node.
    """

    ranks: int
    near: int


@dataclass(frozen=True)
class Transfer:
    """What one rank sends, in bytes, and how long it takes with nothing else going on."""

    nvlink: float = 0.0
    network: float = 0.0
    seconds: float = 0.0
    calls: int = 0

    def __add__(self, other: Transfer) -> Transfer:
        return Transfer(
            self.nvlink + other.nvlink,
            self.network + other.network,
            self.seconds + other.seconds,
            self.calls + other.calls,
        )

    def times(self, count: float) -> Transfer:
        """So many of it."""
        return Transfer(
            self.nvlink * count, self.network * count, self.seconds * count, int(self.calls * count)
        )


class Network:
    """The groups of a layout on a cluster."""

    def __init__(self, config: Config, derived: Derived, cluster: Cluster):
        self.cluster = cluster
        p = config.parallel
        heads = {"state": 1, "heads": p.context, "two_level": p.context_heads or 1}[p.context_mode]
        data, experts = derived.data_parallel, derived.expert_data_parallel
        layout = {  # stride, ranks
            "tensor": (1, p.tensor),
            "context": (p.tensor, p.context),
            "context_heads": (p.tensor, heads),
            "context_state": (p.tensor * heads, p.context // heads),
            "data": (p.tensor, p.context * data),
            "expert_tensor": (1, p.expert_tensor),
            "expert": (p.expert_tensor, p.expert),
            "tensor_expert": (1, p.expert_tensor * p.expert),
            "expert_data": (p.expert_tensor * p.expert, experts),
            "pipeline": (derived.world_size // p.pipeline, p.pipeline),
            "stage": (1, derived.world_size // p.pipeline),
        }
        self.groups = {name: self._group(*place) for name, place in layout.items()}

    def _group(self, stride: int, ranks: int) -> Group:
        return Group(ranks, max(1, min(ranks, self.cluster.gpus_per_node // stride)))

    def message(self, message: Message) -> Transfer:
        """One collective call."""
        return self.transfer(message.operation, self.groups[message.group], message.bytes)

    def transfer(self, operation: str, group: Group, size: float) -> Transfer:
        """An operation over a tensor of `size` bytes, of which each rank has, or gets, a part."""
        ranks, near = group.ranks, group.near
        if ranks == 1 or size == 0:
            return Transfer()
        part = size / ranks
        if operation == "send":
            inside, outside = (size, 0.0) if near == ranks else (0.0, size)
        elif operation == "all_to_all":
            inside, outside = part * (near - 1), part * (ranks - near)
        else:
            outside = part * (ranks - near) / near
            inside = part * (ranks - 1) - outside if near > 1 else 0.0
            if operation == "all_reduce":
                inside, outside = 2 * inside, 2 * outside
        return self.moved(inside, outside)

    def moved(self, inside: float, outside: float) -> Transfer:
        """Bytes to GPUs of the same node, and to others, at the same time."""
        c, share = self.cluster, self.cluster.efficiency
        moving = max(
            inside / (c.nvlink_gbs * 1e9 * share.nvlink),
            outside / (c.network_gbs * 1e9 * share.network),
        )
        return Transfer(inside, outside, c.latency_us * 1e-6 + moving, 1)

    def layer_messages(self, messages: Counter[Message]) -> dict[str, Transfer]:
        """What layers send to each other's tensor, context and expert ranks, by what for."""
        found: dict[str, Transfer] = defaultdict(Transfer)
        for message, count in messages.items():
            found[PURPOSE[message.group]] += self.message(message).times(count)
        return dict(found)

    def gradients(self, buffers: Iterable[Buffer], sharded: bool) -> Transfer:
        """Summing them over data-parallel ranks: a reduce-scatter, or an all-reduce."""
        operation = "reduce_scatter" if sharded else "all_reduce"
        return self._buckets(buffers, operation, lambda buffer: FP32)

    def parameters(self, buffers: Iterable[Buffer], sharded: bool) -> Transfer:
        """Gathering them after the optimizer's step, where it is sharded."""
        if not sharded:
            return Transfer()
        return self._buckets(buffers, "all_gather", lambda buffer: buffer.element_bytes)

    def _buckets(
        self, buffers: Iterable[Buffer], operation: str, width: Callable[[Buffer], int]
    ) -> Transfer:
        total = Transfer()
        for buffer in buffers:
            group = self.groups["expert_data" if buffer.expert else "data"]
            for first, last in zip(buffer.bounds, buffer.bounds[1:], strict=False):
                size = (last - first) * width(buffer)
                total += self.transfer(operation, group, size)
        return total

    def matrices(self, buffers: Sequence[Buffer]) -> Transfer:
        """What Muon sends to have whole matrices: pieces to the owner, and the updates back.

        The owner of a matrix is the rank with the largest piece (see
        `megakda.optim.matrix_exchange`); the mean over the ranks of a pipeline stage.
        """
        moved = sum(buffer.moved_elements for buffer in buffers)
        stage = self.groups["stage"]
        if stage.ranks == 1 or not moved:
            return Transfer()
        size = 2 * moved * UPDATE_BYTES
        # Shards follow the data-parallel ranks, whose neighbours mostly are on other nodes.
        outside = size if self.groups["data"].near < self.groups["data"].ranks else 0.0
        return self.moved(size - outside, outside) + Transfer(calls=1)


PURPOSE = {
    "tensor": "tensor parallelism",
    "context": "context exchange",
    "context_heads": "context exchange",
    "context_state": "context exchange",
    "expert": "expert all-to-all",
    "expert_tensor": "expert tensor parallelism",
    "tensor_expert": "expert tensor parallelism",
    "other": "other",
}
