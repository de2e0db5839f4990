"""Bytes that generation keeps of a sequence, from the configuration alone.

Per layer, with H heads, K and V their sizes, W taps, L and S the widths of the latent and the
shared key part, and n tokens:

    KDA, GDN   the state H K V in fp32, and W - 1 inputs of the convolutions of q, k and v,
               2 H K + H V channels, in the model's dtype: constant
    MLA        (L + S) n in the model's dtype

Kimi Linear (arXiv 2510.26692), section 4 and figure 1b: with three linear layers to one of full
attention the part that grows is a quarter.
"""

from __future__ import annotations

from dataclasses import dataclass

from megakda.config.pattern import FULL, layer_kinds
from megakda.config.schema import ModelConfig

BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class CacheSize:
    """Bytes of one sequence over all layers.

    Attributes:
        states: of the linear layers, whatever the length.
        per_token: of the full layers.
    """

    states: int
    per_token: int

    def total(self, tokens: int) -> int:
        """Of a sequence of so many tokens."""
        return self.states + self.per_token * tokens


def cache_size(model: ModelConfig, precision: str) -> CacheSize:
    """What one sequence takes, over all tensor-parallel ranks together for the states.

    Latents are held whole by each tensor-parallel rank; this counts them once.
    """
    linear, mla, item = model.linear, model.mla, BYTES[precision]
    kinds = layer_kinds(model.pattern, model.num_layers, model.last_layer_full)
    full = kinds.count(FULL)
    keys, values = model.num_heads * linear.head_dim_k, model.num_heads * linear.head_dim_v
    state = 4 * keys * linear.head_dim_v
    tails = max(0, linear.conv_kernel - 1) * (2 * keys + values) * item
    return CacheSize(
        states=(len(kinds) - full) * (state + tails),
        per_token=full * (mla.kv_lora_rank + mla.qk_shared_head_dim) * item,
    )
