"""Work and bytes of context-parallel ranks: counted one by one, and as the operators move them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from megakda.config import compose
from megakda.config.schema import LinearAttentionConfig, MLAConfig
from megakda.layers.context_layout import ContextLayout, Documents, plan_context
from megakda.models.context_cost import (
    Sharing,
    blocks_met,
    causal_pairs,
    kda_traffic,
    latent_buffers,
    mla_traffic,
    sharing_of,
    work_of_ranks,
)
from megakda.models.flops import flops_per_token
from tests.layers import context_jobs
from tests.models import context_cost_jobs as jobs

TOKENS = context_jobs.TOKENS
LAYOUTS = [ContextLayout("contiguous", 4), ContextLayout("zigzag", 4)]


def make(overrides=()):
    return compose(["model=tiny", "train.context=48", *overrides])


def whole(bounds):
    return Documents(bounds[-1] // TOKENS, TOKENS, tuple(bounds))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: x.kind)
@pytest.mark.parametrize("bounds", context_jobs.DOCUMENTS.values(), ids=context_jobs.DOCUMENTS)
def test_pairs_and_blocks_one_by_one(bounds, layout):
    documents = whole(bounds)
    plans = [plan_context(layout, documents, rank) for rank in range(4)]
    owner, document = {}, {}
    for plan in plans:
        for piece in plan.pieces:
            for token in range(piece.first, piece.last):
                owner[token], document[token] = plan.rank, piece.document
    assert len(owner) == bounds[-1]
    pairs, blocks = Counter(), {rank: {rank} for rank in range(4)}
    for query in owner:
        for key in range(query + 1):
            if document[key] == document[query]:
                pairs[owner[query]] += 1
                blocks[owner[query]].add(owner[key])
    assert [causal_pairs(plan) for plan in plans] == [pairs[rank] for rank in range(4)]
    assert blocks_met(plans) == [len(blocks[rank]) for rank in range(4)]


def test_one_rank_does_what_a_token_costs():
    """All ranks of a group together, without what sharing adds, do the FLOPs of flops.py."""
    model = make().model
    tokens = 1 << 12
    for layout in [ContextLayout("contiguous", 1), *LAYOUTS]:
        work = work_of_ranks(
            model, Sharing(layout, "heads", layout.ranks), Documents.whole_rows(2, tokens)
        )
        total = sum(rank.total - rank.expansion for rank in work)
        whole_model = 2 * tokens * flops_per_token(model, tokens).training
        # Here the diagonal counts in full: half a key per token more.
        diagonal = 3 * 2 * tokens * model.num_heads * (48 + 32)
        assert total == whole_model + diagonal
        assert {rank.tokens for rank in work} == {work[0].tokens}
        assert all(rank.maps == 0 for rank in work)


def test_balance_of_whole_documents():
    model = make().model
    contiguous, zigzag = (
        work_of_ranks(model, Sharing(layout), Documents.whole_rows(1, 4096)) for layout in LAYOUTS
    )
    assert len({rank.attention for rank in zigzag}) == 1
    assert contiguous[3].attention / contiguous[0].attention == pytest.approx(7, rel=1e-2)
    # The block of a rank is expanded by all that see it: of zig-zag all see all.
    assert [rank.expansion // contiguous[1].expansion for rank in contiguous] == [0, 1, 2, 3]
    assert {rank.expansion for rank in zigzag} == {contiguous[3].expansion}


def test_maps_of_pieces_that_leave_or_enter():
    """A quarter of the row on each rank: nothing enters the first, nothing leaves the last."""
    model = make(["model.linear.head_dim_k=16", "model.linear.head_dim_v=24"]).model
    own, heads, layers = 12, 4, 3
    again = own * heads * 64 * (16 + 64) * layers
    leave, enter = own * heads * 4 * 16 * (16 + 24) * layers, own * heads * 6 * 16 * 24 * layers
    documents = Documents.whole_rows(1, 48)
    work = work_of_ranks(model, Sharing(LAYOUTS[0]), documents)
    expected = [leave + again, leave + enter + again, leave + enter + again, enter + again]
    assert [rank.maps for rank in work] == expected
    # Zig-zag: rank 0 holds the first half-segment and the last.
    work = work_of_ranks(model, Sharing(LAYOUTS[1]), documents)
    assert work[0].maps == (leave + enter) // 2 + again
    assert [rank.maps for rank in work[1:]] == [leave + enter + again] * 3
    # Two levels: half the heads, twice the tokens; and none where no document crosses a segment.
    work = work_of_ranks(model, Sharing(LAYOUTS[0], "two_level", 2), documents)
    assert [rank.maps for rank in work] == [leave + again] * 2 + [enter + again] * 2
    apart = Documents(1, 48, (0, 5, 12, 24, 30, 36, 48))
    assert all(rank.maps == 0 for rank in work_of_ranks(model, Sharing(LAYOUTS[0]), apart))


# ------------------------------------------------------------------ bytes


def moved(exchanges):
    """By function of torch.distributed, bytes sent and received."""
    names = {
        "all_gather": ["all_gather_into_tensor"],
        "reduce_scatter": ["reduce_scatter_tensor"],
        "all_to_all": ["all_to_all_single"],
        "ring": ["isend", "irecv"],
    }
    sent, received = Counter(), Counter()
    for x in exchanges:
        first, last = names[x.operation][0], names[x.operation][-1]
        sent[first] += x.sent
        received[last] += x.received
    return {name: (sent[name], received[name]) for name in {*sent, *received}}


def operator_model(mixer="kda", taps=4):
    linear = LinearAttentionConfig(mixer=mixer, head_dim_k=16, head_dim_v=24, conv_kernel=taps)
    r, n, p, v = context_jobs.MLA_SIZES.values()
    mla = MLAConfig(kv_lora_rank=r, qk_nope_head_dim=n, qk_shared_head_dim=p, v_head_dim=v)
    return replace(make().model, num_heads=4, linear=linear, mla=mla)


MODES = {"state": 1, "two_level": 2, "heads": 4}


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
def test_kda_bytes_are_those_of_the_operator(ranks, kind, mode, bf16):
    bounds = context_jobs.DOCUMENTS["two_rows"]
    sharing = Sharing(ContextLayout(kind, 4), mode, MODES[mode], element_bytes=2 if bf16 else 4)
    traffic = kda_traffic(operator_model(), sharing, 2, TOKENS)
    expected = moved(traffic.forward), moved(traffic.backward)
    for found in ranks.run(4, jobs.exchanged, "kda", kind, bounds, bf16, mode=mode):
        assert found == expected


def test_kda_exchanges_nothing_where_no_document_crosses(ranks):
    sharing = Sharing(ContextLayout("contiguous", 4))
    traffic = kda_traffic(operator_model(), sharing, 1, TOKENS, linked=False)
    assert traffic.bytes == (0, 0)
    bounds = [0, 5, 12, 24, 30, 36, 48]
    assert ranks.run(4, jobs.exchanged, "kda", "contiguous", bounds, False) == [({}, {})] * 4
    # Without a convolution there are no halos.
    traffic = kda_traffic(operator_model(taps=0), sharing, 1, TOKENS)
    expected = moved(traffic.forward), moved(traffic.backward)
    found = ranks.run(4, jobs.exchanged, "kda", "contiguous", [0, 48], False, taps=0)
    assert found == [expected] * 4


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("attention", ["all_gather", "ring"])
def test_mla_bytes_are_those_of_the_operator(ranks, attention, bf16):
    bounds = context_jobs.DOCUMENTS["two_rows"]
    sharing = Sharing(
        ContextLayout("zigzag", 4), attention=attention, element_bytes=2 if bf16 else 4
    )
    traffic = mla_traffic(operator_model(), sharing, 2, TOKENS)
    expected = moved(traffic.forward), moved(traffic.backward)
    for found in ranks.run(4, jobs.exchanged, "mla", "zigzag", bounds, bf16, attention=attention):
        assert found == expected


def test_bytes_of_the_48b_model():
    """128 KiB per head and segment, whatever the tokens; heads in proportion to them."""
    model = compose(["model=kimi_linear_48b"]).model
    sharing = Sharing(ContextLayout("contiguous", 8), tensor=2)
    state = [x for x in kda_traffic(model, sharing, 1, 1 << 17).forward if x.name == "states"]
    assert [(x.sent, x.received) for x in state] == [(16 * 128 << 10, 7 * 16 * 128 << 10)]
    assert kda_traffic(model, sharing, 1, 1 << 20) == kda_traffic(model, sharing, 1, 1 << 17)
    zigzag = replace(sharing, layout=ContextLayout("zigzag", 8))
    assert sum(kda_traffic(model, zigzag, 1, 1 << 17).bytes) == 2 * sum(
        kda_traffic(model, sharing, 1, 1 << 17).bytes
    )
    heads = replace(sharing, mode="heads", heads_ranks=8)
    short, long = (sum(kda_traffic(model, heads, 1, n).bytes) for n in (1 << 17, 1 << 20))
    assert long == 8 * short
    again = replace(sharing, recomputed=1)
    traffic = kda_traffic(model, again, 1, 1 << 17)
    assert traffic.backward[:2] == traffic.forward and len(traffic.backward) == 4
    groups = kda_traffic(model, replace(again, head_groups=4), 1, 1 << 17)
    assert len(groups.forward) == 8 and len(groups.backward) == 24  # forward twice more
    assert groups.bytes[0] == traffic.bytes[0]
    assert groups.bytes[1] == traffic.bytes[1] + traffic.bytes[0]
    # 576 numbers per token in bf16, of 7 of 8 ranks.
    assert mla_traffic(model, sharing, 1, 1 << 17).bytes[0] == 7 * (1 << 14) * 576 * 2
    gathered, ring = (
        latent_buffers(model, replace(sharing, attention=way), 1, 1 << 17)
        for way in ("all_gather", "ring")
    )
    assert gathered == 4 * ring == (1 << 17) * 576 * (2 + 4)


def test_sharing_of_a_recipe():
    config = make(["parallel.context=8", "model.num_heads=8", "precision=bf16"])
    assert sharing_of(config, "zigzag", "state") == Sharing(ContextLayout("zigzag", 8))
    assert sharing_of(config, "zigzag", "heads").heads_ranks == 8
    assert sharing_of(config, "zigzag", "two_level").heads_ranks == 4
    assert sharing_of(config, "zigzag", "two_level", node_ranks=2).heads_ranks == 2
    assert sharing_of(config, "zigzag", "two_level", node_ranks=1) is None
    config = make(["parallel.context=8", "parallel.tensor=2", "parallel.context_heads=2"])
    found = sharing_of(config, "contiguous", "two_level")
    assert (found.heads_ranks, found.tensor, found.element_bytes) == (2, 2, 4)
    assert sharing_of(config, "contiguous", "heads") is None  # 2 heads on a rank
    config = make(["parallel.context=4", "parallel.recompute=full"])
    assert sharing_of(config, "zigzag", "heads").recomputed == 1
    config = make(
        ["parallel.context=4", "parallel.recompute=full", "parallel.recompute_head_groups=2"]
    )
    assert sharing_of(config, "zigzag", "state").kda_recomputed == 2
    assert sharing_of(config, "zigzag", "heads") is None  # 2 heads in a group
