"""The largest logit of each head, found by attention over tiles on its way, against all scores."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megakda.kernels.tile_attention import Tile, attend_tiles, empty_attention
from tests.kernels.helpers import assert_close
from tests.kernels.tile_cases import (
    HEADS,
    RESULTS,
    SCALE,
    Block,
    dense,
    every_backend,
    make,
    mask_of,
    random_ring,
    ready,
    run,
)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with ready(request.param) as name:
        yield name


def largest_logits(
    x: dict[str, torch.Tensor], blocks: Sequence[Block], scale: float = SCALE
) -> torch.Tensor:
    """float64 [H]."""
    scores = scale * torch.einsum("ihd,jhd->hij", x["q"].double(), x["k"].double())
    return scores[:, mask_of(x, blocks)].amax(-1)


def nothing_yet(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full((HEADS,), -torch.inf, dtype=dtype)


@every_backend
@pytest.mark.parametrize(
    "sizes, seed", [((24, 16), 0), ((16, 32), 1), ((12, 20), 2), ((192, 128), 3), ((200, 160), 4)]
)
def test_records_over_a_ring(backend: str, sizes: tuple[int, int], seed: int) -> None:
    """Packed documents of many lengths; results are what they are without recording."""
    x = make(150, sizes)
    blocks = random_ring(seed, 150, documents=[7, 40][seed % 2], segments=3)
    reference = dense(x, blocks)
    for order in (blocks, [blocks[i] for i in (2, 0, 1)]):
        found = nothing_yet()
        assert_close(run(x, order, backend, max_logit=found), reference, 1e-5)
        torch.testing.assert_close(found.double(), largest_logits(x, blocks), rtol=1e-6, atol=0)


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [(192, 128), (24, 16), (256, 256)])
def test_records_in_half_precision(
    backend: str, dtype: torch.dtype, sizes: tuple[int, int]
) -> None:
    """Several blocks of queries and keys, the last ones short; values from a wider tensor."""
    x = make(290, sizes, dtype)
    x["v"] = torch.cat([x["v"], torch.full_like(x["v"], torch.nan)], -1)[..., : sizes[1]]
    tiles = [Tile(0, 270, 0, 270, True), Tile(0, 270, 270, 290, False)]
    tiles += [Tile(270, 290, 0, 70, False), Tile(270, 290, 71, 72, False)]
    scale, found = sizes[0] ** -0.5, nothing_yet()
    got = run(x, [(0, tiles)], backend, scale, found)
    assert_close(got, dense(x, [(0, tiles)], scale), 4e-3)
    torch.testing.assert_close(
        found.double(), largest_logits(x, [(0, tiles)], scale), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("backend", ["torch", "reference"], indirect=True)
def test_records_in_float64(backend: str) -> None:
    x, found = make(100, (24, 16), torch.float64), nothing_yet(torch.float64)
    blocks = random_ring(2, 100, documents=5, segments=3)
    assert_close(run(x, blocks, backend, max_logit=found), dense(x, blocks), 1e-13)
    torch.testing.assert_close(found, largest_logits(x, blocks), rtol=1e-14, atol=0)


@every_backend
@pytest.mark.parametrize("kind", ["huge", "equal", "negative", "tiny", "zero"])
def test_records_extremes(backend: str, kind: str) -> None:
    """Padding, masked pairs and a first maximum of 0 would all show where logits are negative."""
    x, scale = make(75, (24, 16)), SCALE
    if kind == "huge":
        x["q"] *= 1e4
    elif kind == "equal":
        x["q"], x["k"] = (torch.ones_like(x[name]) * t for name, t in (("q", 3.0), ("k", -7.0)))
    elif kind == "negative":
        x["q"], x["k"] = x["q"].abs() + 0.1, -x["k"].abs() - 0.1
    elif kind == "tiny":
        x["k"] *= 1e-30
    else:
        scale = 0.0
    tiles = [Tile(0, 40, 0, 40, True), Tile(40, 75, 40, 75, True), Tile(40, 75, 0, 33, False)]
    found, expected = nothing_yet(), largest_logits(x, [(0, tiles)], scale)
    got = run(x, [(0, tiles)], backend, scale, found)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    if kind == "negative":
        assert expected.max() < 0
    if kind != "huge":  # one of the keys has all the weight: gradients of 0 are noise
        assert got["out"].isfinite().all()
        assert_close({"out": got["out"]}, {"out": dense(x, [(0, tiles)], scale)["out"]}, 1e-5)


@every_backend
def test_records_nan(backend: str) -> None:
    """Of the head that has one, where a query sees it."""
    x = make(60)
    x["k"][50, 1] = x["q"][55, 1] = torch.nan
    tiles = [Tile(0, 30, 0, 30, True), Tile(30, 50, 20, 45, False)]
    for more in ([], [Tile(52, 54, 49, 51, False)], [Tile(54, 60, 1, 45, False)]):
        found, seen = nothing_yet(), [*tiles, *more]
        run(x, [(0, seen)], backend, max_logit=found)
        assert found.isnan().tolist() == [False, bool(more)]
        expected = largest_logits({**x, "k": x["k"].nan_to_num()}, [(0, seen)])
        assert found[0] == pytest.approx(expected[0].item(), rel=1e-6)
    run(x, [(0, tiles)], backend, max_logit=found)
    assert found.isnan().tolist() == [False, True], "it is not forgotten"


@every_backend
def test_a_later_key_that_is_nan_is_not_seen(backend: str) -> None:
    x = make(40)
    x["k"][39] = x["v"][39] = torch.nan
    found = nothing_yet()
    out, lse = empty_attention(x["q"][:39], 16)
    tiles = [Tile(0, 39, 0, 39, True)]
    attend_tiles(x["q"][:39], x["k"], x["v"], tiles, SCALE, out, lse, backend, found)
    assert out.isfinite().all() and found.isfinite().all()


@every_backend
def test_goes_on_from_the_logits_there_are(backend: str) -> None:
    x, tiles = make(20), [Tile(0, 20, 0, 20, True)]
    expected = largest_logits(x, [(0, tiles)])
    found = torch.tensor([1e6, -1e6])
    run(x, [(0, tiles)], backend, max_logit=found)
    assert found[0] == 1e6
    assert found[1] == pytest.approx(expected[1].item(), rel=1e-6)
    run(x, [(0, [])], backend, max_logit=found)
    assert found[1] == pytest.approx(expected[1].item(), rel=1e-6)


@every_backend
def test_equal_bits_while_recording(backend: str) -> None:
    x = make(120, (24, 16))
    blocks = random_ring(5, 120, documents=9, segments=3)
    logits = [nothing_yet() for _ in range(2)]
    first, second = (run(x, blocks, backend, max_logit=found) for found in logits)
    for name in RESULTS:
        assert torch.equal(first[name], second[name]), name
    assert torch.equal(*logits)


@pytest.mark.parametrize("shape", [(1, 3000), (40, 45)])
def test_recording_holds_few_scores(shape: tuple[int, int]) -> None:
    """No tensor of more than 4 MiB, of 69 MiB of scores in one document."""

    class Sizes(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.largest = max(self.largest, result.numel() * result.element_size())
            return result

    documents, length = shape
    tiles = [Tile(i, i + length, i, i + length, True) for i in range(0, documents * length, length)]
    x, found = make(documents * length, (24, 16)), nothing_yet()
    out, lse = empty_attention(x["q"], 16)
    with Sizes() as sizes:
        attend_tiles(x["q"], x["k"], x["v"], tiles, SCALE, out, lse, "torch", found)
    assert sizes.largest <= 2**22
    again, again_lse = empty_attention(x["q"], 16)
    attend_tiles(x["q"], x["k"], x["v"], tiles, SCALE, again, again_lse, "torch")
    assert_close({"out": out, "lse": lse}, {"out": again, "lse": again_lse}, 1e-5)


@pytest.mark.parametrize("backend", ["gpu", "flash_attn"], indirect=True)
def test_recording_launches_once_for_all_documents(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megakda.kernels import tile_attention_triton as kernels

    launches, launch = [], kernels.tile_attention_triton

    def counted(q: torch.Tensor, k: Any, v: Any, lengths: Any, *rest: Any) -> Any:
        launches.append(lengths)
        return launch(q, k, v, lengths, *rest)

    monkeypatch.setattr(kernels, "tile_attention_triton", counted)
    x, bounds = make(64), [0, 5, 30, 31, 64]
    tiles = [Tile(a, b, a, b, True) for a, b in itertools.pairwise(bounds)]
    run(x, [(0, tiles)], backend, max_logit=nothing_yet())
    assert launches == [((5, 5), (25, 25), (1, 1), (33, 33))]


@pytest.mark.parametrize("backend", ["gpu", "flash_attn"], indirect=True)
@pytest.mark.parametrize("sizes", [(257, 16), (16, 300)])
def test_heads_too_wide_to_record(backend: str, sizes: tuple[int, int]) -> None:
    message = f"heads of {sizes[0]} and {sizes[1]} channels.* takes at most 256"
    with pytest.raises(ValueError, match=message):
        run(make(4, sizes), [(0, [Tile(0, 4, 0, 4, True)])], backend, max_logit=nothing_yet())


@pytest.mark.parametrize("backend", ["gpu"], indirect=True)
def test_recording_needs_triton(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="max_logit: recording it on a GPU needs the triton"):
        run(make(4), [(0, [Tile(0, 4, 0, 4, True)])], backend, max_logit=nothing_yet())


@pytest.mark.parametrize(
    "max_logit, message",
    [
        (torch.zeros(3), r"max_logit: shape \(3,\) must be \(2,\)"),
        (torch.zeros(2).double(), "max_logit: dtype torch.float64 must be torch.float32"),
    ],
)
def test_logits_of_another_shape_or_dtype(max_logit: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(make(4), [(0, [])], "torch", max_logit=max_logit)
