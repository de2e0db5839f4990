"""What each rank of a context-parallel group has to compute and to exchange, in closed form.

Work counts as in `megakda.models.flops`: products of matrices, 2 FLOPs per multiply-add, backward
twice forward. All ranks hold the same number of tokens, so all that is done token by token
(projections, the KDA recurrence, feed-forwards) is the same everywhere. What differs:

- attention: 2 (Dqk + Dv) FLOPs forward per head and causal pair of tokens of one document, and the
  pairs are counted exactly from the pieces that a rank holds;
- expansion: keys and values are expanded from the latents of every block that a rank meets, also of
  those that other ranks hold;
- maps, where KDA exchanges states: 4 K (K + V) per head and token of a piece that goes on elsewhere
  for the map that it makes of its tokens (two products with a state of K + V columns), 6 K V
  backward per token of a piece that began elsewhere for the gradient of the state before it, and
  for all tokens C K + C^2, the products of keys inside chunks, which are done twice.

Bytes are those of `megakda.layers.kda_context_parallel` and `mla_context_parallel`, per layer and
GPU, counted as `megakda.runtime.collectives.Collective` counts them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise

from megakda.config.schema import Config, ModelConfig
from megakda.layers.context_layout import ContextLayout, ContextPlan, Documents, plan_context
from megakda.models.flops import CHUNK, flops_per_token, full_attention_flops
from megakda.models.params import count_layers, full_attention_parameters

MODES = ("state", "heads", "two_level")
ATTENTION = ("all_gather", "ring")
STATE_BYTES = 4
"""Maps and the gradients of states and latents are fp32, all else has the model's dtype."""


@dataclass(frozen=True)
class Sharing:
    """How the sequences of a model are shared by ranks.

    Attributes:
        layout: kind and ranks.
        mode: of KDA: "state", "heads" or "two_level".
        heads_ranks: ranks that exchange heads; 1 in mode "state", all in mode "heads".
        attention: of MLA: "all_gather" or "ring".
        tensor: ranks that share the heads by tensor parallelism.
        element_bytes: of the model's dtype.
        recomputed: how often the mixers' forward pass, with its exchanges, runs again in the
            backward pass.
        head_groups: with KDA's core recomputed in so many groups of heads, once more; 0 for not.
    """

    layout: ContextLayout
    mode: str = "state"
    heads_ranks: int = 1
    attention: str = "all_gather"
    tensor: int = 1
    element_bytes: int = 2
    recomputed: int = 0
    head_groups: int = 0

    @property
    def ranks(self) -> int:
        return self.layout.ranks

    @property
    def kda_recomputed(self) -> int:
        """How often the forward pass of KDA runs again."""
        return self.recomputed + (self.head_groups > 0)

    @property
    def state_ranks(self) -> int:
        return self.ranks // self.heads_ranks

    @property
    def state_layout(self) -> ContextLayout:
        """The layout of the groups that share heads: what KDA's states are exchanged in."""
        return self.layout.outer(self.heads_ranks)


def sharing_of(
    config: Config, kind: str, mode: str, attention: str | None = None, node_ranks: int = 8
) -> Sharing | None:
    """The sharing of a recipe with another layout or mode, or None if its heads do not divide.

    Args:
        kind: "contiguous" or "zigzag".
        mode: of KDA.
        attention: of MLA; None: the recipe's.
        node_ranks: context-parallel ranks in a node, for the heads groups of "two_level" where
            `parallel.context_heads` is null: the largest that fit are taken.
    """
    parallel, ranks = config.parallel, config.parallel.context
    # That are exchanged together.
    heads = config.model.num_heads // parallel.tensor // max(1, parallel.recompute_head_groups)
    heads_ranks: int | None = {"state": 1, "heads": ranks}.get(mode)
    if mode == "two_level":
        fitting = (
            n for n in range(2, min(ranks, node_ranks + 1)) if math.gcd(ranks, heads, n) == n
        )
        heads_ranks = parallel.context_heads or max(fitting, default=None)
    if heads_ranks is None or heads % heads_ranks or ranks % heads_ranks:
        return None
    return Sharing(
        ContextLayout(kind, ranks),
        mode,
        heads_ranks,
        attention or parallel.context_attention,
        parallel.tensor,
        2 if config.precision == "bf16" else 4,
        int(
            parallel.recompute == "full"
            or (parallel.recompute == "selective" and "core_attn" in parallel.recompute_modules)
        ),
        parallel.recompute_head_groups,
    )


# ------------------------------------------------------------------ work


