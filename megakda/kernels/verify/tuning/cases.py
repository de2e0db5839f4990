"""Calls of the operators as in training and inference of Kimi Linear 48B, on any device.

On the meta device they can be compiled, on a GPU timed, and at `SMALL` sizes interpreted on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from megakda.kernels.gated_norm import gated_rms_norm
from megakda.kernels.kda.decode import kda_decode_step
from megakda.kernels.kda.decode_fused import kda_decode_fused
from megakda.kernels.kda.gate import kda_gate
from megakda.kernels.kda.op import chunk_kda
from megakda.kernels.l2_norm import l2_norm
from megakda.kernels.mla_decode import mla_decode
from megakda.kernels.short_conv import short_conv, short_conv_step

Tensors = dict[str, torch.Tensor]
TAPS = 4
PAGE_SIZE = 64


@dataclass(frozen=True)
class Sizes:
    """Sizes of the cases: tokens of a sequence, the longest one, channels of a head, and what the
    numbers of heads and of sequences are divided by.
    """

    tokens: int = 8192
    long: int = 32768
    channels: int = 128
    latent: int = 512
    shared: int = 64
    fewer: int = 1


PRODUCTION = Sizes()
SMALL = Sizes(tokens=40, long=80, channels=16, latent=16, shared=16, fewer=32)


@dataclass(frozen=True)
class Maker:
    """Inputs on a device; equal seeds give equal values.

    Attributes:
        device: cuda, cpu or meta.
        sizes: of the case.
        generator: None on the meta device, which has no values.
    """

    device: torch.device
    sizes: Sizes
    generator: torch.Generator | None

    def randn(
        self, *shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = False
    ) -> torch.Tensor:
        x = torch.empty(shape, dtype=dtype, device=self.device)
        if self.generator is not None:
            x.normal_(generator=self.generator)
        return x.requires_grad_(grad)

    def fewer(self, number: int) -> int:
        """A number of heads or sequences at these sizes."""
        return max(1, number // self.sizes.fewer)

    def heads(self, heads: int, tokens: int, channels: int | None = None, **kind: Any) -> Any:
        """[1, T, H, channels]."""
        return self.randn(1, tokens, heads, channels or self.sizes.channels, **kind)


Run = Callable[[], Tensors]


def _with_gradients(names: str, tensors: list[torch.Tensor], forward: Callable[[], Any]) -> Run:
    """Runs `forward`, and the backward pass for a gradient of ones."""
    titles = [f"d{name}" for name in names.split()]

    def run() -> Tensors:
        y = forward()
        gradients = torch.autograd.grad(y, tensors, torch.ones_like(y))
        return {"y": y.detach(), **dict(zip(titles, gradients, strict=True))}

    return run


def _l2_norm(make: Maker) -> Run:
    x = make.heads(make.fewer(32), make.sizes.tokens, grad=True)
    return _with_gradients("x", [x], lambda: l2_norm(x, backend="triton"))


def _gated_norm(make: Maker) -> Run:
    heads = make.fewer(32)
    x, gate = (make.heads(heads, make.sizes.tokens, grad=True) for _ in range(2))
    weight = make.randn(make.sizes.channels, grad=True)
    return _with_gradients(
        "x gate weight",
        [x, gate, weight],
        lambda: gated_rms_norm(x, weight, gate, backend="triton"),
    )


def _gate(make: Maker, lower_bound: float | None = None) -> Run:
    heads = make.fewer(32)
    raw = make.heads(heads, make.sizes.tokens, grad=True)
    rate = make.randn(heads, dtype=torch.float32, grad=True)
    bias = make.randn(heads * make.sizes.channels, dtype=torch.float32, grad=True)
    return _with_gradients(
        "raw rate bias",
        [raw, rate, bias],
        lambda: kda_gate(raw, rate, bias, lower_bound, backend="triton"),
    )


def _short_conv(make: Maker) -> Run:
    width = make.fewer(32) * make.sizes.channels
    x = make.randn(1, make.sizes.tokens, width, grad=True)
    weight = make.randn(width, TAPS, grad=True)
    return _with_gradients(
        "x weight", [x, weight], lambda: short_conv(x, weight, backend="triton")[0]
    )


def _short_conv_step(make: Maker, sequences: int) -> Run:
    width, n = make.fewer(32) * make.sizes.channels, make.fewer(sequences)
    x, state = make.randn(n, width), make.randn(n, width, TAPS - 1)
    weight = make.randn(width, TAPS)

    def run() -> Tensors:
        return {"y": short_conv_step(x, state, weight, backend="triton"), "state": state}

    return run


def chunk_kda_case(
    make: Maker,
    heads: int,
    train: bool = True,
    tokens: int | None = None,
    lower_bound: float | None = None,
    lengths: tuple[int, ...] = (),
) -> Run:
    heads, tokens = make.fewer(heads), tokens or make.sizes.tokens
    q, k, v, g = (make.heads(heads, tokens, grad=train) for _ in range(4))
    beta = make.randn(1, tokens, heads, grad=train)
    rate = make.randn(heads, dtype=torch.float32, grad=train)
    bias = make.randn(heads * make.sizes.channels, dtype=torch.float32, grad=train)
    bounds = None
    if lengths:
        scaled = [0, *(tokens * sum(lengths[: i + 1]) // sum(lengths) for i in range(len(lengths)))]
        bounds = torch.tensor(scaled)

    def forward() -> tuple[torch.Tensor, torch.Tensor | None]:
        o, state = chunk_kda(
            q,
            k,
            v,
            g,
            beta,
            A_log=rate,
            dt_bias=bias,
            output_final_state=not train,
            use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True,
            use_beta_sigmoid_in_kernel=True,
            safe_gate=lower_bound is not None,
            lower_bound=lower_bound,
            cu_seqlens=bounds,
            backend="triton",
        )
        return o, state

    if train:
        tensors = [q, k, v, g, beta, rate, bias]
        return _with_gradients("q k v g beta rate bias", tensors, lambda: forward()[0])

    def run() -> Tensors:
        o, state = forward()
        assert state is not None
        return {"o": o, "state": state}

    return run


def _kda_decode(make: Maker, sequences: int, drafts: int = 1) -> Run:
    n, heads, channels = make.fewer(sequences), make.fewer(32), make.sizes.channels
    q, k, v, g = (make.randn(n, drafts, heads, channels) for _ in range(4))
    beta = make.randn(n, drafts, heads)
    state = make.randn(n * drafts, heads, channels, channels, dtype=torch.float32)
    indices = torch.arange(n * drafts, dtype=torch.int32, device=make.device)
    accepted = torch.ones(n, dtype=torch.int32, device=make.device) if drafts > 1 else None
    options: dict[str, Any] = {
        "A_log": make.randn(heads, dtype=torch.float32),
        "dt_bias": make.randn(heads * channels, dtype=torch.float32),
        "state_indices": indices.view(n, drafts) if drafts > 1 else indices,
        "num_accepted": accepted,
    }

    def run() -> Tensors:
        o = kda_decode_step(
            q,
            k,
            v,
            g,
            beta,
            state,
            **options,
            use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True,
            use_beta_sigmoid_in_kernel=True,
            backend="triton",
        )
        return {"o": o, "state": state}

    return run


def _kda_decode_fused(make: Maker, sequences: int) -> Run:
    n, heads, channels = make.fewer(sequences), make.fewer(32), make.sizes.channels
    width = heads * channels
    q, k, v, g, gate = (make.randn(n, width) for _ in range(5))
    beta = make.randn(n, heads)
    conv_states = (make.randn(n, width, 3), make.randn(n, width, 3), make.randn(n, width, 3))
    weights = (make.randn(width, TAPS), make.randn(width, TAPS), make.randn(width, TAPS))
    norm = make.randn(channels)
    state = make.randn(n, heads, channels, channels, dtype=torch.float32)
    rate, bias = (make.randn(x, dtype=torch.float32) for x in (heads, width))

    def run() -> Tensors:
        o = kda_decode_fused(
            q,
            k,
            v,
            g,
            beta,
            gate,
            conv_states,
            weights,
            norm,
            state,
            A_log=rate,
            dt_bias=bias,
            backend="triton",
        )
        return {"o": o, "state": state}

    return run


def _mla_decode(make: Maker, sequences: int, heads: int, tokens: int, paged: bool) -> Run:
    sizes, n = make.sizes, make.fewer(sequences)
    width = sizes.latent + sizes.shared
    q = make.randn(n, max(1, heads // sizes.fewer), width)
    lengths = torch.full((n,), tokens, dtype=torch.int32, device=make.device)
    pages = -(-tokens // PAGE_SIZE)
    table = None
    if paged:
        cache = make.randn(n * pages, PAGE_SIZE, width)
        # A pool that has been in use for a while: no two pages of a sequence lie side by side.
        order = torch.arange(n * pages, dtype=torch.int32, device=make.device)
        table = order.view(pages, n).T.contiguous()
    else:
        cache = make.randn(n, tokens, width)

    def run() -> Tensors:
        o = mla_decode(
            q,
            cache,
            lengths,
            sizes.latent,
            scale=192**-0.5,
            block_table=table,
            backend="triton",
        )
        assert isinstance(o, torch.Tensor)
        return {"o": o}

    return run


_RAGGED = (1300, 547, 2048, 963, 271, 3063)


def _tile_attention(make: Maker, lengths: tuple[int, ...] = (1,)) -> Run:
    """Documents whose lengths are as those given, or one."""
    from megakda.kernels.tile_attention_triton import tile_attention_triton

    heads, sizes = make.fewer(32), make.sizes
    width = sizes.channels + sizes.shared
    scaled = [sizes.tokens * n // sum(lengths) for n in lengths]
    q, k = (make.randn(sum(scaled), heads, width) for _ in range(2))
    v = make.randn(sum(scaled), heads, sizes.channels)
    tiles = tuple((n, n) for n in scaled)

    def run() -> Tensors:
        results = tile_attention_triton(q, k, v, tiles, causal=True, scale=width**-0.5)
        return dict(zip(("out", "lse", "max_logit"), results, strict=True))

    return run


CASES: dict[str, Callable[[Maker], Run]] = {
    "l2_norm": _l2_norm,
    "gated_norm": _gated_norm,
    "gate_softplus": _gate,
    "gate_bounded": lambda make: _gate(make, -5.0),
    "short_conv": _short_conv,
    "short_conv_step": lambda make: _short_conv_step(make, 64),
    "kda_prefill_h32": lambda make: chunk_kda_case(make, 32, train=False),
    "kda_train_h16": lambda make: chunk_kda_case(make, 16),
    "kda_train_h32": lambda make: chunk_kda_case(make, 32),
    "kda_train_h64": lambda make: chunk_kda_case(make, 64),
    "kda_train_h96_bounded": lambda make: chunk_kda_case(make, 96, lower_bound=-5.0),
    "kda_train_packed": lambda make: chunk_kda_case(make, 32, lengths=_RAGGED),
    "kda_train_long": lambda make: chunk_kda_case(make, 4, tokens=make.sizes.long),
    "kda_decode_1": lambda make: _kda_decode(make, 1),
    "kda_decode_64": lambda make: _kda_decode(make, 64),
    "kda_decode_drafts": lambda make: _kda_decode(make, 64, drafts=4),
    "kda_decode_fused_1": lambda make: _kda_decode_fused(make, 1),
    "kda_decode_fused_64": lambda make: _kda_decode_fused(make, 64),
    "mla_decode_h32_1": lambda make: _mla_decode(make, 1, 32, make.sizes.long, False),
    "mla_decode_h32_64": lambda make: _mla_decode(make, 64, 32, make.sizes.tokens, False),
    "mla_decode_h16_64": lambda make: _mla_decode(make, 64, 16, make.sizes.tokens, False),
    "mla_decode_h32_1_paged": lambda make: _mla_decode(make, 1, 32, make.sizes.long, True),
    "mla_decode_h32_64_paged": lambda make: _mla_decode(make, 64, 32, make.sizes.tokens, True),
    "mla_decode_h16_64_paged": lambda make: _mla_decode(make, 64, 16, make.sizes.tokens, True),
    "tile_attention": _tile_attention,
    "tile_attention_packed": lambda make: _tile_attention(make, _RAGGED),
}
"""By name: makes the inputs, and returns a call that gives every result, gradients included."""


def build(name: str, device: torch.device, sizes: Sizes = PRODUCTION) -> Run:
    """A case with inputs on a device; every call makes the same inputs anew.

    Raises:
        KeyError: an unknown case.
    """
    generator = None
    if device.type != "meta":
        generator = torch.Generator(device).manual_seed(0)
    return CASES[name](Maker(device, sizes, generator))
