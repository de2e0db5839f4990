"""Kimi Delta Attention: the recurrence, its chunk-parallel form, decoding, and the decay gate."""

from megakda.kernels.kda.affine import compose, fold, fold_backward, range_state
from megakda.kernels.kda.decode import kda_decode_step
from megakda.kernels.kda.gate import kda_gate
from megakda.kernels.kda.linear_attention import (
    chunk_gated_linear_attention,
    fused_recurrent_gated_linear_attention,
)
from megakda.kernels.kda.op import chunk_kda, fused_recurrent_kda

__all__ = [
    "chunk_gated_linear_attention",
    "chunk_kda",
    "compose",
    "fold",
    "fold_backward",
    "fused_recurrent_gated_linear_attention",
    "fused_recurrent_kda",
    "kda_decode_step",
    "kda_gate",
    "range_state",
]