@dataclass(frozen=True)
class Work:
    """FLOPs of one rank for a micro-batch, forward and backward, of all layers.

    Tensor- and pipeline-parallel GPUs of the rank together.
    """

    tokens: int
    attention: int
    expansion: int
    maps: int

    @property
    def total(self) -> int:
        return self.tokens + self.attention + self.expansion + self.maps


def causal_pairs(plan: ContextPlan) -> int:
    """Pairs of a query of this rank and a key of the same document, not after it, on any rank."""
    pairs = 0
    for piece in plan.pieces:
        before, length = piece.first - piece.document_start, piece.end - piece.start
        pairs += length * before + length * (length + 1) // 2
    return pairs


def blocks_met(plans: list[ContextPlan]) -> list[int]:
    """The number of ranks whose keys each rank meets, its own among them; plans of all ranks."""
    by_document: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for plan in plans:
        for piece in plan.pieces:
            by_document[piece.document].append((piece.first, plan.rank))
    met = [{plan.rank} for plan in plans]
    for pieces in by_document.values():
        holders: set[int] = set()
        for _, rank in sorted(pieces):
            holders.add(rank)
            met[rank] |= holders
    return [len(ranks) for ranks in met]


def work_of_ranks(model: ModelConfig, sharing: Sharing, documents: Documents) -> list[Work]:
    """The work of every rank of the context-parallel group, in the order of ranks.

    Raises:
        ValueError: rows that the layout cannot cut.
    """
    layers, mla = count_layers(model), model.mla
    plans = [plan_context(sharing.layout, documents, rank) for rank in range(sharing.ranks)]
    own = documents.rows * documents.tokens // sharing.ranks

    parts = flops_per_token(model, context=1).components
    tokens = 3 * own * (sum(parts.values()) - parts["full_attention"])
    # The mean token of a sequence of T sees T / 2 keys, so one pair is the mean of T = 2.
    dim_qk = mla.qk_nope_head_dim + mla.qk_shared_head_dim
    pair = model.num_heads * full_attention_flops(dim_qk, mla.v_head_dim, 2)
    expand = 2 * full_attention_parameters(model)["kv_b_proj"]
    blocks = blocks_met(plans) if layers["full"] else [1] * sharing.ranks
    maps = [
        _map_flops(model, sharing, documents, group)
        for group in range(sharing.state_ranks)
        for _ in range(sharing.heads_ranks)
    ]
    return [
        Work(
            tokens=tokens,
            attention=3 * layers["full"] * pair * causal_pairs(plan),
            expansion=3 * layers["full"] * expand * own * (met - 1),
            maps=layers["linear"] * flops,
        )
        for plan, met, flops in zip(plans, blocks, maps, strict=True)
    ]


def _map_flops(model: ModelConfig, sharing: Sharing, documents: Documents, group: int) -> int:
    """Of a rank in heads group number `group`, for one KDA layer, forward and backward."""
    if sharing.state_ranks == 1:
        return 0
    plan = plan_context(sharing.state_layout, documents, group)
    if not plan.linked:
        return 0
    key, value = model.linear.head_dim_k, model.linear.head_dim_v
    length = [end - start for start, end in pairwise(plan.bounds)]
    leaving = sum(length[n] for n in plan.leaving)
    entering = sum(length[n] for n in plan.entering)
    flops = leaving * 4 * key * (key + value) + entering * 6 * key * value
    flops += plan.bounds[-1] * CHUNK * (key + CHUNK)
    return flops * model.num_heads // sharing.heads_ranks


# ------------------------------------------------------------------ bytes


@dataclass(frozen=True)
class Exchange:
    """One exchange of one layer, as one GPU sees it.

    Attributes:
        name: what is exchanged.
        operation: "all_gather", "reduce_scatter", "all_to_all" or "ring".
        group: "context", "heads" or "state".
        ranks: of the group.
        part: bytes of one rank's part: what it gives to all (all_gather), or to each other rank
            (reduce_scatter, all_to_all, a step of the ring).
        steps: of a ring.
    """

    name: str
    operation: str
    group: str
    ranks: int
    part: int
    steps: int = 1

    @property
    def sent(self) -> int:
        """Bytes; of an all-gather each once."""
        if self.operation == "ring":
            return self.part * self.steps
        return self.part if self.operation == "all_gather" else self.part * (self.ranks - 1)

    @property
    def received(self) -> int:
        """Bytes; of a reduce-scatter the sum once."""
        if self.operation == "ring":
            return self.part * self.steps
        return self.part if self.operation == "reduce_scatter" else self.part * (self.ranks - 1)


