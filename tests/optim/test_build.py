"""The schedule's numbers, who decays, clipping, and the balancing of the experts."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megakda.config import compose, validate
from megakda.optim.finalize import GradFinalizer
from megakda.optim.schedule import Schedule
from tests import jobs

STEPS = 10


def rates(**settings: Any) -> list[float]:
    """The learning rate of each of ten steps with a peak of 1; checked in every group."""
    groups: list[dict[str, Any]] = [{}, {"wd_mult": 0.0}]
    said = [f"schedule.{key}={value}" for key, value in settings.items()]
    config = compose(["schedule.warmup_steps=0", "optim.lr=1", f"train.steps={STEPS}", *said])
    timetable = validate(config, 1).timetable
    schedule = Schedule(SimpleNamespace(param_groups=groups), timetable, weight_decay=0.3)
    found = []
    for step in range(STEPS):
        found.append(schedule.set(step))
        assert [group["lr"] for group in groups] == [found[-1]] * 2
        assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    # Any step, in any order: nothing is remembered.
    assert [schedule.set(step) for step in reversed(range(STEPS))] == found[::-1]
    return found


WARMUP = [0.25, 0.5, 0.75, 1.0]


def cosine(done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))


SCHEDULES = {
    "wsd": (
        dict(style="wsd", warmup_steps=4, decay_steps=3, min_lr=0.2),
        [*WARMUP, 1, 1, 1, 0.8, 0.6, 0.4],
    ),
    "wsd_all_decay": (
        dict(style="wsd", decay_steps=10),
        [n / 11 for n in range(10, 0, -1)],
    ),
    "wsd_cosine_decay": (
        dict(style="wsd", decay_steps=3, decay_shape="cosine", min_lr=0.2),
        [1] * 7 + [0.2 + 0.8 * cosine(n / 4) for n in (1, 2, 3)],
    ),
    "wsd_exponential_decay": (
        dict(style="wsd", decay_steps=3, decay_shape="exponential"),
        [1] * 7 + [2 * 0.5 ** (n / 4) - 1 for n in (1, 2, 3)],
    ),
    "wsd_minus_sqrt_decay": (
        dict(style="wsd", decay_steps=3, decay_shape="minus_sqrt"),
        [1] * 7 + [1 - math.sqrt(n / 4) for n in (1, 2, 3)],
    ),
    "wsd_before_its_decay": (dict(style="wsd", warmup_steps=4), [*WARMUP] + [1] * 6),
    "cosine": (
        dict(style="cosine", warmup_steps=4, min_lr=0.1),
        [*WARMUP, *(0.1 + 0.9 * cosine(n / 7) for n in range(1, 7))],
    ),
    "cosine_without_warmup": (
        dict(style="cosine"),
        [cosine(n / 11) for n in range(1, 11)],
    ),
    "linear": (
        dict(style="linear", warmup_steps=4, min_lr=0.3),
        [*WARMUP, *(1 - 0.7 * n / 7 for n in range(1, 7))],
    ),
    "constant": (dict(style="constant", warmup_steps=4), [*WARMUP] + [1] * 6),
    "constant_without_warmup": (dict(style="constant"), [1] * 10),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_learning_rates(name):
    settings, expected = SCHEDULES[name]
    found = rates(**settings)
    assert found == pytest.approx(expected, rel=1e-12)
    assert min(found) > 0  # every step trains
    assert found[-1] > settings.get("min_lr", 0.0)


@pytest.mark.parametrize("style", ["wsd", "constant"])
def test_a_run_may_end_in_its_warmup(style):
    """Where the rate does not depend on the length of the run, a test run can be short."""
    expected = [n / 25 for n in range(1, 11)]
    assert rates(style=style, warmup_steps=25) == pytest.approx(expected, rel=1e-12)


def decay_of_parameters(corpus: str, overrides: list[str]) -> list[tuple[str, int, list[float]]]:
    """Name, dimensions and weight decay (once per group it is in) of every parameter."""
    overrides = ["parallel.distributed_optimizer=false", "optim.weight_decay=0.3", *overrides]
    with jobs.trainer(overrides, corpus) as run:
        run.schedule.set(0)
        # In fp32 and unsharded, the optimizer's parameters are the model's.
        held: dict[int, list[float]] = {}
        for group in run.optimizer.param_groups:
            for param in group["params"]:
                held.setdefault(id(param), []).append(group["weight_decay"])
        (chunk,) = run.chunks
        named = list(chunk.module.named_parameters())
        assert held.keys() <= {id(param) for _, param in named}
        return [(name, param.dim(), held.get(id(param), [])) for name, param in named]


def test_matrices_decay_and_vectors_do_not(ranks, corpus):
    (found,) = ranks.run(1, decay_of_parameters, corpus, [])
    wrong = [
        (name, decays) for name, dims, decays in found if decays != [0.0 if dims == 1 else 0.3]
    ]
    assert not wrong
    exempt = {name.removesuffix(".weight").rsplit(".")[-1] for name, dims, _ in found if dims == 1}
    assert exempt == {
        "A_log",
        "dt_bias",
        "o_norm",
        "kv_a_layernorm",
        "input_layernorm",
        "pre_mlp_layernorm",
        "final_layernorm",
    }


def norms_around_clipping(corpus: str, overrides: list[str]) -> dict[str, Any]:
    """Gradient norms before clipping and after, by limit as a multiple of the norm."""
    from megakda.optim.build import clip_gradients

    with jobs.trainer(overrides, corpus) as run:
        batches = run._batches(run.datasets.train, 0)
        run.forward_backward(batches, num_microbatches=run.derived.micro_batches)
        run.optimizer.prepare_grads()
        norm = float(run.optimizer.get_grad_norm())
        found: dict[str, Any] = {"parts": len(run.optimizer.chained_optimizers)}
        for factor in (0.0, 2.0, 0.5):  # the last one changes the gradients
            clip_gradients(run.optimizer, norm, factor * norm)
            found[str(factor)] = float(run.optimizer.get_grad_norm()) / norm
        return found


@pytest.mark.parametrize("sharded", ["true", "false"])
def test_clipping_scales_all_gradients_to_the_norm(ranks, corpus, sharded):
    overrides = [f"parallel.distributed_optimizer={sharded}"]
    (found,) = ranks.run(1, norms_around_clipping, corpus, overrides)
    assert found["parts"] == 2  # experts have an optimizer of their own
    assert (found["0.0"], found["2.0"]) == (1.0, 1.0)
    assert found["0.5"] == pytest.approx(0.5, rel=1e-5)


def finalizer(loads: list[list[float]]) -> tuple[GradFinalizer, list[torch.Tensor]]:
    """One that has just seen `loads`, and the biases of its routers, one per layer."""
    found = GradFinalizer([])
    biases = [torch.full((len(row),), 0.5) for row in loads]
    found._routers = [SimpleNamespace(expert_bias=bias) for bias in biases]
    found.expert_loads = torch.tensor(loads, dtype=torch.float32)
    return found, biases


def test_expert_biases_move_against_the_load():
    """b += u (sign(e) - mean sign(e)), e = mean load - load, layer by layer."""
    found, biases = finalizer([[4, 4, 4, 4], [9, 1, 3, 3], [0, 0, 0, 12], [5, 3, 4, 4]])
    found.update_expert_biases(0.1)
    expected = [
        [0, 0, 0, 0],
        [-1.5, 0.5, 0.5, 0.5],
        [0.5, 0.5, 0.5, -1.5],
        [-1, 1, 0, 0],  # exactly at the mean: no sign
    ]
    for bias, signs in zip(biases, expected, strict=True):
        assert bias.tolist() == pytest.approx([0.5 + 0.1 * sign for sign in signs])
        assert float(bias.mean()) == pytest.approx(0.5)


def test_expert_biases_wait_for_loads():
    found = GradFinalizer([])
    found.update_expert_biases(0.1)
    assert found.expert_loads is None
    assert found.expert_metrics() == {"layers": 0.0, "max_over_mean": 0.0, "bias_square": 0.0}


def test_expert_metrics():
    found, _ = finalizer([[4, 4, 4, 4], [9, 1, 3, 3]])
    assert found.expert_metrics() == pytest.approx(
        {"layers": 2.0, "max_over_mean": 1.0 + 9 / 4, "bias_square": 8 * 0.25}
    )


def loads_and_biases(corpus: str) -> list[tuple[Any, Any, int]]:
    """After each of two steps: loads and biases by layer, and tokens."""
    with jobs.trainer(["model.moe.bias_update_rate=0.01"], corpus) as run:
        batches = run._batches(run.datasets.train, 0)
        found = []
        for _ in range(2):
            run.step(batches)
            biases = [router.expert_bias.clone() for router in run.finalizer._routers]
            found.append((run.finalizer.expert_loads, torch.stack(biases), run.finalizer.tokens))
        return found


def test_a_step_counts_its_own_loads_and_moves_the_biases(ranks, corpus):
    (found,) = ranks.run(1, loads_and_biases, corpus)
    bias = torch.zeros(3, 8)
    for loads, biases, tokens in found:
        assert tokens == 4 * 48  # the global batch
        assert loads.shape == (3, 8)
        assert loads.sum(-1).tolist() == [2 * tokens] * 3  # two experts per token
        sign = (loads.mean(-1, keepdim=True) - loads).sign()
        bias += 0.01 * (sign - sign.mean(-1, keepdim=True))
        torch.testing.assert_close(biases, bias)
    assert not torch.equal(found[0][0], found[1][0])
