"""Peers sit behind our arguments, and refuse what they do not have."""

from __future__ import annotations

import sys
import types
from dataclasses import replace
from typing import Any

import pytest
import torch

from megakda.kernels.kda import chunk_kda, peers
from megakda.kernels.kda.checks import Options

HEAD = 128


def kda_inputs(dtype: torch.dtype = torch.bfloat16, tokens: int = 12) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    q, k, v, g = (torch.randn(1, tokens, 2, HEAD, generator=generator) for _ in range(4))
    beta = torch.randn(1, tokens, 2, generator=generator)
    return tuple(x.to(dtype) for x in (q, k, v, g, beta))


FUSED = Options(
    A_log=torch.zeros(2),
    dt_bias=torch.zeros(2, HEAD),
    use_qk_l2norm_in_kernel=True,
    use_gate_in_kernel=True,
    use_beta_sigmoid_in_kernel=True,
    lower_bound=-5.0,
)


def arguments(options: Options) -> dict[str, Any]:
    return {k: v for k, v in vars(options).items() if k not in ("delta_rule", "backend")}


@pytest.fixture
def as_if_installed(monkeypatch):
    """Peers that are our own operator behind their signatures."""
    monkeypatch.setattr(peers, "why_not", lambda peer: None)
    monkeypatch.setattr(peers, "_check_device", lambda peer, x: None)

    def chunk_kda_of_fla(q, k, v, g, beta, **kwargs):
        assert kwargs["A_log"] is None or kwargs["A_log"].ndim == 1
        assert kwargs["dt_bias"] is None or kwargs["dt_bias"].ndim == 1
        return chunk_kda(q, k, v, g, beta, **kwargs, backend="torch")

    def fwd(
        q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound,
        initial_state=None, final_state=None, cu_seqlens=None,
    ):  # fmt: skip
        for x in (q, k, v, g, beta, out):
            assert x.dtype == torch.bfloat16 and x.is_contiguous()
        assert A_log.dtype == dt_bias.dtype == torch.float32
        assert A_log.shape == (2,) and dt_bias.shape == (2, HEAD)
        assert cu_seqlens is None or cu_seqlens.dtype == torch.int64
        o, final = chunk_kda(
            q, k, v, g, beta, A_log=A_log, dt_bias=dt_bias, scale=scale, lower_bound=lower_bound,
            initial_state=initial_state, output_final_state=True, cu_seqlens=cu_seqlens,
            use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True,
            use_beta_sigmoid_in_kernel=True, state_v_first=True, backend="torch",
        )  # fmt: skip
        out.copy_(o)
        if final_state is not None:
            final_state.copy_(final)

    monkeypatch.setitem(sys.modules, "flash_kda", types.SimpleNamespace(fwd=fwd))
    fla = types.SimpleNamespace(chunk_kda=chunk_kda_of_fla)
    for name in ("fla", "fla.ops", "fla.ops.kda"):
        monkeypatch.setitem(sys.modules, name, fla)


@pytest.mark.parametrize("peer", [peers.chunk_kda_fla, peers.chunk_kda_flash])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("v_first", [False, True])
def test_peers_take_our_arguments(as_if_installed, peer, packed, v_first):
    generator = torch.Generator().manual_seed(1)
    state = torch.randn(2 if packed else 1, 2, HEAD, HEAD, generator=generator)
    options = replace(
        FUSED,
        A_log=torch.randn(2, generator=generator),
        dt_bias=torch.randn(2, HEAD, generator=generator),
        initial_state=state,
        output_final_state=True,
        state_v_first=v_first,
        cu_seqlens=torch.tensor([0, 5, 12], dtype=torch.int32) if packed else None,
    )
    inputs = kda_inputs()
    o, final = peer(inputs, options)
    expected_o, expected_final = chunk_kda(*inputs, **arguments(options))
    torch.testing.assert_close(o, expected_o)
    torch.testing.assert_close(final, expected_final)
    o, final = peer(inputs, replace(options, output_final_state=False, A_log=None, dt_bias=None))
    bare = replace(options, A_log=torch.zeros(2), dt_bias=None)
    torch.testing.assert_close(o, chunk_kda(*inputs, **arguments(bare))[0])
    assert final is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"delta_rule": False}, "delta_rule: False"),
        ({"return_intermediate_states": True}, "return_intermediate_states: True"),
        ({"chunk_size": 16}, "chunk_size: 16 must be 32 or 64"),
        ({}, "backend: 'fla' runs on a GPU, and the tensors are on cpu"),
    ],
)
def test_what_fla_lacks(change, message):
    with pytest.raises(ValueError, match=message):
        peers.chunk_kda_fla(kda_inputs(), replace(FUSED, **change))


def test_inputs_that_fla_lacks():
    q, k, v, g, beta = kda_inputs()
    with pytest.raises(ValueError, match="g: one decay per head"):
        peers.chunk_kda_fla((q, k, v, g[..., :1], beta), FUSED)
    with pytest.raises(ValueError, match="q: dtype torch.float64"):
        peers.chunk_kda_fla(kda_inputs(torch.float64), FUSED)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"delta_rule": False}, "delta_rule: False"),
        ({"lower_bound": None}, "lower_bound: FlashKDA has the bounded gate alone"),
        ({"use_gate_in_kernel": False}, "lower_bound: FlashKDA has the bounded gate alone"),
        ({"use_qk_l2norm_in_kernel": False}, "use_qk_l2norm_in_kernel: False"),
        ({"use_beta_sigmoid_in_kernel": False}, "use_beta_sigmoid_in_kernel: False"),
        ({"allow_neg_eigval": True}, "allow_neg_eigval: True"),
        ({"chunk_size": 32}, "chunk_size: 32, but FlashKDA has its own"),
        ({}, "backend: 'flash_kda' runs on a GPU"),
    ],
)
def test_what_flash_kda_lacks(change, message):
    with pytest.raises(ValueError, match=message):
        peers.chunk_kda_flash(kda_inputs(), replace(FUSED, **change))


def test_inputs_that_flash_kda_lacks():
    q, k, v, g, beta = kda_inputs()
    half = (x[..., :64] for x in (q, k, v, g))
    for inputs, message in (
        (kda_inputs(torch.float32), "q: dtype torch.float32 must be torch.bfloat16"),
        ((*half, beta), "q: 64 channels must be 128"),
        ((q[:, :, :1], k[:, :, :1], v, g, beta), "v: 2 value heads must be as many as the 1"),
        ((q.clone().requires_grad_(), k, v, g, beta), "q: requires a gradient"),
    ):
        with pytest.raises(ValueError, match=message):
            peers.chunk_kda_flash(inputs, FUSED)


def test_which_peers_can_run(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert peers.available() == ()
    assert peers.why_not("flash_kda").endswith("is not installed")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert peers.why_not("fla") == "there is no GPU" and peers.available() == ()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "an older GPU")
    assert peers.available() == ("fla",) and "this is an older GPU" in peers.why_not("flash_kda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert peers.available() == ("fla", "flash_kda")
    with pytest.raises(ValueError, match="peer: 'cula' must be one of"):
        peers.why_not("cula")
