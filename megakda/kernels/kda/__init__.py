"""Kimi Delta Attention: the recurrence, its chunk-parallel form, and the decay gate."""

from megakda.kernels.kda.gate import kda_gate
from megakda.kernels.kda.op import chunk_kda, fused_recurrent_kda

__all__ = ["chunk_kda", "fused_recurrent_kda", "kda_gate"]
