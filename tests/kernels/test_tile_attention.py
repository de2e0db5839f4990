"""Attention over tiles against dense float64 softmax under the mask that the tiles make."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from megakda.kernels import tile_attention, tile_engines
from megakda.kernels.tile_attention import (
    Tile,
    attend_tiles,
    attend_tiles_backward,
    empty_attention,
)
from tests.kernels.attention_stand_ins import FlashAttention
from tests.kernels.helpers import assert_close
from tests.kernels.tile_cases import (
    HEADS,
    RESULTS,
    SCALE,
    Block,
    dense,
    every_backend,
    make,
    random_ring,
    ready,
    ring,
    run,
)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with ready(request.param) as name:
        yield name


@every_backend
@pytest.mark.parametrize("sizes", [(24, 16), (16, 32), (12, 20)])
@pytest.mark.parametrize("seed", [0, 1])
def test_packed_documents_over_a_ring(backend: str, sizes: tuple[int, int], seed: int) -> None:
    x = make(150, sizes)
    blocks = random_ring(seed, 150, documents=[7, 60][seed], segments=4)
    reference = dense(x, blocks)
    for order in (blocks, blocks[::-1], [blocks[i] for i in (2, 0, 3, 1)]):
        assert_close(run(x, order, backend), reference, 1e-5)


@every_backend
def test_tiles_that_share_queries_and_keys(backend: str) -> None:
    """Of one shape too, which would be batched if they shared nothing; in any order."""
    x = make(96)
    ranges = [(start, start + 32) for start in (0, 32, 64)]
    tiles = [
        Tile(*queries, *keys, causal=queries == keys)
        for keys, queries in itertools.combinations_with_replacement(ranges, 2)
    ]
    reference = dense(x, [(0, tiles)])
    assert_close(reference, dense(x, [(0, [Tile(0, 96, 0, 96, True)])]), 1e-12)
    for order in (tiles, tiles[::-1], tiles[3:] + tiles[:3]):
        assert_close(run(x, [(0, order)], backend), reference, 1e-5)


@every_backend
def test_kinds_of_tiles_between_each_other(backend: str) -> None:
    """Shapes and masks that must not be taken for one another, in an order that would allow it."""
    x = make(64)
    tiles = [
        Tile(0, 8, 0, 8, True),
        Tile(8, 16, 8, 16, False),
        Tile(16, 24, 16, 24, True),
        Tile(30, 38, 24, 26, False),
        Tile(40, 48, 30, 38, False),
        Tile(50, 52, 40, 48, False),
    ]
    seen = sorted({row for tile in tiles for row in range(tile.query_start, tile.query_end)})
    got, reference = run(x, [(0, tiles)], backend), dense(x, [(0, tiles)])
    for results in (got, reference):
        results["lse"] = results["lse"][seen]
    assert_close(got, reference, 1e-5)


@every_backend
def test_documents_of_one_token(backend: str) -> None:
    x = make(9)
    got = run(x, [(0, [Tile(i, i + 1, i, i + 1, i % 2 == 0) for i in range(9)])], backend)
    assert_close({"out": got["out"], "dv": got["dv"]}, {"out": x["v"], "dv": x["dout"]}, 1e-6)
    assert got["dq"].abs().max() < 1e-6 and got["dk"].abs().max() < 1e-6


@every_backend
def test_rows_without_a_key(backend: str) -> None:
    """They are as they were; the gradients of keys that nobody sees too."""
    x = make(40)
    tiles = [Tile(5, 10, 20, 25, True), Tile(12, 17, 30, 35, True), Tile(5, 17, 0, 3, False)]
    got = run(x, [(0, tiles)], backend)
    reference = dense(x, [(0, tiles)])
    seen = torch.zeros(40, dtype=torch.bool)
    seen[5:17] = True
    assert torch.isneginf(got["lse"][~seen]).all()
    for name in ("out", "dq"):
        assert not got[name][~seen].any()
    for name in ("dk", "dv"):
        assert not got[name][3:20].any() and not got[name][35:].any()
    for results in (got, reference):
        results["lse"] = results["lse"][seen]
    assert_close(got, reference, 1e-5)


@every_backend
def test_large_scores(backend: str) -> None:
    """Scores of +-1e3, and blocks that outweigh others by all the bits there are."""
    x = make(96, (16, 24))
    blocks = random_ring(3, 96, documents=3, segments=3)
    scores = torch.einsum("ihd,jhd->hij", x["q"], x["k"])
    scale = 1e3 / min(scores.max().item(), -scores.min().item())
    reference = dense(x, blocks, scale)
    for order in (blocks, blocks[::-1]):
        # Rounding a score or lse of 1e3 in fp32 moves a probability by 6e-5.
        assert_close(run(x, order, backend, scale), reference, 5e-4)


@pytest.mark.parametrize("backend", ["torch", "reference"], indirect=True)
def test_float64(backend: str) -> None:
    x = make(100, (24, 16), torch.float64)
    blocks = random_ring(2, 100, documents=5, segments=3)
    got = run(x, blocks, backend)
    assert {t.dtype for t in got.values()} == {torch.float64}
    assert_close(got, dense(x, blocks), 1e-13)


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(backend: str, dtype: torch.dtype) -> None:
    x = make(200, (24, 16), dtype)
    blocks = random_ring(2, 200, documents=3, segments=3)
    got = run(x, blocks, backend)
    assert {t.dtype for t in got.values()} == {torch.float32}
    assert_close(got, dense(x, blocks), 4e-3)


def test_half_precision_gradients_do_not_lose_with_the_length() -> None:
    x = {name: (t + 0.3).bfloat16() for name, t in make(2048).items()}
    blocks: list[Block] = [(0, [Tile(0, 2048, 0, 2048, True)])]
    limits = {"out": 3e-3, "lse": 1e-5, "dq": 4e-3, "dk": 1e-3, "dv": 1e-5}
    assert_close(run(x, blocks, "torch"), dense(x, blocks), limits)


def test_merging_with_no_keys() -> None:
    """On either side, on both, and on neither."""
    nothing, one = -torch.inf, 1.0
    lse = torch.tensor([[nothing], [nothing], [one], [one]])
    part_lse = torch.tensor([[nothing], [one], [nothing], [one]])
    out = torch.where(lse.isneginf(), 0.0, 2.0).unsqueeze(-1)
    part = torch.where(part_lse.isneginf(), 0.0, 4.0).unsqueeze(-1)
    for rows in (slice(0, 4), torch.arange(4)):
        merged, merged_lse = out.clone(), lse.clone()
        tile_attention._merge(merged, merged_lse, rows, part, part_lse)
        assert merged.flatten().tolist() == [0, 4, 2, 3]
        assert merged_lse.flatten().tolist() == [
            nothing,
            one,
            one,
            pytest.approx(one + math.log(2)),
        ]


@every_backend
def test_adds_to_what_is_there(backend: str) -> None:
    x = make(30)
    tiles = [Tile(0, 10, 0, 10, True), Tile(12, 22, 12, 22, True)]
    out, lse = empty_attention(x["q"], 16)
    attend_tiles(x["q"], x["k"], x["v"], tiles, SCALE, out, lse, backend)
    once, twice = ([torch.zeros_like(x[name]) for name in "qkv"] for _ in range(2))
    forward = (x["dout"], x["q"], x["k"], x["v"], tiles, SCALE, out, lse)
    attend_tiles_backward(*forward, *once, backend)
    for _ in range(2):
        attend_tiles_backward(*forward, *twice, backend)
    for a, b in zip(once, twice, strict=True):
        assert torch.equal(2 * a, b)


@every_backend
def test_equal_bits(backend: str) -> None:
    x = make(120, (24, 16))
    blocks = random_ring(5, 120, documents=9, segments=3)
    first, second = (run(x, blocks, backend) for _ in range(2))
    for name in RESULTS:
        assert torch.equal(first[name], second[name]), name


@every_backend
@pytest.mark.parametrize("of_a_sum", [True, False])
def test_strided_inputs(backend: str, of_a_sum: bool) -> None:
    """Parts of wider tensors, transposed ones, and the expanded gradient of a sum."""
    x = make(64, (16, 24))
    wide = torch.cat([x["k"], x["v"]], -1)
    heads_first = x["dout"].transpose(0, 1).contiguous().transpose(0, 1)
    strided = {
        "q": x["q"].permute(2, 1, 0).contiguous().permute(2, 1, 0),
        "k": wide[..., :16],
        "v": wide[..., 16:],
        "dout": torch.tensor(0.5).expand(64, HEADS, 24) if of_a_sum else heads_first,
    }
    blocks = random_ring(1, 64, documents=12, segments=2)
    plain = {name: t.contiguous() for name, t in strided.items()}
    assert_close(run(strided, blocks, backend), dense(plain, blocks), 1e-5)


def test_no_graph_is_kept() -> None:
    x = {name: t.requires_grad_() for name, t in make(8).items()}
    assert not any(
        t.requires_grad for t in run(x, [(0, [Tile(0, 8, 0, 8, True)])], "torch").values()
    )


def test_memory_is_linear() -> None:
    """8192 tokens of one head would have 256 MiB of scores in fp32."""
    program = f"""
