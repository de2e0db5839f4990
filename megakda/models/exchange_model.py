"""How long the exchanges of context parallelism take, and how much of it computing can hide.

A prediction by arithmetic, never a measurement. Rates come from data sheets (`H200`), and the
shares of them that programs reach are assumptions (`Assumptions`), which whoever reads a prediction
should replace by measured ones. Rows are whole documents, so that every segment is linked to the
next: the most that there can be to exchange.

What hides an exchange is what the code has to compute between starting it and awaiting it:

- states (`megakda.kernels.kda.linked_triton`): forward the products inside chunks with the queries,
  backward the pass that makes the states again. For them the mode computes maps, the products of
  keys a second time, and backward a pass for the gradients of the states that enter.
- heads (`megakda.layers.kda_context_parallel`): nothing; the operator waits for its inputs.
- latents (`megakda.layers.mla_context_parallel`): all_gather the rank's own block; ring the block
  before. Of the gradients, the reduce-scatter and the ring's last step are awaited. Both ways a
  rank expands the latents of all blocks.

Collectives are taken to use all adapters of a node: what has to come into a node comes in once,
shared among the adapters of the GPUs of the group, and is passed on inside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from megakda.config.schema import Config, ModelConfig
from megakda.models.context_cost import (
    ATTENTION,
    MODES,
    Exchange,
    Sharing,
    kda_traffic,
    mla_traffic,
    sharing_of,
)
from megakda.models.flops import CHUNK, full_attention_flops, linear_state_flops, peak_flops
from megakda.models.params import full_attention_parameters


@dataclass(frozen=True)
class Machine:
    """Rates of one GPU and its place in a cluster.

    Attributes:
        flops: dense bf16 FLOP/s; memory: bytes/s; link, network: bytes/s in each direction, to
            GPUs of the same node and to others.
        node_gpus: GPUs of a node.
        sources: where the rates are from.
    """

    name: str
    flops: float
    memory: float
    link: float
    network: float
    node_gpus: int
    sources: tuple[str, ...]


H200 = Machine(
    name="H200 SXM, 8 in a node, NVLink 4, InfiniBand NDR",
    flops=peak_flops("NVIDIA H200") or 0.0,
    memory=4.8e12,
    link=450e9,
    network=50e9,
    node_gpus=8,
    sources=(
        "NVIDIA H200 Tensor Core GPU data sheet: bf16 1,979 TFLOP/s with sparsity, half of it "
        "dense; memory 4.8 TB/s; NVLink 900 GB/s both directions together",
        "NVIDIA ConnectX-7 data sheet: InfiniBand NDR 400 Gb/s, one adapter per GPU as in HGX",
    ),
)


@dataclass(frozen=True)
class Assumptions:
    """Shares of a machine's rates that are reached. Nobody has measured them for this code.

    The rate of the matrix units is that of bf16, also for a model in fp32.

    Attributes:
        link, network: of the rates between GPUs, by collectives.
        memory: of the memory's rate, by the kernels of KDA.
        kda, attention, gemm: of the matrix units' rate, by the kernels of KDA, by fused attention
            and by plain matrix products.
        latency: seconds of one collective call, or step of a ring, without any bytes.
    """

    link: float = 0.8
    network: float = 0.8
    memory: float = 0.8
    kda: float = 0.3
    attention: float = 0.5
    gemm: float = 0.7
    latency: float = 20e-6


ASSUMED = Assumptions()


# Bytes per token and head at K = V = 128 in bf16: benchmarks/results/kernels_bytes.md, "softplus
# gate"; of passes that leave arrays out, without those. FLOPs as in `megakda.models.flops`.
_BYTES = {
    "intra": 1708,
    "walk": 1448,
    "states": 1624,
    "grad_walk": 1960,
    "grads": 3342,
    "keys": 1708 - 256 - 256 - 80,  # intra without q, q_in, scores
    "maps": 1112 - 256,  # kda_state_kernel of "in ranges" without the maps, one per piece
    "enter": 1960 - 256 - 512,  # grad_walk without dv, dstates
}


@dataclass(frozen=True)
class Prediction:
    """Seconds of one layer on one GPU, forward and backward.

    Attributes:
        exchange: of its exchanges, hidden or not.
        exposed: of its exchanges that nothing hides.
        extra: of what the exchange makes a rank compute besides.
        compute: of the operator itself, on its share of the tokens and heads.
    """

    exchange: float
    exposed: float
    extra: float
    compute: float

    @property
    def cost(self) -> float:
        """What sharing the sequence adds to the operator."""
        return self.exposed + self.extra


def seconds(x: Exchange, sharing: Sharing, machine: Machine, assumed: Assumptions) -> float:
    """Time of one exchange with nothing else going on."""
    near = max(1, machine.node_gpus // sharing.tensor)  # context-parallel ranks in a node
    if x.group == "state":
        near = max(1, near // sharing.heads_ranks)
    near = min(near, x.ranks)
    if x.operation == "ring":
        outside, inside = (x.part, 0) if near < x.ranks else (0, x.part)
    elif x.operation == "all_to_all":
        outside, inside = x.part * (x.ranks - near), x.part * (near - 1)
    else:
        outside = x.part * (x.ranks - near) // near
        inside = x.part * (x.ranks - 1) - outside
        inside = inside if near > 1 else 0
    moving = max(
        outside / (machine.network * assumed.network), inside / (machine.link * assumed.link)
    )
    return x.steps * (assumed.latency + moving)


def predict_kda(
    model: ModelConfig,
    sharing: Sharing,
    rows: int,
    tokens: int,
    machine: Machine = H200,
    assumed: Assumptions = ASSUMED,
) -> Prediction:
    """One KDA layer on a micro-batch of `rows` rows of `tokens` tokens over all ranks."""
    passes = _kda_passes(model, sharing, rows * tokens // sharing.ranks, machine, assumed)
    linked = sharing.state_ranks > 1
    traffic = kda_traffic(model, sharing, rows, tokens)
    groups = max(1, sharing.head_groups)  # of heads, one after the other
    hidden = {"forward": passes["intra"] / groups, "backward": passes["states"] / groups}
    exchange = exposed = 0.0
    for way, exchanges in (("forward", traffic.forward), ("backward", traffic.backward)):
        for x in exchanges:
            time = seconds(x, sharing, machine, assumed)
            exchange += time
            exposed += max(0.0, time - hidden[way]) if x.name == "states" else time
    again = 1 + sharing.kda_recomputed
    extra = again * (passes["keys"] + passes["maps"]) + passes["enter"] if linked else 0.0
    forward = passes["intra"] + passes["walk"]
    backward = sum(passes[name] for name in ("intra", "states", "grad_walk", "grads"))
    return Prediction(exchange, exposed, extra, again * forward + backward)


def _kda_passes(
    model: ModelConfig, sharing: Sharing, tokens: int, machine: Machine, assumed: Assumptions
) -> dict[str, float]:
    """Seconds of each pass over `tokens` tokens of all heads of a GPU: a roofline."""
    key, value, chunk = model.linear.head_dim_k, model.linear.head_dim_v, CHUNK
    walk = 6 * key * value + chunk * value
    flops = {
        "intra": 2 * chunk * key + chunk * chunk,
        "walk": walk,
        "states": 4 * key * value,
        "grad_walk": walk,
        "grads": 2 * linear_state_flops(key, value) - walk,
        "keys": chunk * key + chunk * chunk,
        "maps": 4 * key * (key + value),
        "enter": 6 * key * value,
    }
    heads = model.num_heads // sharing.tensor
    width = (key + value) / 256 * sharing.element_bytes / 2
    return {
        name: tokens
        * heads
        * max(
            _BYTES[name] * width / (machine.memory * assumed.memory),
            flops[name] / (machine.flops * assumed.kda),
        )
        for name in flops
    }


def predict_mla(
    model: ModelConfig,
    sharing: Sharing,
    rows: int,
    tokens: int,
    machine: Machine = H200,
    assumed: Assumptions = ASSUMED,
) -> Prediction:
    """One MLA layer; arguments as for `predict_kda`. Of a contiguous layout the last rank, which
    has the most to do."""
    ranks, own = sharing.ranks, tokens // sharing.ranks
    mla, heads = model.mla, model.num_heads // sharing.tensor
    dim_qk = mla.qk_nope_head_dim + mla.qk_shared_head_dim
    pair = heads * full_attention_flops(dim_qk, mla.v_head_dim, 2)
    attend = rows * own * own / 2 * pair / (machine.flops * assumed.attention)
    # Zig-zag: a rank sees half of each other block's keys, or half of its queries do, all of them.
    foreign = attend * (1 if sharing.layout.per_rank == 2 else 2)
    weights = full_attention_parameters(model)["kv_b_proj"] / sharing.tensor
    expand = 2 * weights * rows * own / (machine.flops * assumed.gemm)
    repeats = 1 + sharing.recomputed  # of the forward pass
    compute = (repeats + 2) * (attend + (ranks - 1) * foreign + expand)
    if ranks == 1:
        return Prediction(0.0, 0.0, 0.0, compute)

    traffic = mla_traffic(model, sharing, rows, tokens)
    latents, gradients = (
        seconds(x, sharing, machine, assumed) for x in (traffic.forward[0], traffic.backward[-1])
    )
    if sharing.attention == "all_gather":
        exposed = repeats * max(0.0, latents - attend - expand)
        exposed += max(0.0, latents - 2 * attend - 3 * expand) + gradients
    else:
        there, back = latents / (ranks - 1), gradients / ranks  # of one step
        steps = [attend] + [foreign] * (ranks - 2)  # what is worked on while a block is on its way
        exposed = repeats * sum(max(0.0, there - step - expand) for step in steps)
        exposed += sum(max(0.0, there + back - 2 * step - 3 * expand) for step in steps) + back
    return Prediction(
        exchange=(repeats + 1) * latents + gradients,
        exposed=exposed,
        extra=(repeats + 2) * (ranks - 1) * expand,
        compute=compute,
    )


@dataclass(frozen=True)
class Point:
    """Predictions for one size of sharing; None for a mode whose heads do not divide.

    Attributes:
        tensor, ranks, tokens: tensor- and context-parallel ranks, tokens of a row on each rank.
        kda: by mode; mla: by way of exchange.
    """

    tensor: int
    ranks: int
    tokens: int
    kda: dict[str, Prediction | None]
    mla: dict[str, Prediction]

    @property
    def best_mode(self) -> str:
        """The mode that adds least to a KDA layer."""
        return min(
            (mode for mode, x in self.kda.items() if x is not None),
            key=lambda mode: self.kda[mode].cost,  # type: ignore[union-attr]
        )

    @property
    def best_attention(self) -> str:
        """The way of exchange that exposes least in an MLA layer; "all_gather", with fewer calls,
        where the difference is below a hundredth of what the layer computes."""
        ring, gather = self.mla["ring"], self.mla["all_gather"]
        return "ring" if gather.exposed - ring.exposed > 0.01 * ring.compute else "all_gather"


def predict(
    config: Config,
    kind: str,
    tensor: int,
    ranks: int,
    tokens: int,
    machine: Machine = H200,
    assumed: Assumptions = ASSUMED,
) -> Point:
    """Predictions for a recipe's model and micro-batch at another size of sharing.

    Args:
        kind: of layout.
        tensor, ranks: tensor- and context-parallel ranks; `tensor` divides the heads.
        tokens: of a row on each rank.
    """
    parallel = config.parallel
    heads_ranks = parallel.context_heads if ranks == parallel.context else None
    groups = parallel.recompute_head_groups  # fewer where they do not divide the heads
    if groups:
        groups = math.gcd(groups, config.model.num_heads // tensor)
    parallel = replace(
        parallel,
        tensor=tensor,
        context=ranks,
        context_heads=heads_ranks,
        recompute_head_groups=groups,
    )
    config = replace(config, parallel=parallel)
    sizes = (config.train.micro_batch, tokens * ranks, machine, assumed)

    def sharing(mode: str, attention: str | None = None) -> Sharing | None:
        return sharing_of(config, kind, mode, attention, max(1, machine.node_gpus // tensor))

    shared = {mode: sharing(mode) for mode in MODES}
    ways = {way: sharing("state", way) for way in ATTENTION}
    return Point(
        tensor,
        ranks,
        tokens,
        {
            mode: None if x is None else predict_kda(config.model, x, *sizes)
            for mode, x in shared.items()
        },
        {way: predict_mla(config.model, x, *sizes) for way, x in ways.items() if x is not None},
    )
