"""Multi-head latent attention, with or without rotary positions.

DeepSeek-V2, arXiv 2405.04434, section 2.1; Kimi Linear (arXiv 2510.26692) uses it as the full
attention layer with no position embedding at all: the 64 key dimensions that the heads share stay,
unrotated.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megakda.config.schema import MLAConfig
from megakda.layers.cached import CachedTokens, LatentCache
from megakda.layers.context_layout import Documents
from megakda.layers.context_parallel import ALONE, ContextParallel
from megakda.layers.linear import (
    ReplicatedLinear,
    column_parallel,
    enter_tensor_parallel,
    ready_weight,
    row_parallel,
)
from megakda.layers.mla_cached import latent_attention_cached
from megakda.layers.mla_context_parallel import LatentHeads, latent_attention
from megakda.layers.norm import RMSNorm


class MultiLatentAttention(MegatronModule):
    """Causal MLA on stock megatron-core parallel linears.

    Parameters (hidden h, heads H split over TP, latent r, widths n(ope), p (shared), v):
    q_proj [H(n+p), h] and kv_b_proj [H(n+v), r] column-parallel, kv_a_proj_with_mqa [r+p, h] and
    kv_a_layernorm [r] replicated, o_proj [h, Hv] row-parallel. With a latent of width c for queries
    too, q_a_proj [c, h] and q_a_layernorm [c], replicated, and q_b_proj [H(n+p), c] replace q_proj.

    Args:
        config: megatron-core's config; hidden size, dtype, sequence parallelism and recompute.
        layer_number: 1-based, over the whole model.
        mla: widths and the rotary option.
        num_heads: H, over all ranks.
        pg_collection: process groups; `tp` is used.
        context: how sequences are shared by ranks.
        attention_backend: of packed and shared sequences, see `megakda.kernels.tile_attention`.

    Attributes:
        max_logits: None, or what `record_max_logits` records.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        mla: MLAConfig,
        num_heads: int,
        pg_collection: ProcessGroupCollection,
        context: ContextParallel = ALONE,
        attention_backend: str | None = None,
        **_: Any,
    ):
        super().__init__(config=config)
        self.mla = mla
        self.context, self.attention_backend = context, attention_backend
        self.layer_number = layer_number
        self.tp_group = pg_collection.tp
        self.local_heads = num_heads // pg_collection.tp.size()
        self.max_logits: torch.Tensor | None = None
        self.scale = (mla.qk_nope_head_dim + mla.qk_shared_head_dim) ** -0.5
        hidden = config.hidden_size
        qk_head_dim = mla.qk_nope_head_dim + mla.qk_shared_head_dim

        queries = num_heads * qk_head_dim
        if mla.q_lora_rank is None:
            self.q_proj = column_parallel(hidden, queries, config, pg_collection)
        else:
            self.q_a_proj = ReplicatedLinear(hidden, mla.q_lora_rank, config)
            self.q_a_layernorm = RMSNorm(config, mla.q_lora_rank, eps=mla.kv_norm_eps)
            self.q_b_proj = column_parallel(mla.q_lora_rank, queries, config, pg_collection)
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
        self,
        hidden_states: torch.Tensor,
        attention_mask: Any = None,
        packed_seq_params: Documents | CachedTokens | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """[s, b, h] -> ([s, b, h], no bias).

        s is this rank's share under sequence and context parallelism. The mask is causal by
        construction, within the documents of `packed_seq_params` where that is given, or over a
        cached past with `CachedTokens`; `attention_mask` and the other arguments of megatron-core's
        attention interface are not used.
        """
        q, latent = self._project(hidden_states)
        if isinstance(packed_seq_params, CachedTokens):
            return self.o_proj(self._attend_cached(packed_seq_params, q, latent))
        documents = packed_seq_params
        # Torch's attention over whole rows does not say what the largest logit was.
        recording = self.max_logits is not None and self.training
        if documents is None and (self.context.group is not None or recording):
            rows, tokens = q.shape[1], q.shape[0] * self.context.layout.ranks
            documents = Documents.whole_rows(rows, tokens)
        if self.rotary is not None:
            q, latent = self._rotated(q, latent, documents)

        attend = self._attend if documents is None else partial(self._attend_documents, documents)
        weight = ready_weight(self.kv_b_proj)
        if self.recompute_core and self.training:
            out = tensor_parallel.checkpoint(attend, False, q, latent, weight)
        else:
            out = attend(q, latent, weight)
        return self.o_proj(out)

    def _project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[s, b, h] -> q [S, b, H, n+p] and the normed latent with the shared key [S, b, r+p]."""
        mla = self.mla
        latent, k_shared = self.kv_a_proj_with_mqa(hidden_states).split(
            [mla.kv_lora_rank, mla.qk_shared_head_dim], dim=-1
        )
        latent = torch.cat([self.kv_a_layernorm(latent), k_shared], dim=-1)
        # All heads of all ranks read the latent, so its gradient is a sum over the group.
        latent = enter_tensor_parallel(latent, self.config.sequence_parallel, self.tp_group)
        if mla.q_lora_rank is None:
            q, _ = self.q_proj(hidden_states)
        else:
            q, _ = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
        return q.unflatten(-1, (-1, mla.qk_nope_head_dim + mla.qk_shared_head_dim)), latent

    def _rotated(
        self, q: torch.Tensor, latent: torch.Tensor, documents: Documents | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotary positions, counted from each document's start; shapes as they are."""
        assert self.rotary is not None
        tokens, rows = q.shape[:2]
        if documents is None:
            angles = self.rotary(tokens, packed_seq=True)  # [S, 1, 1, p]
        else:  # of this rank's tokens, counted from each document's start
            angles = self.rotary(documents.tokens, packed_seq=True)
            angles = angles[self.context.plan(documents).positions.to(q.device)]
            angles = angles.view(rows, tokens, 1, -1).transpose(0, 1)
        return self._rotate(q, latent, angles)

    def _rotate(
        self, q: torch.Tensor, latent: torch.Tensor, angles: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Turns the shared dimensions of queries and keys by `angles` [S, 1 or b, 1, p]."""
        mla = self.mla
        latent, k_shared = latent.split([mla.kv_lora_rank, mla.qk_shared_head_dim], dim=-1)
        q_nope, q_shared = q.split([mla.qk_nope_head_dim, mla.qk_shared_head_dim], dim=-1)
        q_shared = apply_rotary_pos_emb(q_shared, angles, self.config)
        k_shared = apply_rotary_pos_emb(k_shared.unsqueeze(2), angles, self.config)
        return (
            torch.cat([q_nope, q_shared], dim=-1),
            torch.cat([latent, k_shared.squeeze(2)], dim=-1),
        )

    def _attend(self, q: torch.Tensor, latent: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Causal attention over whole rows on this rank.

        q [S, b, H, n+p], latent [S, b, r+p], weight [H(n+v), r] -> [S, b, H * v].
        """
        mla = self.mla
        latent, k_shared = latent.split([mla.kv_lora_rank, mla.qk_shared_head_dim], dim=-1)
        kv = F.linear(latent, weight)
        k_nope, v = kv.unflatten(-1, (-1, mla.qk_nope_head_dim + mla.v_head_dim)).split(
            [mla.qk_nope_head_dim, mla.v_head_dim], dim=-1
        )
        k = torch.cat([k_nope, k_shared.unsqueeze(2).expand(-1, -1, k_nope.shape[2], -1)], dim=-1)
        q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        return out.permute(2, 0, 1, 3).flatten(2)

    def _attend_documents(
        self, documents: Documents, q: torch.Tensor, latent: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        """The same within documents, over the whole context-parallel group."""
        tokens, rows = q.shape[:2]
        q, latent = (x.transpose(0, 1).flatten(0, 1) for x in (q, latent))
        out = latent_attention(
            q,
            latent,
            weight,
            heads=self._heads,
            context=self.context,
            documents=documents,
            max_logit=self._max_logit(),
        )
        return out.unflatten(0, (rows, tokens)).transpose(0, 1).flatten(2)

    def record_max_logits(self) -> None:
        """Records the largest logit of each head from now on, and forgets those recorded so far.

        `max_logits`, fp32 [heads of this rank], then holds the largest of all forward passes that
        built a graph in training mode, recomputed ones too: over micro-batches, documents and keys
        of other context-parallel ranks. What counts is what this rank's own queries saw, so that a
        step's maximum is that over data- and context-parallel ranks. -inf where there was none yet;
        NaN once a logit was NaN. Neither a parameter nor a buffer, so in no state dict; None stops
        the recording. Attention runs in `megakda.kernels.tile_attention` meanwhile.
        """
        if self.max_logits is None:
            device = self.kv_b_proj.weight.device
            self.max_logits = torch.empty(self.local_heads, dtype=torch.float32, device=device)
        self.max_logits.fill_(-torch.inf)

    def _max_logit(self) -> torch.Tensor | None:
        """Where this forward pass leaves its largest logits.

        Recomputation runs the layer without a graph first, and then with one; only the latter
        counts. The first takes the same operator all the same: another one would round otherwise,
        and the second would not repeat it.
        """
        if self.max_logits is None or not self.training:
            return None
        if torch.is_grad_enabled():
            return self.max_logits
        return torch.full_like(self.max_logits, -torch.inf)

    @property
    def _heads(self) -> LatentHeads:
        mla = self.mla
        return LatentHeads(
            rank=mla.kv_lora_rank,
            key=mla.qk_nope_head_dim,
            shared=mla.qk_shared_head_dim,
            value=mla.v_head_dim,
            scale=self.scale,
            backend=self.attention_backend,
        )

    def _attend_cached(
        self, new: CachedTokens, q: torch.Tensor, latent: torch.Tensor
    ) -> torch.Tensor:
        """New tokens of cached sequences: q [S, 1, H, n+p], latent [S, 1, r+p] -> [S, 1, H * v]."""
        if self.rotary is not None:
            positions = F.pad(new.positions, (0, len(q) - new.tokens)).float()
            angles = torch.outer(positions, self.rotary.inv_freq.to(q.device)).repeat(1, 2)
            q, latent = self._rotate(q, latent, angles[:, None, None])
        cache = new.caches[self.layer_number]
        assert isinstance(cache, LatentCache)
        out = latent_attention_cached(
            q.squeeze(1),
            latent.squeeze(1),
            ready_weight(self.kv_b_proj),
            heads=self._heads,
            new=new,
            cache=cache,
        )
        return out.flatten(1).unsqueeze(1)

    def make_cache(self, pages: int, page_size: int) -> LatentCache:
        """An empty cache of so many pages; every tensor-parallel rank has all of it."""
        width = self.mla.kv_lora_rank + self.mla.qk_shared_head_dim
        weight = self.kv_b_proj.weight
        shape = (pages, page_size, width)
        return LatentCache(torch.zeros(shape, device=weight.device, dtype=weight.dtype))
