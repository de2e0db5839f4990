"""The launches of training and inference at production sizes, as `report` compiles them.

Sizes are those of Kimi Linear 48B: 32 heads of 128 channels, convolutions of 4 taps, latents of
512 + 64 channels, bf16 throughout, and states in fp32.
"""

from __future__ import annotations

from typing import Any

import torch

from megakda.kernels.gated_norm import gated_rms_norm
from megakda.kernels.kda.affine import range_state
from megakda.kernels.kda.decode import kda_decode_step
from megakda.kernels.kda.decode_fused import kda_decode_fused
from megakda.kernels.kda.gate import kda_gate
from megakda.kernels.kda.linear_attention import chunk_gated_linear_attention
from megakda.kernels.kda.op import chunk_kda
from megakda.kernels.l2_norm import l2_norm
from megakda.kernels.mla_decode import mla_decode
from megakda.kernels.short_conv import short_conv, short_conv_step
from megakda.kernels.tile_attention import Tile, attend_tiles, empty_attention
from megakda.kernels.verify.budget import Case, Kernel

TOKENS, HEADS, CHANNELS = 8192, 32, 128
SEQUENCES = 64  # of a batch that is decoded
LATENT, SHARED = 512, 64
WIDTH = CHANNELS + SHARED  # of queries and keys, expanded


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = False) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=grad)


def _backward(*outputs: torch.Tensor) -> None:
    torch.autograd.backward(outputs, [torch.empty_like(x) for x in outputs])


def _tokens(**kwargs: Any) -> torch.Tensor:
    return _meta(1, TOKENS, HEADS, CHANNELS, **kwargs)


def _l2_norm() -> None:
    _backward(l2_norm(_tokens(grad=True), backend="triton"))


def _gated_norm() -> None:
    weight = _meta(CHANNELS, grad=True)
    _backward(gated_rms_norm(_tokens(grad=True), weight, _tokens(grad=True), backend="triton"))


def _gate(lower_bound: float | None) -> None:
    rate = _meta(HEADS, dtype=torch.float32, grad=True)
    bias = _meta(HEADS * CHANNELS, dtype=torch.float32, grad=True)
    _backward(kda_gate(_tokens(grad=True), rate, bias, lower_bound, backend="triton"))


def _short_conv() -> None:
    x = _meta(1, TOKENS, HEADS * CHANNELS, grad=True)
    y, _ = short_conv(x, _meta(HEADS * CHANNELS, 4, grad=True), backend="triton")
    _backward(y)


def _short_conv_step() -> None:
    x, state = _meta(SEQUENCES, HEADS * CHANNELS), _meta(SEQUENCES, HEADS * CHANNELS, 3)
    short_conv_step(x, state, _meta(HEADS * CHANNELS, 4), backend="triton")


def _chunk_kda(
    tokens: int,
    heads: int,
    train: bool,
    lower_bound: float | None = None,
    states: bool = False,
    decays: int = CHANNELS,
) -> None:
    q, k, v = (_meta(1, tokens, heads, CHANNELS, grad=train) for _ in range(3))
    g = _meta(1, tokens, heads, decays, grad=train)
    initial = _meta(1, heads, CHANNELS, CHANNELS, dtype=torch.float32, grad=train)
    o, final_state = chunk_kda(
        q,
        k,
        v,
        g,
        _meta(1, tokens, heads, grad=train),
        A_log=_meta(heads, dtype=torch.float32, grad=train),
        dt_bias=_meta(heads * decays, dtype=torch.float32, grad=train),
        initial_state=initial if states else None,
        output_final_state=states,
        use_qk_l2norm_in_kernel=True,
        use_gate_in_kernel=True,
        use_beta_sigmoid_in_kernel=True,
        safe_gate=lower_bound is not None,
        lower_bound=lower_bound,
        backend="triton",
    )
    if train:
        _backward(*((o, final_state) if states else (o,)))


def _linear_attention() -> None:
    q, k, v, g = (_tokens(grad=True) for _ in range(4))
    o, _ = chunk_gated_linear_attention(q, k, v, g, backend="triton")
    _backward(o)


def _range_state() -> None:
    k, v, g = (_tokens(grad=True) for _ in range(3))
    m, e = range_state(k, v, g, _meta(1, TOKENS, HEADS, grad=True), backend="triton")
    _backward(m, e)


def _kda_decode(tokens: int) -> None:
    q, k, v, g = (_meta(SEQUENCES, tokens, HEADS, CHANNELS) for _ in range(4))
    drafts = tokens > 1
    indices = (SEQUENCES, tokens) if drafts else (SEQUENCES,)
    kda_decode_step(
        q,
        k,
        v,
        g,
        _meta(SEQUENCES, tokens, HEADS),
        _meta(2 * SEQUENCES * tokens, HEADS, CHANNELS, CHANNELS, dtype=torch.float32),
        A_log=_meta(HEADS, dtype=torch.float32),
        dt_bias=_meta(HEADS * CHANNELS, dtype=torch.float32),
        use_qk_l2norm_in_kernel=True,
        use_gate_in_kernel=True,
        use_beta_sigmoid_in_kernel=True,
        state_indices=_meta(*indices, dtype=torch.int32),
        num_accepted=_meta(SEQUENCES, dtype=torch.int32) if drafts else None,
        backend="triton",
    )


