"""What holds for the KDA operators whatever the inputs: properties, with hypothesis.

Bits are compared where they have to be equal. Where they need not be, the docstring says why.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from megakda.kernels.kda import chunk_kda, fused_recurrent_kda
from megakda.kernels.kda.affine import compose, fold, range_state
from megakda.kernels.kda.reference import kda_recurrence
from tests.kernels.helpers import assert_close, outputs_and_gradients, rms_error
from tests.kernels.kda_cases import Case, Tensors

FP32 = 1e-5
SEQUENCES = ("q", "k", "v", "g", "beta")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs the triton package"
)
BACKENDS = ["torch", pytest.param("triton", marks=needs_triton)]
FORMS = [
    pytest.param(chunk_kda, "torch", id="chunk-torch"),
    pytest.param(chunk_kda, "triton", id="chunk-triton", marks=needs_triton),
    pytest.param(fused_recurrent_kda, "torch", id="recurrent-torch"),
    pytest.param(fused_recurrent_kda, "triton", id="recurrent-triton", marks=needs_triton),
]


def examples(number: int) -> settings:
    """The same examples in every run, none of them timed: a kernel is interpreted."""
    return settings(max_examples=number, deadline=None, derandomize=True, database=None)


small = st.builds(
    partial(Case, sizes=(16, 24), chunk_size=16),
    tokens=st.integers(2, 33),
    heads=st.sampled_from([(1, 1), (1, 2), (2, 2)]),
    decay=st.sampled_from(["soft", 0.0, -5.0, "softplus", "bounded"]),
    head_decay=st.booleans(),
    beta=st.sampled_from(["plain", "sigmoid", "negative"]),
    l2_norm=st.booleans(),
)


def run(operator: Any, case: Case, inputs: Tensors, **options: Any) -> tuple[torch.Tensor, ...]:
    """o and the final state, without gradients."""
    with torch.no_grad():
        return operator(**inputs, **case.options() | options)


def tokens(inputs: Tensors, start: int | None, end: int | None = None) -> Tensors:
    """The inputs with a part of their tokens."""
    return {name: x[:, start:end] if name in SEQUENCES else x for name, x in inputs.items()}


# ------------------------------------------------------------------ sequences


@pytest.mark.parametrize("backend", BACKENDS)
@examples(5)
@given(case=small, data=st.data())
def test_split_anywhere(backend: str, case: Case, data: st.DataObject) -> None:
    """Handing the state over gives the values and gradients of one pass."""
    cut = data.draw(st.integers(1, case.tokens - 1), label="cut")
    options = case.options() | {"backend": backend}

    def parts(**inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first, state = chunk_kda(**tokens(inputs, None, cut), **options)
        rest = tokens(inputs, cut) | {"initial_state": state}
        second, state = chunk_kda(**rest, **options)
        return torch.cat((first, second), 1), state

    tolerance = dict.fromkeys(["output 0", "output 1", "dq", "dk", "dv", "dg", "dbeta"], FP32)
    tolerance |= {"dinitial_state": FP32, "dA_log": 1e-4, "ddt_bias": 1e-4}
    if case.gate is not None:  # decays of up to -16 per step
        tolerance["dg"] = 1e-4
    whole = case.results(chunk_kda, backend=backend)
    assert_close(outputs_and_gradients(parts, case.inputs()), whole, tolerance)


@pytest.mark.parametrize(("operator", "backend"), FORMS)
@examples(4)
@given(case=small, cuts=st.lists(st.integers(0, 40), max_size=4))
def test_packed_is_one_by_one(operator: Any, backend: str, case: Case, cuts: list[int]) -> None:
    """With the kernels to the bit: a sequence does not know where it lies.

    PyTorch's batched products round as their shapes suggest, and packing changes those.
    """
    bounds = sorted([0, case.tokens, *(min(x, case.tokens) for x in cuts)])
    inputs = case.inputs()
    sizes = (len(bounds) - 1, case.heads[1], *case.sizes)
    generator = torch.Generator().manual_seed(0)
    inputs["initial_state"] = torch.randn(sizes, generator=generator)
    packing = torch.tensor(bounds)
    got = run(operator, case, inputs, cu_seqlens=packing, backend=backend)
    outputs, states = [], []
    for n, (start, end) in enumerate(pairwise(bounds)):
        state = inputs["initial_state"][n : n + 1]
        if start < end:
            part = tokens(inputs, start, end) | {"initial_state": state}
            o, state = run(operator, case, part, backend=backend)
            outputs.append(o)
        states.append(state)
    for x, alone in zip(got, (torch.cat(outputs, 1), torch.cat(states)), strict=True):
        if backend == "triton":
            assert torch.equal(x, alone)
        else:
            assert rms_error(x, alone) < FP32


@pytest.mark.parametrize("backend", BACKENDS)
@examples(4)
@given(cut=st.integers(1, 29), wide=st.booleans())
def test_forgetting_all_begins_a_new_sequence(backend: str, cut: int, wide: bool) -> None:
    """A decay of minus infinity is a boundary between packed sequences."""
    case = Case(30, (16, 24), heads=(1, 2), initial_state=False, chunk_size=32, head_decay=wide)
    inputs = case.inputs()
    packed, _ = run(chunk_kda, case, inputs, cu_seqlens=torch.tensor([0, cut, 30]), backend=backend)
    inputs["g"][:, cut] = float("-inf")
    whole, _ = run(chunk_kda, case, inputs, backend=backend)
    # Kernels take 2^-150 for minus infinity, and next to that sums of weak decays lose digits.
    assert rms_error(whole, packed) < (FP32 if backend == "torch" else 1e-4)


@pytest.mark.parametrize(("operator", "backend"), FORMS)
@examples(3)
@given(case=small, data=st.data())
def test_heads_do_not_know_their_place(
    operator: Any, backend: str, case: Case, data: st.DataObject
) -> None:
    """Permuting the heads permutes the results, to the bit."""
    case = replace(case, heads=(3, 3))
    order = data.draw(st.permutations(range(3)), label="order")
    inputs = case.inputs()
    o, state = run(operator, case, inputs, backend=backend)
    other = {name: x[:, :, order] for name, x in inputs.items() if name in SEQUENCES}
    other["initial_state"] = inputs["initial_state"][:, order]
    for name in ("A_log", "dt_bias"):
        if name in inputs:
            other[name] = inputs[name].view(3, -1)[order].flatten()
    other_o, other_state = run(operator, case, other, backend=backend)
    assert torch.equal(other_o, o[:, :, order])
    assert torch.equal(other_state, state[:, order])


# ------------------------------------------------------------------ algebra


@pytest.mark.parametrize(("operator", "backend"), FORMS)
@examples(5)
@given(case=small, a=st.floats(-3, 3, width=32), b=st.floats(-3, 3, width=32))
def test_linear_in_values_and_state(
    operator: Any, backend: str, case: Case, a: float, b: float
) -> None:
    inputs = case.inputs()
    generator = torch.Generator().manual_seed(7)
    linear = ("v", "initial_state")
    other = {n: torch.randn(inputs[n].shape, generator=generator) for n in linear}
    sums = {n: a * inputs[n] + b * other[n] for n in linear}
    x, y, z = (
        run(operator, case, inputs | change, backend=backend) for change in ({}, other, sums)
    )
    for first, second, both in zip(x, y, z, strict=True):
        size = first.square().mean().sqrt() * abs(a) + second.square().mean().sqrt() * abs(b)
        assert (both - (a * first + b * second)).square().mean().sqrt() <= FP32 * size + 1e-30


@pytest.mark.parametrize(("operator", "backend"), FORMS)
@examples(4)
@given(
    case=small, power=st.integers(-20, 20), dtype=st.sampled_from([torch.float32, torch.bfloat16])
)
def test_powers_of_two_only_move_the_exponent(
    operator: Any, backend: str, case: Case, power: int, dtype: torch.dtype
) -> None:
    """Values and state times 2^n give results times 2^n, and a scale does the same to o alone."""
    case, factor = replace(case, dtype=dtype), 2.0**power
    inputs = case.inputs()
    o, state = run(operator, case, inputs, scale=0.25, backend=backend)
    larger = inputs | {n: factor * inputs[n] for n in ("v", "initial_state")}
    got, got_state = run(operator, case, larger, scale=0.25, backend=backend)
    assert torch.equal(got, factor * o) and torch.equal(got_state, factor * state)
    got, got_state = run(operator, case, inputs, scale=0.25 * factor, backend=backend)
    assert torch.equal(got, factor * o) and torch.equal(got_state, state)


@pytest.mark.parametrize(("operator", "backend"), FORMS)
@examples(4)
@given(length=st.integers(1, 40), decay=st.sampled_from(["soft", 0.0, -5.0]))
def test_what_was_just_written_is_read(
    operator: Any, backend: str, length: int, decay: float | str
) -> None:
    """The delta rule at beta = 1: the state then answers to k_t with v_t, whatever it held."""
    case = Case(length, (16, 24), decay=decay, chunk_size=16)
    inputs = case.inputs()
    inputs["beta"][:] = 1.0
    inputs["q"] = inputs["k"]
    o, _ = run(operator, case, inputs, scale=1.0, backend=backend)
    assert rms_error(o, inputs["v"]) < FP32


# ------------------------------------------------------------------ affine maps


@pytest.mark.parametrize("backend", BACKENDS)
@examples(4)
@given(case=small, cuts=st.lists(st.integers(0, 40), max_size=3), data=st.data())
def test_ranges_compose(backend: str, case: Case, cuts: list[int], data: st.DataObject) -> None:
    """However a sequence is cut and its maps are bracketed, the state after it is the same."""
    bounds = sorted([0, case.tokens, *(min(x, case.tokens) for x in cuts)])
    inputs = case.inputs()
    initial = inputs.pop("initial_state")
    q = inputs.pop("q")
    options = case.options()
    del options["output_final_state"], options["state_v_first"]
    with torch.no_grad():
        m, e = range_state(**inputs, **options, cu_seqlens=torch.tensor(bounds), backend=backend)
    maps = [(m[n], e[n]) for n in range(len(m))]
    before, after = fold(maps, initial[0])
    while len(maps) > 1:
        n = data.draw(st.integers(0, len(maps) - 2), label="pair")
        maps[n : n + 2] = [compose(maps[n + 1], maps[n])]
    _, composed = fold(maps, initial[0])
    _, state = run(chunk_kda, case, inputs | {"q": q, "initial_state": initial}, backend=backend)
    assert rms_error(after, state[0]) < FP32 and rms_error(composed, state[0]) < FP32
    for start, x in zip(bounds[:-1], before, strict=True):
        if start:
            part = tokens(inputs | {"q": q}, None, start) | {"initial_state": initial}
            _, state = run(chunk_kda, case, part, backend=backend)
            assert rms_error(x, state[0]) < FP32


@pytest.mark.parametrize("backend", BACKENDS)
@examples(4)
@given(case=small)
def test_matrix_knows_nothing_of_values(backend: str, case: Case) -> None:
    inputs = case.inputs()
    del inputs["initial_state"], inputs["q"]
    options = case.options() | {"backend": backend}
    del options["output_final_state"], options["state_v_first"]
    with torch.no_grad():
        m, e = range_state(**inputs, **options)
        same, twice = range_state(**inputs | {"v": 2 * inputs["v"]}, **options)
        _, zero = range_state(**inputs | {"v": 0 * inputs["v"]}, **options)
    assert torch.equal(m, same) and torch.equal(twice, 2 * e) and not zero.any()


# ------------------------------------------------------------------ time


def changed_later(inputs: Tensors, start: int, names: tuple[str, ...]) -> Tensors:
    """Other random numbers from token `start` on, of the same kind."""
    generator = torch.Generator().manual_seed(9)
    changed = {name: x.clone() for name, x in inputs.items()}
    for name in names:
        x = changed[name][:, start:]
        noise = torch.randn(x.shape, generator=generator)
        if name in ("q", "k"):
            noise = F.normalize(noise, dim=-1)
        x[:] = {"g": -noise.abs(), "beta": noise.sigmoid()}.get(name, noise)
    return changed


EXACT = [
    pytest.param(chunk_kda, "torch", torch.float32, id="chunk-torch"),
    pytest.param(chunk_kda, "torch", torch.bfloat16, id="chunk-torch-bf16"),
    # Half precision has not the range for anchors in the middle of blocks.
    pytest.param(chunk_kda, "triton", torch.float16, id="chunk-triton-fp16", marks=needs_triton),
    pytest.param(fused_recurrent_kda, "torch", torch.float32, id="recurrent-torch"),
    pytest.param(
        fused_recurrent_kda, "triton", torch.bfloat16, id="recurrent-triton", marks=needs_triton
    ),
]


@pytest.mark.parametrize(("operator", "backend", "dtype"), EXACT)
@examples(4)
@given(start=st.integers(1, 69), strong=st.booleans())
def test_later_tokens_do_not_count(
    operator: Any, backend: str, dtype: torch.dtype, start: int, strong: bool
) -> None:
    case = Case(70, (16, 24), heads=(1, 1), dtype=dtype)
    inputs = case.inputs()
    o, _ = run(operator, case, inputs, backend=backend)
    later = changed_later(inputs, start, SEQUENCES)
    if strong:
        later["g"][:, start::3] = -60.0
    got, _ = run(operator, case, later, backend=backend)
    assert torch.equal(got[:, :start], o[:, :start])
    # Nor do those that do not exist.
    got, _ = run(operator, case, tokens(inputs, None, start), backend=backend)
    if backend == "triton":
        assert torch.equal(got, o[:, :start])
    else:
        assert rms_error(got, o[:, :start]) < (FP32 if dtype == torch.float32 else 0.005)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", ["soft", "bounded"])
@examples(5)
@given(start=st.integers(1, 69))
def test_later_tokens_and_the_chunked_kernels(decay: str, dtype: torch.dtype, start: int) -> None:
    """Within 16 tokens the anchor of the decays is the eighth: those before it see its decay.

    So the bits of a token depend on later decays in the first half of its own block of 16, and on
    nothing else that comes later: not on later q, k, v or beta, nor on other blocks.
    """
    case = Case(70, (16, 24), heads=(1, 1), decay=decay, dtype=dtype)
    inputs = case.inputs()
    o, _ = run(chunk_kda, case, inputs, backend="triton")
    got, _ = run(
        chunk_kda, case, changed_later(inputs, start, ("q", "k", "v", "beta")), backend="triton"
    )
    assert torch.equal(got[:, :start], o[:, :start])
    got, _ = run(chunk_kda, case, changed_later(inputs, start, SEQUENCES), backend="triton")
    known = start - start % 16 if start % 16 < 8 else start
    assert torch.equal(got[:, :known], o[:, :known])
    assert rms_error(got[:, :start], o[:, :start]) < (1e-6 if dtype == torch.float32 else 0.005)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_choice_of_anchors_sees_the_whole_chunk(dtype: torch.dtype) -> None:
    """If decays somewhere in a chunk are too strong for anchors in the middle of blocks, none of
    the chunk has them: its tokens then round otherwise. Chunks before it do not change. With the
    bounded gate there is no such choice.
    """
    for decay, chosen in (("soft", True), ("bounded", False)):
        case = Case(70, (16, 24), heads=(1, 1), decay=decay, dtype=dtype, chunk_size=32)
        inputs = case.inputs()
        o, _ = run(chunk_kda, case, inputs, backend="triton")
        inputs["g"][:, 60:] = -60.0  # in the chunk of tokens 32 to 63, second half of its block
        got, _ = run(chunk_kda, case, inputs, backend="triton")
        assert torch.equal(got[:, :32], o[:, :32])
        assert torch.equal(got[:, 32:60], o[:, 32:60]) is not chosen
        assert rms_error(got[:, 32:60], o[:, 32:60]) < (1e-6 if dtype == torch.float32 else 0.005)


# ------------------------------------------------------------------ the reference


@examples(4)
@given(
    length=st.integers(1, 6),
    head_decay=st.booleans(),
    heads=st.sampled_from([(1, 1), (1, 2), (2, 2)]),
    seed=st.integers(0, 99),
)
def test_gradients_of_the_reference(
    length: int, head_decay: bool, heads: tuple[int, int], seed: int
) -> None:
    """Finite differences in float64: what all else is held against has the right gradients."""
    generator = torch.Generator().manual_seed(seed)
    h, hv = heads
    shapes = [(h, 3), (h, 3), (hv, 2), (hv, 1 if head_decay else 3), (hv,)]
    x = [torch.randn(1, length, *s, generator=generator, dtype=torch.float64) for s in shapes]
    x[3] = -x[3].abs()
    x.append(torch.randn(1, hv, 3, 2, generator=generator, dtype=torch.float64))
    assert torch.autograd.gradcheck(
        lambda *y: kda_recurrence(*y[:5], scale=0.7, initial_state=y[5]),
        [y.requires_grad_() for y in x],
    )
