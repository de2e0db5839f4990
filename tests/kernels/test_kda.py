"""KDA operators in PyTorch against the float64 recurrence: values, gradients, packing, bits."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megakda.kernels.kda import chunk_kda, fused_recurrent_kda, kda_gate
from megakda.kernels.kda.chunk_torch import chunk_kda_torch
from megakda.kernels.kda.reference import kda_recurrence
from tests.kernels.helpers import assert_close, outputs_and_gradients, rms_error

FP32 = 1e-5
OPERATORS = [chunk_kda, fused_recurrent_kda]
Tensors = dict[str, torch.Tensor]


def make_inputs(
    tokens: int,
    decay: float | str = "soft",
    batch: int = 2,
    heads: int = 2,
    value_heads: int = 4,
    key_dim: int = 32,
    value_dim: int = 24,
    decay_dim: int | None = None,
    sequences: int | None = None,
) -> Tensors:
    """Random fp32 inputs with unit keys and queries.

    decay: "soft" is the softplus gate at initialisation, "mixed" forgets all in one step out of
    five and next to nothing in the others, a number is the least forgetting of each step, scaled
    by up to 1.1.
    """
    generator = torch.Generator().manual_seed(tokens)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    decay_shape = (batch, tokens, value_heads, decay_dim or key_dim)
    if decay == "soft":
        g = -F.softplus(randn(*decay_shape))
    elif decay == "mixed":
        g = torch.where(randn(*decay_shape) > 0.84, -60.0, -0.01)
    else:
        g = decay * (1 + 0.1 * torch.rand(decay_shape, generator=generator))
    return {
        "q": F.normalize(randn(batch, tokens, heads, key_dim), dim=-1),
        "k": F.normalize(randn(batch, tokens, heads, key_dim), dim=-1),
        "v": randn(batch, tokens, value_heads, value_dim),
        "g": g,
        "beta": torch.sigmoid(randn(batch, tokens, value_heads)),
        "initial_state": randn(sequences or batch, value_heads, key_dim, value_dim),
    }


def check(operator: Any, inputs: Tensors, tolerance: float | dict[str, float] = FP32) -> None:
    """Outputs, final state and all gradients of the operator against the recurrence."""
    got = outputs_and_gradients(lambda **x: operator(**x, output_final_state=True), inputs)
    assert_close(got, outputs_and_gradients(kda_recurrence, inputs, torch.float64), tolerance)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("tokens", [1, 2, 15, 63, 64, 65, 130])
def test_any_length(operator: Any, tokens: int) -> None:
    check(operator, make_inputs(tokens))


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("decay", [0.0, -1e-3, -1.0, -5.0, -30.0, -60.0, "mixed"])
def test_any_decay(operator: Any, decay: float | str) -> None:
    check(operator, make_inputs(130, decay, batch=1))


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("decay", ["soft", -60.0])
def test_one_decay_per_head(operator: Any, decay: float | str) -> None:
    check(operator, make_inputs(70, decay, decay_dim=1))


@pytest.mark.parametrize(("key_dim", "value_dim"), [(16, 16), (64, 128), (24, 33), (256, 16)])
def test_head_sizes(key_dim: int, value_dim: int) -> None:
    check(chunk_kda, make_inputs(70, key_dim=key_dim, value_dim=value_dim))


@pytest.mark.parametrize("chunk_size", [16, 32, 128])
def test_chunk_sizes(chunk_size: int) -> None:
    inputs = make_inputs(130)
    check(lambda **x: chunk_kda(**x, chunk_size=chunk_size), inputs)


def test_without_initial_state() -> None:
    inputs = make_inputs(70)
    del inputs["initial_state"]
    check(chunk_kda, inputs)
    check(fused_recurrent_kda, inputs)


def test_backward_formulas_in_float64() -> None:
    # Finite differences do not share the algebra of the code under test.
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (1, 11, 1, 3), "k": (1, 11, 1, 3), "v": (1, 11, 2, 2), "g": (1, 11, 2, 3)}
    shapes |= {"beta": (1, 11, 2), "initial_state": (1, 2, 3, 2)}
    x = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}
    x["g"] = -x["g"].abs()
    for decay in (x["g"], x["g"][..., :1]):
        leaves = [y.clone().requires_grad_() for y in (x | {"g": decay}).values()]
        assert torch.autograd.gradcheck(
            lambda q, k, v, g, beta, state: chunk_kda_torch(q, k, v, g, beta, 0.5, state, 4)[:2],
            leaves,
            atol=1e-7,
        )


@pytest.mark.parametrize("output", [0, 1])
def test_gradient_from_one_output_alone(output: int) -> None:
    inputs = make_inputs(70)
    got = outputs_and_gradients(
        lambda **x: chunk_kda(**x, output_final_state=True)[output : output + 1], inputs
    )
    reference = outputs_and_gradients(
        lambda **x: kda_recurrence(**x)[output : output + 1], inputs, torch.float64
    )
    assert_close(got, reference, FP32)


@pytest.mark.parametrize("operator", OPERATORS)
def test_bfloat16(operator: Any) -> None:
    inputs = make_inputs(130, key_dim=64, value_dim=64)
    inputs |= {n: inputs[n].bfloat16() for n in ("q", "k", "v", "beta")}
    # The inputs as rounded are the truth, so this is what the operator itself loses: the rounding
    # of outputs and gradients to bf16.
    tolerance = dict.fromkeys(["output 0", "output 1"], 0.005)
    tolerance |= dict.fromkeys(["dq", "dk", "dv", "dbeta", "dg", "dinitial_state"], 0.005)
    check(operator, inputs, tolerance)
    o, state = operator(**inputs, output_final_state=True)
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)


# ------------------------------------------------------------------ activations


def reference_with_activations(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    lower_bound: float | None = None,
    beta_factor: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole operator from its formulas, in the dtype of the inputs."""
    q, k = (x / (x.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    x = g if dt_bias is None else g + dt_bias.view(g.shape[2:])
    rate = 1.0 if A_log is None else A_log.exp().view(-1, 1)
    g = (
        -rate * (1 + x.exp()).log()
        if lower_bound is None
        else lower_bound / (1 + (-rate * x).exp())
    )
    return kda_recurrence(
        q, k, v, g, beta_factor / (1 + (-beta).exp()), initial_state=initial_state
    )


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize(
    ("lower_bound", "missing"),
    [(None, ""), (None, "dt_bias"), (-5.0, ""), (-5.0, "dt_bias"), (-5.0, "A_log")],
)
def test_activations(
    operator: Any, negative: bool, lower_bound: float | None, missing: str
) -> None:
    inputs = make_inputs(66, batch=1)
    heads, key_dim = inputs["g"].shape[2:]
    generator = torch.Generator().manual_seed(3)
    # Queries so short that the norm's 1e-6 counts.
    for name, size in (("q", 3e-4), ("k", 3.0), ("beta", 3.0)):
        inputs[name] = size * torch.randn(inputs[name].shape, generator=generator)
    inputs["g"] = torch.randn(inputs["g"].shape, generator=generator)
    inputs["A_log"] = torch.rand(heads, generator=generator)
    inputs["dt_bias"] = torch.randn(heads * key_dim, generator=generator)
    inputs.pop(missing, None)

    def ours(**x: torch.Tensor) -> Any:
        return operator(
            **x,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True,
            use_beta_sigmoid_in_kernel=True,
            allow_neg_eigval=negative,
            safe_gate=lower_bound is not None,
            lower_bound=lower_bound,
        )

    def reference(**x: torch.Tensor) -> Any:
        factor = 2.0 if negative else 1.0
        return reference_with_activations(**x, lower_bound=lower_bound, beta_factor=factor)

    reference_results = outputs_and_gradients(reference, inputs, torch.float64)
    assert_close(outputs_and_gradients(ours, inputs), reference_results, FP32)


@pytest.mark.parametrize("lower_bound", [None, -5.0, -0.5])
@pytest.mark.parametrize("key_dim", [8, 1])
def test_gate(lower_bound: float | None, key_dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "raw": 4 * torch.randn(3, 5, 2, key_dim, generator=generator),
        "A_log": torch.rand(2, generator=generator),
        "dt_bias": torch.randn(2 * key_dim, generator=generator),
    }

    def reference(raw: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor) -> Any:
        rate, x = A_log.exp().view(2, 1), raw + dt_bias.view(2, key_dim)
        if lower_bound is None:
            return [-rate * torch.logaddexp(x, torch.zeros_like(x))]
        return [lower_bound / (1 + (-rate * x).exp())]

    got = outputs_and_gradients(lambda **x: [kda_gate(**x, lower_bound=lower_bound)], inputs)
    assert_close(got, outputs_and_gradients(reference, inputs, torch.float64), FP32)
    assert kda_gate(inputs["raw"].bfloat16(), inputs["A_log"]).dtype == torch.float32


@pytest.mark.parametrize("lower_bound", [None, -5.0])
def test_gate_is_finite_where_it_saturates(lower_bound: float | None) -> None:
    raw = torch.tensor([-1e30, -1e4, -200.0, 0.0, 200.0, 1e4, 1e30]).view(-1, 1, 1)
    raw.requires_grad_()
    A_log = torch.tensor([2.7], requires_grad=True)
    g = kda_gate(raw, A_log, lower_bound=lower_bound)
    assert g.isfinite().all() and (g <= 0).all()
    for gradient in torch.autograd.grad(g.exp().sum(), (raw, A_log)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("lower_bound", [0.0, 1.0, -5.01, float("nan"), float("-inf")])
def test_gate_bound_out_of_range(lower_bound: float) -> None:
    with pytest.raises(ValueError, match=r"lower_bound: .* must be in \[-5, 0\)"):
        kda_gate(torch.zeros(1, 2, 4), torch.zeros(2), lower_bound=lower_bound)


def test_gate_wrong_sizes() -> None:
    with pytest.raises(ValueError, match="A_log: .* must have 2"):
        kda_gate(torch.zeros(1, 2, 4), torch.zeros(8))
    with pytest.raises(ValueError, match="dt_bias: .* must have 8"):
        kda_gate(torch.zeros(1, 2, 4), torch.zeros(2), torch.zeros(2))


# ------------------------------------------------------------------ sequences and states


PACKED = [0, 0, 1, 1, 66, 99, 130, 130]


def packed_reference(bounds: list[int], **x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each sequence on its own."""
    initial = x.pop("initial_state")
    outputs, states = [], []
    for n, (start, end) in enumerate(pairwise(bounds)):
        state = initial[n : n + 1].double()
        if start < end:
            o, state = kda_recurrence(
                **{name: y[:, start:end] for name, y in x.items()}, initial_state=state
            )
            outputs.append(o)
        states.append(state)
    return torch.cat(outputs, 1), torch.cat(states)


@pytest.mark.parametrize("operator", OPERATORS)
def test_packed_sequences(operator: Any) -> None:
    inputs = make_inputs(130, batch=1, sequences=len(PACKED) - 1)
    got = outputs_and_gradients(
        lambda **x: operator(**x, output_final_state=True, cu_seqlens=torch.tensor(PACKED)), inputs
    )
    reference = outputs_and_gradients(
        lambda **x: packed_reference(PACKED, **x), inputs, torch.float64
    )
    assert_close(got, reference, FP32)
    # An empty sequence hands its state on, to the bit.
    assert torch.equal(got["output 1"][0], inputs["initial_state"][0])


def test_packed_sequences_do_not_touch() -> None:
    inputs = make_inputs(130, batch=1, sequences=len(PACKED) - 1)
    cu_seqlens = torch.tensor(PACKED, dtype=torch.int32)
    o, state = chunk_kda(**inputs, output_final_state=True, cu_seqlens=cu_seqlens)
    other = {name: x.clone() for name, x in inputs.items()}
    for name in ("q", "k", "v", "g", "beta"):
        other[name][:, 66:99] *= 0.5
    changed_o, changed_state = chunk_kda(**other, output_final_state=True, cu_seqlens=cu_seqlens)
    same = torch.ones(130, dtype=torch.bool)
    same[66:99] = False
    assert torch.equal(o[:, same], changed_o[:, same])
    assert not torch.equal(o[:, ~same], changed_o[:, ~same])
    assert [torch.equal(a, b) for a, b in zip(state, changed_state, strict=True)] == [
        n != PACKED.index(66) for n in range(len(PACKED) - 1)
    ]


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("cut", [1, 64, 77])
def test_chaining_states_equals_one_pass(operator: Any, cut: int) -> None:
    inputs = make_inputs(130)

    def chained(initial_state: torch.Tensor, **x: torch.Tensor) -> Any:
        first, state = operator(
            **{name: y[:, :cut] for name, y in x.items()},
            initial_state=initial_state,
            output_final_state=True,
        )
        # The other operator goes on from the same state.
        other = fused_recurrent_kda if operator is chunk_kda else chunk_kda
        second, state = other(
            **{name: y[:, cut:] for name, y in x.items()},
            initial_state=state,
            output_final_state=True,
        )
        return torch.cat((first, second), 1), state

    whole = outputs_and_gradients(lambda **x: operator(**x, output_final_state=True), inputs)
    assert_close(outputs_and_gradients(chained, inputs), whole, FP32)


@pytest.mark.parametrize("operator", OPERATORS)
def test_state_v_first(operator: Any) -> None:
    inputs = make_inputs(70)
    o, state = operator(**inputs, output_final_state=True)
    inputs["initial_state"] = inputs["initial_state"].mT.contiguous()
    other_o, other_state = operator(**inputs, output_final_state=True, state_v_first=True)
    assert torch.equal(o, other_o) and torch.equal(state, other_state.mT)


def test_final_state_is_optional_and_initial_state_is_left_alone() -> None:
    inputs = make_inputs(5)
    before = inputs["initial_state"].clone()
    for operator in OPERATORS:
        assert operator(**inputs)[1] is None
        assert torch.equal(inputs["initial_state"], before)


@pytest.mark.parametrize("cu_seqlens", [None, PACKED])
@pytest.mark.parametrize("state_v_first", [False, True])
def test_intermediate_states(cu_seqlens: list[int] | None, state_v_first: bool) -> None:
    bounds = cu_seqlens or [0, 130]
    inputs = make_inputs(130, batch=1, sequences=len(bounds) - 1)
    initial = inputs.pop("initial_state")
    packed = None if cu_seqlens is None else torch.tensor(cu_seqlens)
    expected = []
    for n, (start, end) in enumerate(pairwise(bounds)):
        for chunk in range(start, end, 64):
            state = initial[n : n + 1]
            if chunk > start:
                sequence = {name: x[:, start:chunk] for name, x in inputs.items()}
                _, state = kda_recurrence(**sequence, initial_state=state)
            expected.append(state.double())
    with torch.no_grad():
        _, _, states = chunk_kda(
            **inputs,
            initial_state=initial.mT if state_v_first else initial,
            cu_seqlens=packed,
            state_v_first=state_v_first,
            return_intermediate_states=True,
        )
    assert rms_error(states.mT if state_v_first else states, torch.stack(expected, 1)) < FP32


def test_reference_backend() -> None:
    inputs = make_inputs(20)
    o, state = kda_recurrence(**inputs)
    for operator in OPERATORS:
        got = operator(**inputs, output_final_state=True, backend="reference")
        assert torch.equal(got[0], o.float()) and torch.equal(got[1], state.float())


# ------------------------------------------------------------------ bits


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("decay", ["soft", -60.0, "mixed"])
def test_causal_to_the_bit(operator: Any, decay: float | str) -> None:
    inputs = make_inputs(130, decay, batch=1)
    o, _ = operator(**inputs)
    generator = torch.Generator().manual_seed(9)
    for t in (0, 1, 6, 31, 63, 64, 100, 128):
        later = {name: x.clone() for name, x in inputs.items()}
        for name in ("q", "k", "v", "g", "beta"):
            later[name][:, t + 1 :] = torch.randn(
                later[name][:, t + 1 :].shape, generator=generator
            )
        later["g"] = -later["g"].abs()
        later["g"][:, t + 1 :: 3] = -60.0
        assert torch.equal(operator(**later)[0][:, : t + 1], o[:, : t + 1])


def test_same_bits_every_time() -> None:
    inputs = make_inputs(130)
    first, second = (
        outputs_and_gradients(lambda **x: chunk_kda(**x, output_final_state=True), inputs)
        for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_memory_layout_does_not_matter() -> None:
    inputs = make_inputs(70)
    inputs["g"] = inputs["g"][..., :1].expand_as(inputs["g"])
    o, _ = chunk_kda(**{name: x.contiguous() for name, x in inputs.items()})
    # Sequence first, as megatron-core keeps its activations.
    strided = {name: x.transpose(0, 1).contiguous().transpose(0, 1) for name, x in inputs.items()}
    strided["g"] = inputs["g"]
    got, _ = chunk_kda(**strided)
    assert torch.equal(got, o) and got.is_contiguous()


def test_autocast_does_not_lower_the_precision() -> None:
    inputs = make_inputs(70)
    for operator in OPERATORS:
        o, _ = operator(**inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(operator(**inputs)[0], o)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("decay", [0.0, -88.0, -1e4, -1e30, float("-inf"), "alternating"])
def test_finite_at_extremes(operator: Any, decay: float | str) -> None:
    inputs = make_inputs(130, batch=1)
    if decay == "alternating":
        inputs["g"].fill_(0.0)
        inputs["g"][:, ::3] = -3e38
    else:
        inputs["g"].fill_(decay)
    results = outputs_and_gradients(lambda **x: operator(**x, output_final_state=True), inputs)
    assert all(x.isfinite().all() for x in results.values())
    outputs, states = kda_recurrence(**inputs)
    assert rms_error(results["output 0"], outputs) < FP32
    assert rms_error(results["output 1"], states) < FP32
