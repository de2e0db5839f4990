"""QK-Clip: bounds the attention logits of MLA layers by scaling query and key weights.

Kimi K2, arXiv 2507.20534, section 2.1, for the weights of multi-head latent attention. After an
optimizer step, each head whose largest logit of that step, S, exceeded tau is scaled with
gamma = tau / S: the rows of its queries and keys that meet each other by sqrt(gamma) each, and the
rows of its queries that meet the key part shared by all heads by gamma, since that part must stay
as it is for the others. All its logits are then gamma times what they were.

Linear attention has no softmax, so that its layers are left alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state

from megakda.config.schema import Config
from megakda.layers.mla import MultiLatentAttention
from megakda.models.sharding import ModelChunk
from megakda.optim.shards import Shard, shards


class QKClip:
    """Measures the logits of a step and, as part of the optimizer's step, clips the heads.

    The largest logit is over micro-batches, recorded by the attention of this rank, and over data-
    and context-parallel ranks. The fp32 main weights are scaled, wherever megatron-core keeps them,
    before it copies them to the model, so that both agree and checkpoints hold the clipped weights.

    Args:
        config: `optim.qk_clip` is tau; null switches everything here off.
        chunks: model chunks, wrapped for data parallelism.
        optimizer: megatron-core's ChainedOptimizer around any torch optimizer.
    """

    def __init__(self, config: Config, chunks: Sequence[ModelChunk], optimizer: Any):
        self.tau = config.optim.qk_clip
        self._num_layers = config.model.num_layers
        self._num_heads = config.model.num_heads
        self._layers = [
            module
            for chunk in chunks
            for module in chunk.modules()
            if isinstance(module, MultiLatentAttention) and self.tau is not None
        ]
        self._found = torch.empty(0)  # [layers here, heads here], the largest logits of a step
        weights = {weight for layer in self._layers for weight in _scaled_weights(layer)}
        for part in optimizer.chained_optimizers if weights else ():
            mine = [shard for shard in shards(part) if shard.param in weights]
            if mine:
                part.optimizer.register_step_post_hook(
                    lambda *_, mine=mine: self._clip(mine)  # type: ignore[misc]
                )

    def begin_step(self) -> None:
        """Forgets the logits of the step before."""
        for layer in self._layers:
            layer.record_max_logits()

    def end_forward(self) -> None:
        """Takes what the step's micro-batches have recorded. Collective over data and context."""
        if not self._layers:
            return
        recorded = [layer.max_logits for layer in self._layers]
        assert all(found is not None for found in recorded), "begin_step was not called"
        self._found = torch.stack(recorded)  # type: ignore[arg-type]
        torch.distributed.all_reduce(
            self._found,
            op=torch.distributed.ReduceOp.MAX,
            group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        )

    def metrics(self) -> dict[str, Any]:
        """Of the last step, over the whole model. Collective over all ranks.

        Returns:
            max_logit by layer number (1-based), and qk_clip_share, the share of heads above tau;
            empty without QK-Clip or without MLA layers.
        """
        if self.tau is None:
            return {}
        device = torch.device(torch.cuda.current_device())
        largest = torch.full((self._num_layers,), -torch.inf, device=device)
        for layer, found in zip(self._layers, self._found, strict=True):
            largest[layer.layer_number - 1] = found.max()
        above = (self._found > self.tau).sum().to(device)
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
        # Each data- and context-parallel rank has counted the same heads.
        torch.distributed.all_reduce(above)
        copies = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
        layers = {
            str(number): value
            for number, value in enumerate(largest.tolist(), start=1)
            if value != -math.inf  # a NaN is to be seen
        }
        if not layers:
            return {}
        heads = len(layers) * self._num_heads
        return {"max_logit": layers, "qk_clip_share": int(above) / copies / heads}

    @torch.no_grad()
    def _clip(self, mine: Sequence[Shard]) -> None:
        """Scales this rank's shards of the weights of heads above tau."""
        assert self.tau is not None
        factors: dict[torch.nn.Parameter, torch.Tensor] = {}
        above = (self._found > self.tau).any(dim=1).tolist()
        for layer, largest, clips in zip(self._layers, self._found, above, strict=True):
            if clips:
                factors.update(row_factors(layer, gammas(largest, self.tau)))
        for shard in mine:
            rows = factors.get(shard.param)
            if rows is not None:
                columns = shard.param.shape[1]
                each = rows.repeat_interleave(columns)[shard.start : shard.end]
                shard.main.mul_(each.view_as(shard.main))


def gammas(largest: torch.Tensor, tau: float) -> torch.Tensor:
    """tau / S of heads whose largest logit S is above tau, 1 of the others; [H], dtype as given."""
    return torch.where(largest > tau, tau / largest, torch.ones_like(largest))


def row_factors(
    layer: MultiLatentAttention, gamma: torch.Tensor
) -> dict[torch.nn.Parameter, torch.Tensor]:
    """What to scale each row of this rank's query and key weights by.

    Args:
        gamma: [local heads].
    """
    mla = layer.mla
    own = gamma.sqrt().unsqueeze(1)
    queries = torch.cat(
        [
            own.expand(-1, mla.qk_nope_head_dim),
            gamma.unsqueeze(1).expand(-1, mla.qk_shared_head_dim),
        ],
        dim=1,
    )
    values = torch.ones_like(own).expand(-1, mla.v_head_dim)
    keys = torch.cat([own.expand(-1, mla.qk_nope_head_dim), values], dim=1)
    query_weight, key_weight = _scaled_weights(layer)
    return {query_weight: queries.flatten(), key_weight: keys.flatten()}


def _scaled_weights(layer: MultiLatentAttention) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    query = layer.q_proj if layer.mla.q_lora_rank is None else layer.q_b_proj
    return query.weight, layer.kv_b_proj.weight
