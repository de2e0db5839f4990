"""What context parallelism moves, counted from the collectives that were called."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.layers import context_jobs

KIB = 1024


def record(operator: Any, shared: Any, replicated: Any, context: Any) -> tuple[list, list]:
    """Collectives of the forward and of the backward pass on this rank."""
    from megakda.runtime.collectives import record_collectives

    own = {
        name: context.layout.take(x, context.rank).requires_grad_() for name, x in shared.items()
    }
    same = {name: x.requires_grad_() for name, x in replicated.items()}
    with record_collectives() as forward:
        o, _ = operator(own, same)
    with record_collectives() as backward:
        o.sum().backward()
    return list(forward), list(backward)


def kda(mode: str, kind: str, tokens: int, heads: int, dtype: torch.dtype) -> tuple[list, list]:
    """One KDA layer's exchange at K = V = 128."""
    from megakda.layers.context_layout import Documents

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    generator = torch.Generator().manual_seed(0)
    with context_jobs.world():
        context = context_jobs.make_context(mode, kind, heads_ranks=2)
        size = (1, tokens, heads, 128)
        shared = {name: randn(*size) for name in "qkvg"} | {"beta": randn(1, tokens, heads)}
        replicated = {"A_log": torch.zeros(heads), "dt_bias": torch.zeros(heads * 128)}
        replicated |= {f"conv_{name}": randn(heads * 128, 4) for name in "qkv"}
        operator = context_jobs.kda_operator(Documents.whole_rows(1, tokens), context, False)
        return record(operator, shared, replicated, context)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("world", "kind"), [(2, "zigzag"), (2, "contiguous"), (3, "zigzag")])
def test_states_are_128_kib_per_head_segment_and_direction(ranks, world, kind, dtype):
    heads, segments = 2, 2 if kind == "zigzag" else 1
    moved = []
    for tokens in (48, 192):
        for per_rank in ranks.run(world, kda, "state", kind, tokens, heads, dtype):
            for calls, halo_dtype in zip(per_rank, (dtype, torch.float32), strict=True):
                states = [call for call in calls if call.shape[1:] == (heads, 128, 256)]
                assert len(states) == 1
                assert states[0].sent == 128 * KIB * heads * segments
                assert states[0].received == states[0].sent * (world - 1)
                assert states[0].dtype == torch.float32
                # All else is the convolutions' halo: 3 tokens of q, k and v; gradients are summed.
                halo = sum(call.sent for call in calls if call not in states)
                width = 3 * heads * 128 * halo_dtype.itemsize
                assert 3 * width * segments <= halo <= 3 * width * segments * (world - 1)
                assert len(calls) == 2
            moved.append([[call.sent for call in calls] for calls in per_rank])
    assert all(entry == moved[0] for entry in moved)  # whatever the rank and the tokens


def test_heads_move_every_token(ranks):
    heads, dtype = 2, torch.float32
    sent = {}
    for tokens in (64, 256):
        forward, backward = ranks.run(2, kda, "heads", "zigzag", tokens, heads, dtype)[0]
        # q, k, v, g, beta there and o back, of the half of the heads that is another rank's.
        expected = tokens // 2 * (heads // 2) * (4 * 128 + 1 + 128) * dtype.itemsize
        for calls in (forward, backward):
            assert {call.operation for call in calls} == {"all_to_all_single"}
            assert sum(call.sent for call in calls) == expected
        sent[tokens] = expected
    assert sent[256] == 4 * sent[64]


def test_two_levels_move_the_states_of_fewer_heads(ranks):
    heads, neighbours = 4, 2
    forward, _ = ranks.run(4, kda, "two_level", "zigzag", 96, heads, torch.float32)[0]
    states = [call for call in forward if call.shape[1:] == (heads // neighbours, 128, 256)]
    assert len(states) == 1 and states[0].ranks == 2
    assert states[0].sent == 128 * KIB * 2 * heads // neighbours


def mla(attention: str, heads: int, dtype: torch.dtype) -> tuple[list, list]:
    """One MLA layer's exchange at the 48B model's latent, 512 + 64."""
    from megakda.layers.context_layout import Documents
    from megakda.layers.mla_context_parallel import LatentHeads, latent_attention

    tokens, sizes = 32, LatentHeads(rank=512, key=16, shared=64, value=16, scale=0.1)
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    with context_jobs.world():
        context = context_jobs.make_context("state", "zigzag", attention=attention)
        documents = Documents.whole_rows(1, tokens)
        shared = {"q": randn(1, tokens, heads, 80), "latent": randn(1, tokens, 576)}

        def operator(own: Any, same: Any) -> Any:
            q, latent = own["q"][0], own["latent"][0]
            weight = same["weight"]
            return latent_attention(
                q, latent, weight, heads=sizes, context=context, documents=documents
            ), None

        return record(operator, shared, {"weight": randn(heads * 32, 512)}, context)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["all_gather", "ring"])
def test_attention_moves_the_latent_only(ranks, attention, dtype):
    world, own = 4, 32 // 4
    found = {heads: ranks.run(world, mla, attention, heads, dtype)[0] for heads in (1, 4)}
    assert found[1] == found[4]  # expanded heads stay where they are
    forward, backward = found[4]
    assert all(call.shape[-1] == 576 for call in forward + backward)
    block = own * 576
    received = sum(call.received for call in forward)
    assert received == block * dtype.itemsize * (world - 1)
    gradients = sum(call.sent for call in backward) - sum(call.sent for call in forward)
    steps = world - 1 if attention == "all_gather" else world  # home again
    assert gradients == block * 4 * steps  # in fp32, since they are sums over the ranks
