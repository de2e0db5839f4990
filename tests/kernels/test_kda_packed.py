"""Packed sequences, all at once, against the float64 recurrence of each on its own."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megakda.kernels.kda import chunk_kda, fused_recurrent_kda
from megakda.kernels.kda import chunk_torch as chunk_module
from megakda.kernels.kda.chunk_packed import packed_kda_torch
from megakda.kernels.kda.recurrent import recurrent_kda_torch
from megakda.kernels.kda.reference import kda_recurrence
from tests.kernels.helpers import assert_close, outputs_and_gradients
from tests.kernels.test_kda import make_inputs

FP32 = 1e-5
OPERATORS = [chunk_kda, fused_recurrent_kda]
Tensors = dict[str, torch.Tensor]

# Sequences that end with a chunk, before, and after; of one token; empty at both ends and inside;
# several in a chunk; over several chunks.
RAGGED = [0, 0, 1, 1, 66, 99, 130, 130]
BOUNDS = {
    "ragged": RAGGED,
    "aligned": [0, 64, 128, 130],
    "short": [0, 3, 5, 6, 6, 20, 27, 33, 61, 64, 65, 100, 130],
    "tokens": list(range(131)),
    "one": [0, 130],
    "one and empty": [0, 0, 130, 130],
}


def inputs_for(bounds: list[int], decay: float | str = "soft", **sizes: Any) -> Tensors:
    return make_inputs(bounds[-1], decay, batch=1, sequences=len(bounds) - 1, **sizes)


def each_alone(bounds: list[int], delta_rule: bool = True, **x: torch.Tensor) -> Any:
    """Each sequence through the recurrence."""
    initial = x.pop("initial_state", None)
    outputs, states = [], []
    for n, (start, end) in enumerate(pairwise(bounds)):
        if initial is None:
            shape = (1, x["v"].shape[2], x["k"].shape[3], x["v"].shape[3])
            state = torch.zeros(shape, dtype=torch.float64)
        else:
            state = initial[n : n + 1].double()
        if start < end:
            part = {name: y[:, start:end] for name, y in x.items()}
            o, state = kda_recurrence(**part, initial_state=state, delta_rule=delta_rule)
            outputs.append(o)
        states.append(state)
    return torch.cat(outputs, 1), torch.cat(states)


def check(operator: Any, bounds: list[int], inputs: Tensors, **options: Any) -> None:
    packed = {"cu_seqlens": torch.tensor(bounds), "output_final_state": True}
    got = outputs_and_gradients(lambda **x: operator(**x, **packed, **options), inputs)
    expected = outputs_and_gradients(lambda **x: each_alone(bounds, **x), inputs, torch.float64)
    assert_close(got, expected, FP32)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", BOUNDS)
def test_against_recurrence(operator: Any, name: str) -> None:
    check(operator, BOUNDS[name], inputs_for(BOUNDS[name]))


@pytest.mark.parametrize("decay", [-1e-3, -60.0, float("-inf"), "mixed"])
def test_any_decay(decay: float | str) -> None:
    check(chunk_kda, RAGGED, inputs_for(RAGGED, decay))


@pytest.mark.parametrize("name", ["ragged", "short"])
def test_one_decay_per_head(name: str) -> None:
    check(chunk_kda, BOUNDS[name], inputs_for(BOUNDS[name], decay_dim=1))


@pytest.mark.parametrize("chunk_size", [16, 32, 128])
def test_chunk_sizes(chunk_size: int) -> None:
    check(chunk_kda, RAGGED, inputs_for(RAGGED), chunk_size=chunk_size)


@pytest.mark.parametrize("name", ["ragged", "short"])
def test_many_groups_of_chunks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk_module, "_GROUP_BYTES", 1)
    check(chunk_kda, BOUNDS[name], inputs_for(BOUNDS[name]), chunk_size=16)


@pytest.mark.parametrize("name", ["ragged", "short", "one and empty"])
@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("final", [False, True])
def test_states_are_optional(name: str, initial: bool, final: bool) -> None:
    bounds = BOUNDS[name]
    inputs = inputs_for(bounds)
    if not initial:
        del inputs["initial_state"]
    wanted = slice(None) if final else slice(1)
    packed = {"cu_seqlens": torch.tensor(bounds), "output_final_state": final}
    got = outputs_and_gradients(lambda **x: chunk_kda(**x, **packed)[wanted], inputs)
    expected = outputs_and_gradients(
        lambda **x: each_alone(bounds, **x)[wanted], inputs, torch.float64
    )
    assert_close(got, expected, FP32)
    if not final:
        assert chunk_kda(**inputs, **packed)[1] is None


def test_gradient_from_the_final_states_alone() -> None:
    inputs = inputs_for(RAGGED)
    packed = {"cu_seqlens": torch.tensor(RAGGED), "output_final_state": True}
    got = outputs_and_gradients(lambda **x: chunk_kda(**x, **packed)[1:], inputs)
    expected = outputs_and_gradients(lambda **x: each_alone(RAGGED, **x)[1:], inputs, torch.float64)
    assert_close(got, expected, FP32)


def test_states_with_values_first() -> None:
    inputs = inputs_for(RAGGED)
    packed = {"cu_seqlens": torch.tensor(RAGGED), "output_final_state": True}
    o, state = chunk_kda(**inputs, **packed)
    inputs["initial_state"] = inputs["initial_state"].mT.contiguous()
    other_o, other_state = chunk_kda(**inputs, **packed, state_v_first=True)
    assert torch.equal(o, other_o) and torch.equal(state, other_state.mT)


@pytest.mark.parametrize("operator", OPERATORS)
def test_an_empty_sequence_hands_its_state_on(operator: Any) -> None:
    inputs = inputs_for(RAGGED)
    _, state = operator(**inputs, cu_seqlens=torch.tensor(RAGGED), output_final_state=True)
    for n in (0, 2, 6):
        assert torch.equal(state[n], inputs["initial_state"][n])


def test_bfloat16() -> None:
    inputs = inputs_for(RAGGED)
    inputs |= {name: inputs[name].bfloat16() for name in ("q", "k", "v", "beta")}
    packed = {"cu_seqlens": torch.tensor(RAGGED), "output_final_state": True}
    got = outputs_and_gradients(lambda **x: chunk_kda(**x, **packed), inputs)
    expected = outputs_and_gradients(lambda **x: each_alone(RAGGED, **x), inputs, torch.float64)
    assert_close(got, expected, 0.005)
    assert got["output 0"].dtype == torch.bfloat16 and got["output 1"].dtype == torch.float32


@pytest.mark.parametrize("recurrent", [False, True])
def test_without_the_delta_rule(recurrent: bool) -> None:
    inputs = inputs_for(RAGGED)

    def ours(initial_state: torch.Tensor, **x: torch.Tensor) -> Any:
        if recurrent:
            return recurrent_kda_torch(
                **x, scale=32**-0.5, initial_state=initial_state, delta_rule=False, bounds=RAGGED
            )
        return packed_kda_torch(
            **x,
            scale=32**-0.5,
            initial_state=initial_state,
            bounds=RAGGED,
            output_final_state=True,
            delta_rule=False,
        )

    expected = outputs_and_gradients(
        lambda **x: each_alone(RAGGED, False, **x), inputs, torch.float64
    )
    assert_close(outputs_and_gradients(ours, inputs), expected, FP32)


def test_backward_formulas_in_float64() -> None:
    # Finite differences do not share the algebra of the code under test.
    inputs = make_inputs(11, batch=1, heads=1, value_heads=2, key_dim=3, value_dim=2, sequences=5)
    leaves = [x.double().requires_grad_() for x in inputs.values()]

    def packed(*x: torch.Tensor) -> Any:
        *sequences, state = x
        return packed_kda_torch(
            *sequences, 0.5, state, [0, 1, 3, 3, 10, 11], output_final_state=True, chunk_size=4
        )

    assert torch.autograd.gradcheck(packed, leaves, atol=1e-7)


# ------------------------------------------------------------------ sequences do not touch


def by_sequence(results: Tensors, bounds: list[int], n: int) -> list[torch.Tensor]:
    """What of outputs and gradients belongs to sequence n."""
    tokens = slice(bounds[n], bounds[n + 1])
    by_state = {"output 1", "dinitial_state"}
    return [x[n] if name in by_state else x[:, tokens] for name, x in results.items()]


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("changed", [1, 4, 6, 8])
@pytest.mark.parametrize("size", [0.5, 1e18])
def test_no_value_reaches_another_sequence(operator: Any, changed: int, size: float) -> None:
    bounds = [0, 3, 5, 6, 30, 40, 40, 75, 90, 130]
    inputs = inputs_for(bounds)
    other = {name: x.clone() for name, x in inputs.items()}
    tokens = slice(bounds[changed], bounds[changed + 1])
    for name in ("q", "v"):
        other[name][:, tokens] *= size
    for name in ("k", "g", "beta"):
        other[name][:, tokens] *= 0.5
    other["initial_state"][changed] *= size
    packed = {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32), "output_final_state": True}
    before, after = (
        outputs_and_gradients(lambda **x: operator(**x, **packed), x) for x in (inputs, other)
    )
    for n in range(len(bounds) - 1):
        pairs = zip(by_sequence(before, bounds, n), by_sequence(after, bounds, n), strict=True)
        same = [torch.equal(x, y) for x, y in pairs]
        assert all(same) if n != changed else not any(same), (n, same)


def test_the_sequences_after_do_not_count() -> None:
    inputs = inputs_for([0, 50, 130])
    del inputs["initial_state"]
    o, _ = chunk_kda(**inputs, cu_seqlens=torch.tensor([0, 50, 130]))
    others, _ = chunk_kda(**inputs, cu_seqlens=torch.tensor([0, 50, 51, 90, 130]))
    assert torch.equal(o[:, :51], others[:, :51])


# ------------------------------------------------------------------ cost


class _CountOperations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations(operator: Any, sequences: int, states: bool) -> int:
    """Of the forward and the backward pass over 640 tokens."""
    inner = random.Random(0).sample(range(1, 640), sequences - 1)
    bounds = [0, *sorted(inner), 640]
    inputs = make_inputs(640, batch=1, sequences=sequences, key_dim=16, value_dim=16)
    if not states:
        del inputs["initial_state"]
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    with _CountOperations() as counter:
        results = operator(**leaves, cu_seqlens=torch.tensor(bounds), output_final_state=states)
        loss = sum(x.sum() for x in results if x is not None)
        torch.autograd.grad(loss, list(leaves.values()))
    return counter.count


def test_work_does_not_grow_with_the_number_of_sequences() -> None:
    assert operations(chunk_kda, 200, states=False) == operations(chunk_kda, 5, states=False)
    # States enter and leave in one batch per power of two of the pieces' lengths.
    assert operations(chunk_kda, 200, states=True) < 1.5 * operations(chunk_kda, 5, states=True)


def test_recurrent_steps_are_those_of_the_longest_sequence() -> None:
    few, many = (operations(fused_recurrent_kda, n, states=True) for n in (5, 200))
    assert many < 0.2 * few
