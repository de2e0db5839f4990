"""The KDA decode step and the recurrent kernel against float64 formulas: values, rows, errors."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megakda.kernels.kda.decode import kda_decode_step
from megakda.kernels.kda.recurrent_triton import recurrent_kda_triton
from megakda.kernels.kda.reference import kda_recurrence
from megakda.kernels.verify.memory import checked_memory
from megakda.kernels.verify.traffic import record_traffic
from tests.kernels.helpers import rms_error

FP32, BF16 = 1e-5, 0.005
BACKENDS = ["triton", "torch", "reference"]
EVERYTHING: dict[str, Any] = {
    "use_qk_l2norm_in_kernel": True,
    "use_gate_in_kernel": True,
    "use_beta_sigmoid_in_kernel": True,
}
Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def memory() -> Iterator[None]:
    """Every access of a kernel is checked; what nobody has written is NaN."""
    with checked_memory():
        yield


def make_inputs(
    size: int = 3,
    tokens: int = 1,
    heads: int = 2,
    value_heads: int = 2,
    key_dim: int = 32,
    value_dim: int = 16,
    decay_dim: int | None = None,
    rows: int | None = None,
) -> Tensors:
    """Random fp32 inputs, g in log space, and a state of `rows` rows (one per sequence)."""
    generator = torch.Generator().manual_seed(tokens)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "q": F.normalize(randn(size, tokens, heads, key_dim), dim=-1),
        "k": F.normalize(randn(size, tokens, heads, key_dim), dim=-1),
        "v": randn(size, tokens, value_heads, value_dim),
        "g": -F.softplus(randn(size, tokens, value_heads, decay_dim or key_dim)),
        "beta": torch.sigmoid(randn(size, tokens, value_heads)),
        "state": randn(rows or size, value_heads, key_dim, value_dim),
    }


def walk(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    *,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    delta_rule: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """o [N, S, HV, V] and the state after each token [N, S, HV, K, V], float64, by the formulas."""
    q, k, v, g, beta, state = (x.double() for x in (q, k, v, g, beta, state))
    if use_qk_l2norm_in_kernel:
        q, k = (x / (x.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    if use_gate_in_kernel:
        x = g if dt_bias is None else g + dt_bias.double().view(g.shape[2:])
        rate = 1.0 if A_log is None else A_log.double().exp().view(-1, 1)
        if lower_bound is None:
            g = -rate * torch.logaddexp(x, torch.zeros_like(x))
        else:
            g = lower_bound / (1 + (-rate * x).exp())
    if use_beta_sigmoid_in_kernel:
        beta = (2 if allow_neg_eigval else 1) / (1 + (-beta).exp())
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], dim=2) for x in (q, k))
    outputs, states = [], []
    for s in range(q.shape[1]):
        state = g[:, s].exp().unsqueeze(-1) * state
        found = (state * k[:, s].unsqueeze(-1)).sum(-2) if delta_rule else 0.0
        write = beta[:, s].unsqueeze(-1) * (v[:, s] - found)
        state = state + k[:, s].unsqueeze(-1) * write.unsqueeze(-2)
        outputs.append(scale * (state * q[:, s].unsqueeze(-1)).sum(-2))
        states.append(state)
    return torch.stack(outputs, 1), torch.stack(states, 1)


def check(inputs: Tensors, backend: str, tolerance: float = FP32, **options: Any) -> None:
    """Output and state of a step without indices, in both layouts of the state."""
    o, states = walk(**inputs, **options)
    for state_v_first in (False, True):
        state = inputs["state"].mT.contiguous() if state_v_first else inputs["state"].clone()
        got = kda_decode_step(
            **(inputs | {"state": state}), state_v_first=state_v_first, backend=backend, **options
        )
        assert got.dtype == inputs["v"].dtype
        assert rms_error(got, o) < tolerance
        assert rms_error(state.mT if state_v_first else state, states[:, -1]) < FP32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("key_dim", "value_dim"), [(16, 16), (32, 40), (24, 20), (128, 33), (256, 16), (1, 3)]
)
def test_head_sizes(backend: str, key_dim: int, value_dim: int) -> None:
    check(make_inputs(2, 1, 1, 1, key_dim, value_dim), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [2, 5])
def test_several_tokens(backend: str, tokens: int) -> None:
    check(make_inputs(tokens=tokens, value_heads=4), backend, scale=0.3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_decay_per_head(backend: str) -> None:
    check(make_inputs(tokens=2, decay_dim=1), backend)
    inputs = make_inputs(tokens=2, decay_dim=1)
    activations = {"A_log": torch.tensor([0.3, -1.0]), "dt_bias": torch.tensor([1.0, -2.0])}
    check(inputs, backend, **activations, **EVERYTHING)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("decay", [0.0, -5.0, -60.0, -1e4])
def test_any_decay(backend: str, decay: float) -> None:
    inputs = make_inputs(tokens=3)
    check(inputs | {"g": torch.full_like(inputs["g"], decay)}, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gated_linear_attention(backend: str) -> None:
    check(make_inputs(tokens=3), backend, delta_rule=False)
    check(make_inputs(tokens=3, decay_dim=1), backend, delta_rule=False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize(
    ("lower_bound", "missing"),
    [(None, ""), (None, "dt_bias"), (-5.0, ""), (-5.0, "dt_bias"), (-5.0, "A_log")],
)
def test_activations(backend: str, negative: bool, lower_bound: float | None, missing: str) -> None:
    inputs = make_inputs(2, 2, value_heads=4, key_dim=24)
    generator = torch.Generator().manual_seed(3)
    # Queries so short that the norm's 1e-6 counts.
    for name, size in (("q", 3e-4), ("k", 3.0), ("beta", 3.0), ("g", 2.0)):
        inputs[name] = size * torch.randn(inputs[name].shape, generator=generator)
    inputs["A_log"] = torch.rand(4, generator=generator)
    inputs["dt_bias"] = torch.randn(4 * 24, generator=generator)
    inputs.pop(missing, None)
    check(inputs, backend, lower_bound=lower_bound, allow_neg_eigval=negative, **EVERYTHING)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("raw", [-1e4, -60.0, 60.0, 1e4])
@pytest.mark.parametrize("lower_bound", [None, -5.0])
def test_saturated_activations(backend: str, raw: float, lower_bound: float | None) -> None:
    inputs = make_inputs(2)
    inputs |= {name: torch.full_like(inputs[name], raw) for name in ("g", "beta")}
    inputs |= {name: torch.zeros_like(inputs[name]) for name in ("q", "k")}
    check(inputs, backend, A_log=torch.tensor([2.7, 0.0]), lower_bound=lower_bound, **EVERYTHING)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(backend: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(2, 3, value_heads=4, key_dim=64, value_dim=48)
    # The inputs as rounded are the truth; g in either precision.
    inputs |= {name: inputs[name].to(dtype) for name in ("q", "k", "v", "beta")}
    check(inputs, backend, BF16)
    inputs["g"] = inputs["g"].to(dtype)
    check(inputs, backend, BF16, A_log=torch.zeros(4), **EVERYTHING)


def test_tokens_together_or_one_by_one_give_the_same_bits() -> None:
    inputs = make_inputs(tokens=4)
    state = inputs.pop("state")
    together, one_by_one = state.clone(), state.clone()
    o = kda_decode_step(**inputs, state=together, backend="triton")
    for s in range(4):
        token = {name: x[:, s : s + 1] for name, x in inputs.items()}
        got = kda_decode_step(**token, state=one_by_one, backend="triton")
        assert torch.equal(got, o[:, s : s + 1])
    assert torch.equal(together, one_by_one)


def test_strided_inputs() -> None:
    inputs = make_inputs(tokens=2, value_heads=4)
    got = {}
    for backend in BACKENDS:
        strided = {n: x.transpose(0, 1).contiguous().transpose(0, 1) for n, x in inputs.items()}
        strided["state"] = inputs["state"].clone()
        got[backend] = kda_decode_step(**strided, backend=backend)
    assert all(rms_error(o, walk(**inputs)[0]) < FP32 for o in got.values())


# ------------------------------------------------------------------ rows of the state


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("state_v_first", [False, True])
def test_pool(backend: str, tokens: int, dtype: torch.dtype, state_v_first: bool) -> None:
    inputs = make_inputs(size=4, tokens=tokens, value_heads=4, rows=6)
    indices = [4, -1, 0, -7]
    before = inputs["state"]
    o, states = walk(**(inputs | {"state": before[[i % 6 for i in indices]]}))
    # Padding may hold anything.
    for name in ("q", "k", "v", "g", "beta"):
        inputs[name][1] = torch.nan
    # Rows further apart than they are long, as where several layers share one buffer.
    buffer = torch.full((6, 2, *before.shape[1:]), 7.0)
    if state_v_first:
        buffer = buffer.mT.contiguous()
    buffer[:, 1] = before.mT if state_v_first else before
    state = buffer[:, 1]
    got = kda_decode_step(
        **(inputs | {"state": state}),
        state_indices=torch.tensor(indices, dtype=dtype),
        state_v_first=state_v_first,
        backend=backend,
    )
    state = state.mT if state_v_first else state
    assert (buffer[:, 0] == 7).all()
    for n, index in enumerate(indices):
        if index < 0:
            assert (got[n] == 0).all()
        else:
            assert rms_error(got[n], o[n]) < FP32
            assert rms_error(state[index], states[n, -1]) < FP32
    for row in set(range(6)) - set(indices):
        assert torch.equal(state[row], before[row])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("state_v_first", [False, True])
def test_speculative_decoding(backend: str, state_v_first: bool) -> None:
    # Three steps of 3 tokens, of which any number may have been kept, against one walk over the
    # tokens that were. Sequence 1 is padding.
    kept = [[2, 1, 3], [0, 0, 0], [3, 2, 1]]
    indices = torch.tensor([[3, 0, 6], [-1, -1, -1], [5, 2, 1]], dtype=torch.int32)
    steps = [make_inputs(3, 3 + 10 * i) for i in range(3)]
    initial = steps[0]["state"]
    pool = torch.full((8, *initial.shape[1:]), 9.0)
    pool[indices[:, 0]] = initial
    pool[[7, 4]] = 9.0  # what index -1 has put there, and an unused row
    if state_v_first:
        pool = pool.mT.contiguous()
    accepted = torch.tensor([1, 0, 1])  # the prompt's state lies in the first row
    history: list[list[Tensors]] = [[], [], []]
    for i, step in enumerate(steps):
        tokens = {name: x[:, :3] for name, x in step.items() if name != "state"}
        for x in tokens.values():
            x[1] = torch.nan
        o = kda_decode_step(
            **tokens,
            state=pool,
            state_indices=indices,
            num_accepted=accepted,
            state_v_first=state_v_first,
            backend=backend,
        )
        states = pool.mT if state_v_first else pool
        assert (o[1] == 0).all() and (states[[4, 7]] == 9).all()
        for n in (0, 2):
            new = {name: x[n : n + 1] for name, x in tokens.items()}
            parts = [*history[n], new]
            sequence = {name: torch.cat([p[name] for p in parts], 1) for name in new}
            wanted, after = walk(**sequence, state=initial[n : n + 1])
            assert rms_error(o[n], wanted[0, -3:]) < FP32
            assert rms_error(states[indices[n].long()], after[0, -3:]) < FP32
            history[n].append({name: x[:, : kept[n][i]] for name, x in new.items()})
        accepted = torch.tensor([row[i] for row in kept])


@pytest.mark.parametrize("state_v_first", [False, True])
def test_states_are_moved_once_and_not_for_padding(state_v_first: bool) -> None:
    inputs = make_inputs(size=3, tokens=2, value_dim=48, rows=7)
    if state_v_first:
        inputs["state"] = inputs["state"].mT.contiguous()
    row = inputs["state"][0].nbytes
    small = sum(x.nbytes for name, x in inputs.items() if name != "state")
    options: dict[str, Any] = {"state_v_first": state_v_first, "backend": "triton"}

    indices = torch.tensor([5, -1, 2], dtype=torch.int32)
    with record_traffic() as launches:
        o = kda_decode_step(**inputs, state_indices=indices, **options)
    assert launches[0].unique_loaded == small + indices.nbytes + 2 * row
    assert launches[0].stored == o.nbytes + 2 * row

    table = torch.tensor([[5, 4], [-1, -1], [2, 0]], dtype=torch.int32)
    accepted = torch.tensor([2, 0, 1], dtype=torch.int32)
    with record_traffic() as launches:
        kda_decode_step(**inputs, state_indices=table, num_accepted=accepted, **options)
    assert len(launches) == 1
    # All of the table, but of the counts only those of living sequences.
    assert launches[0].unique_loaded == small + table.nbytes + 2 * 4 + 2 * row
    assert launches[0].stored == o.nbytes + 4 * row


# ------------------------------------------------------------------ whole sequences


@pytest.mark.parametrize("state_v_first", [False, True])
@pytest.mark.parametrize("tokens", [1, 7])
def test_recurrent_kernel(tokens: int, state_v_first: bool) -> None:
    inputs = make_inputs(2, tokens, value_heads=4, key_dim=24, value_dim=40)
    state = inputs.pop("state")
    initial = state.mT.contiguous() if state_v_first else state.clone()
    before = initial.clone()
    reference = kda_recurrence(**inputs, scale=0.7, initial_state=state)
    o, final = recurrent_kda_triton(
        **inputs, scale=0.7, initial_state=initial, state_v_first=state_v_first
    )
    assert final is not None
    assert rms_error(o, reference[0]) < FP32
    assert rms_error(final.mT if state_v_first else final, reference[1]) < FP32
    assert torch.equal(initial, before)

    reference = kda_recurrence(**inputs, scale=0.7)
    o, final = recurrent_kda_triton(**inputs, scale=0.7, state_v_first=state_v_first)
    assert final is not None
    assert rms_error(o, reference[0]) < FP32
    assert rms_error(final.mT if state_v_first else final, reference[1]) < FP32
    o_alone, none = recurrent_kda_triton(**inputs, scale=0.7, output_final_state=False)
    assert none is None and torch.equal(o_alone, o)


def test_recurrent_kernel_on_packed_sequences() -> None:
    bounds = [0, 0, 1, 1, 6, 9, 9]
    inputs = make_inputs(1, 9, rows=6)
    state = inputs.pop("state")
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    o, final = recurrent_kda_triton(**inputs, scale=0.7, initial_state=state, cu_seqlens=cu_seqlens)
    _, from_zero = recurrent_kda_triton(**inputs, scale=0.7, cu_seqlens=cu_seqlens.long())
    assert final is not None and from_zero is not None
    for n, (start, end) in enumerate(pairwise(bounds)):
        if start == end:
            assert torch.equal(final[n], state[n]) and (from_zero[n] == 0).all()
            continue
        sequence = {name: x[:, start:end] for name, x in inputs.items()}
        wanted, after = kda_recurrence(**sequence, scale=0.7, initial_state=state[n : n + 1])
        assert rms_error(o[:, start:end], wanted) < FP32
        assert rms_error(final[n : n + 1], after) < FP32
        assert rms_error(from_zero[n : n + 1], kda_recurrence(**sequence, scale=0.7)[1]) < FP32


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "cuda"}, "backend: 'cuda'"),
        ({"q": torch.zeros(2, 2, 8)}, "q: shape"),
        ({"q": torch.zeros(2, 0, 2, 8)}, "q: shape"),
        ({"k": torch.zeros(2, 3, 2, 4)}, "k: shape"),
        ({"k": torch.zeros(2, 3, 2, 8).half()}, "k: dtype"),
        ({"v": torch.zeros(2, 3, 3, 4)}, "v: shape .* multiple of q's 2 heads"),
        ({"v": torch.zeros(2, 3, 4, 4, dtype=torch.int32)}, "v: dtype"),
        ({"g": torch.zeros(2, 3, 4, 2)}, "g: shape"),
        ({"beta": torch.zeros(2, 3, 2)}, "beta: shape"),
        ({"beta": torch.zeros(2, 3, 4, device="meta")}, "beta: on meta"),
        ({"state": torch.zeros(2, 4, 4, 8)}, r"state: shape .* must be \[2, 4, 8, 4\]"),
        ({"state": torch.zeros(3, 4, 8, 4)}, r"state: shape .* must be \[2, 4, 8, 4\]"),
        ({"state_v_first": True}, r"state: shape .* must be \[2, 4, 4, 8\]"),
        ({"state": torch.zeros(2, 4, 8, 4).half()}, "state: dtype"),
        ({"state": torch.zeros(2, 4, 4, 8).mT}, "state: strides"),
        ({"state": torch.zeros(1, 4, 8, 4).expand(2, 4, 8, 4)}, "state: strides"),
        ({"state": torch.zeros(2, 4, 8, 4, requires_grad=True)}, "state: requires a gradient"),
        ({"v": torch.zeros(2, 3, 4, 4, requires_grad=True)}, "v: requires a gradient"),
        ({"A_log": torch.zeros(4)}, "A_log: given, but only use_gate_in_kernel"),
        ({"lower_bound": -1.0}, "lower_bound: given, but only use_gate_in_kernel"),
        ({"lower_bound": 1.0, "use_gate_in_kernel": True}, "lower_bound: 1.0"),
        ({"use_gate_in_kernel": True}, "A_log: use_gate_in_kernel=True needs"),
        ({"use_gate_in_kernel": True, "A_log": torch.zeros(2)}, "A_log: 2 elements"),
        ({"allow_neg_eigval": True}, "allow_neg_eigval: "),
        ({"num_accepted": torch.tensor([1, 1])}, "num_accepted: given"),
        ({"state_indices": torch.tensor([0.0, 1.0])}, "state_indices: torch.float32"),
        ({"state_indices": torch.tensor([0])}, "state_indices: torch.int64 .1. must be"),
        ({"state_indices": torch.zeros(2, 3).int()}, "without num_accepted"),
        ({"state_indices": torch.tensor([0, 2])}, "state_indices: .0, 2. must be below"),
        ({"state_indices": torch.tensor([1, 1])}, "named twice"),
        ({"state_indices": torch.tensor([0, 1], device="meta")}, "state_indices: on meta"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = make_inputs(2, 3, 2, 4, 8, 4)
    for backend in BACKENDS:
        kda_decode_step(**good, backend=backend)
        before = good["state"].clone()
        with pytest.raises(ValueError, match=message):
            kda_decode_step(**({"backend": backend} | good | change))
        assert torch.equal(good["state"], before)


@pytest.mark.parametrize(
    ("indices", "accepted", "message"),
    [
        ([[0, 1], [2, 0]], [1, 1], "named twice"),
        ([[0, 0], [2, 3]], [1, 1], "named twice"),
        ([[0, -1], [2, 3]], [1, 1], "all must be negative"),
        ([[0, 1], [2, 3]], [1, 0], r"num_accepted: \[1, 0\] must be in 1..2"),
        ([[0, 1], [2, 3]], [3, 1], r"num_accepted: \[3, 1\] must be in 1..2"),
        ([[0, 1], [2, 3]], [1], "num_accepted: torch.int64 .1. must be"),
        ([0, 1], [1, 1], "with num_accepted"),
    ],
)
def test_bad_rows(indices: list[Any], accepted: list[int], message: str) -> None:
    inputs = make_inputs(2, 2, rows=4)
    with pytest.raises(ValueError, match=message):
        kda_decode_step(
            **inputs,
            state_indices=torch.tensor(indices),
            num_accepted=torch.tensor(accepted),
            backend="torch",
        )


def test_limits_of_the_kernel() -> None:
    with pytest.raises(ValueError, match="q: K = 257 must be at most 256"):
        kda_decode_step(**make_inputs(1, 1, 1, 1, 257, 1), backend="triton")
    inputs = {name: x.double() for name, x in make_inputs().items()}
    inputs["state"] = inputs["state"].float()
    with pytest.raises(ValueError, match="q: float64"):
        kda_decode_step(**inputs, backend="triton")
