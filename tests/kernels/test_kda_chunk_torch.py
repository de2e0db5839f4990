"""Insides of the chunk-parallel PyTorch path: groups of chunks, and what is kept for backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megakda.kernels.kda import chunk_torch as chunk_module
from megakda.kernels.kda.chunk_torch import chunk_kda_torch, run_chunks
from megakda.kernels.kda.reference import kda_recurrence
from tests.kernels.helpers import assert_close, outputs_and_gradients
from tests.kernels.test_kda import make_inputs

FP32 = 1e-5
SCALE = 32**-0.5
Tensors = dict[str, torch.Tensor]


def chunked(x: Tensors, **options: Any) -> Tensors:
    return outputs_and_gradients(lambda **y: chunk_kda_torch(**y, scale=SCALE, **options)[:2], x)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("group_bytes", [1, 50_000, 100_000])
@pytest.mark.parametrize("decay_dim", [None, 1])
def test_groups_of_chunks(
    recompute: bool, group_bytes: int, decay_dim: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One, three and six of the nine chunks at a time.
    inputs = make_inputs(140, decay_dim=decay_dim)
    monkeypatch.setattr(chunk_module, "_GROUP_BYTES", group_bytes)
    got = chunked(inputs, chunk_size=16, recompute=recompute)
    assert_close(got, outputs_and_gradients(kda_recurrence, inputs, torch.float64), FP32)


def test_recomputing_gives_the_same_bits() -> None:
    inputs = make_inputs(300)
    kept, recomputed = (chunked(inputs, recompute=recompute) for recompute in (False, True))
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


def kept_bytes(recompute: bool, x: Tensors) -> int:
    """What the backward pass is handed besides the inputs."""
    storages = {}

    def pack(y: torch.Tensor) -> torch.Tensor:
        storages[y.untyped_storage().data_ptr()] = y.untyped_storage().nbytes()
        return y

    leaves = {name: y.requires_grad_() for name, y in x.items()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda y: y):
        results = chunk_kda_torch(**leaves, scale=SCALE, recompute=recompute)
    assert results[0].requires_grad
    inputs = {y.untyped_storage().data_ptr() for y in x.values()}
    return sum(size for pointer, size in storages.items() if pointer not in inputs)


def test_kept_for_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(1024, batch=1, heads=2, value_heads=2, key_dim=64, value_dim=64)
    size = inputs["v"].numel() * 4
    # Scores, inverse, written values, and states: each as large as v where C = K = V = 64.
    assert kept_bytes(False, inputs) <= 4 * size + inputs["initial_state"].numel() * 4
    # One state per group of four chunks.
    monkeypatch.setattr(chunk_module, "_GROUP_BYTES", 4 * 2 * 64 * 64 * 4)
    assert kept_bytes(True, inputs) == size // 4


def test_nothing_is_kept_without_gradients() -> None:
    inputs = make_inputs(70)
    assert not any(x.requires_grad for x in chunk_kda_torch(**inputs, scale=SCALE))
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    with torch.no_grad():
        assert not any(x.requires_grad for x in chunk_kda_torch(**leaves, scale=SCALE))


@pytest.mark.parametrize("recompute", [False, True])
def test_without_the_delta_rule(recompute: bool) -> None:
    inputs = make_inputs(130)
    reference = outputs_and_gradients(
        lambda **x: kda_recurrence(**x, delta_rule=False), inputs, torch.float64
    )
    assert_close(chunked(inputs, delta_rule=False, recompute=recompute), reference, FP32)


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_of_the_insides(recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """States before chunks, what tokens write, and states added between chunks."""
    monkeypatch.setattr(chunk_module, "_GROUP_BYTES", 1)
    inputs = make_inputs(12, batch=1, heads=1, value_heads=2, key_dim=2, value_dim=3)
    leaves = [x.double().requires_grad_() for x in inputs.values()]
    added = torch.randn(2, 1, 2, 2, 3, generator=torch.Generator().manual_seed(0))

    def insides(*x: torch.Tensor) -> Any:
        q, k, v, g, beta, state, added_states = x
        return run_chunks(
            *(q, k, v, g, beta, 0.5, state, 4),
            added_states=added_states,
            added_after=(0, 2),
            recompute=recompute,
        )

    assert torch.autograd.gradcheck(insides, [*leaves, added.double().requires_grad_()], atol=1e-7)
