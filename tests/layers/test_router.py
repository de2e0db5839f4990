"""The sigmoid router against a plain computation and against megatron-core's own."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig

from megakda.config import compose
from megakda.layers.router import SigmoidRouter
from megakda.models.kimi_linear import transformer_config
from tests.jobs import SMALL

EXPERTS = 8


@cache
def core_config(top_k: int, dtype: str) -> TransformerConfig:
    config = compose([*SMALL, f"model.moe.top_k={top_k}", f"model.moe.router_dtype={dtype}"])
    assert config.model.moe.num_experts == EXPERTS
    return transformer_config(config.model, config.parallel, "fp32")


def make_router(top_k: int = 2, dtype: str = "fp64") -> SigmoidRouter:
    groups = SimpleNamespace(tp=None, cp=None, tp_cp=None, tp_dp_cp=None)
    return SigmoidRouter(core_config(top_k, dtype), groups)


def make_logits(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, EXPERTS, generator=generator, dtype=torch.float64).to(dtype)


def plain(logits: torch.Tensor, bias: torch.Tensor, top_k: int) -> tuple[torch.Tensor, ...]:
    """Token by token: choose by score + bias, weight by score alone."""
    probs, routing_map = torch.zeros_like(logits), torch.zeros_like(logits, dtype=torch.bool)
    for n, row in enumerate(logits):
        scores = 1 / (1 + torch.exp(-row))
        chosen = (scores + bias).argsort(descending=True)[:top_k].tolist()
        total = sum(scores[e] for e in chosen) if top_k > 1 else 1.0
        for e in chosen:
            probs[n, e] = 2.446 * scores[e] / total
            routing_map[n, e] = True
    return probs, routing_map


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_routing_is_the_plain_computation(top_k):
    """Weights, choices, loads and the gradient of the weights; one choice is not renormalised."""
    router = make_router(top_k)
    router.expert_bias.copy_(torch.linspace(-0.2, 0.2, EXPERTS))
    logits = make_logits(6, 3).requires_grad_()
    probs, routing_map = router.routing(logits)

    rows = logits.detach().view(-1, EXPERTS).clone().requires_grad_()
    expected, expected_map = plain(rows, router.expert_bias.double(), top_k)
    assert (probs.dtype, routing_map.dtype) == (torch.float32, torch.bool)
    assert torch.equal(routing_map, expected_map)
    torch.testing.assert_close(probs.double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(router.local_tokens_per_expert, expected_map.sum(0).float())
    if top_k > 1:
        assert probs.sum(-1).tolist() == pytest.approx([2.446] * 18)
    else:
        assert probs.sum(-1).max() < 2.446  # the score itself, so that the router can learn

    grad = make_logits(18)
    (found,) = torch.autograd.grad(probs, logits, grad.float())
    (wanted,) = torch.autograd.grad(expected, rows, grad)
    torch.testing.assert_close(found.view(-1, EXPERTS), wanted, rtol=1e-5, atol=1e-6)


def test_biases_change_the_choice_and_not_the_weights():
    router = make_router()
    logits = make_logits(40)
    before, map_before = router.routing(logits)
    router.expert_bias[3] = 1.0  # sigmoid scores lie in (0, 1)
    after, map_after = router.routing(logits)
    assert map_after[:, 3].all() and not map_before[:, 3].all()
    same = (map_before == map_after).all(-1)
    assert 0 < same.sum() < 40
    assert torch.equal(before[same], after[same])
    scores = logits.sigmoid() * map_after
    expected = 2.446 * scores / scores.sum(-1, keepdim=True)
    torch.testing.assert_close(after.double(), expected, rtol=1e-6, atol=0)


def test_padding_does_not_count_as_load():
    router = make_router()
    logits = make_logits(5, 4)
    padding = torch.zeros(5, 4, dtype=torch.bool)
    padding[3:, 1] = True
    padding[0, 2] = True
    probs, routing_map = router.routing(logits, padding_mask=padding)
    real = routing_map.view(5, 4, EXPERTS)[~padding]
    assert torch.equal(router.local_tokens_per_expert, real.sum(0).float())
    assert router.local_tokens_per_expert.sum() == 2 * (20 - 3)
    whole = make_router().routing(logits)[0].view(5, 4, EXPERTS)
    assert torch.equal(probs.view(5, 4, EXPERTS), whole * ~padding.unsqueeze(-1))
    with torch.no_grad():  # validation, and the first of two runs under recomputation
        router.routing(logits)
    assert router.local_tokens_per_expert.sum() == 2 * (20 - 3)


def test_ties_of_a_billionth_are_decided_by_the_logits():
    """From fp32 inputs and weights on: the products are made in fp64, the scores stay there."""
    router = make_router(top_k=1)
    x = torch.zeros(1, 1, router.config.hidden_size)
    x[..., 0], x[..., 1] = 1.0, 1e-9
    for best in range(EXPERTS):
        router.weight.data = torch.zeros(EXPERTS, router.config.hidden_size)
        router.weight.data[:, 0] = 0.5
        router.weight.data[best, 1] = 1.0
        _, routing_map = router(x)
        assert routing_map.nonzero().tolist() == [[0, best]]


def test_agrees_with_megatron_core_where_nothing_is_close():
    """megatron-core's routing in fp32, on the same module."""
    router = make_router(dtype="fp32")
    router.expert_bias.copy_(torch.linspace(0.1, -0.1, EXPERTS))
    logits = make_logits(64, 4, dtype=torch.float32)
    biased = (logits.sigmoid() + router.expert_bias).sort(dim=-1, descending=True).values
    assert (biased[..., 1] - biased[..., 2]).min() > 1e-6
    expected, expected_map = TopKRouter.routing(router, logits)
    expected_load = router.local_tokens_per_expert.clone()
    router.local_tokens_per_expert.zero_()
    probs, routing_map = router.routing(logits)
    assert torch.equal(routing_map, expected_map)
    torch.testing.assert_close(probs, expected, rtol=1e-6, atol=0)
    assert torch.equal(router.local_tokens_per_expert, expected_load)
    assert expected_load.sum() == 2 * 256


def test_groups_limit_the_choice():
    """Against a plain loop: the best groups by their two best scores, then the best experts."""
    router = make_router(top_k=3)
    router.config = replace(core_config(3, "fp64"))
    router.config.moe_router_num_groups, router.config.moe_router_group_topk = 4, 2
    router.expert_bias.copy_(torch.linspace(0.3, -0.3, EXPERTS))
    logits = make_logits(50)
    probs, routing_map = router.routing(logits)

    limited = 0
    for row, found, weights in zip(logits, routing_map, probs, strict=True):
        scores = row.sigmoid()
        choice = scores + router.expert_bias
        groups = choice.view(4, 2).sum(-1).argsort(descending=True)[:2].tolist()
        allowed = [e for e in range(EXPERTS) if e // 2 in groups]
        chosen = sorted(allowed, key=lambda e: -float(choice[e]))[:3]
        assert sorted(chosen) == found.nonzero().flatten().tolist()
        expected = 2.446 * scores[chosen] / scores[chosen].sum()
        torch.testing.assert_close(weights[chosen].double(), expected, rtol=1e-6, atol=1e-6)
        limited += sorted(chosen) != sorted(choice.argsort(descending=True)[:3].tolist())
    assert limited > 10  # groups matter at these logits
