"""Multi-head latent attention without query compression, with or without rotary positions.

DeepSeek-V2, arXiv 2405.04434, section 2.1; Kimi Linear (arXiv 2510.26692) uses it as the full
attention layer with no position embedding at all: the 64 key dimensions that the heads share stay,
unrotated.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megakda.config.schema import MLAConfig
from megakda.layers.linear import (
    ReplicatedLinear,
    column_parallel,
    enter_tensor_parallel,
    row_parallel,
)
from megakda.layers.norm import RMSNorm


class MultiLatentAttention(MegatronModule):
    """Causal MLA over a whole sequence on stock megatron-core parallel linears.

    Parameters (hidden h, heads H split over TP, latent r, widths n(ope), p (shared), v):
    q_proj [H(n+p), h] and kv_b_proj [H(n+v), r] column-parallel, kv_a_proj_with_mqa [r+p, h] and
    kv_a_layernorm [r] replicated, o_proj [h, Hv] row-parallel.

    Args:
        config: megatron-core's config; hidden size, dtype, sequence parallelism and recompute.
        layer_number: 1-based, over the whole model.
        mla: widths and the rotary option.
        num_heads: H, over all ranks.
        pg_collection: process groups; `tp` is used.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        mla: MLAConfig,
        num_heads: int,
        pg_collection: ProcessGroupCollection,
        **_: Any,
    ):
        super().__init__(config=config)
        self.mla = mla
        self.layer_number = layer_number
        self.tp_group = pg_collection.tp
        self.scale = (mla.qk_nope_head_dim + mla.qk_shared_head_dim) ** -0.5
        hidden = config.hidden_size
        qk_head_dim = mla.qk_nope_head_dim + mla.qk_shared_head_dim

        self.q_proj = column_parallel(hidden, num_heads * qk_head_dim, config, pg_collection)
        self.kv_a_proj_with_mqa = ReplicatedLinear(
            hidden, mla.kv_lora_rank + mla.qk_shared_head_dim, config
        )
        self.kv_a_layernorm = RMSNorm(config, mla.kv_lora_rank, eps=mla.kv_norm_eps)
        self.kv_b_proj = column_parallel(
            mla.kv_lora_rank,
            num_heads * (mla.qk_nope_head_dim + mla.v_head_dim),
            config,
            pg_collection,
        )
        self.o_proj = row_parallel(num_heads * mla.v_head_dim, hidden, config, pg_collection)
        self.rotary = (
            RotaryEmbedding(
                kv_channels=mla.qk_shared_head_dim,
                rotary_percent=1.0,
                rotary_base=mla.rope_base,
                cp_group=pg_collection.cp,
            )
            if mla.rope
            else None
        )
        self.recompute_core = (
            config.recompute_granularity == "selective" and "core_attn" in config.recompute_modules
        )

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: Any = None, **_: Any
    ) -> tuple[torch.Tensor, None]:
        """[s, b, h] -> ([s, b, h], no bias); s is this rank's share under sequence parallelism.

        The mask is causal by construction; `attention_mask` and the other arguments of
        megatron-core's attention interface are not used.
        """
        q, k, v = self._queries_keys_values(hidden_states)
        if self.recompute_core and self.training:
            out = tensor_parallel.checkpoint(self._attend, False, q, k, v)
        else:
            out = self._attend(q, k, v)
        return self.o_proj(out)

    def _queries_keys_values(
        self, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k [S, b, H/TP, n+p] and v [S, b, H/TP, v] over the whole sequence S."""
        mla = self.mla
        latent, k_shared = self.kv_a_proj_with_mqa(hidden_states).split(
            [mla.kv_lora_rank, mla.qk_shared_head_dim], dim=-1
        )
        q, _ = self.q_proj(hidden_states)
        kv, _ = self.kv_b_proj(self.kv_a_layernorm(latent))
        # All heads of all ranks read the shared key, so its gradient is a sum over the group.
        k_shared = enter_tensor_parallel(
            k_shared, self.config.sequence_parallel, self.tp_group
        ).unsqueeze(2)

        q = q.unflatten(-1, (-1, mla.qk_nope_head_dim + mla.qk_shared_head_dim))
        k_nope, v = kv.unflatten(-1, (-1, mla.qk_nope_head_dim + mla.v_head_dim)).split(
            [mla.qk_nope_head_dim, mla.v_head_dim], dim=-1
        )
        if self.rotary is not None:
            angles = self.rotary(q.shape[0])
            q_nope, q_shared = q.split([mla.qk_nope_head_dim, mla.qk_shared_head_dim], dim=-1)
            q = torch.cat([q_nope, apply_rotary_pos_emb(q_shared, angles, self.config)], dim=-1)
            k_shared = apply_rotary_pos_emb(k_shared, angles, self.config)
        k = torch.cat([k_nope, k_shared.expand(-1, -1, k_nope.shape[2], -1)], dim=-1)
        return q, k, v

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Causal softmax attention; [S, b, H, d] each -> [S, b, H * v]."""
        q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.scale
        )
        return out.permute(2, 0, 1, 3).flatten(2)
