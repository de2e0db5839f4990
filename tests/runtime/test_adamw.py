"""AdamW against torch's, and its state as megatron-core's distributed optimizer wants it."""

from __future__ import annotations

import copy

import pytest
import torch

from megakda.runtime.adamw import AdamW

SHAPES = ((5, 3), (7,), (2, 3, 4))
SETTINGS = dict(lr=0.02, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def groups(params: list[torch.nn.Parameter]) -> list[dict]:
    """Two groups: the matrices, and the vector with another rate and no decay."""
    matrices = [param for param in params if param.dim() > 1]
    vectors = [param for param in params if param.dim() == 1]
    return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0, "lr": 0.005}]


def take_steps(optimizer: torch.optim.Optimizer, params, first: int, last: int) -> None:
    """Steps `first` up to, not including, `last`, each with gradients and a rate of its own."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(1 + step)
        for param in params:
            # Sizes down to eps, so that it matters where eps is added.
            size = torch.logspace(0, -8, param.numel()).view_as(param)
            param.grad = torch.randn(param.shape, generator=generator) * size
        for group, lr in zip(optimizer.param_groups, (0.02, 0.005), strict=True):
            group["lr"] = lr / (1 + step)
        optimizer.step()


def test_equals_torch_over_ten_steps():
    ours, theirs = parameters(), parameters()
    take_steps(AdamW(groups(ours), **SETTINGS), ours, 0, 10)
    take_steps(torch.optim.AdamW(groups(theirs), **SETTINGS), theirs, 0, 10)
    for mine, expected, start in zip(ours, theirs, parameters(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-6)
        assert (mine - start).abs().mean() > 1e-3  # far more than the tolerance


def test_the_step_lives_in_the_group():
    params = parameters()
    optimizer = AdamW(groups(params), **SETTINGS)
    take_steps(optimizer, params, 0, 3)
    assert [group["step"] for group in optimizer.param_groups] == [3, 3]
    for param in params:
        assert optimizer.state[param].keys() == {"exp_avg", "exp_avg_sq"}


def test_a_restored_state_continues_bit_for_bit():
    params = parameters()
    optimizer = AdamW(groups(params), **SETTINGS)
    take_steps(optimizer, params, 0, 4)
    saved = copy.deepcopy(optimizer.state_dict())
    copies = [torch.nn.Parameter(param.detach().clone()) for param in params]
    take_steps(optimizer, params, 4, 8)

    resumed = AdamW(groups(copies), **SETTINGS)
    resumed.load_state_dict(saved)
    take_steps(resumed, copies, 4, 8)
    for one, other in zip(params, copies, strict=True):
        assert torch.equal(one, other)

    without = [torch.nn.Parameter(param.detach().clone()) for param in copies]
    take_steps(AdamW(groups(without), **SETTINGS), without, 8, 9)
    take_steps(optimizer, params, 8, 9)
    assert not any(torch.equal(x, y) for x, y in zip(params, without, strict=True))


def test_parameters_without_gradients_are_left_alone():
    params = parameters()
    optimizer = AdamW(groups(params), **SETTINGS)
    take_steps(optimizer, params, 0, 2)
    before = [param.detach().clone() for param in params]
    moments = optimizer.state[params[0]]["exp_avg"].clone()
    params[0].grad = None
    optimizer.step()
    assert torch.equal(params[0], before[0])  # no weight decay either
    assert torch.equal(optimizer.state[params[0]]["exp_avg"], moments)
    assert not torch.equal(params[1], before[1]) and not torch.equal(params[2], before[2])

    idle = AdamW(groups(parameters()), **SETTINGS)
    idle.step()
    assert not idle.state


def test_l2_regularisation_is_refused():
    with pytest.raises(AssertionError, match="decoupled"):
        AdamW(parameters(), **SETTINGS, adam_w_mode=False)
