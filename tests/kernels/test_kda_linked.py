"""KDA over pieces with an exchange between them, against KDA over the whole sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from megakda.kernels.kda import chunk_kda
from megakda.kernels.kda import op as kda_op
from megakda.kernels.kda.linked import Links, linked_kda
from tests.kernels.helpers import assert_close, outputs_and_gradients

BACKENDS = ("torch", "triton")
K, V, HEADS = 16, 24, 2

# documents, cuts inside them
CASES = {
    "one_document": ([0, 150], [20, 84, 85]),
    "uneven": ([0, 3, 70, 71, 150], [1, 30, 64, 100]),
    "cut_at_bounds": ([0, 40, 80, 150], [40, 60, 80]),
    "not_cut": ([0, 60, 150], []),
}


class Loopback:
    """The exchange where all pieces are here: piece n leaves to piece n + 1."""

    def __init__(self, pieces: int, entering: Sequence[int], leaving: Sequence[int]):
        self.pieces, self.entering, self.leaving = pieces, list(entering), list(leaving)
        self.started: list[str] = []

    def forward(self, maps: torch.Tensor) -> Callable[[], torch.Tensor]:
        self.started.append("forward")
        value_dim = maps.shape[-1] - maps.shape[-2]
        after: dict[int, torch.Tensor] = {}
        for n, affine in zip(self.leaving, maps, strict=True):
            e, m = affine[..., :value_dim], affine[..., value_dim:]
            after[n] = e + m @ after[n - 1] if n in self.entering else e
        empty = maps.new_empty(0, *maps.shape[1:3], value_dim)
        return lambda: torch.cat([empty, *(after[n - 1][None] for n in self.entering)])

    def backward(self, direct: torch.Tensor, maps: torch.Tensor) -> Callable[[], torch.Tensor]:
        self.started.append("backward")
        value_dim = direct.shape[-1]
        m = dict(zip(self.leaving, maps[..., value_dim:], strict=True))
        before: dict[int, torch.Tensor] = {}
        for n, own in reversed(list(zip(self.entering, direct, strict=True))):
            before[n] = own + m[n].mT @ before[n + 1] if n in self.leaving else own
        empty = direct.new_empty(0, *direct.shape[1:])
        return lambda: torch.cat([empty, *(before[n + 1][None] for n in self.leaving)])


def make_inputs(tokens: int, documents: int, scalar_decay: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens + documents)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    channels = 1 if scalar_decay else K
    return {
        "q": randn(1, tokens, HEADS, K),
        "k": randn(1, tokens, HEADS, K),
        "v": randn(1, tokens, HEADS, V),
        "g": randn(1, tokens, HEADS, channels),
        "beta": randn(1, tokens, HEADS),
        "A_log": randn(HEADS),
        "dt_bias": randn(HEADS * channels),
        "state": randn(documents, HEADS, K, V),
    }


SETTINGS: dict[str, Any] = {
    "use_qk_l2norm_in_kernel": True,
    "use_gate_in_kernel": True,
    "use_beta_sigmoid_in_kernel": True,
    "output_final_state": True,
    "chunk_size": 16,
}


def whole(documents: list[int]) -> Any:
    def run(state: torch.Tensor, **x: torch.Tensor) -> Any:
        return chunk_kda(
            **x,
            **SETTINGS,
            initial_state=state,
            cu_seqlens=torch.tensor(documents),
            backend="torch",
        )

    return run


def in_pieces(documents: list[int], cuts: list[int], backend: str, log: list[str]) -> Any:
    bounds = sorted({*documents, *cuts})
    entering = [n for n, start in enumerate(bounds[:-1]) if start not in documents]
    leaving = [n - 1 for n in entering]
    first = [bounds.index(start) for start in documents[:-1]]
    last = [bounds.index(end) - 1 for end in documents[1:]]

    def run(state: torch.Tensor, **x: torch.Tensor) -> Any:
        exchange = Loopback(len(bounds) - 1, entering, leaving)
        exchange.started = log
        start = state.new_zeros(len(bounds) - 1, *state.shape[1:]).index_copy(
            0, torch.tensor(first), state
        )
        o, final_state = linked_kda(
            **x,
            **SETTINGS,
            initial_state=start,
            cu_seqlens=torch.tensor(bounds),
            links=Links(tuple(entering), tuple(leaving), exchange),
            backend=backend,
        )
        assert final_state is not None
        return o, final_state[last]

    return run


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_pieces_are_the_whole(case: str, backend: str) -> None:
    documents, cuts = CASES[case]
    inputs = make_inputs(documents[-1], len(documents) - 1)
    log: list[str] = []
    got = outputs_and_gradients(in_pieces(documents, cuts, backend, log), inputs)
    assert_close(got, outputs_and_gradients(whole(documents), inputs), 1e-5)
    assert log == ["forward", "backward"]  # once each, also where nothing is cut


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_decay_per_head(backend: str) -> None:
    documents, cuts = CASES["uneven"]
    inputs = make_inputs(documents[-1], len(documents) - 1, scalar_decay=True)
    got = outputs_and_gradients(in_pieces(documents, cuts, backend, []), inputs)
    assert_close(got, outputs_and_gradients(whole(documents), inputs), 1e-5)


def test_pieces_that_the_kernels_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces long enough to be walked in several ranges: maps and gradients are put together."""
    monkeypatch.setattr(kda_op, "chunks_per_range", lambda *args: 2)
    documents, cuts = [0, 17, 150], [60, 100]
    inputs = make_inputs(documents[-1], len(documents) - 1)
    got = outputs_and_gradients(in_pieces(documents, cuts, "triton", []), inputs)
    assert_close(got, outputs_and_gradients(whole(documents), inputs), 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_states_of_documents(backend: str) -> None:
    documents, cuts = CASES["one_document"]
    inputs = make_inputs(documents[-1], 1)
    del inputs["state"]
    settings = SETTINGS | {"output_final_state": False}
    bounds = sorted({*documents, *cuts})
    inner = tuple(range(len(bounds) - 1))

    def run(**x: torch.Tensor) -> Any:
        exchange = Loopback(len(bounds) - 1, inner[1:], inner[:-1])
        links = Links(inner[1:], inner[:-1], exchange)
        o, final_state = linked_kda(
            **x, **settings, cu_seqlens=torch.tensor(bounds), links=links, backend=backend
        )
        assert final_state is None
        return (o,)

    def reference(**x: torch.Tensor) -> Any:
        return chunk_kda(**x, **settings, backend="torch")[:1]

    assert_close(outputs_and_gradients(run, inputs), outputs_and_gradients(reference, inputs), 1e-5)


def test_in_bf16_the_exchange_is_fp32() -> None:
    documents, cuts = CASES["one_document"]
    bounds = sorted({*documents, *cuts})
    inner = tuple(range(len(bounds) - 1))
    inputs = make_inputs(documents[-1], 1)
    inputs = {
        name: x if name in ("A_log", "dt_bias") else x.bfloat16() for name, x in inputs.items()
    }
    del inputs["state"]
    seen: list[torch.dtype] = []

    class Watched(Loopback):
        def forward(self, maps: torch.Tensor) -> Callable[[], torch.Tensor]:
            seen.append(maps.dtype)
            return super().forward(maps)

        def backward(self, direct: torch.Tensor, maps: torch.Tensor) -> Callable[[], torch.Tensor]:
            seen.append(direct.dtype)
            return super().backward(direct, maps)

    for backend in BACKENDS:
        exchange = Watched(len(bounds) - 1, inner[1:], inner[:-1])
        leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
        o, _ = linked_kda(
            **leaves,
            **SETTINGS,
            cu_seqlens=torch.tensor(bounds),
            links=Links(inner[1:], inner[:-1], exchange),
            backend=backend,
        )
        assert o.dtype == torch.bfloat16
        o.float().square().sum().backward()
    assert seen == [torch.float32] * 4
