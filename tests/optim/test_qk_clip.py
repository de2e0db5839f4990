"""QK-Clip: the rule in float64, heads brought under tau, and the same weights at every layout."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from megakda.config.schema import MLAConfig
from megakda.optim.qk_clip import gammas, row_factors
from tests.optim import muon_jobs


@pytest.fixture(scope="module")
def tau_of(ranks, corpus):
    """A bound between the heads' largest logits in the first step, by overrides."""
    cache: dict[tuple[str, ...], float] = {}

    def tau(*overrides: str) -> float:
        if overrides not in cache:
            free = ["optim.qk_clip=inf", *overrides]
            logits = ranks.run(1, muon_jobs.clip, free, corpus, 1)[0]["logits"][0]
            cache[overrides] = float(logits.sort().values[0, 1:3].mean())
        return cache[overrides]

    return tau


@pytest.mark.parametrize("q_lora_rank", [None, 5])
def test_logits_scale_as_the_rule_says(q_lora_rank):
    """Exactly by gamma = tau / S where S > tau, by nothing elsewhere, in float64."""
    heads, hidden, rank, tokens, tau = 3, 12, 8, 10, 1.5
    mla = MLAConfig(
        q_lora_rank=q_lora_rank,
        kv_lora_rank=rank,
        qk_nope_head_dim=4,
        qk_shared_head_dim=2,
        v_head_dim=3,
    )
    generator = torch.Generator().manual_seed(0)

    def weight(rows: int, columns: int) -> torch.nn.Parameter:
        values = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
        return torch.nn.Parameter(values, requires_grad=False)

    query = weight(heads * 6, hidden)
    query.data.view(heads, 6, hidden).mul_(torch.tensor([0.02, 1.0, 5.0]).view(3, 1, 1))
    keys = weight(heads * 7, rank)
    named = {"q_proj" if q_lora_rank is None else "q_b_proj": SimpleNamespace(weight=query)}
    layer = SimpleNamespace(mla=mla, kv_b_proj=SimpleNamespace(weight=keys), **named)
    x = torch.randn(tokens, hidden, generator=generator, dtype=torch.float64)
    latent = torch.randn(tokens, rank, generator=generator, dtype=torch.float64)
    shared = torch.randn(tokens, 2, generator=generator, dtype=torch.float64)

    def logits_and_values() -> tuple[torch.Tensor, torch.Tensor]:
        q = (x @ query.T).view(tokens, heads, 6)
        own, values = (latent @ keys.T).view(tokens, heads, 7).split([4, 3], dim=-1)
        k = torch.cat([own, shared.unsqueeze(1).expand(-1, heads, -1)], dim=-1)
        return torch.einsum("ihd,jhd->hij", q, k) * 6**-0.5, values

    before, values = logits_and_values()
    largest = before.amax((1, 2))
    assert (largest > tau).tolist() == [False, True, True]
    gamma = gammas(largest, tau)
    for param, rows in row_factors(layer, gamma).items():
        param.mul_(rows.unsqueeze(1))
    after, same_values = logits_and_values()
    assert torch.equal(same_values, values)
    assert torch.equal(after[0], before[0])
    torch.testing.assert_close(after, before * gamma.view(-1, 1, 1), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        after.amax((1, 2))[1:], largest.new_full((2,), tau), rtol=1e-12, atol=0
    )


def test_heads_above_tau_are_brought_to_it_and_nothing_else_moves(ranks, corpus):
    free = ranks.run(1, muon_jobs.clip, ["optim.qk_clip=inf"], corpus, 2, still=True)[0]
    tau = float(free["logits"][0].sort().values[0, :2].mean())  # between the lowest two heads
    clipped = ranks.run(1, muon_jobs.clip, [f"optim.qk_clip={tau}"], corpus, 2, still=True)[0]
    first, second = clipped["logits"]
    assert torch.equal(first, free["logits"][0]) and torch.equal(first, free["logits"][1])
    above = first > tau
    assert above.sum() == 3
    bound = torch.full_like(second[above], tau)
    torch.testing.assert_close(second[above], bound, rtol=1e-5, atol=0)
    assert torch.equal(second[~above], first[~above])
    moved = {
        name
        for name, weight in clipped["weights"].items()
        if not torch.equal(weight, free["weights"][name])
    }
    # Layer 3 alone has MLA: its shared key stays, and so do all KDA layers.
    layer = "decoder.layers.3.self_attention"
    assert moved == {f"{layer}.q_proj.weight", f"{layer}.kv_b_proj.weight"}
    assert clipped["metrics"][0]["max_logit"] == {"4": pytest.approx(float(first.max()))}
    assert clipped["metrics"][0]["qk_clip_share"] == float(above.float().mean())
    assert free["metrics"][0]["qk_clip_share"] == 0


LAYOUTS = {
    "dp2": (2, []),
    "dp2_plain": (2, ["parallel.distributed_optimizer=false"]),
    "tp2_dp2": (4, ["parallel=tp2"]),
    "pp2": (2, ["parallel=pp2"]),
    "cp2_ring": (2, ["parallel.context=2", "parallel.context_attention=ring"]),
    "dp2_packed": (2, ["data.packing=best_fit"]),
    "dp2_adamw": (2, ["optim=adamw"]),
    "dp2_overlap": (
        2,
        ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"],
    ),
    "ep2_recompute": (2, ["parallel=ep2", "parallel.recompute=full"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_those_of_one_rank(ranks, corpus, tau_of, layout):
    world, overrides = LAYOUTS[layout]
    model = [o for o in overrides if o.startswith(("data.", "optim="))]
    tau = f"optim.qk_clip={tau_of(*model)}"
    one = ranks.run(1, muon_jobs.clip, [*model, tau], corpus, 3)[0]
    found = ranks.run(world, muon_jobs.clip, [*overrides, tau], corpus, 3)
    assert 0 < one["metrics"][0]["qk_clip_share"] < 1
    for theirs, ours in zip(one["metrics"], found[0]["metrics"], strict=True):
        assert ours["max_logit"] == pytest.approx(theirs["max_logit"], rel=1e-5)
        assert ours["qk_clip_share"] == theirs["qk_clip_share"]
    for name, weight in one["weights"].items():
        assert (found[0]["weights"][name] - weight).abs().max() < 1e-5, name
    assert all(rank["agree"] for rank in found)


def test_bf16_weights_are_the_clipped_fp32_ones(ranks, corpus, tau_of):
    tau = tau_of("precision=bf16")
    overrides = ["precision=bf16", f"optim.qk_clip={tau}"]
    found = ranks.run(2, muon_jobs.clip, overrides, corpus, 2, still=True)[0]
    assert found["agree"]
    first, second = found["logits"]
    assert (first > tau).any() and second.max() < tau * 1.01


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        (["model.pattern='1:0'"], []),
        (["model.linear.mixer=gdn"], ["4"]),
        (["model.pattern='0:1'", "model.mla.rope=true"], ["1", "2", "3", "4"]),
        (["model.mla.q_lora_rank=24"], ["4"]),
    ],
)
def test_every_kind_of_model(ranks, corpus, model, layers):
    overrides = ["parallel=pp2", "optim.qk_clip=0.001", *model]
    found = ranks.run(2, muon_jobs.clip, overrides, corpus, 2)[0]["metrics"][0]
    if not layers:
        assert found == {}
    else:
        assert list(found["max_logit"]) == layers and found["qk_clip_share"] > 0.5
        assert all(math.isfinite(value) for value in found["max_logit"].values())
