"""The fused decode step against the float64 formulas of its parts: values, states, rows, errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megakda.kernels.kda.decode_fused import kda_decode_fused
from megakda.kernels.verify.memory import checked_memory
from megakda.kernels.verify.traffic import record_traffic
from tests.kernels.helpers import rms_error

FP32, BF16 = 1e-5, 0.005
BACKENDS = ["triton", "torch", "reference"]
INPUTS = ("q", "k", "v", "g", "beta", "gate")


@pytest.fixture(autouse=True)
def memory() -> Iterator[None]:
    """Every access of a kernel is checked; what nobody has written is NaN."""
    with checked_memory():
        yield


def make_inputs(
    size: int = 2,
    heads: int = 2,
    value_heads: int = 2,
    key_dim: int = 16,
    value_dim: int = 16,
    taps: int = 4,
    rows: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(key_dim)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    keys, values = heads * key_dim, value_heads * value_dim
    widths = (keys, keys, values)
    gates = (value_heads * key_dim, value_heads, values)
    inputs = {n: randn(size, d) for n, d in zip(INPUTS, (*widths, *gates), strict=True)}
    return {name: x.to(dtype) for name, x in inputs.items()} | {
        "conv_states": tuple(randn(rows or size, d, taps - 1).to(dtype) for d in widths),
        "conv_weights": tuple(randn(d, taps).to(dtype) for d in widths),
        "norm_weight": randn(value_dim).to(dtype),
        "state": randn(rows or size, value_heads, key_dim, value_dim),
        "A_log": randn(value_heads),
        "dt_bias": randn(value_heads * key_dim),
    }


def formulas(
    inputs: dict[str, Any],
    lower_bound: float | None = None,
    beta_factor: float = 1.0,
    swish: bool = False,
    scale: float | None = None,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """o, the state and the convolutions' states after the token, sequence n in row n; float64."""
    state = inputs["state"].double()
    size, value_heads, key_dim, value_dim = state.shape
    convolved, windows = [], []
    for x, old, weight in zip(
        (inputs[n] for n in "qkv"), inputs["conv_states"], inputs["conv_weights"], strict=True
    ):
        window = torch.cat((old, x.unsqueeze(-1)), -1).double()
        y = (window * weight.double()).sum(-1)
        convolved.append(y / (1 + (-y).exp()))
        windows.append(window[..., 1:])
    q, k = (x.view(size, -1, key_dim) for x in convolved[:2])
    v = convolved[2].view(size, -1, value_dim)
    q, k = (x / (x.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    q, k = (x.repeat_interleave(value_heads // x.shape[1], 1) for x in (q, k))
    g = inputs["g"].double().view(size, value_heads, key_dim)
    if inputs.get("dt_bias") is not None:
        g = g + inputs["dt_bias"].double().view(value_heads, key_dim)
    rate = 1.0
    if inputs.get("A_log") is not None:
        rate = inputs["A_log"].double().exp().view(-1, 1)
    if lower_bound is None:
        g = -rate * torch.logaddexp(g, torch.zeros_like(g))
    else:
        g = lower_bound / (1 + (-rate * g).exp())
    beta = beta_factor / (1 + (-inputs["beta"].double()).exp())
    state = g.exp().unsqueeze(-1) * state
    write = beta.unsqueeze(-1) * (v - (state * k.unsqueeze(-1)).sum(-2))
    state = state + k.unsqueeze(-1) * write.unsqueeze(-2)
    o = (key_dim**-0.5 if scale is None else scale) * (state * q.unsqueeze(-1)).sum(-2)
    o = o / (o.pow(2).mean(-1, keepdim=True) + eps).sqrt() * inputs["norm_weight"].double()
    gate = inputs["gate"].double().view(o.shape)
    o = o / (1 + (-gate).exp()) * (gate if swish else 1)
    return o.flatten(1), state, windows


def check(inputs: dict[str, Any], backend: str, options: Any = (), **expected: Any) -> None:
    """Output, state and convolution states, in both layouts of the state."""
    o, state, windows = formulas(inputs, **expected)
    for state_v_first in (False, True):
        new = dict(inputs)
        new["conv_states"] = tuple(x.clone() for x in inputs["conv_states"])
        new["state"] = (inputs["state"].mT if state_v_first else inputs["state"]).clone(
            memory_format=torch.contiguous_format
        )
        got = kda_decode_fused(**new, **dict(options), state_v_first=state_v_first, backend=backend)
        half = inputs["q"].dtype != torch.float32
        assert got.dtype == inputs["v"].dtype
        assert rms_error(got, o) < (BF16 if half else FP32)
        new_state = new["state"].mT if state_v_first else new["state"]
        assert rms_error(new_state, state) < FP32
        for window, wanted in zip(new["conv_states"], windows, strict=True):
            assert torch.equal(window.double(), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("heads", "value_heads", "key_dim", "value_dim", "taps"),
    [(2, 2, 16, 16, 4), (1, 3, 24, 40, 4), (2, 4, 32, 16, 2), (1, 1, 100, 128, 3), (1, 2, 3, 5, 8)],
)
def test_sizes(
    backend: str, heads: int, value_heads: int, key_dim: int, value_dim: int, taps: int
) -> None:
    check(make_inputs(2, heads, value_heads, key_dim, value_dim, taps), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(backend: str, dtype: torch.dtype) -> None:
    check(make_inputs(2, 2, 4, 32, 32, dtype=dtype), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("missing", ["", "A_log", "dt_bias"])
def test_bounded_gate(backend: str, missing: str) -> None:
    inputs = make_inputs()
    inputs.pop(missing, None)
    check(inputs, backend, {"lower_bound": -5.0}, lower_bound=-5.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_options(backend: str) -> None:
    inputs = make_inputs()
    options = {"allow_neg_eigval": True, "activation": "swish", "scale": 0.2, "eps": 0.1}
    check(inputs, backend, options, beta_factor=2.0, swish=True, scale=0.2, eps=0.1)
    del inputs["dt_bias"]
    check(inputs, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("indices", [[3, -1, 0], [-1, -2, -1]])
def test_pool(backend: str, indices: list[int]) -> None:
    inputs = make_inputs(size=3, value_heads=4, rows=5)
    rows = [i % 5 for i in indices]
    before = {"state": inputs["state"].clone()}
    before |= {f"conv {i}": x.clone() for i, x in enumerate(inputs["conv_states"])}
    chosen = inputs | {"state": inputs["state"][rows]}
    chosen["conv_states"] = tuple(x[rows] for x in inputs["conv_states"])
    o, state, windows = formulas(chosen)
    for name in INPUTS:
        inputs[name][1] = torch.nan  # padding may hold anything
    got = kda_decode_fused(**inputs, state_indices=torch.tensor(indices).int(), backend=backend)
    after = {"state": inputs["state"]}
    after |= {f"conv {i}": x for i, x in enumerate(inputs["conv_states"])}
    for n, index in enumerate(indices):
        if index < 0:
            assert (got[n] == 0).all()
            continue
        assert rms_error(got[n], o[n]) < FP32
        assert rms_error(after["state"][index], state[n]) < FP32
        for i, window in enumerate(windows):
            assert torch.equal(after[f"conv {i}"][index].double(), window[n])
    for row in set(range(5)) - set(indices):
        assert all(torch.equal(after[name][row], before[name][row]) for name in before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_extremes_are_finite(backend: str) -> None:
    for value in (-1e4, 0.0, 1e4):
        inputs = make_inputs()
        for name in INPUTS:
            inputs[name].fill_(value)
        o = kda_decode_fused(**inputs, backend=backend)
        assert o.isfinite().all() and inputs["state"].isfinite().all()


@pytest.mark.parametrize("value_heads", [2, 4])
def test_everything_is_moved_once_in_one_launch(value_heads: int) -> None:
    inputs = make_inputs(value_heads=value_heads, dtype=torch.bfloat16)
    tensors = [x for y in inputs.values() for x in (y if isinstance(y, tuple) else (y,))]
    with record_traffic() as launches:
        o = kda_decode_fused(**inputs, backend="triton")
    (launch,) = launches
    assert launch.unique_loaded == sum(x.nbytes for x in tensors)
    states = (o, inputs["state"], *inputs["conv_states"])
    assert launch.stored == launch.unique_stored == sum(x.nbytes for x in states)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "fused"}, "backend: 'fused'"),
        ({"q": torch.zeros(2, 24)}, "q: shape"),
        ({"q": torch.zeros(2, 48)}, "q: shape"),
        ({"k": torch.zeros(2, 16)}, "k: shape"),
        ({"v": torch.zeros(2, 32).half()}, "v: dtype"),
        ({"g": torch.zeros(2, 2)}, "g: shape"),
        ({"beta": torch.zeros(3, 2)}, "beta: shape"),
        ({"gate": torch.zeros(2, 32).int()}, "gate: dtype"),
        ({"gate": torch.zeros(2, 32, requires_grad=True)}, "gate: requires a gradient"),
        ({"conv_states": (torch.zeros(2, 32, 3),) * 2}, "conv_states: 2 tensors"),
        ({"conv_states": (torch.zeros(2, 32, 4),) * 3}, r"conv_states\[0\]: shape"),
        ({"conv_states": (torch.zeros(3, 32, 3),) * 3}, r"conv_states\[0\]: shape"),
        ({"conv_states": (torch.zeros(2, 32, 3).half(),) * 3}, r"conv_states\[0\]: dtype"),
        ({"conv_states": (torch.zeros(2, 3, 32).mT,) * 3}, r"conv_states\[0\]: strides"),
        ({"conv_weights": (torch.zeros(32, 9),) * 3}, r"conv_weights\[0\]: shape"),
        ({"conv_weights": (torch.zeros(32, 4),) * 2 + (torch.zeros(32, 3),)}, r"_weights\[2\]"),
        ({"norm_weight": torch.zeros(32)}, "norm_weight: 32 elements"),
        ({"state": torch.zeros(2, 2, 16)}, "state: shape"),
        ({"state": torch.zeros(2, 2, 16, 16).half()}, "state: dtype"),
        ({"state": torch.zeros(3, 2, 16, 16)}, "state: 3 rows, must have 2"),
        ({"A_log": None}, "A_log: needed"),
        ({"A_log": torch.zeros(3)}, "A_log: 3 elements"),
        ({"lower_bound": -6.0}, "lower_bound: -6.0"),
        ({"activation": "relu"}, "activation: 'relu'"),
        ({"eps": -1e-6}, "eps: -1e-06"),
        ({"state_indices": torch.tensor([0, 0])}, "state_indices: .* named twice"),
        ({"state_indices": torch.tensor([[0], [1]])}, "state_indices: torch.int64"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    good = make_inputs()
    with pytest.raises(ValueError, match=message):
        kda_decode_fused(**({"backend": "torch"} | good | change))


def test_limits_of_the_kernel() -> None:
    with pytest.raises(ValueError, match="state: K = 129 and V = 16 must be at most 128"):
        kda_decode_fused(**make_inputs(1, 1, 1, key_dim=129), backend="triton")
    with pytest.raises(ValueError, match="float64"):
        kda_decode_fused(**make_inputs(dtype=torch.float64), backend="triton")
