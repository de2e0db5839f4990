"""The grid of flash-linear-attention's KDA tests, at sizes that the interpreter can do.

Shapes, options, distributions of the inputs and error bounds are those of tests/ops/test_kda.py in
github.com/fla-org/flash-linear-attention; a test's name is that of its original there, its id the
original's parameters. Scaled down are: the batch to 1, the heads to one query head with as many
value heads as there were to each, and sequences of many chunks to one or two chunks with the same
ragged end (`scaled`). K and V stay. What is compared with is the float64 recurrence.
"""

from __future__ import annotations

import importlib.util
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megakda.kernels.kda import chunk_kda, fused_recurrent_kda, kda_gate
from megakda.kernels.kda.decode import kda_decode_step
from megakda.kernels.kda.gate import kda_gate_reference
from megakda.kernels.kda.reference import kda_recurrence
from tests.kernels.helpers import assert_close, outputs_and_gradients, rms_error

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
Tensors = dict[str, torch.Tensor]
triton = pytest.param(
    "triton",
    marks=pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="needs the triton package"
    ),
)
backends = pytest.mark.parametrize("backend", ["torch", triton])


def scaled(tokens: int, chunk: int = 64) -> int:
    """At most two chunks: two whole ones, or one and the ragged end."""
    if tokens <= 2 * chunk:
        return tokens
    return chunk + (tokens % chunk or chunk)


def packed(cu_seqlens: list[int], chunk: int = 64) -> list[int]:
    """The longest sequence as `scaled`, of each other its ragged end, or one chunk."""
    lengths = [end - start for start, end in pairwise(cu_seqlens)]
    ends = [x % chunk or chunk for x in lengths]
    longest = lengths.index(max(lengths))
    ends[longest] = min(lengths[longest], chunk + ends[longest])
    return [0, *accumulate(ends)]


