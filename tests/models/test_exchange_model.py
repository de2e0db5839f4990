"""Predicted times of exchanges, against arithmetic by hand, and what must hold of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megakda.config import compose
from megakda.layers.context_layout import ContextLayout
from megakda.models.context_cost import Exchange, Sharing, kda_traffic
from megakda.models.exchange_model import (
    ASSUMED,
    H200,
    Assumptions,
    Machine,
    predict,
    predict_kda,
    predict_mla,
    seconds,
)
from megakda.models.flops import full_attention_flops

# 100 bytes a second inside a node of 4, 10 between nodes, nothing lost.
SMALL = Machine("small", 1e3, 1e3, 100.0, 10.0, 4, ())
FULL = Assumptions(1.0, 1.0, 1.0, 1.0, 1.0, 1.0, latency=0.0)


def sharing(ranks, mode="state", heads_ranks=1, tensor=1, kind="zigzag", **settings):
    return Sharing(ContextLayout(kind, ranks), mode, heads_ranks, tensor=tensor, **settings)


@pytest.mark.parametrize(
    ("operation", "ranks", "tensor", "expected"),
    [
        ("all_gather", 4, 1, 3 * 100 / 100),  # from three neighbours
        ("reduce_scatter", 4, 1, 3 * 100 / 100),
        ("all_to_all", 4, 1, 3 * 100 / 100),
        ("all_gather", 4, 2, 100 / 10),  # two nodes of two ranks, two adapters for two parts
        ("all_gather", 4, 4, 3 * 100 / 10),  # every rank in a node of its own
        ("all_to_all", 4, 2, 2 * 100 / 10),
        ("all_gather", 8, 1, 100 / 10),  # four parts through four adapters
        ("ring", 4, 1, 3 * 100 / 100),
        ("ring", 8, 1, 7 * 100 / 10),  # each step waits for the one between nodes
    ],
)
def test_times_by_hand(operation, ranks, tensor, expected):
    steps = ranks - 1 if operation == "ring" else 1
    x = Exchange("x", operation, "context", ranks, 100, steps)
    assert seconds(x, sharing(ranks, tensor=tensor), SMALL, FULL) == pytest.approx(expected)
    late = replace(FULL, latency=2.0, network=0.5, link=0.5)
    found = seconds(x, sharing(ranks, tensor=tensor), SMALL, late)
    assert found == pytest.approx(2 * expected + 2 * steps)


def test_groups_of_two_levels():
    """Heads groups fill a node of 4, so that states always cross nodes."""
    two = sharing(8, "two_level", 4)
    assert seconds(Exchange("x", "all_to_all", "heads", 4, 100), two, SMALL, FULL) == 3.0
    assert seconds(Exchange("x", "all_gather", "state", 2, 100), two, SMALL, FULL) == 10.0
    two = sharing(8, "two_level", 2)  # two ranks of a state group in each node
    assert seconds(Exchange("x", "all_gather", "state", 4, 100), two, SMALL, FULL) == 10.0


@pytest.fixture(scope="module")
def model():
    return compose(["model=kimi_linear_48b"]).model


def test_state_does_not_grow_with_tokens_and_heads_do(model):
    def exchange(n, mode, heads_ranks):
        return predict_kda(model, sharing(8, mode, heads_ranks), 1, n, assumed=FULL).exchange

    short, long = 1 << 17, 1 << 20
    assert exchange(long, "state", 1) == exchange(short, "state", 1)
    assert exchange(long, "heads", 8) == pytest.approx(8 * exchange(short, "heads", 8))
    # The bytes of four all-to-all exchanges inside a node.
    expected = sum(kda_traffic(model, sharing(8, "heads", 8), 1, short).bytes) / H200.link
    assert exchange(short, "heads", 8) == pytest.approx(expected)


def test_what_hides_the_exchange_of_states(model):
    few, many = (predict_kda(model, sharing(8), 1, n) for n in (1 << 12, 1 << 21))
    halos = 2 * ASSUMED.latency
    assert few.exposed > 0.5 * few.exchange
    assert many.exposed == pytest.approx(halos, rel=0.3)  # they are waited for
    assert many.extra == pytest.approx(512 * few.extra)
    assert 0.2 < many.extra / many.compute < 1
    heads = predict_kda(model, sharing(8, "heads", 8), 1, 1 << 21)
    assert heads.exposed == heads.exchange and heads.extra == 0
    again = predict_kda(model, sharing(8, recomputed=1), 1, 1 << 21)
    assert again.extra > many.extra and again.exchange > many.exchange
    groups = predict_kda(model, sharing(8, recomputed=1, head_groups=4), 1, 1 << 21)
    assert groups.extra > again.extra and groups.compute > again.compute


def test_attention_hides_latents(model):
    pair = model.num_heads * full_attention_flops(192, 128, 2)
    for kind, blocks in (("zigzag", 8), ("contiguous", 15)):
        for n in (1 << 17, 1 << 20):
            found = {
                way: predict_mla(model, sharing(8, kind=kind, attention=way), 1, n, assumed=FULL)
                for way in ("all_gather", "ring")
            }
            own = (n // 8) ** 2 / 2 * pair / H200.flops
            assert found["ring"].compute == pytest.approx(3 * blocks * own, rel=0.05)
            # The gradients of the last block go home, or all are reduced, with nothing to do.
            part = n // 8 * 576 * 4 / H200.link
            assert found["ring"].exposed == pytest.approx(part)
            assert found["all_gather"].exposed == pytest.approx(7 * part)
            assert found["ring"].extra == found["all_gather"].extra > 0
    slow = replace(H200, link=1e6)
    found = predict_mla(model, sharing(8, attention="ring"), 1, 1 << 17, slow, FULL)
    assert 0.9 * found.exchange < found.exposed < found.exchange
    alone = predict_mla(model, sharing(1), 1, 1 << 17)
    assert alone.cost == alone.exchange == 0 < alone.compute


def test_points_and_what_is_best():
    config = compose(["model=kimi_linear_48b", "precision=bf16", "parallel.context=8"])
    point = predict(config, "zigzag", tensor=2, ranks=8, tokens=1 << 14)
    assert point.kda.keys() == {"state", "heads", "two_level"}
    costs = {mode: x.cost for mode, x in point.kda.items()}
    assert point.best_mode == min(costs, key=costs.get)
    # 4 heads groups of a node each: where few tokens make states the larger part, they win.
    few = predict(config, "zigzag", tensor=1, ranks=32, tokens=1 << 10)
    assert few.best_mode == "two_level"
    assert predict(config, "zigzag", tensor=1, ranks=32, tokens=1 << 17).best_mode == "state"
    point = predict(config, "zigzag", tensor=8, ranks=8, tokens=1 << 14)
    assert point.kda["heads"] is None and point.kda["two_level"] is None
    assert point.best_mode == "state"
    settings = ["parallel.recompute=full", "parallel.recompute_head_groups=16"]
    grouped = compose(["model=kimi_linear_48b", "precision=bf16", *settings])
    found = predict(grouped, "zigzag", tensor=8, ranks=8, tokens=1 << 14)  # 4 heads on a rank
    assert found.kda["state"].extra > point.kda["state"].extra
    ring = replace(point.mla["ring"], exposed=1.0, compute=10.0)
    mla = {"ring": ring, "all_gather": replace(ring, exposed=1.05)}
    assert replace(point, mla=mla).best_attention == "all_gather"  # fewer calls, much the same
    mla["all_gather"] = replace(ring, exposed=1.2)
    assert replace(point, mla=mla).best_attention == "ring"


def test_rates_have_sources():
    assert H200.flops == 989.5e12
    text = " ".join(H200.sources)
    assert "H200 Tensor Core GPU data sheet" in text and "ConnectX-7 data sheet" in text
    assert f"{2 * H200.link / 1e9:g} GB/s both directions" in text
    assert f"{8 * H200.network / 1e9:g} Gb/s" in text and f"{H200.memory / 1e12:g} TB/s" in text
