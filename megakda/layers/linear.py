"""Linears that megatron-core does not offer without TransformerEngine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    linear_with_grad_accumulation_and_async_allreduce,
)
from megatron.core.transformer.transformer_config import TransformerConfig


class ReplicatedLinear(torch.nn.Module):
    """A bias-free linear whose whole weight lives on every tensor-parallel rank.

    Its weight gradient is complete only if the gradient of its output is. Under sequence
    parallelism each rank covers its own tokens and megatron-core sums the weight gradient over the
    group (the `sequence_parallel` mark); without it every rank must receive the gradient from all
    heads, so whatever reads the output has to reduce its input gradient over the group, as
    ColumnParallelLinear and `enter_tensor_parallel` do.

    Shape: [..., in_features] -> [..., out_features].
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: TransformerConfig,
    ):
        super().__init__()
        self.weight = torch.nn.Parameter(
            torch.empty(
                out_features,
                in_features,
                device=torch.cuda.current_device(),
                dtype=config.params_dtype,
            )
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)


def column_parallel(
    in_features: int,
    out_features: int,
    config: TransformerConfig,
    pg_collection: ProcessGroupCollection,
) -> ColumnParallelLinear:
    """megatron-core's column-parallel linear without bias: outputs split over the group."""
    return ColumnParallelLinear(
        in_features,
        out_features,
        config=config,
        init_method=config.init_method,
        bias=False,
        tp_group=pg_collection.tp,
    )


def row_parallel(
    in_features: int,
    out_features: int,
    config: TransformerConfig,
    pg_collection: ProcessGroupCollection,
) -> RowParallelLinear:
    """megatron-core's row-parallel linear without bias: inputs split over the group."""
    return RowParallelLinear(
        in_features,
        out_features,
        config=config,
        init_method=config.output_layer_init_method,
        bias=False,
        input_is_parallel=True,
        skip_bias_add=True,
        tp_group=pg_collection.tp,
    )


def project_together(
    x: torch.Tensor, linears: Sequence[ColumnParallelLinear]
) -> tuple[torch.Tensor, ...]:
    """``tuple(linear(x) for linear in linears)`` in one matrix product.

    The weights stay separate parameters (checkpoints and matrix-wise optimizers want them so) and
    are joined here: sequence parallelism then gathers `x` once, and reduce-scatters its gradient
    once, instead of once per projection.

    Args:
        x: [s, b, in_features], split along s under sequence parallelism.
        linears: column-parallel linears over the same group, without bias.

    Returns:
        One [S, b, out_features / TP] per linear, S being the whole sequence.
    """
    first = linears[0]
    sizes = [linear.output_size_per_partition for linear in linears]
    weight = None if torch.is_grad_enabled() else _joint_weight(linears)
    joint = linear_with_grad_accumulation_and_async_allreduce(
        x,
        torch.cat([ready_weight(linear) for linear in linears]) if weight is None else weight,
        bias=None,
        gradient_accumulation_fusion=False,
        allreduce_dgrad=first.allreduce_dgrad,
        sequence_parallel=first.sequence_parallel,
        tp_group=first.tp_group,
    )
    return joint.split(sizes, dim=-1)


def projected_together(
    x: torch.Tensor, linears: Sequence[ColumnParallelLinear | ReplicatedLinear]
) -> tuple[torch.Tensor, ...] | None:
    """The same for linears that `join_weights` has joined, on one rank and without autograd.

    Returns:
        None where that is not so.
    """
    weight = None if torch.is_grad_enabled() else _joint_weight(linears)
    if weight is None:
        return None
    return F.linear(x, weight).split([len(linear.weight) for linear in linears], dim=-1)


def join_weights(linears: Sequence[ColumnParallelLinear | ReplicatedLinear]) -> None:
    """Lays the weights of `project_together` side by side in memory, so that it need not copy them.

    For generation, where a step reads every weight once: the parameters become views of one tensor,
    with the same values. Values may change in place; a parameter that is given another tensor
    (`.data =`, `.to`, a data-parallel wrapper) leaves the joint one, and is copied again.
    """
    joint = torch.cat([linear.weight.data for linear in linears])
    sizes = [len(linear.weight) for linear in linears]
    for linear, part in zip(linears, joint.split(sizes), strict=True):
        linear.weight.data = part
    linears[0].joint_weight = joint


def _joint_weight(
    linears: Sequence[ColumnParallelLinear | ReplicatedLinear],
) -> torch.Tensor | None:
    """The tensor that `join_weights` has made of these, if their weights still lie in it."""
    joint = getattr(linears[0], "joint_weight", None)
    if joint is None:
        return None
    place = joint.data_ptr()
    for linear in linears:
        if linear.weight.data_ptr() != place:
            return None
        place += linear.weight.nbytes
    rows = (place - joint.data_ptr()) // (joint.shape[1] * joint.element_size())
    return joint[:rows]


def ready_weight(module: torch.nn.Module) -> torch.Tensor:
    """`module.weight`, for use outside the module's own forward.

    Overlapped parameter gathering waits for a weight in a pre-hook of the module that holds it, so
    the pre-hooks are run first.
    """
    for hook in module._forward_pre_hooks.values():
        hook(module, ())
    return module.weight  # type: ignore[return-value]


def enter_tensor_parallel(
    x: torch.Tensor, sequence_parallel: bool, group: torch.distributed.ProcessGroup
) -> torch.Tensor:
    """Hands a replicated activation to heads that are split over `group`.

    Forward: the whole sequence on every rank. Backward: the sum of all ranks' gradients, split
    along the sequence again under sequence parallelism.

    Args:
        x: [s, b, ...], split along s under sequence parallelism, else whole.

    Returns:
        [S, b, ...].
    """
    if sequence_parallel:
        return gather_from_sequence_parallel_region(x.contiguous(), group=group)
    return copy_to_tensor_model_parallel_region(x, group=group)
