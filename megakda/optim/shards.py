"""Where megatron-core's optimizers keep this rank's fp32 share of each parameter."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


class Shard(NamedTuple):
    """Elements [start, end) of a local parameter, counted row by row, in fp32."""

    param: torch.nn.Parameter
    main: torch.Tensor  # what the inner optimizer updates; any shape of end - start elements
    start: int
    end: int


def shards(part: Any) -> list[Shard]:
    """Of one of the optimizers in a ChainedOptimizer; parameters without a share here are left out.

    The distributed optimizer has flat ranges, the plain one whole parameters.
    """
    inner = part.optimizer
    if not isinstance(part, DistributedOptimizer):
        return [
            Shard(param, param, 0, param.numel())
            for group in inner.param_groups
            for param in group["params"]
        ]
    found = []
    for param, (group, place) in part.model_param_group_index_map.items():
        where = part._get_model_param_range_map(param)["param"]
        main = inner.param_groups[group]["params"][place]
        found.append(Shard(param, main, where.start, where.end))
    return found