def grid(*rows: tuple[Any, ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("row", rows, ids=lambda row: "-".join(map(str, row)))


class Inputs:
    """Inputs as fla's tests draw them."""

    def __init__(self, tokens: int, heads: int, size: int, dtype: torch.dtype) -> None:
        self.generator = torch.Generator().manual_seed(42)
        self.tokens, self.heads, self.size, self.dtype = tokens, heads, size, dtype

    def rand(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self.generator)

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def draw(self, normal: bool = False, sequences: int = 1) -> Tensors:
        """q, k, v, beta and initial_state; v not negative, unless all are `normal`."""
        draw = self.randn if normal else self.rand
        t, hv, d = self.tokens, self.heads, self.size
        x = {"q": draw(1, t, 1, d), "k": draw(1, t, 1, d), "v": draw(1, t, hv, d)}
        x["beta"] = (self.rand(1, t, hv) if normal else self.randn(1, t, hv)).sigmoid()
        x = {name: y.to(self.dtype) for name, y in x.items()}
        return x | {"initial_state": self.randn(sequences, hv, d, d)}

    def raw_gate(self) -> torch.Tensor:
        return self.randn(1, self.tokens, self.heads, self.size)

    def rates(self) -> torch.Tensor:
        return (1 + 15 * self.rand(self.heads)).log()


def normalised(x: Tensors) -> Tensors:
    return x | {name: F.normalize(x[name], dim=-1) for name in ("q", "k")}


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor,
    *,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    gate: bool = False,
    lower_bound: float | None = None,
    l2_norm: bool = False,
    scale: float | None = None,
    bounds: list[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """o and final states in float64, one sequence after the other."""
    if l2_norm:
        q, k = F.normalize(q.double(), dim=-1), F.normalize(k.double(), dim=-1)
    if gate:
        g = kda_gate_reference(g, A_log, dt_bias, lower_bound)
    outputs, states = [], []
    for n, (start, end) in enumerate(pairwise(bounds or [0, q.shape[1]])):
        sequence = (x[:, start:end] for x in (q, k, v, g, beta))
        o, state = kda_recurrence(*sequence, scale=scale, initial_state=initial_state[n : n + 1])
        outputs.append(o)
        states.append(state)
    return torch.cat(outputs, 1), torch.cat(states)


NAMES = ["output 0", "output 1", "dq", "dk", "dv", "dinitial_state", "dg", "dbeta"]
BOUNDS = dict(zip(NAMES, [0.005] * 2 + [0.008] * 4 + [0.02] * 2, strict=True))
# Above 0.003, fla's test of dA_log only warns, and a sum over fewer tokens cancels more often.
BOUNDS |= {"dA_log": 0.006, "ddt_bias": 0.008}
PACKED_BOUNDS = dict(
    zip(NAMES, [0.005, 0.005, 0.007, 0.008, 0.007, 0.007, 0.015, 0.015], strict=True)
)
PACKED_BOUNDS |= {"dA_log": 0.008, "ddt_bias": 0.005}


@backends
@grid(
    # T, H, HV, D, scale, gate_logit_normalizer, mask_p, l2norm, gate, dtype, safe_gate, chunk_size
    (63, 1, 1, 64, 1, 1, 0, False, False, FP16, True, 64),
    (500, 3, 3, 60, 1, 1, 0, False, False, FP16, True, 64),
    (1000, 3, 3, 64, 0.1, 1, 0.5, False, False, FP16, False, 64),
    (1024, 4, 4, 100, 1, 0.1, 0, False, False, FP16, False, 64),
    (1024, 4, 4, 128, 0.1, 1, 0, False, False, FP16, True, 64),
    (1024, 4, 4, 128, 0.1, 1, 0, True, False, FP16, True, 64),
    (1500, 4, 4, 128, 0.1, 10, 0, False, True, FP16, False, 64),
    (2048, 8, 8, 64, 0.1, 1, 0, False, True, FP16, True, 64),
    (1024, 2, 4, 64, 0.1, 1, 0, False, False, FP16, False, 64),
    (1024, 2, 8, 64, 0.1, 1, 0, False, True, FP16, False, 64),
    (1024, 4, 8, 128, 0.1, 1, 0, True, True, FP16, False, 64),
    (160, 2, 4, 64, 0.1, 1, 0, False, True, FP16, True, 32),
    (1024, 2, 4, 64, 0.1, 1, 0, True, True, BF16, True, 64),
    (1024, 2, 4, 64, 0.1, 1, 0, False, True, BF16, False, 64),
    (160, 2, 4, 64, 0.1, 1, 0, False, True, BF16, True, 32),
    (1024, 2, 8, 128, 0.1, 1, 0, True, True, BF16, False, 64),
)
def test_chunk(backend: str, row: tuple[Any, ...]) -> None:
    tokens, h, hv, size, scale, normalizer, mask_p, l2_norm, gate, dtype, safe, chunk = row
    inputs = Inputs(scaled(tokens, chunk), hv // h, size, dtype)
    x = inputs.draw()
    if not l2_norm:
        x = normalised(x)
    g = inputs.raw_gate()
    if gate:
        x["g"] = g.to(dtype)
        x |= {"A_log": inputs.randn(hv // h), "dt_bias": inputs.randn(hv // h * size)}
    else:
        g = F.logsigmoid(g) / normalizer * (inputs.rand(*g.shape) > mask_p)
        x["g"] = g.clamp(-5, 0) if safe else g
    lower_bound = -5.0 if safe else None

    def ours(**x: torch.Tensor) -> Any:
        return chunk_kda(
            **x,
            scale=scale,
            output_final_state=True,
            use_qk_l2norm_in_kernel=l2_norm,
            use_gate_in_kernel=gate,
            safe_gate=safe,
            lower_bound=lower_bound,
            chunk_size=chunk,
            backend=backend,
        )

    def truth(**x: torch.Tensor) -> Any:
        options = {"scale": scale, "gate": gate, "lower_bound": lower_bound, "l2_norm": l2_norm}
        return reference(**x, **options)

    assert_close(
        outputs_and_gradients(ours, x), outputs_and_gradients(truth, x, torch.float64), BOUNDS
    )


@backends
@grid(
    # D, mask_p, cu_seqlens, dtype, gate, safe_gate, chunk_size
    (60, 0.1, [0, 15], FP16, True, False, 64),
    (64, 0.9, [0, 256, 500, 1000], FP16, True, False, 64),
    (128, 0.5, [0, 256, 500, 1000], FP16, False, False, 64),
    (100, 0, [0, 15, 100, 300, 1200, 2000], FP16, True, False, 64),
    (256, 0, [0, 100, 300], FP16, False, True, 64),  # and 1200, 3000, 4096
    (60, 0.1, [0, 31, 96, 160], FP16, True, False, 32),
)
def test_chunk_varlen(backend: str, row: tuple[Any, ...]) -> None:
    size, mask_p, cu_seqlens, dtype, gate, safe, chunk = row
    bounds = packed(cu_seqlens, chunk)
    inputs = Inputs(bounds[-1], 1, size, dtype)
    x = normalised(inputs.draw(normal=True, sequences=len(bounds) - 1))
    g = inputs.raw_gate()
    if gate:
        x |= {"A_log": inputs.rates(), "dt_bias": inputs.randn(size)}
    else:
        g = F.logsigmoid(g) * (inputs.rand(*g.shape) > mask_p)
    g = torch.where(inputs.rand(*g.shape) > mask_p, g, -1000.0)
    x["g"] = g.clamp(-5, 0) if safe else g.to(dtype) if gate else g

    def ours(**x: torch.Tensor) -> Any:
        return chunk_kda(
            **x,
            output_final_state=True,
            cu_seqlens=torch.tensor(bounds),
            use_gate_in_kernel=gate,
            safe_gate=safe,
            chunk_size=chunk,
            backend=backend,
        )

    def truth(**x: torch.Tensor) -> Any:
        return reference(**x, gate=gate, bounds=bounds)

    got, expected = (
        outputs_and_gradients(ours, x),
        outputs_and_gradients(truth, x, torch.float64),
    )
    assert_close(got, expected, PACKED_BOUNDS)
    with torch.inference_mode():  # test_chunk_varlen_prefill
        o, state = ours(**x)
    assert torch.equal(o, got["output 0"]) and torch.equal(state, got["output 1"])


@backends
@grid(
    # T, D, dtype
    (63, 64, FP16),
    (500, 60, FP16),
    (1024, 128, FP16),
)
def test_chunk_state_v_first(backend: str, row: tuple[Any, ...]) -> None:
    tokens, size, dtype = row
    inputs = Inputs(scaled(tokens), 1, size, dtype)
    x = normalised(inputs.draw()) | {"g": F.logsigmoid(inputs.raw_gate())}
    options = {"output_final_state": True, "backend": backend}

    def v_first(initial_state: torch.Tensor, **x: torch.Tensor) -> Any:
        o, state = chunk_kda(**x, initial_state=initial_state.mT, state_v_first=True, **options)
        return o, state.mT

    k_first = outputs_and_gradients(lambda **x: chunk_kda(**x, **options), x)
    assert_close(outputs_and_gradients(v_first, x), k_first, 1e-4)


@backends
@grid(
    # T, H, D, allow_neg_eigval, dtype
    (8192, 96, 128, False, BF16),
    (8192, 96, 128, True, BF16),
    (96, 2, 64, True, FP16),
)
def test_chunk_use_beta_sigmoid_in_kernel(backend: str, row: tuple[Any, ...]) -> None:
    tokens, _, size, negative, dtype = row
    inputs = Inputs(scaled(tokens), 1, size, dtype)
    x = normalised(inputs.draw()) | {"g": F.logsigmoid(inputs.raw_gate())}
    logits = inputs.randn(1, inputs.tokens, 1).to(dtype)

    def outside(beta: torch.Tensor, **x: torch.Tensor) -> Any:
        beta = (2 if negative else 1) * beta.float().sigmoid()
        return chunk_kda(**x, beta=beta, output_final_state=True, backend=backend)

    def inside(**x: torch.Tensor) -> Any:
        return chunk_kda(
            **x,
            output_final_state=True,
            use_beta_sigmoid_in_kernel=True,
            allow_neg_eigval=negative,
            backend=backend,
        )

    x["beta"] = logits
    assert_close(outputs_and_gradients(inside, x), outputs_and_gradients(outside, x), 1e-4)


# ------------------------------------------------------------------ token by token

RECURRENT_TOKENS = 8
"""What is done for each token does not depend on how many there are."""


@backends
@grid(
    # H, HV, D, scale, l2norm
    (1, 1, 64, 1, False),
    (3, 3, 60, 1, False),
    (4, 4, 100, 0.1, True),
    (4, 4, 128, 0.1, False),
    (2, 4, 60, 1, False),
    (2, 8, 128, 0.1, True),
)
def test_fused_recurrent(backend: str, row: tuple[Any, ...]) -> None:
    h, hv, size, scale, l2_norm = row
    inputs = Inputs(RECURRENT_TOKENS, hv // h, size, FP32)
    x = inputs.draw() | {"g": F.logsigmoid(inputs.raw_gate())}
    if not l2_norm:
        x = normalised(x)
    options = {"scale": scale, "output_final_state": True, "backend": backend}
    with torch.no_grad():
        o, state = fused_recurrent_kda(**x, **options, use_qk_l2norm_in_kernel=l2_norm)
        x["initial_state"] = x["initial_state"].mT  # test_fused_recurrent_state_v_first
        options |= {"use_qk_l2norm_in_kernel": l2_norm, "state_v_first": True}
        same, same_state = fused_recurrent_kda(**x, **options)
    x["initial_state"] = x["initial_state"].mT
    for got, expected in zip((o, state), reference(**x, scale=scale, l2_norm=l2_norm), strict=True):
        assert rms_error(got, expected) < 0.005
    assert rms_error(same, o) < 1e-4 and rms_error(same_state.mT, state) < 1e-4


@backends
@grid(
    # D, allow_neg_eigval
    (64, False),
    (64, True),
    (60, True),
)
def test_fused_recurrent_use_beta_sigmoid_in_kernel(backend: str, row: tuple[Any, ...]) -> None:
    size, negative = row
    inputs = Inputs(RECURRENT_TOKENS, 1, size, FP32)
    x = normalised(inputs.draw()) | {"g": F.logsigmoid(inputs.raw_gate())}
    beta = x.pop("beta")
    with torch.no_grad():
        got = fused_recurrent_kda(
            **x,
            beta=torch.logit(beta),
            output_final_state=True,
            use_beta_sigmoid_in_kernel=True,
            allow_neg_eigval=negative,
            backend=backend,
        )
    truth = reference(**x, beta=(2 if negative else 1) * beta)
    assert all(rms_error(a, b) < 0.005 for a, b in zip(got, truth, strict=True))


@backends
@grid(
    # H, HV, D, scale, has_a_log, has_dt_bias, safe_gate, dtype
    (1, 1, 64, 1, True, False, False, FP32),
    (2, 2, 64, 1, True, True, False, FP32),
    (2, 4, 64, 0.1, True, True, True, FP16),
    (2, 8, 128, 1, True, False, False, FP16),
    (4, 4, 128, 0.1, True, True, True, FP16),
    (1, 1, 64, 1, False, False, True, FP32),
    (2, 4, 64, 1, False, True, True, FP32),
)
def test_fused_recurrent_gate_in_kernel(backend: str, row: tuple[Any, ...]) -> None:
    h, hv, size, scale, has_rate, has_bias, safe, dtype = row
    inputs = Inputs(RECURRENT_TOKENS, hv // h, size, dtype)
    x = inputs.draw() | {"g": inputs.raw_gate()}
    parameters: dict[str, Any] = {"lower_bound": -5.0 if safe else None, "scale": scale}
    if has_rate:
        parameters["A_log"] = inputs.rates()
    if has_bias:
        parameters["dt_bias"] = inputs.randn(hv // h * size)
    with torch.no_grad():
        got = fused_recurrent_kda(
            **x,
            **parameters,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True,
            backend=backend,
        )
    truth = reference(**x, **parameters, gate=True, l2_norm=True)
    assert all(rms_error(a, b) < 0.002 for a, b in zip(got, truth, strict=True))


@backends
@grid(
    # D, scale, gate_logit_normalizer, l2norm, gate, safe_gate, dtype
    (128, 0.1, 1.0, True, False, False, BF16),
    (64, 1.0, 1.0, False, False, False, FP16),
    (128, 0.5, 0.5, True, False, False, BF16),
    (128, 0.1, 1.0, True, True, False, BF16),
    (64, 1.0, 1.0, False, True, False, FP16),
    (128, 0.5, 0.5, True, True, True, BF16),
)
def test_fused_recurrent_vllm_decode(backend: str, row: tuple[Any, ...]) -> None:
    size, scale, normalizer, l2_norm, gate, safe, dtype = row
    sequences, slots, used = 3, 9, torch.tensor([7, 0, 4])
    inputs = Inputs(sequences, 1, size, dtype)
    x = inputs.draw(sequences=slots)
    pool = x.pop("initial_state")
    x["g"] = inputs.raw_gate().to(dtype if gate else FP32)
    options: dict[str, Any] = {}
    if gate:
        options = {"A_log": inputs.rates(), "dt_bias": inputs.randn(size)}
        options["lower_bound"] = -5.0 if safe else None
    else:
        x["g"] = F.logsigmoid(x["g"]) / normalizer
    if not l2_norm:
        x = normalised(x)
    x = {name: y.transpose(0, 1) for name, y in x.items()}  # a sequence each
    pool[[n for n in range(slots) if n not in used.tolist()]] = 1e30
    before = pool.clone()
    o = kda_decode_step(
        **x,
        state=pool,
        state_indices=used,
        scale=scale,
        use_qk_l2norm_in_kernel=l2_norm,
        use_gate_in_kernel=gate,
        backend=backend,
        **options,
    )
    for n, slot in enumerate(used):
        alone = {name: y[n : n + 1] for name, y in x.items()}
        alone["initial_state"] = before[slot : slot + 1]
        expected = reference(**alone, **options, gate=gate, l2_norm=l2_norm, scale=scale)
        assert rms_error(o[n : n + 1], expected[0]) < 0.005
        assert rms_error(pool[slot : slot + 1], expected[1]) < 0.005
        before[slot] = pool[slot]
    assert torch.equal(pool, before)


# ------------------------------------------------------------------ gate and states


@backends
@grid(
    # B, T, H, D, has_a_log, has_bias, lower_bound
    (1, 2, 2, 12, True, False, -5.0),
    (1, 32, 2, 16, True, False, -5.0),
    (2, 64, 4, 32, True, False, -5.0),
    (4, 128, 8, 64, True, False, -5.0),
    (4, 128, 8, 128, True, False, None),
    (1, 2, 2, 12, True, True, None),
    (1, 32, 2, 16, True, True, None),
    (2, 64, 4, 32, True, True, None),
    (4, 128, 8, 64, True, True, None),
    (4, 128, 8, 128, True, True, None),
    (1, 2, 2, 12, False, False, -5.0),
    (2, 64, 4, 32, False, False, -5.0),
    (4, 128, 8, 64, False, True, -5.0),
    (4, 128, 8, 128, False, True, -5.0),
)
def test_gate(backend: str, row: tuple[Any, ...]) -> None:
    batch, tokens, heads, size, has_rate, has_bias, lower_bound = row
    inputs = Inputs(tokens, heads, size, FP32)
    x = {"raw": 10 * inputs.randn(batch, min(tokens, 32), heads, size)}
    x["A_log"] = inputs.rates()
    x["dt_bias"] = inputs.randn(heads * size)
    missing = {"A_log": has_rate, "dt_bias": has_bias}
    x = {name: y for name, y in x.items() if missing.get(name, True)}
    options = {"A_log": None, "lower_bound": lower_bound}
    got = outputs_and_gradients(lambda **x: [kda_gate(**options | x, backend=backend)], x)
    truth = outputs_and_gradients(lambda **x: [kda_gate_reference(**options | x)], x, torch.float64)
    # Where the sigmoid saturates, PyTorch's own derivative s * (1 - s) of it loses digits.
    assert_close(got, truth, 1e-4 if backend == "triton" else 5e-4)


@backends
def test_chunk_return_intermediate_states(backend: str) -> None:
    inputs = Inputs(128, 1, 128, BF16)
    x = inputs.draw(normal=True) | {"g": -inputs.raw_gate().abs().to(BF16)}
    del x["initial_state"]
    options = {"output_final_state": True, "return_intermediate_states": True, "backend": backend}
    for cu_seqlens, sequences in ((None, 1), (torch.tensor([0, 64, 128]), 2)):
        with torch.inference_mode():
            o, state, states = chunk_kda(**normalised(x), **options, cu_seqlens=cu_seqlens)
        assert o.shape == (1, 128, 1, 128) and state.shape == (sequences, 1, 128, 128)
        assert states.shape == (1, 2, 1, 128, 128) and states.dtype == BF16