import resource, sys
import torch
sys.path[:0] = {sys.path!r}
from tests.kernels.tile_cases import Tile, make, run

def peak(tokens):
    x = {{name: t[:, :1] for name, t in make(tokens, (16, 8)).items()}}
    run(x, [(0, [Tile(0, tokens, 0, tokens, True)])], "torch")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

print(-peak(1024) + peak(8192))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 64, f"{done.stdout} MiB more for 8192 tokens than for 1024"


@pytest.mark.parametrize("gap", [0, 1])
def test_short_documents_of_a_length_share_a_call(
    gap: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And long ones, which would be copied for nothing, do not."""
    lengths = []
    engine = tile_engines._CPU

    def forward(batch: list[Tile], *rest: Any) -> Any:
        lengths.append([tile.queries for tile in batch])
        return engine.forward(batch, *rest)

    monkeypatch.setattr(tile_engines, "_CPU", engine._replace(forward=forward))
    documents = [8, 5] * 30 + [1500, 1500]
    starts = [0, *itertools.accumulate(length + gap for length in documents)]
    tiles = [Tile(a, a + n, a, a + n, True) for a, n in zip(starts, documents, strict=False)]
    x = make(starts[-1])
    out, lse = empty_attention(x["q"], 16)
    attend_tiles(x["q"], x["k"], x["v"], tiles, SCALE, out, lse)
    assert lengths == [[8] * 30, [5] * 30, [1500], [1500]]


# Torch's attention for GPUs.


def test_torch_has_the_operators() -> None:
    """A release that changes them has to be looked at."""
    arguments = {
        "_scaled_dot_product_flash_attention_for_cpu": "query key value dropout_p is_causal "
        "attn_mask scale",
        "_scaled_dot_product_flash_attention_for_cpu_backward": "grad_out query key value out "
        "logsumexp dropout_p is_causal attn_mask scale",
        "_efficient_attention_forward": "query key value bias cu_seqlens_q cu_seqlens_k "
        "max_seqlen_q max_seqlen_k dropout_p custom_mask_type compute_log_sumexp scale seqlen_k "
        "window_size",
        "_efficient_attention_backward": "grad_out_ query key value bias out cu_seqlens_q "
        "cu_seqlens_k max_seqlen_q max_seqlen_k logsumexp dropout_p philox_seed philox_offset "
        "custom_mask_type bias_requires_grad scale num_splits_key window_size "
        "shared_storage_dqdkdv",
    }
    for name, expected in arguments.items():
        schema = getattr(torch.ops.aten, name).default._schema
        assert [argument.name for argument in schema.arguments] == expected.split(), schema


@pytest.mark.parametrize("causal", [True, False])
def test_shapes_on_a_gpu(causal: bool) -> None:
    """By torch's own rules for shapes, which know of the padding of lse."""
    x = {name: t.to("meta") for name, t in make(70, (24, 16), torch.bfloat16).items()}
    tiles = [Tile(0, 33, 0, 33, causal), Tile(35, 68, 35, 68, causal)]
    out, lse = empty_attention(x["q"], 16)
    attend_tiles(x["q"], x["k"], x["v"], tiles, SCALE, out, lse)
    rows = [torch.cat([x[name][:33], x[name][35:68]]) for name in "qkv"]
    out, lse = tile_engines._forward_gpu(tile_engines.Batch(tiles), *rows, SCALE)
    assert out.shape == (66, 2, 16) and lse.shape == (66, 2)


# flash-attn.


@pytest.mark.parametrize("backend", ["flash_attn"], indirect=True)
def test_flash_attn_takes_all_tiles_of_a_kind_at_once(backend: str) -> None:
    x = make(100)
    first, second = ring(100, [13, 41, 60], [50])
    FlashAttention.forwards = 0
    got = run(x, [first, second], backend)
    # Documents that the cut leaves whole, and the one that it divides: causal and full tiles.
    assert FlashAttention.forwards == 3
    assert_close(got, dense(x, [first, second]), 1e-5)


def pretend_flash_attn(monkeypatch: pytest.MonkeyPatch, version: str) -> ModuleType:
    package = ModuleType("flash_attn")
    package.__version__ = version  # type: ignore[attr-defined]
    package.__spec__ = SimpleNamespace(name="flash_attn")  # type: ignore[assignment]
    interface = ModuleType("flash_attn.flash_attn_interface")
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
    return interface


def test_flash_attn_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    interface = pretend_flash_attn(monkeypatch, "2.8.3.post1")
    q = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
    assert tile_engines._flash_attn(q) is interface  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "version, message", [("2.6.3", "2.7 or later, this is 2.6.3"), ("2.8.3", "on cpu")]
)
def test_flash_attn_cannot_run(monkeypatch: pytest.MonkeyPatch, version: str, message: str) -> None:
    pretend_flash_attn(monkeypatch, version)
    with pytest.raises(ValueError, match=message):
        run(make(4, dtype=torch.bfloat16), [(0, [])], "flash_attn")


