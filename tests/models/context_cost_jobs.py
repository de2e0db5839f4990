"""Jobs for the rank pool: what the operators of context parallelism really exchange."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from megakda.runtime.collectives import Collective, record_collectives
from tests.layers import context_jobs as jobs

Moved = dict[str, tuple[int, int]]  # by operation, bytes sent and received


def exchanged(
    layer: str,
    kind: str,
    bounds: Sequence[int],
    bf16: bool,
    mode: str = "state",
    attention: str = "all_gather",
    taps: int = 4,
) -> tuple[Moved, Moved]:
    """Bytes of one operator's forward and backward pass, 4 heads, heads groups of 2."""
    from megakda.layers.context_layout import Documents

    documents = Documents(bounds[-1] // jobs.TOKENS, jobs.TOKENS, tuple(bounds))
    with jobs.world():
        context = jobs.make_context(
            mode, kind, 2 if mode == "two_level" else None, attention=attention
        )
        if layer == "kda":
            operator = jobs.kda_operator(documents, context, states=False)
            tensors = jobs.kda_inputs(documents.rows, 0, 4, taps=taps)
        else:
            operator = jobs.mla_operator(documents, context)
            tensors = jobs.mla_inputs(documents.rows, 4)
        own = {name: context.layout.take(x, context.rank) for name, x in tensors[0].items()}
        same = tensors[1]
        for part in (own, same):
            for name, x in part.items():
                fp32 = not bf16 or name in ("A_log", "dt_bias")
                part[name] = x.to(torch.float32 if fp32 else torch.bfloat16).requires_grad_()
        with record_collectives() as forward:
            o, _ = operator(own, same)
        with record_collectives() as backward:
            o.sum().backward()
        return _total(forward), _total(backward)


def _total(calls: list[Collective]) -> Moved:
    sent: Counter[str] = Counter()
    received: Counter[str] = Counter()
    for call in calls:
        sent[call.operation] += call.sent
        received[call.operation] += call.received
    return {name: (sent[name], received[name]) for name in sent}
