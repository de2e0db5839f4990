"""Bad arguments of the KDA operators: refused by name, value and rule before any work starts."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megakda.kernels.kda import chunk_kda, fused_recurrent_kda

OPERATORS = [chunk_kda, fused_recurrent_kda]
B, T, H, HV, K, V = 2, 6, 2, 4, 24, 16
zeros = torch.zeros


def good(batch: int = B) -> dict[str, torch.Tensor]:
    return {
        "q": zeros(batch, T, H, K),
        "k": zeros(batch, T, H, K),
        "v": zeros(batch, T, HV, V),
        "g": zeros(batch, T, HV, K),
        "beta": zeros(batch, T, HV),
    }


def sized(key_dim: int, value_dim: int) -> dict[str, torch.Tensor]:
    return {
        "q": zeros(B, T, H, key_dim),
        "k": zeros(B, T, H, key_dim),
        "v": zeros(B, T, HV, value_dim),
        "g": zeros(B, T, HV, key_dim),
    }


BAD: list[tuple[dict[str, Any], str]] = [
    ({"backend": "cuda"}, r"backend: 'cuda' must be one of \('torch', 'triton', 'reference'"),
    ({"chunk_size": 48}, r"chunk_size: 48 must be one of \(16, 32, 64, 128\)"),
    # Shapes and dtypes of the sequences.
    ({"q": zeros(B, T, K)}, r"q: shape \[2, 6, 24\] must have 4 dimensions"),
    ({"g": zeros(B, T, HV)}, r"g: shape \[2, 6, 4\] must have 4 dimensions"),
    ({"q": zeros(B, T, H, K, dtype=torch.int64)}, "q: dtype torch.int64 must be a floating"),
    ({"g": zeros(B, T, HV, K, dtype=torch.int32)}, "g: dtype torch.int32 must be a floating"),
    ({"beta": zeros(B, T, HV, dtype=torch.bool)}, "beta: dtype torch.bool must be a floating"),
    ({"k": zeros(B, T, H, K).bfloat16()}, "k: dtype torch.bfloat16 must be q's torch.float32"),
    ({"v": zeros(B, T, HV, V).half()}, "v: dtype torch.float16 must be q's torch.float32"),
    ({"k": zeros(B, T, H, K + 1)}, r"k: shape \[2, 6, 2, 25\] must be q's \[2, 6, 2, 24\]"),
    ({"v": zeros(B, T, 3, V)}, "v: shape .* HV a multiple of q's 2 heads"),
    ({"v": zeros(B, T, 1, V)}, "v: shape .* HV a multiple of q's 2 heads"),
    ({"v": zeros(B, T + 1, HV, V)}, r"v: shape \[2, 7, 4, 16\] must be \[2, 6, HV, V\]"),
    ({"g": zeros(B, T, H, K)}, r"g: shape \[2, 6, 2, 24\] must be \[2, 6, 4, 24\]"),
    ({"g": zeros(B, T, HV, K - 1)}, "g: shape .* or with last dimension 1 for one decay per head"),
    ({"beta": zeros(B, T, H)}, r"beta: shape \[2, 6, 2\] must be \[2, 6, 4\]"),
    ({"beta": zeros(B, T, HV, 1)}, "beta: shape .* 3 dimensions"),
    (sized(15, V), r"q: K = 15 must be in 16\.\.256"),
    (sized(257, V), r"q: K = 257 must be in 16\.\.256"),
    (sized(K, 8), r"v: V = 8 must be in 16\.\.256"),
    (sized(K, 512), r"v: V = 512 must be in 16\.\.256"),
    (
        {"q": zeros(B, 0, H, K), "k": zeros(B, 0, H, K), "v": zeros(B, 0, HV, V)},
        "must not be empty",
    ),
    ({"k": torch.empty(B, T, H, K, device="meta")}, "k: on meta, must be on q's device cpu"),
    # Options that contradict each other.
    ({"A_log": zeros(HV)}, "A_log: given, but only use_gate_in_kernel=True"),
    ({"dt_bias": zeros(HV * K)}, "dt_bias: given, but only use_gate_in_kernel=True"),
    ({"lower_bound": -5.0}, "lower_bound: -5.0 given, but only"),
    ({"lower_bound": -6.0, "safe_gate": True}, r"lower_bound: -6.0 must be in \[-5, 0\)"),
    ({"lower_bound": float("nan"), "safe_gate": True}, r"lower_bound: nan must be in \[-5, 0\)"),
    ({"use_gate_in_kernel": True}, "A_log: use_gate_in_kernel=True needs A_log, or lower_bound"),
    (
        {"use_gate_in_kernel": True, "A_log": zeros(HV), "safe_gate": True},
        "lower_bound: None, but safe_gate=True",
    ),
    ({"allow_neg_eigval": True}, "allow_neg_eigval: True needs use_beta_sigmoid_in_kernel"),
    # The gate's parameters.
    ({"use_gate_in_kernel": True, "A_log": zeros(H)}, r"A_log: \[2\] .* must have 4: one per head"),
    (
        {"use_gate_in_kernel": True, "A_log": zeros(HV), "dt_bias": zeros(HV)},
        "dt_bias: .* must have 96: one per head and channel",
    ),
    (
        {"use_gate_in_kernel": True, "A_log": zeros(HV, dtype=torch.int32)},
        "A_log: dtype torch.int32 must be a floating dtype",
    ),
    (
        {"use_gate_in_kernel": True, "A_log": torch.empty(HV, device="meta")},
        "A_log: on meta, must be on g's device cpu",
    ),
    # States.
    (
        {"initial_state": zeros(B, H, K, V)},
        r"initial_state: shape \[2, 2, 24, 16\] must be \[N, HV, K, V\] = \[2, 4, 24, 16\]",
    ),
    (
        {"initial_state": zeros(B, HV, K, V), "state_v_first": True},
        r"initial_state: shape .* \[N, HV, V, K\] = \[2, 4, 16, 24\]",
    ),
    (
        {"initial_state": zeros(B, HV, K, V).bfloat16()},
        "initial_state: dtype torch.bfloat16 must be torch.float32",
    ),
    (
        {"initial_state": torch.empty(B, HV, K, V, device="meta")},
        "initial_state: on meta, must be on v's device cpu",
    ),
    ({"cu_seqlens": torch.tensor([0, T])}, "cu_seqlens: needs batch size 1"),
]

BAD_PACKING: list[tuple[dict[str, Any], str]] = [
    ({"cu_seqlens": torch.tensor([0, 4, 3, T])}, "cu_seqlens: falls from 4 to 3"),
    ({"cu_seqlens": torch.tensor([0, -1, T])}, "cu_seqlens: falls from 0 to -1"),
    ({"cu_seqlens": torch.tensor([1, T])}, "cu_seqlens: runs from 1"),
    ({"cu_seqlens": torch.tensor([0, T - 1])}, "cu_seqlens: runs from 0 to 5, must run .* T = 6"),
    ({"cu_seqlens": torch.tensor([0, T + 1])}, "cu_seqlens: runs from 0 to 7"),
    ({"cu_seqlens": torch.tensor([0.0, T])}, "cu_seqlens: torch.float32"),
    ({"cu_seqlens": torch.tensor([0])}, r"cu_seqlens: torch.int64 \[1\] must be .* N >= 1"),
    ({"cu_seqlens": torch.tensor([[0, T]])}, r"cu_seqlens: torch.int64 \[1, 2\] must be"),
    (
        {"cu_seqlens": torch.tensor([0, 3, T]), "initial_state": zeros(1, HV, K, V)},
        r"initial_state: shape .* = \[2, 4, 24, 16\]",
    ),
]


@pytest.fixture
def no_launch() -> Iterator[None]:
    """No kernel may run."""
    if importlib.util.find_spec("triton") is None:
        yield
        return
    from megakda.kernels.verify import interpreter

    class Forbidden(interpreter.Observer):
        def launch_begins(self, kernel: str, arguments: dict[str, Any]) -> None:
            raise AssertionError(f"{kernel} was launched")

    with interpreter.observed_by(Forbidden()):
        yield


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
def test_good_arguments(operator: Any, backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    for batch, packing in ((B, None), (1, torch.tensor([0, 2, T]))):
        o, state = operator(**good(batch), cu_seqlens=packing, backend=backend)
        assert o.shape == (batch, T, HV, V) and state is None


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
@pytest.mark.parametrize(
    ("batch", "change", "message"),
    [(B, *case) for case in BAD] + [(1, *case) for case in BAD_PACKING],
)
def test_bad_arguments(
    operator: Any, backend: str, batch: int, change: dict[str, Any], message: str, no_launch: None
) -> None:
    with pytest.raises(ValueError, match=message):
        operator(**({"backend": backend} | good(batch) | change))


def test_bad_intermediate_states() -> None:
    with pytest.raises(ValueError, match="return_intermediate_states: the states carry no grad"):
        chunk_kda(**good(), return_intermediate_states=True)
    with torch.no_grad(), pytest.raises(ValueError, match="backend='reference' has no chunks"):
        chunk_kda(**good(), return_intermediate_states=True, backend="reference")


@pytest.mark.parametrize("operator", OPERATORS)
def test_unknown_arguments(operator: Any) -> None:
    with pytest.raises(TypeError, match="head_first"):
        operator(**good(), head_first=True)
    # The operators that these stand in for order what follows beta differently.
    with pytest.raises(TypeError, match="positional"):
        operator(*good().values(), zeros(HV))
    with pytest.raises(TypeError, match="return_intermediate_states"):
        fused_recurrent_kda(**good(), return_intermediate_states=True)


# ------------------------------------------------------------------ the kernels


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", ["q", "g", "beta"])
def test_kernels_have_no_float64(operator: Any, name: str, no_launch: None) -> None:
    pytest.importorskip("triton")
    inputs = good()
    for x in ("q", "k", "v") if name == "q" else (name,):
        inputs[x] = inputs[x].double()
    operator(**inputs, backend="torch")
    with pytest.raises(ValueError, match=f"{name}: dtype torch.float64, but backend='triton'"):
        operator(**inputs, backend="triton")


def test_kernels_have_no_chunks_of_128(no_launch: None) -> None:
    pytest.importorskip("triton")
    chunk_kda(**good(), chunk_size=128, backend="torch")
    with pytest.raises(ValueError, match=r"chunk_size: 128 must be one of \(16, 32, 64\)"):
        chunk_kda(**good(), chunk_size=128, backend="triton")


@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state"])
def test_recurrent_kernel_has_no_gradient(name: str) -> None:
    pytest.importorskip("triton")
    inputs = good() | {"A_log": zeros(HV), "dt_bias": zeros(HV * K)}
    inputs["initial_state"] = zeros(B, HV, K, V)
    inputs[name].requires_grad_()
    options = {"use_gate_in_kernel": True, "backend": "triton"}
    with pytest.raises(ValueError, match="backend: 'triton' has no backward pass of the recurrent"):
        fused_recurrent_kda(**inputs, **options)
    with torch.no_grad():
        o, _ = fused_recurrent_kda(**inputs, **options)
    assert not o.requires_grad


@pytest.mark.parametrize("operator", OPERATORS)
def test_kernels_need_a_gpu_or_the_interpreter(
    operator: Any, monkeypatch: pytest.MonkeyPatch, no_launch: None
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="backend: 'triton' runs on a GPU, and .* are on cpu"):
        operator(**good(), backend="triton")


@pytest.mark.parametrize("operator", OPERATORS)
def test_kernels_need_triton(operator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="backend: 'triton' needs the triton package"):
        operator(**good(), backend="triton")
    operator(**good())  # and nothing else does