def test_flash_attn_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="flash-attn, 2.7 or later, which is not installed"):
        run(make(4), [(0, [])], "flash_attn")


# Errors.


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("q", torch.zeros(4, 16), r"q: shape \(4, 16\) must be \[T, H, D\]"),
        ("k", torch.zeros(4, 3, 16), r"k: shape \(4, 3, 16\) must be \(4, 2, 16\)"),
        ("v", torch.zeros(5, 2, 16), r"v: shape \(5, 2, 16\) must be \(4, 2, 16\)"),
        ("k", torch.zeros(4, 2, 16).bfloat16(), "k: dtype torch.bfloat16 must be that of q"),
        ("out", torch.zeros(4, 2, 8), r"out: shape \(4, 2, 8\) must be \(4, 2, 16\)"),
        ("lse", torch.zeros(2, 4), r"lse: shape \(2, 4\) must be \(4, 2\)"),
        ("lse", torch.zeros(4, 2).double(), "lse: dtype torch.float64 must be torch.float32"),
        ("dout", torch.zeros(4, 2, 8), r"dout: shape \(4, 2, 8\) must be \(4, 2, 16\)"),
        ("dk", torch.zeros(5, 2, 16), r"dk: shape \(5, 2, 16\) must be \(4, 2, 16\)"),
        ("dv", torch.zeros(4, 2, 16).bfloat16(), "dv: dtype torch.bfloat16 must be torch.float32"),
        ("backend", "triton", "backend: 'triton' must be one of"),
    ],
)
def test_errors(name: str, value: Any, message: str) -> None:
    x: dict[str, Any] = {**make(4), "tiles": [Tile(0, 4, 0, 4, True)], "scale": SCALE}
    x["out"], x["lse"] = empty_attention(x["q"], 16)
    x |= {f"d{of}": torch.zeros_like(x[of]) for of in "qkv"} | {"backend": None, name: value}
    with pytest.raises(ValueError, match=message):
        attend_tiles_backward(**x)
    forward = {key: x[key] for key in ("q", "k", "v", "tiles", "scale", "out", "lse", "backend")}
    if name in forward:
        with pytest.raises(ValueError, match=message):
            attend_tiles(**forward)


def test_float64_on_a_gpu() -> None:
    x = {name: t.to("meta") for name, t in make(4, dtype=torch.float64).items()}
    with pytest.raises(ValueError, match="float64, but backend='torch' takes fp32, bf16 and fp16"):
        attend_tiles(x["q"], x["k"], x["v"], [], SCALE, *empty_attention(x["q"], 16))


@pytest.mark.parametrize(
    "tile", [(0, 0, 0, 1, False), (0, 1, 2, 2, False), (-1, 1, 0, 2, False), (0, 3, 0, 2, True)]
)
def test_tiles_that_cannot_be(tile: tuple[int, int, int, int, bool]) -> None:
    with pytest.raises(AssertionError):
        Tile(*tile)


def test_tiles_beyond_the_sequence() -> None:
    for tile in (Tile(2, 5, 0, 1, False), Tile(0, 1, 2, 5, False)):
        with pytest.raises(AssertionError):
            run(make(4), [(0, [tile])], "torch")
