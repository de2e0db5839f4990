"""Affine maps of token ranges against the float64 recurrence."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megakda.kernels.kda import chunk_gated_linear_attention, chunk_kda
from megakda.kernels.kda.affine import compose, fold, fold_backward, range_state
from megakda.kernels.kda.reference import kda_recurrence
from tests.kernels.helpers import assert_close, outputs_and_gradients, rms_error

FP32 = 1e-5
BACKENDS = ("torch", "triton")
K, V, HEADS = 16, 24, 2
Tensors = dict[str, torch.Tensor]


def make_range(tokens: int, decay: float | str = "soft", batch: int = 1, width: int = K) -> Tensors:
    """Random k with unit norm, v, g and beta; v has twice as many heads as k."""
    generator = torch.Generator().manual_seed(tokens)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    noise = randn(batch, tokens, 2 * HEADS, width)
    return {
        "k": F.normalize(randn(batch, tokens, HEADS, K), dim=-1),
        "v": randn(batch, tokens, 2 * HEADS, V),
        "g": -F.softplus(noise) if decay == "soft" else decay * (1 + 0.1 * noise.sigmoid()),
        "beta": torch.sigmoid(randn(batch, tokens, 2 * HEADS)),
    }


def recurrence_map(k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor) -> Any:
    """M and E by definition: E is the state after starting from zero, and column d of M how a state
    with a one in row d ends, less E. Each column is run by itself."""
    zero = torch.zeros(len(v), v.shape[2], K, V, dtype=torch.float64)
    if not v.shape[1]:
        return torch.eye(K).double().expand(*zero.shape[:2], K, K), zero
    _, e = kda_recurrence(k, k, v, g, beta, initial_state=zero)
    columns = []
    for d in range(K):
        start = zero.clone()
        start[:, :, d, 0] = 1
        _, end = kda_recurrence(k, k, v, g, beta, initial_state=start)
        columns.append((end - e)[..., 0])
    return torch.stack(columns, -1), e


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("decay", ["soft", -1e-3, -60.0])
@pytest.mark.parametrize("tokens", [1, 64, 100])
def test_against_recurrence(tokens: int, decay: float | str, backend: str) -> None:
    inputs = make_range(tokens, decay, batch=2)
    got = outputs_and_gradients(partial(range_state, backend=backend), inputs)
    tolerance = dict.fromkeys(got, FP32)
    if backend == "triton":
        tolerance["dg"] = 1e-4  # differences of a cumulative decay of thousands
    reference = outputs_and_gradients(recurrence_map, inputs, torch.float64)
    assert_close(got, reference, tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_decay_per_head(backend: str) -> None:
    inputs = make_range(70, width=1)
    got = outputs_and_gradients(partial(range_state, backend=backend), inputs)
    assert_close(got, outputs_and_gradients(recurrence_map, inputs, torch.float64), FP32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lower_bound", [None, -5.0])
@pytest.mark.parametrize("delta_rule", [True, False])
def test_is_the_map_of_the_operators(
    backend: str, lower_bound: float | None, delta_rule: bool
) -> None:
    """With all activations, raw inputs go to the map as they go to the operator itself."""
    inputs = make_range(70)
    x = {name: inputs[name] for name in ("k", "v", "beta")} | {"g": torch.randn_like(inputs["g"])}
    generator = torch.Generator().manual_seed(3)
    x["A_log"] = torch.randn(2 * HEADS, generator=generator)
    x["dt_bias"] = torch.randn(2 * HEADS * K, generator=generator)
    state = torch.randn(1, 2 * HEADS, K, V, generator=generator)
    settings: dict[str, Any] = {
        "use_qk_l2norm_in_kernel": True,
        "use_gate_in_kernel": True,
        "lower_bound": lower_bound,
    }

    def with_map(**x: torch.Tensor) -> Any:
        m, e = range_state(**x, **settings, delta_rule=delta_rule, backend=backend)
        return (m @ state + e,)

    def whole(**x: torch.Tensor) -> Any:
        operator: Any = chunk_kda if delta_rule else chunk_gated_linear_attention
        _, final_state = operator(
            q=x["k"], **x, **settings, initial_state=state, output_final_state=True, backend="torch"
        )
        return (final_state,)

    assert_close(outputs_and_gradients(with_map, x), outputs_and_gradients(whole, x), FP32)


def test_any_state() -> None:
    # The map holds for states it was not made from.
    inputs = make_range(90)
    m, e = range_state(**inputs)
    state = torch.randn(1, 2 * HEADS, K, V, generator=torch.Generator().manual_seed(0))
    _, expected = kda_recurrence(inputs["k"], **inputs, initial_state=state)
    assert rms_error(m @ state + e, expected) < FP32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bounds", [[0, 0, 1, 1, 66, 99, 130, 130], [0, 64, 128, 130], [0, 130]])
def test_packed_ranges(bounds: list[int], backend: str) -> None:
    inputs = make_range(130)

    def packed(**x: torch.Tensor) -> Any:
        return range_state(**x, cu_seqlens=torch.tensor(bounds), backend=backend)

    def reference(**x: torch.Tensor) -> Any:
        parts = [
            recurrence_map(**{name: y[:, start:end] for name, y in x.items()})
            for start, end in pairwise(bounds)
        ]
        return [torch.cat(y) for y in zip(*parts, strict=True)]

    got = outputs_and_gradients(packed, inputs)
    assert_close(got, outputs_and_gradients(reference, inputs, torch.float64), FP32)


def test_empty_range() -> None:
    m, e = range_state(**make_range(5), cu_seqlens=torch.tensor([0, 0, 5, 5]))
    for n in (0, 2):
        assert torch.equal(m[n], torch.eye(K).expand(2 * HEADS, K, K))
        assert not e[n].any()


@pytest.mark.parametrize("cut", [0, 1, 37, 64, 99, 100])
def test_split_anywhere(cut: int) -> None:
    inputs = make_range(100)

    def split(**x: torch.Tensor) -> Any:
        m, e = range_state(**x, cu_seqlens=torch.tensor([0, cut, 100]))
        return compose((m[1:], e[1:]), (m[:1], e[:1]))

    got = outputs_and_gradients(split, inputs)
    assert_close(got, outputs_and_gradients(range_state, inputs), FP32)


def run_range(
    x: Tensors, weights: torch.Tensor, start: int, end: int, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A loss of what the tokens read, and the state after them, as a tensor of its own because the
    last token reads it, too."""
    if start == end:
        return 0 * state.sum(), state.clone()
    o, state = kda_recurrence(**{n: y[:, start:end] for n, y in x.items()}, initial_state=state)
    return (o * weights[:, start:end]).sum(), state.clone()


