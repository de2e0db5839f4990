"""Jobs for the rank pool: one operator over a sequence that several ranks hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]
TIMEOUT = timedelta(seconds=60)

# T = 48 tokens a row: segments of 24, 16, 12, 8 and 6 for 2, 3 and 4 ranks.
TOKENS = 48
DOCUMENTS = {
    "one_document": [0, 48],
    "uneven": [0, 5, 24, 25, 45, 48],
    "at_segment_ends": [0, 8, 12, 16, 24, 32, 36, 40, 48],
    "one_token_documents": [0, 1, 2, 11, 12, 13, 23, 24, 25, 47, 48],
    "empty_documents": [0, 0, 10, 10, 24, 24, 24, 30, 48, 48],
    "two_rows": [0, 7, 48, 48, 60, 96],
}


@contextmanager
def world(timeout: timedelta = TIMEOUT) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", timeout=timeout)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def make_context(
    mode: str,
    kind: str,
    heads_ranks: int | None = None,
    timeout: timedelta = TIMEOUT,
    **settings: Any,
) -> Any:
    """A `ContextParallel` over the whole world."""
    from megakda.layers.context_layout import ContextLayout
    from megakda.layers.context_parallel import ContextParallel

    ranks = torch.distributed.get_world_size()
    inner = {"state": 1, "heads": ranks}.get(mode, heads_ranks)
    outer = ranks // inner
    rank = torch.distributed.get_rank()
    heads_group = state_group = None
    for start in range(0, ranks, inner):
        group = torch.distributed.new_group(list(range(start, start + inner)), timeout)
        if rank // inner == start // inner and inner > 1:
            heads_group = group
    for start in range(inner):
        group = torch.distributed.new_group(list(range(start, ranks, inner)), timeout)
        if rank % inner == start and outer > 1:
            state_group = group
    return ContextParallel(
        layout=ContextLayout(kind, ranks),
        group=torch.distributed.group.WORLD,
        heads_group=heads_group,
        state_group=state_group,
        **settings,
    )


def run_shared(
    operator: Callable[..., Sequence[torch.Tensor | None]],
    shared: Tensors,
    replicated: Tensors,
    context: Any,
    gather: bool = True,
) -> Tensors:
    """Runs an operator on this rank's tokens; with `gather`, whole outputs and gradients.

    Args:
        operator: (own tokens of `shared`, `replicated`) -> (output over tokens, replicated output
            or None).
        shared: [B, T, ...] each.
        replicated: the same on all ranks.
    """
    rank, layout = context.rank, context.layout
    own = {name: layout.take(x, rank).requires_grad_() for name, x in shared.items()}
    same = {name: x.clone().requires_grad_() for name, x in replicated.items()}
    o, whole = operator(own, same)
    assert o is not None
    loss = (o * layout.take(_weights(o, layout.ranks), rank)).sum()
    if whole is not None:  # its loss counts once, but on a rank that need not have made it
        loss = loss + (whole * _weights(whole)).sum() * (rank == layout.ranks - 1)
    loss.backward()
    if not gather:
        return {}
    found = {"o": _gathered(o.detach(), layout)}
    found |= {f"d{name}": _gathered(_grad(x), layout) for name, x in own.items()}
    for name, x in same.items():
        found[f"d{name}"] = _grad(x).clone()
        torch.distributed.all_reduce(found[f"d{name}"])
    if whole is not None:
        found["whole"] = whole.detach()
    return found


def run_alone(
    operator: Callable[..., Sequence[torch.Tensor | None]], shared: Tensors, replicated: Tensors
) -> Tensors:
    """The same on one rank that holds everything."""
    own = {name: x.clone().requires_grad_() for name, x in shared.items()}
    same = {name: x.clone().requires_grad_() for name, x in replicated.items()}
    o, whole = operator(own, same)
    assert o is not None
    loss = (o * _weights(o)).sum()
    if whole is not None:
        loss = loss + (whole * _weights(whole)).sum()
    loss.backward()
    found = {"o": o.detach()} | {f"d{name}": _grad(x) for name, x in (own | same).items()}
    return found if whole is None else found | {"whole": whole.detach()}


def _grad(x: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(x) if x.grad is None else x.grad


def _weights(like: torch.Tensor, ranks: int = 1) -> torch.Tensor:
    """Of a loss; [B, T, ...] for an output that one of `ranks` ranks holds."""
    shape = list(like.shape)
    shape[1] *= ranks
    generator = torch.Generator().manual_seed(7)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(like.dtype)


def _gathered(x: torch.Tensor, layout: Any) -> torch.Tensor:
    """[B, S, ...] of all ranks -> [B, T, ...]."""
    parts = [torch.empty_like(x) for _ in range(layout.ranks)]
    torch.distributed.all_gather(parts, x.contiguous())
    by_segment = torch.stack([part.unflatten(1, (layout.per_rank, -1)) for part in parts])
    segments = layout.restore(by_segment.movedim(2, 1))  # [segments, B, L, ...]
    return segments.movedim(0, 1).flatten(1, 2)


# ------------------------------------------------------------------ KDA


def kda_inputs(
    rows: int, documents: int, heads: int, gdn: bool = False, tokens: int = TOKENS, taps: int = 4
) -> tuple[Tensors, Tensors]:
    generator = torch.Generator().manual_seed(rows + heads)
    key_dim, value_dim = 16, 24

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    decays = 1 if gdn else key_dim
    shared = {
        "q": randn(rows, tokens, heads, key_dim),
        "k": randn(rows, tokens, heads, key_dim),
        "v": randn(rows, tokens, heads, value_dim),
        "g": randn(rows, tokens, heads, decays),
        "beta": randn(rows, tokens, heads),
    }
    replicated = {"A_log": randn(heads), "dt_bias": randn(heads * decays)}
    if documents:
        replicated["initial_state"] = randn(documents, heads, key_dim, value_dim)
    if taps:
        replicated |= {
            f"conv_{name}": randn(heads * size, taps)
            for name, size in (("q", key_dim), ("k", key_dim), ("v", value_dim))
        }
    return shared, replicated


def kda_operator(documents: Any, context: Any, states: bool, backend: str | None = None) -> Any:
    """`kda_context_parallel` with everything switched on."""
    from megakda.layers.kda_context_parallel import kda_context_parallel

    def run(own: Tensors, same: Tensors) -> Any:
        weights = [same[f"conv_{name}"] for name in "qkv" if f"conv_{name}" in same]
        return kda_context_parallel(
            **own,
            context=context,
            documents=documents,
            conv_weights=weights,
            A_log=same["A_log"],
            dt_bias=same["dt_bias"],
            initial_state=same.get("initial_state"),
            output_final_state=states,
            chunk_size=16,
            backend=backend,
            use_gate_in_kernel=True,
            use_qk_l2norm_in_kernel=True,
            use_beta_sigmoid_in_kernel=True,
        )

    return run


def kda_shared(
    mode: str,
    kind: str,
    bounds: Sequence[int],
    heads: int,
    heads_ranks: int | None = None,
    states: bool = True,
    tokens: int = TOKENS,
    backend: str | None = None,
    **inputs: Any,
) -> Tensors | None:
    from megakda.layers.context_layout import Documents

    if backend == "triton":
        from megakda.kernels.verify import interpreter

        interpreter.install()
    documents = Documents(bounds[-1] // tokens, tokens, tuple(bounds))
    with world():
        context = make_context(mode, kind, heads_ranks)
        tensors = kda_inputs(
            documents.rows, len(bounds) - 1 if states else 0, heads, tokens=tokens, **inputs
        )
        operator = kda_operator(documents, context, states, backend)
        found = run_shared(operator, *tensors, context)
        return found if context.rank == 0 else None


# ------------------------------------------------------------------ MLA

MLA_SIZES = dict(rank=20, key=16, shared=8, value=12)


def mla_inputs(rows: int, heads: int, tokens: int = TOKENS) -> tuple[Tensors, Tensors]:
    generator = torch.Generator().manual_seed(rows + heads)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    r, n, p, v = MLA_SIZES.values()
    shared = {
        "q": randn(rows, tokens, heads, n + p),
        "latent": randn(rows, tokens, r + p),
    }
    return shared, {"weight": randn(heads * (n + v), r) * r**-0.5}


def mla_operator(documents: Any, context: Any, max_logit: torch.Tensor | None = None) -> Any:
    from megakda.layers.mla_context_parallel import LatentHeads, latent_attention

    sizes = LatentHeads(**MLA_SIZES, scale=0.3)

    def run(own: Tensors, same: Tensors) -> Any:
        q, latent = (own[name].flatten(0, 1) for name in ("q", "latent"))
        o = latent_attention(
            q,
            latent,
            same["weight"],
            heads=sizes,
            context=context,
            documents=documents,
            max_logit=max_logit,
        )
        return o.unflatten(0, own["q"].shape[:2]), None

    return run


def mla_shared(attention: str, kind: str, bounds: Sequence[int], heads: int) -> Tensors | None:
    from megakda.layers.context_layout import Documents

    documents = Documents(bounds[-1] // TOKENS, TOKENS, tuple(bounds))
    with world():
        context = make_context("state", kind, attention=attention)
        tensors = mla_inputs(documents.rows, heads)
        max_logit = torch.full((heads,), -torch.inf)
        found = run_shared(mla_operator(documents, context, max_logit), *tensors, context)
        torch.distributed.all_reduce(max_logit, torch.distributed.ReduceOp.MAX)
        return found | {"max_logit": max_logit} if context.rank == 0 else None


def any_operator(context: Any, is_mla: bool) -> tuple[Any, Tensors, Tensors]:
    """An operator over one document, and its inputs."""
    from megakda.layers.context_layout import Documents

    documents = Documents.whole_rows(1, TOKENS)
    if is_mla:
        return mla_operator(documents, context), *mla_inputs(1, 3)
    return kda_operator(documents, context, states=False), *kda_inputs(1, 0, 3)
