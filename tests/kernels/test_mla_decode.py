"""Absorbed MLA decode against its float64 formula: layouts, lengths, splits, extremes, errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from megakda.kernels.launch import force
from megakda.kernels.mla_decode import mla_decode, mla_decode_reference
from tests.kernels.helpers import assert_close, rms_error

BACKENDS = ["torch", "triton"]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}


def make_inputs(
    lengths: list[int],
    queries: int = 1,
    heads: int = 3,
    value_dim: int = 24,
    shared: int = 10,
    page_size: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Arguments of `mla_decode`; what no sequence holds is NaN, and unused pages are -1."""
    generator = torch.Generator().manual_seed(0)
    sequences, width, most = len(lengths), value_dim + shared, max(lengths) + 3
    q = 2 * torch.randn(sequences, queries, heads, width, generator=generator)
    cache = torch.full((sequences, most, width), float("nan"))
    for row, length in zip(cache, lengths, strict=True):
        row[:length] = torch.randn(length, width, generator=generator)
    inputs = {
        "q": q.to(dtype),
        "cache": cache.to(dtype),
        "lengths": torch.tensor(lengths, dtype=torch.int32),
        "value_dim": value_dim,
        "scale": width**-0.5,
    }
    return inputs if page_size is None else paged(inputs, page_size)


