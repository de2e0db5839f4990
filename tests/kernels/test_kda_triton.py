"""The chunked KDA kernels, interpreted, against the float64 recurrence: values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from megakda.kernels import launch
from megakda.kernels.kda import chunk_kda, fused_recurrent_kda, op
from megakda.kernels.kda.plan import chunks_per_range, plan_chunks
from megakda.kernels.kda.reference import kda_recurrence
from tests.kernels.helpers import assert_close, outputs_and_gradients, rms_error
from tests.kernels.kda_cases import Case, Tensors, covering

pytest.importorskip("triton")

FP32 = 1e-5
BF16, FP16 = torch.bfloat16, torch.float16
MILD = ("soft", 0.0, -5.0)
SPLIT = [None, 1, 2]


def tolerances(case: Case) -> dict[str, float]:
    """Largest errors, relative RMS, about twice what these cases show.

    fp32: cumulative sums of strong decays grow to 64 * 150 in units of log2, where fp32 numbers are
    1e-3 apart. That is felt where weak decays follow upon strong ones ("mixed"), and otherwise only
    in the gradients of strong decays themselves.
    bf16, fp16: the inputs as rounded are the truth, so this is what the kernels lose.
    """
    names = ["output 0", "output 1", "dq", "dk", "dv", "dinitial_state"]
    decays, parameters = ["dg", "dbeta"], ["dA_log", "ddt_bias"]
    if case.dtype != torch.float32:
        return (
            dict.fromkeys(names[:2], 0.005)
            | dict.fromkeys(names[2:], 0.008)
            | dict.fromkeys(decays + parameters, 0.02)
        )
    if case.decay == "mixed":
        return dict.fromkeys(names + decays, 4e-4)
    strong = 1e-5 if case.decay in MILD else 1e-4
    return dict.fromkeys([*names, "dbeta"], FP32) | dict.fromkeys(["dg", *parameters], strong)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensors]:
    """Results of a case with its split of sequences, checked against the recurrence."""

    def checked(case: Case, tolerance: dict[str, float] | None = None, **options: Any) -> Tensors:
        monkeypatch.setattr(op, "chunks_per_range", lambda *_: case.chunks_per_range)
        tolerance = tolerances(case) if tolerance is None else tolerance
        return case.check(chunk_kda, tolerance, backend="triton", **options)

    return checked


def bits(case: Case, inputs: Tensors, **options: Any) -> Tensors:
    """Outputs and gradients of the operator, unchecked."""
    options = case.options() | options
    return outputs_and_gradients(lambda **x: chunk_kda(**x, **options, backend="triton"), inputs)


def equal(a: Tensors, b: Tensors) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------ values and gradients


@pytest.mark.parametrize(
    "case",
    covering(
        decay=["soft", 0.0, -5.0, -30.0, "mixed", "softplus", "bounded"],
        tokens=[1, 15, 16, 63, 64, 65],
        dtype=[torch.float32, BF16],
        sizes=[(16, 16), (24, 40), (40, 24)],
        layout=["one", "packed", "batch"],
        heads=[(1, 1), (1, 2)],
        chunk_size=[64, 32, 16],
        chunks_per_range=SPLIT,
        beta=["plain", "sigmoid", "negative"],
        l2_norm=[False, True],
        initial_state=[True, False],
        state_v_first=[False, True],
        head_decay=[False, True],
    ),
    ids=str,
)
def test_any_two_options(run: Callable[..., Tensors], case: Case) -> None:
    run(case)


FUSED: dict[str, Any] = {"beta": "sigmoid", "l2_norm": True}


@pytest.mark.parametrize(
    "case",
    [
        Case(130),
        Case(65, heads=(2, 4), layout="batch", decay="softplus without dt_bias"),
        Case(65, layout="batch", decay="bounded without A_log", chunks_per_range=1),
        Case(130, layout="packed", dtype=BF16, decay="softplus", **FUSED),
        Case(130, heads=(1, 1), layout="packed", decay="mixed", chunks_per_range=1),
        Case(65, (128, 128), heads=(1, 1), dtype=BF16, decay="softplus", **FUSED),
        Case(65, (128, 128), heads=(1, 1), decay="bounded", head_decay=True, **FUSED),
        Case(17, (256, 16), heads=(1, 1), chunk_size=16),
        Case(17, (16, 256), heads=(1, 1), chunk_size=16),
        Case(66, dtype=FP16),
        Case(66, dtype=FP16, decay="bounded", **FUSED),
    ],
    ids=str,
)
def test_larger(run: Callable[..., Tensors], case: Case) -> None:
    run(case)


@pytest.mark.parametrize("decay", ["softplus", "bounded"])
def test_gate_parameters_in_bfloat16(run: Callable[..., Tensors], decay: str) -> None:
    # Decays of up to -16 per step, as a model begins with: their own gradients are tiny, and the
    # rounding of their neighbours' must not reach them.
    case = Case(130, (64, 64), dtype=BF16, decay=decay, **FUSED)
    run(case, tolerances(case) | {"dg": 0.005, "dA_log": 0.003, "ddt_bias": 0.003})


@pytest.mark.parametrize("chunks", SPLIT)
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("output", [0, 1])
def test_gradient_from_one_output_alone(
    monkeypatch: pytest.MonkeyPatch, output: int, dtype: torch.dtype, chunks: int | None
) -> None:
    case = Case(66, heads=(1, 1), dtype=dtype)
    monkeypatch.setattr(op, "chunks_per_range", lambda *_: chunks)
    options = case.options() | {"backend": "triton", "output_final_state": output == 1}
    got = outputs_and_gradients(
        lambda **x: chunk_kda(**x, **options)[output : output + 1], case.inputs()
    )
    reference = outputs_and_gradients(
        lambda **x: case.formulas(**x)[output : output + 1], case.inputs(), torch.float64
    )
    # Through all of the decay, 1e-20 of the initial state is left.
    tolerance = tolerances(case) | {"dinitial_state": 0.015 if dtype == BF16 else FP32}
    assert_close(got, reference, tolerance)


def test_inputs_without_gradients() -> None:
    # A model's first chunk of a long text: nothing but the weights behind v is trained.
    case = Case(20, heads=(1, 1), chunk_size=16)
    inputs = case.inputs()
    reference = case.reference()["dv"]
    inputs["v"].requires_grad_()
    generator = torch.Generator().manual_seed(1)
    outputs = chunk_kda(**inputs, **case.options(), backend="triton")
    loss = sum((x * torch.randn(x.shape, generator=generator)).sum() for x in outputs)
    (dv,) = torch.autograd.grad(loss, [inputs["v"]])
    assert rms_error(dv, reference) < FP32


@pytest.mark.parametrize("chunk_size", [64, 16])
@pytest.mark.parametrize(
    ("beta", "dtype", "tolerance"),
    [(0.999, torch.float32, FP32), (1.9, torch.float32, 5e-4), (0.999, BF16, 0.02)],
)
def test_equal_keys(beta: float, dtype: torch.dtype, tolerance: float, chunk_size: int) -> None:
    # Every product of two keys is 1: the powers of the matrix that is inverted grow like binomial
    # coefficients, to 1e17 for 64 tokens, while its inverse stays small. With beta near 2 the state
    # swings and forgets nothing, and rounding adds up.
    case = Case(130, heads=(1, 1), decay=0.0, dtype=dtype, chunk_size=chunk_size)
    inputs = case.inputs()
    inputs["k"][:] = inputs["k"][:, :1]
    inputs["beta"][:] = beta
    reference = outputs_and_gradients(case.formulas, inputs, torch.float64)
    assert_close(bits(case, inputs), reference, tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("decay", [-88.0, -1e4, -1e30, float("-inf"), "alternating"])
def test_extremes(decay: float | str, dtype: torch.dtype) -> None:
    case = Case(66, heads=(1, 1), dtype=dtype, chunk_size=32)
    inputs = case.inputs()
    inputs["g"][:] = 0.0 if decay == "alternating" else decay
    if decay == "alternating":
        inputs["g"][:, ::3] = -3e38
    results = bits(case, inputs)
    assert all(x.isfinite().all() for x in results.values())
    for n, x in enumerate(kda_recurrence(**inputs)):
        assert rms_error(results[f"output {n}"], x) < (FP32 if dtype == torch.float32 else 0.005)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_100"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_launch_tables(run: Callable[..., Tensors], architecture: str, dtype: torch.dtype) -> None:
    with launch.force(architecture):
        run(Case(33, (96, 80), heads=(1, 1), dtype=dtype, chunk_size=32, chunks_per_range=1))


# ------------------------------------------------------------------ states


@pytest.mark.parametrize("chunks", SPLIT)
@pytest.mark.parametrize(
    "case",
    [
        Case(66, heads=(1, 1), layout="batch", chunk_size=32),
        Case(66, heads=(1, 1), layout="packed", chunk_size=16, state_v_first=True),
        Case(66, heads=(1, 1), dtype=BF16, decay="softplus", initial_state=False, **FUSED),
    ],
    ids=str,
)
def test_intermediate_states(
    monkeypatch: pytest.MonkeyPatch, case: Case, chunks: int | None
) -> None:
    monkeypatch.setattr(op, "chunks_per_range", lambda *_: chunks)
    inputs = case.inputs()
    with torch.no_grad():
        o, final_state, states = chunk_kda(
            **inputs, **case.options(), return_intermediate_states=True, backend="triton"
        )
    # A chunk's state is the final state of the tokens before it.
    expected = []
    for n, (start, end) in enumerate(pairwise(case.bounds or [0, case.tokens])):
        for chunk in range(start, end, case.chunk_size):
            part = {x: y[:, start:chunk] for x, y in inputs.items() if x in SEQUENCES}
            part |= {x: y for x, y in inputs.items() if x in ("A_log", "dt_bias")}
            state = inputs.get("initial_state")
            if state is None:
                state = torch.zeros_like(states[:, 0], dtype=torch.float32)
            elif case.bounds:
                state = state[n : n + 1]
            if chunk > start:
                alone = replace(case, layout="batch" if case.layout == "batch" else "one")
                _, state = chunk_kda(
                    **part, **alone.options(), initial_state=state, backend="reference"
                )
            expected.append(state)
    assert states.dtype == case.dtype
    tolerance = FP32 if case.dtype == torch.float32 else 0.005
    assert rms_error(states, torch.stack(expected, 1)) < tolerance


SEQUENCES = ("q", "k", "v", "g", "beta")


def test_natural_split(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(24 * 16 + 1, (16, 16), heads=(1, 1), chunk_size=16)
    plans = []

    def plan(*args: Any) -> Any:
        plans.append(plan_chunks(*args))
        return plans[-1]

    monkeypatch.setattr(op, "plan_chunks", plan)
    with torch.no_grad():
        got = chunk_kda(**case.inputs(), **case.options(), backend="triton")
    assert plans[0].split.walks[:, :2].tolist() == [[0, 128], [128, 256], [256, 384], [384, 385]]
    for x, reference in zip(got, kda_recurrence(**case.inputs()), strict=True):
        assert rms_error(x, reference) < FP32


def test_when_sequences_are_split() -> None:
    # 25 chunks and one program each: too few for 132 processors, and enough for three ranges.
    assert chunks_per_range((0, 400), 16, 1, 132) == 8
    assert chunks_per_range((0, 100, 300, 400), 16, 1, 132) is None  # the longest has 13 chunks
    # As many programs as processors: nothing to be won.
    assert chunks_per_range((0, 400), 16, 132, 132) is None
    assert chunks_per_range((0, 6400), 16, 12, 132) == 37
    assert chunks_per_range((0, 0), 16, 1, 132) is None


# ------------------------------------------------------------------ bits


@pytest.mark.parametrize("chunks", [None, 1])
def test_same_bits_every_time(monkeypatch: pytest.MonkeyPatch, chunks: int | None) -> None:
    monkeypatch.setattr(op, "chunks_per_range", lambda *_: chunks)
    case = Case(40, heads=(1, 1), dtype=BF16, layout="packed", chunk_size=32)
    assert equal(*(bits(case, case.inputs()) for _ in range(2)))


def test_memory_layout_does_not_matter() -> None:
    case = Case(40, layout="batch", chunk_size=32, decay="softplus")
    inputs = case.inputs()
    inputs["g"] = inputs["g"][..., :1].expand_as(inputs["g"])
    reference = bits(case, {name: x.contiguous() for name, x in inputs.items()})
    # Sequence first, as megatron-core keeps its activations; states seen from the other side.
    for name in ("q", "k", "v", "beta"):
        inputs[name] = inputs[name].transpose(0, 1).contiguous().transpose(0, 1)
    inputs["initial_state"] = inputs["initial_state"].mT.contiguous().mT
    options = case.options() | {"backend": "triton"}
    with torch.no_grad():
        o, state = chunk_kda(**inputs, **options)
    assert torch.equal(o, reference["output 0"]) and o.is_contiguous()
    assert torch.equal(state, reference["output 1"])


def test_published_shape_of_A_log() -> None:
    case = Case(20, decay="softplus", chunk_size=32)
    inputs = case.inputs()
    reference = bits(case, inputs)
    inputs["A_log"] = inputs["A_log"].view(1, 1, -1, 1)
    got = bits(case, inputs)
    assert got["dA_log"].shape == (1, 1, 2, 1)
    got["dA_log"] = got["dA_log"].flatten()
    assert equal(got, reference)


def test_state_v_first_and_integer_kinds_give_the_same_bits() -> None:
    case = Case(40, heads=(1, 1), layout="packed", chunk_size=16)
    inputs = case.inputs()
    reference = bits(case, inputs)
    assert equal(reference, bits(case, inputs, cu_seqlens=torch.tensor(case.bounds).int()))
    inputs["initial_state"] = inputs["initial_state"].mT.contiguous()
    with torch.no_grad():
        o, state = chunk_kda(**inputs, **case.options() | STATE_V_FIRST)
    assert torch.equal(o, reference["output 0"]) and torch.equal(state.mT, reference["output 1"])
    # An empty sequence hands its state on, to the bit.
    assert torch.equal(state[0], inputs["initial_state"][0])


STATE_V_FIRST = {"state_v_first": True, "backend": "triton"}


def test_autocast_does_not_change_the_bits() -> None:
    case = Case(20, heads=(1, 1), chunk_size=32)
    reference = bits(case, case.inputs())
    with torch.autocast("cpu", dtype=BF16):
        assert equal(bits(case, case.inputs()), reference)


@pytest.mark.parametrize("chunks", [None, 1])
def test_packed_sequences_do_not_touch(monkeypatch: pytest.MonkeyPatch, chunks: int | None) -> None:
    monkeypatch.setattr(op, "chunks_per_range", lambda *_: chunks)
    case = Case(66, heads=(1, 1), layout="packed", chunk_size=32)
    inputs = case.inputs()
    assert case.bounds == [0, 0, 22, 22, 23, 65, 66, 66]
    before = bits(case, inputs)
    for name in SEQUENCES:
        inputs[name][:, 23:65] *= 0.5
    after = bits(case, inputs)
    for name in ("output 0", *(f"d{x}" for x in SEQUENCES)):
        same = (before[name] == after[name]).flatten(2).all(-1)[0]
        assert same[:23].all() and same[65:].all() and not same[23:65].any(), name
    for name in ("output 1", "dinitial_state"):
        same = (before[name] == after[name]).flatten(1).all(-1).tolist()
        assert same == [n != 4 for n in range(7)], name


@pytest.mark.parametrize(("decay", "chunks"), [("soft", None), ("softplus", 1), ("bounded", None)])
def test_nan_in_the_gate(monkeypatch: pytest.MonkeyPatch, decay: str, chunks: int | None) -> None:
    # It shows in every output of its sequence and head from its own token on, and nowhere else but
    # in its own chunk.
    monkeypatch.setattr(op, "chunks_per_range", lambda *_: chunks)
    case = Case(66, decay=decay, layout="packed", chunk_size=16)
    inputs = case.inputs()
    assert case.bounds == [0, 0, 22, 22, 23, 65, 66, 66]
    with torch.no_grad():
        o, state = chunk_kda(**inputs, **case.options(), backend="triton")
        inputs["g"][0, 50, 1, 5] = float("nan")
        got, got_state = chunk_kda(**inputs, **case.options(), backend="triton")
    assert torch.equal(got[:, :, 0], o[:, :, 0])  # the other head
    assert torch.equal(got[:, :39, 1], o[:, :39, 1])  # its chunk begins at 23 + 16
    assert got[:, 50:65, 1].isnan().all()
    assert torch.equal(got[:, 65:], o[:, 65:])
    others = [n for n in range(7) if n != 4]
    assert torch.equal(got_state[others], state[others])
    assert torch.equal(got_state[4, 0], state[4, 0]) and got_state[4, 1, 5].isnan().all()


# ------------------------------------------------------------------ token by token


@pytest.mark.parametrize(
    "case",
    covering(
        decay=["soft", "mixed", "softplus", "softplus without dt_bias", "bounded"],
        tokens=[1, 9],
        dtype=[torch.float32, BF16],
        sizes=[(24, 40), (96, 80)],
        layout=["one", "packed", "batch"],
        heads=[(1, 1), (1, 2)],
        beta=["plain", "sigmoid", "negative"],
        l2_norm=[False, True],
        initial_state=[True, False],
        state_v_first=[False, True],
        head_decay=[False, True],
    ),
    ids=str,
)
def test_recurrent_operator(case: Case) -> None:
    with torch.no_grad():
        o, state = fused_recurrent_kda(**case.inputs(), **case.options(), backend="triton")
    reference = case.reference()
    assert o.dtype == case.dtype
    assert rms_error(o, reference["output 0"]) < (FP32 if case.dtype == torch.float32 else 0.005)
    assert rms_error(state, reference["output 1"]) < FP32
