"""Routed experts as stacked weights: one grouped matrix product on a GPU, a loop on a CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import divide


class StackedExperts(MegatronModule):
    """SwiGLU experts behind megatron-core's token dispatcher, without TransformerEngine.

    Parameters (local experts E, this rank's share F of the expert width, hidden h):
    `gate_up` [E, 2, F, h], the gate's matrix before the up matrix, and `down` [E, h, F]. The extra
    axis of `gate_up` keeps both matrices in one product and lets expert tensor parallelism split F
    without interleaving the two.

    Args:
        num_local_experts: E.
        config: megatron-core's config; `moe_ffn_hidden_size` is the whole expert width.
        pg_collection: process groups; `ep`, `expt_tp` and `expt_dp` are used.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
    ):
        super().__init__(config=config)
        self.ep_group = pg_collection.ep
        self.tp_group = pg_collection.expt_tp
        self.dp_group = pg_collection.expt_dp
        self.num_local_experts = num_local_experts
        width = divide(config.moe_ffn_hidden_size, self.tp_group.size())
        hidden = config.hidden_size
        self.gate_up = self._parameter((num_local_experts, 2, width, hidden), tp_axis=2)
        self.down = self._parameter((num_local_experts, hidden, width), tp_axis=2)

    def _parameter(self, shape: tuple[int, ...], tp_axis: int) -> torch.nn.Parameter:
        param = torch.nn.Parameter(
            torch.empty(shape, device=torch.cuda.current_device(), dtype=self.config.params_dtype)
        )
        # Counts in the gradient norm on every tensor-parallel rank: none holds a duplicate.
        set_tensor_model_parallel_attributes(param, True, tp_axis, 1)
        # Reduced over the expert-data-parallel group also where EP=1: with expert tensor
        # parallelism unequal to tensor parallelism, that is not the data-parallel group.
        param.allreduce = False  # type: ignore[attr-defined]
        return param

    def forward(
        self,
        permuted_local_hidden_states: torch.Tensor,
        tokens_per_expert: torch.Tensor,
        permuted_probs: torch.Tensor,
    ) -> tuple[torch.Tensor, None]:
        """Applies each expert to its tokens.

        Args:
            permuted_local_hidden_states: [tokens, h], sorted by local expert.
            tokens_per_expert: [E], int.
            permuted_probs: [tokens], the routing weights.

        Returns:
            ([tokens, h], no bias).
        """
        x = permuted_local_hidden_states
        gate, up = grouped_linear(x, self.gate_up.flatten(1, 2), tokens_per_expert).chunk(2, dim=-1)
        hidden = F.silu(gate) * up * permuted_probs.unsqueeze(-1).to(gate.dtype)
        return grouped_linear(hidden, self.down, tokens_per_expert), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """One tensor per matrix: experts split over EP along axis 0, the width over expert TP."""
        assert not sharded_offsets, "layers are stored one by one"
        ep, etp = self.ep_group, self.tp_group
        return {
            f"{prefix}{name}": ShardedTensor.from_rank_offsets(
                f"{prefix}{name}",
                getattr(self, name),
                (0, ep.rank(), ep.size()),
                (2, etp.rank(), etp.size()),
                replica_id=(0, 0, self.dp_group.rank()),
            )
            for name in ("gate_up", "down")
        }


def grouped_linear(
    x: torch.Tensor, weight: torch.Tensor, tokens_per_expert: torch.Tensor
) -> torch.Tensor:
    """x_e @ weight[e]^T for the rows x_e of each expert.

    Args:
        x: [tokens, in], sorted by expert.
        weight: [E, out, in].
        tokens_per_expert: [E], int, may contain zeros; sums to tokens.

    Returns:
        [tokens, out] in the dtype of `x`.
    """
    if x.is_cuda and x.dtype == torch.bfloat16:  # the one dtype that torch's CUDA kernel takes
        offsets = tokens_per_expert.to(x.device).cumsum(0).to(torch.int32)
        out = F.grouped_mm(x, weight.transpose(1, 2), offs=offsets)
        if out.requires_grad:
            out.register_hook(torch.Tensor.contiguous)  # its backward takes no other layout
        return out
    counts = tokens_per_expert.tolist()
    if not torch.is_grad_enabled():
        return _looped_linear(x, weight, counts)
    return _LoopedLinear.apply(x, weight, counts)


def _looped_linear(
    x: torch.Tensor, weight: torch.Tensor, tokens_per_expert: list[int]
) -> torch.Tensor:
    """`grouped_linear` expert by expert."""
    out = x.new_empty(x.shape[0], weight.shape[1])
    first = 0
    for e, count in enumerate(tokens_per_expert):
        if count:  # with one token to decode, most experts have none
            rows = slice(first, first + count)
            torch.mm(x[rows], weight[e].t(), out=out[rows])
        first += count
    return out


class _LoopedLinear(torch.autograd.Function):
    """`grouped_linear` expert by expert, writing each expert's weight gradient in place.

    Autograd on slices of the stacked weight would add up one full-size gradient per expert.
    """

    @staticmethod
    def forward(ctx, x, weight, tokens_per_expert):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        ctx.tokens_per_expert = tokens_per_expert
        return _looped_linear(x, weight, tokens_per_expert)

    @staticmethod
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
        for e, (g_e, x_e, dx_e) in enumerate(
            zip(*(t.split(ctx.tokens_per_expert) for t in (grad_out, x, grad_x)), strict=True)
        ):
            torch.mm(g_e, weight[e], out=dx_e)
            torch.mm(g_e.t(), x_e, out=grad_weight[e])
        return grad_x, grad_weight, None