def paged(inputs: dict[str, Any], page_size: int) -> dict[str, Any]:
    """The same sequences in a pool, in shuffled pages."""
    cache, lengths = inputs["cache"], inputs["lengths"].tolist()
    needed = [-(-length // page_size) for length in lengths]
    generator = torch.Generator().manual_seed(1)
    free = torch.randperm(sum(needed) + 2, generator=generator).tolist()
    pool = torch.full((len(free), page_size, cache.shape[2]), float("nan"), dtype=cache.dtype)
    table = torch.full((len(lengths), max(needed) + 1), -1, dtype=torch.int32)
    for n, pages in enumerate(needed):
        for i in range(pages):
            table[n, i] = free.pop()
            tokens = cache[n, i * page_size : (i + 1) * page_size]
            pool[table[n, i], : len(tokens)] = tokens
    return inputs | {"cache": pool, "block_table": table}


def check(inputs: dict[str, Any], backend: str) -> torch.Tensor:
    """Compares output and log-sum-exp with the reference; returns the output."""
    out, lse = mla_decode(**inputs, return_lse=True, backend=backend)
    reference, reference_lse = mla_decode_reference(**inputs)
    assert out.dtype == inputs["q"].dtype and lse.dtype == torch.float32
    seen = reference_lse > float("-inf")
    assert torch.equal(lse > float("-inf"), seen)
    assert not out[~seen].any()
    tolerance = TOLERANCE[inputs["q"].dtype]
    assert_close(
        {"out": out, "lse": lse[seen]}, {"out": reference, "lse": reference_lse[seen]}, tolerance
    )
    return out


@contextmanager
def short_splits(min_tokens: int = 16, block_n: int = 16) -> Iterator[None]:
    """Several splits of several tiles at lengths that the interpreter can afford."""
    config = {"BLOCK_M": 16, "BLOCK_N": block_n, "MIN_TOKENS": min_tokens}
    options = {"PROGRAMS_PER_PROCESSOR": 2, "num_warps": 4, "num_stages": 2}
    with force("sm_90", mla_decode=config | options):
        yield


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("page_size", [None, 1, 12, 64])
@pytest.mark.parametrize("queries", [1, 3])
def test_matches_reference(
    backend: str, dtype: torch.dtype, page_size: int | None, queries: int
) -> None:
    """Ragged lengths: none, one, fewer than the queries, a whole tile, one more, several tiles."""
    lengths = [0, 1, 2, 64, 65, 150]
    check(make_inputs(lengths, queries, page_size=page_size, dtype=dtype), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("heads", "value_dim", "shared"),
    [(1, 1, 0), (17, 16, 0), (1, 16, 1), (40, 37, 16), (2, 128, 128), (2, 512, 64)],
)
def test_sizes(backend: str, heads: int, value_dim: int, shared: int) -> None:
    inputs = make_inputs([33, 70], 1, heads, value_dim, shared)
    check(inputs, backend)
    check(paged(inputs, 16), backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("page_size", [None, 5, 16, 32])
@pytest.mark.parametrize(("min_tokens", "block_n"), [(16, 16), (16, 32), (40, 16)])
def test_splits(dtype: torch.dtype, page_size: int | None, min_tokens: int, block_n: int) -> None:
    """More splits than the shorter sequences can fill; rows of several blocks see different ends.

    Partial results of empty splits are never written, and torch.empty gives NaN here.
    """
    inputs = make_inputs([0, 1, 40, 131], 3, 7, page_size=page_size, dtype=dtype)
    with short_splits(min_tokens, block_n):
        check(inputs, "triton")


def test_splits_of_the_launch_tables() -> None:
    check(make_inputs([700, 300], dtype=torch.bfloat16), "triton")


def test_splits_do_not_depend_on_lengths() -> None:
    """The host looks at shapes alone, so a captured graph holds for other lengths and pages; and a
    sequence's bits do not change with its neighbours.
    """
    inputs = make_inputs([90, 20, 55], 2, page_size=16)
    with short_splits():
        first = mla_decode(**inputs, backend="triton")
        assert torch.equal(first, mla_decode(**inputs, backend="triton"))
        inputs["lengths"] = torch.tensor([90, 3, 0], dtype=torch.int32)
        inputs["q"][1:] = 5.0
        second = mla_decode(**inputs, backend="triton")
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_new_tokens_together_and_one_by_one(backend: str) -> None:
    inputs = make_inputs([4, 37], queries=4)
    together, lse = mla_decode(**inputs, return_lse=True, backend=backend)
    for s in range(4):
        one = inputs | {"q": inputs["q"][:, s], "lengths": inputs["lengths"] - 3 + s}
        alone, lse_alone = mla_decode(**one, return_lse=True, backend=backend)
        assert alone.shape == (2, 3, 24) and lse_alone.shape == (2, 3)
        assert rms_error(together[:, s], alone) < 1e-6
        assert rms_error(lse[:, s], lse_alone) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_absorbed_form_is_latent_attention(backend: str) -> None:
    """Keys and values made for every head, then ordinary attention, gives the same."""
    generator = torch.Generator().manual_seed(2)
    heads, nope, shared, latent, tokens = 4, 12, 6, 20, 50
    q = torch.randn(1, heads, 1, nope + shared, generator=generator)
    cache = torch.randn(1, tokens, latent + shared, generator=generator)
    to_keys = torch.randn(heads, nope, latent, generator=generator) / latent**0.5
    to_values = torch.randn(heads, 9, latent, generator=generator) / latent**0.5
    c, p = cache.split([latent, shared], -1)
    keys = torch.cat([torch.einsum("hnl,btl->bhtn", to_keys, c), p.expand(heads, -1, -1)[None]], -1)
    values = torch.einsum("hvl,btl->bhtv", to_values, c)
    expected = torch.nn.functional.scaled_dot_product_attention(q, keys, values).squeeze(2)

    q_nope, q_shared = q.squeeze(2).split([nope, shared], -1)
    absorbed = torch.cat([torch.einsum("bhn,hnl->bhl", q_nope, to_keys), q_shared], -1)
    lengths, scale = torch.tensor([tokens]), (nope + shared) ** -0.5
    out = mla_decode(absorbed, cache, lengths, latent, scale=scale, backend=backend)
    assert rms_error(torch.einsum("bhl,hvl->bhv", out, to_values), expected) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_scores(backend: str) -> None:
    """Scores of +-1e4: far beyond exp in fp32, and all but one weight underflows."""
    inputs = make_inputs([1, 20, 77], queries=2)
    inputs["q"] = inputs["q"] * 5e3
    with short_splits():
        check(inputs, backend)
        inputs["q"] = -inputs["q"]
        check(inputs, backend)
        inputs["q"] = inputs["q"] * 0
        check(inputs, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend: str) -> None:
    """Views: of a wider query, of channels and tokens of a larger cache, of a longer table."""
    inputs = make_inputs([30, 50], queries=2, page_size=16)
    expected = mla_decode(**inputs, backend=backend)
    q = torch.full((2, 2, 6, 40), 7.0)
    q[:, :, ::2, 3:37] = inputs["q"]
    pool = torch.full((len(inputs["cache"]), 20, 50), 7.0)
    pool[:, 2:18, 8:42] = inputs["cache"]
    views = {
        "q": q[:, :, ::2, 3:37],
        "cache": pool[:, 2:18, 8:42],
        "lengths": inputs["lengths"].repeat_interleave(2)[::2],
        "block_table": inputs["block_table"].repeat(1, 2)[:, : inputs["block_table"].shape[1]],
    }
    assert rms_error(mla_decode(**(inputs | views), backend=backend), expected) < 1e-6
    turned = {"q": inputs["q"].mT.contiguous().mT}
    assert rms_error(mla_decode(**(inputs | turned), backend=backend), expected) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_sequences_and_no_room(backend: str) -> None:
    lengths = torch.zeros(0, dtype=torch.int32)
    empty = torch.zeros(0, 3, 20)
    assert mla_decode(empty, empty, lengths, 16, scale=1.0, backend=backend).shape == (0, 3, 16)
    lengths = torch.zeros(2, dtype=torch.int32)
    out = mla_decode(
        torch.ones(2, 3, 20), torch.ones(2, 0, 20), lengths, 16, scale=1.0, backend=backend
    )
    assert torch.equal(out, torch.zeros(2, 3, 16))


def test_reference_backend_and_single_output() -> None:
    inputs = make_inputs([5, 0], dtype=torch.bfloat16)
    out = mla_decode(**inputs, backend="reference")
    expected, _ = mla_decode_reference(**inputs)
    assert torch.equal(out, expected.bfloat16())
    assert rms_error(mla_decode(**inputs), expected) < TOLERANCE[torch.bfloat16]


def test_number_of_splits() -> None:
    pytest.importorskip("triton")
    from megakda.kernels.mla_decode_triton import MAX_SPLITS, count_splits

    assert count_splits(max_tokens=0, min_tokens=128, blocks=1, programs=264) == 1
    assert count_splits(max_tokens=1000, min_tokens=128, blocks=1, programs=264) == 8
    assert count_splits(max_tokens=100_000, min_tokens=128, blocks=64, programs=264) == 4
    assert count_splits(max_tokens=100_000, min_tokens=128, blocks=1000, programs=264) == 1
    assert count_splits(max_tokens=100_000, min_tokens=128, blocks=1, programs=264) == MAX_SPLITS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 34)}, "q: "),
        ({"q": torch.zeros(2, 0, 34)}, "q: "),
        ({"q": torch.zeros(2, 3, 34, dtype=torch.float64)}, "q: torch.float64"),
        ({"cache": torch.zeros(2, 9, 33)}, "cache: .* D = 34"),
        ({"cache": torch.zeros(2, 9, 34, dtype=torch.bfloat16)}, "cache: torch.bfloat16"),
        ({"cache": torch.zeros(3, 9, 34)}, "cache: .* N = 2"),
        ({"cache": torch.zeros(2, 34, 9).mT}, "cache: strides"),
        ({"value_dim": 0}, "value_dim: 0"),
        ({"value_dim": 35}, "value_dim: 35"),
        ({"value_dim": 3, "q": torch.zeros(2, 3, 200), "cache": torch.zeros(2, 9, 200)}, "200 - 3"),
        ({"scale": float("nan")}, "scale: nan"),
        ({"lengths": torch.zeros(3, dtype=torch.int32)}, "lengths: "),
        ({"lengths": torch.zeros(2)}, "lengths: torch.float32"),
        ({"lengths": torch.tensor([0, 10])}, "lengths: 10 of sequence 1 must be in 0..9"),
        ({"lengths": torch.tensor([-1, 3])}, "lengths: -1 of sequence 0"),
        ({"lengths": torch.zeros(2, dtype=torch.int32, device="meta")}, "lengths: is on meta"),
        ({"block_table": torch.zeros(1, 2, dtype=torch.int32)}, "block_table: "),
        ({"block_table": torch.zeros(2, 2)}, "block_table: torch.float32"),
        ({"block_table": torch.tensor([[0, -1], [2, 0]])}, r"block_table: \[2\] of sequence 1"),
        (
            {"cache": torch.zeros(2, 0, 34), "block_table": torch.zeros(2, 1, dtype=torch.int32)},
            "cache: .* pages",
        ),
        ({"q": torch.zeros(2, 3, 34, requires_grad=True)}, "no_grad"),
        ({"backend": "cuda"}, "backend: 'cuda'"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "q": torch.zeros(2, 3, 34),
        "cache": torch.zeros(2, 9, 34),
        "lengths": torch.tensor([9, 3], dtype=torch.int32),
        "value_dim": 24,
        "scale": 1.0,
    }
    mla_decode(**good)
    with pytest.raises(ValueError, match=message):
        mla_decode(**(good | change))
