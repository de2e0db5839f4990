"""The sigmoid router with expert bias, exact about near-ties."""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.router import TopKRouter


class SigmoidRouter(TopKRouter):
    """megatron-core's router with its scoring done in `moe_router_dtype` throughout.

    megatron-core rounds the scores to fp32 even where it computes logits in fp64. Sigmoid scores
    of a young model crowd around 0.5, where fp32 has steps of 6e-8, and a token's choice between
    two experts then hangs on rounding that differs between layouts. In fp64 it does so about ten
    times less often.

    Selection is by score + expert bias, weights are the renormalised scores times
    `moe_router_topk_scaling_factor` (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
    """

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Routing weights and choices.

        Args:
            logits: [..., experts] in the router's dtype.
            padding_mask: [...], true for padding, which goes to no expert and does not count as
                load.

        Returns:
            (weights [tokens, experts] fp32, zero where not chosen; choices, the same shape, bool).
        """
        scores = logits.view(-1, self.config.num_moe_experts).sigmoid()
        weights, chosen = self.choose(scores)
        routing_map = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen, True)
        probs = torch.zeros_like(scores).scatter(-1, chosen, weights)
        if padding_mask is not None:
            padding = padding_mask.reshape(-1, 1)
            routing_map = routing_map.masked_fill(padding, False)
            probs = probs.masked_fill(padding, 0)
        self._apply_expert_bias(routing_map)
        return probs.float(), routing_map

    def choose(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores [tokens, experts] -> weights and numbers of the chosen experts [tokens, top_k]."""
        choice = self._within_groups(scores + self.expert_bias)
        chosen = torch.topk(choice, k=self.topk, dim=-1).indices
        weights = scores.gather(-1, chosen)
        if self.topk > 1:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return weights * self.config.moe_router_topk_scaling_factor, chosen

    def _within_groups(self, choice: torch.Tensor) -> torch.Tensor:
        """[tokens, experts] -> the same, -inf outside each token's best groups.

        A group is as good as the sum of its two best scores (DeepSeek-V3, arXiv 2412.19437,
        section 2.1.2, and its published code).
        """
        groups, top = self.config.moe_router_num_groups, self.config.moe_router_group_topk
        if groups is None or groups == top:
            return choice
        grouped = choice.unflatten(-1, (groups, -1))
        worth = grouped.topk(2, dim=-1).values.sum(-1)
        best = torch.zeros_like(worth, dtype=torch.bool)
        best.scatter_(-1, worth.topk(top, dim=-1).indices, True)
        return grouped.masked_fill(~best.unsqueeze(-1), -torch.inf).flatten(-2)