def test_fold_and_its_adjoint() -> None:
    """Ranges worked on apart, in both directions, are the sequence worked on as a whole."""
    bounds = [0, 30, 30, 31, 100]
    generator = torch.Generator().manual_seed(1)
    x = make_range(100) | {"q": torch.randn(1, 100, HEADS, K, generator=generator)}
    x = {name: y.double() for name, y in x.items()}
    initial = torch.randn(1, 2 * HEADS, K, V, generator=generator, dtype=torch.float64)
    weights = torch.randn(1, 100, 2 * HEADS, V, generator=generator, dtype=torch.float64)
    dfinal = torch.randn(initial.shape, generator=generator, dtype=torch.float64)

    # The whole, cut only to see the gradients of the states in between.
    states, loss = [initial.clone().requires_grad_()], torch.zeros(())
    for start, end in pairwise(bounds):
        direct_loss, state = run_range(x, weights, start, end, states[-1])
        loss = loss + direct_loss
        state.retain_grad()
        states.append(state)
    (loss + (states[-1] * dfinal).sum()).backward()

    ranges = {name: y for name, y in x.items() if name != "q"}
    m, e = range_state(**ranges, cu_seqlens=torch.tensor(bounds))
    maps = [(m[n : n + 1], e[n : n + 1]) for n in range(4)]
    before, final = fold(maps, initial)
    for got, expected in zip([*before, final], states, strict=True):
        assert rms_error(got, expected) < 1e-12

    direct = []
    for (start, end), state in zip(pairwise(bounds), before, strict=True):
        state = state.detach().requires_grad_()
        direct_loss, _ = run_range(x, weights, start, end, state)
        direct.append(torch.autograd.grad(direct_loss, state)[0])
    after, dinitial = fold_backward(maps, direct, dfinal)
    for got, expected in zip([dinitial, *after], states, strict=True):
        assert rms_error(got, expected.grad) < 1e-12


def test_bfloat16() -> None:
    inputs = make_range(100)
    inputs |= {name: inputs[name].bfloat16() for name in ("k", "v", "beta")}
    got = outputs_and_gradients(range_state, inputs)
    reference = outputs_and_gradients(recurrence_map, inputs, torch.float64)
    # M and E lose nothing, the gradients their rounding to bf16.
    tolerance = {name: 0.005 if name in ("dk", "dv", "dbeta") else FP32 for name in got}
    assert_close(got, reference, tolerance)


def test_autocast_does_not_lower_the_precision() -> None:
    inputs = make_range(70)
    expected = range_state(**inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = range_state(**inputs)
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"g": torch.zeros(1, 5, 2, 3)}, "g: shape"),
        ({"beta": torch.zeros(1, 5, 3)}, "beta: shape"),
        ({"v": torch.zeros(1, 5, 2, V).bfloat16()}, "v: dtype"),
        ({"cu_seqlens": torch.tensor([0, 4])}, "cu_seqlens: runs from 0 to 4"),
        ({"backend": "reference"}, "backend: 'reference'"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        range_state(**(make_range(5) | change))