def _kda_decode_fused() -> None:
    width = HEADS * CHANNELS
    rows = 2 * SEQUENCES
    x, weight = _meta(SEQUENCES, width), _meta(width, 4)
    kda_decode_fused(
        x,
        x,
        x,
        x,
        _meta(SEQUENCES, HEADS),
        x,
        (_meta(rows, width, 3), _meta(rows, width, 3), _meta(rows, width, 3)),
        (weight, weight, weight),
        _meta(CHANNELS),
        _meta(rows, HEADS, CHANNELS, CHANNELS, dtype=torch.float32),
        A_log=_meta(HEADS, dtype=torch.float32),
        dt_bias=_meta(width, dtype=torch.float32),
        state_indices=_meta(SEQUENCES, dtype=torch.int32),
        backend="triton",
    )


def _mla_decode(sequences: int, queries: int) -> None:
    mla_decode(
        _meta(sequences, queries, HEADS, LATENT + SHARED),
        _meta(4096, 64, LATENT + SHARED),
        _meta(sequences, dtype=torch.int32),
        LATENT,
        scale=WIDTH**-0.5,
        block_table=_meta(sequences, 512, dtype=torch.int32),
        backend="triton",
    )


def _tile_attention(dtype: torch.dtype) -> None:
    """What a rank's queries see of themselves, and of a rank before: with max_logit, in Triton."""
    q, k, v = (_meta(TOKENS, HEADS, x, dtype=dtype) for x in (WIDTH, WIDTH, CHANNELS))
    max_logit = _meta(HEADS, dtype=torch.float32)
    out, lse = empty_attention(q, CHANNELS)
    for causal in (True, False):
        tile = Tile(0, TOKENS, 0, TOKENS, causal)
        attend_tiles(q, k, v, [tile], WIDTH**-0.5, out, lse, max_logit=max_logit)


_KDA_FORWARD = (
    Kernel("kda_intra_kernel", dot=True, may_spill=("sm_80",)),
    Kernel("kda_state_kernel", dot=True, min_warps=4),
)
_KDA_BACKWARD = (
    Kernel("kda_state_grad_kernel", dot=True, min_warps=4),
    Kernel("kda_grad_kernel", dot=True, may_spill=("sm_80",)),
)
_KDA_FOLD = Kernel("kda_fold_kernel", dot=True)  # of ranges, where heads alone do not fill the GPU
_GATE = (
    Kernel("kda_gate_forward_kernel", min_warps=48),
    Kernel("kda_gate_backward_kernel", min_warps=24),
)
_MLA_DECODE = (
    Kernel("mla_decode_split_kernel", dot=True, may_spill=("sm_80",)),
    Kernel("mla_decode_merge_kernel", min_warps=32),
)

CASES: list[Case] = [
    Case(
        "l2_norm",
        _l2_norm,
        (
            Kernel("l2_norm_forward_kernel", min_warps=32),
            Kernel("l2_norm_backward_kernel", min_warps=32),
        ),
    ),
    Case(
        "gated_norm",
        _gated_norm,
        (
            Kernel("gated_norm_forward_kernel", min_warps=32),
            Kernel("gated_norm_backward_kernel", min_warps=32),
        ),
    ),
    Case("gate_softplus", lambda: _gate(None), _GATE),
    Case("gate_bounded", lambda: _gate(-5.0), _GATE),
    Case(
        "short_conv",
        _short_conv,
        (
            Kernel("short_conv_forward_kernel", min_warps=24),
            Kernel("short_conv_backward_kernel", min_warps=12),
        ),
    ),
    Case("short_conv_step", _short_conv_step, (Kernel("short_conv_step_kernel", min_warps=32),)),
    Case("kda_prefill", lambda: _chunk_kda(TOKENS, HEADS, train=False, states=True), _KDA_FORWARD),
    Case(
        "kda_train",
        lambda: _chunk_kda(TOKENS, HEADS, train=True),
        (*_KDA_FORWARD, *_KDA_BACKWARD),
    ),
    Case(
        "kda_train_bounded_with_states",
        lambda: _chunk_kda(TOKENS, HEADS, train=True, lower_bound=-5.0, states=True),
        (*_KDA_FORWARD, *_KDA_BACKWARD),
    ),
    Case(
        "kda_train_few_heads",
        lambda: _chunk_kda(4 * TOKENS, 4, train=True),
        (*_KDA_FORWARD, *_KDA_BACKWARD, _KDA_FOLD),
    ),
    Case(
        "gated_deltanet_train",
        lambda: _chunk_kda(TOKENS, HEADS, train=True, decays=1),
        (*_KDA_FORWARD, *_KDA_BACKWARD),
    ),
    Case("gated_linear_attention_train", _linear_attention, (*_KDA_FORWARD, *_KDA_BACKWARD)),
    Case("range_state", _range_state, (*_KDA_FORWARD, *_KDA_BACKWARD)),
    Case("kda_decode", lambda: _kda_decode(1), (Kernel("kda_recurrent_kernel", min_warps=12),)),
    Case(
        "kda_decode_drafts",
        lambda: _kda_decode(4),
        (Kernel("kda_recurrent_kernel", min_warps=12),),
    ),
    Case("kda_decode_fused", _kda_decode_fused, (Kernel("kda_decode_fused_kernel"),)),
    Case("mla_decode", lambda: _mla_decode(SEQUENCES, 1), _MLA_DECODE),
    Case("mla_decode_drafts", lambda: _mla_decode(SEQUENCES // 4, 4), _MLA_DECODE),
    Case(
        "tile_attention",
        lambda: _tile_attention(torch.bfloat16),
        (Kernel("tile_attention_kernel", dot=True),),
    ),
    Case(
        "tile_attention_fp32",
        lambda: _tile_attention(torch.float32),
        (Kernel("tile_attention_kernel"),),
    ),
]