@dataclass(frozen=True)
class Traffic:
    """The exchanges of one layer and micro-batch, in order."""

    forward: tuple[Exchange, ...]
    backward: tuple[Exchange, ...]

    @property
    def bytes(self) -> tuple[int, int]:
        """Bytes forward and backward: of each exchange those sent or received, whichever is more,
        since a link carries both ways at once."""
        forward, backward = (
            sum(max(x.sent, x.received) for x in way) for way in (self.forward, self.backward)
        )
        return forward, backward


def kda_traffic(
    model: ModelConfig, sharing: Sharing, rows: int, tokens: int, linked: bool = True
) -> Traffic:
    """What one KDA layer exchanges.

    Args:
        rows, tokens: of a micro-batch: rows of `tokens` tokens over all ranks.
        linked: some document crosses from one segment into the next; otherwise nothing but heads
            is exchanged.
    """
    linear = model.linear
    key, value = linear.head_dim_k, linear.head_dim_v
    groups = max(1, sharing.head_groups)
    heads = model.num_heads // sharing.tensor // groups
    forward: list[Exchange] = []
    backward: list[Exchange] = []
    ranks = sharing.heads_ranks
    if ranks > 1:
        decay = key if linear.mixer == "kda" else 1
        words = rows * (tokens // sharing.ranks) * heads // ranks * sharing.element_bytes
        joint, output = words * (2 * key + value + decay + 1), words * value
        forward += [Exchange("tokens for heads", "all_to_all", "heads", ranks, joint)]
        backward += [Exchange("heads for tokens", "all_to_all", "heads", ranks, output)]
    ranks = sharing.state_ranks
    if ranks > 1 and linked:
        layout, share = sharing.state_layout, heads // sharing.heads_ranks
        slots = rows * layout.per_rank
        taps = min(max(linear.conv_kernel - 1, 0), tokens // layout.segments)
        channels = share * (2 * key + value)
        tails = slots * taps * channels
        maps = slots * share * key * (key + value) * STATE_BYTES
        state = Exchange("states", "all_gather", "state", ranks, maps)
        if tails:
            sent = tails * sharing.element_bytes
            forward += [Exchange("convolution halos", "all_gather", "state", ranks, sent)]
        forward += [state]
        backward += [state]
        if tails:
            summed = tails * STATE_BYTES
            backward += [Exchange("convolution halos", "reduce_scatter", "state", ranks, summed)]
    ranks = sharing.heads_ranks
    if ranks > 1:
        forward += [Exchange("heads for tokens", "all_to_all", "heads", ranks, output)]
        backward += [Exchange("tokens for heads", "all_to_all", "heads", ranks, joint)]
    return _traffic(groups * forward, groups * backward, sharing.kda_recomputed)


def mla_traffic(model: ModelConfig, sharing: Sharing, rows: int, tokens: int) -> Traffic:
    """What one MLA layer exchanges; arguments as for `kda_traffic`."""
    ranks, attention = sharing.ranks, sharing.attention
    if ranks == 1:
        return Traffic((), ())
    words = rows * (tokens // ranks) * (model.mla.kv_lora_rank + model.mla.qk_shared_head_dim)
    latents = words * sharing.element_bytes
    if attention == "ring":
        there = Exchange("latents", "ring", "context", ranks, latents, steps=ranks - 1)
        back = Exchange("latents' gradients", "ring", "context", ranks, words * STATE_BYTES, ranks)
    else:
        there = Exchange("latents", "all_gather", "context", ranks, latents)
        back = Exchange(
            "latents' gradients", "reduce_scatter", "context", ranks, words * STATE_BYTES
        )
    return _traffic([there], [there, back], sharing.recomputed)


def latent_buffers(model: ModelConfig, sharing: Sharing, rows: int, tokens: int) -> int:
    """Bytes of the blocks of latents and of their gradients that a GPU holds at once in the
    backward pass of an MLA layer: those of all ranks with "all_gather", two of each with "ring"."""
    words = rows * (tokens // sharing.ranks)
    words *= model.mla.kv_lora_rank + model.mla.qk_shared_head_dim
    blocks = sharing.ranks if sharing.attention == "all_gather" else 2
    return blocks * words * (sharing.element_bytes + STATE_BYTES)


def _traffic(forward: list[Exchange], backward: list[Exchange], recomputed: int) -> Traffic:
    return Traffic(tuple(forward), (*(recomputed * forward), *backward))
