"""Bugs of megatron-core 0.16.1 on any device, most of them where TransformerEngine is absent.

Each entry says what goes wrong without it; drop an entry once a megatron-core release no longer
needs it.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from megakda.runtime.adamw import AdamW
from megakda.runtime.hook import Patches, merge


def _router_gemm(module: ModuleType) -> dict[str, Any]:
    # `router_gating_linear` tests `te_general_gemm is not None`, but the name exists only where
    # TransformerEngine could be imported: NameError on the first MoE forward.
    if not hasattr(module, "te_general_gemm"):
        module.te_general_gemm = None  # type: ignore[attr-defined]
    return {}


def _checkpoint_without_output(module: ModuleType) -> dict[str, Any]:
    # `__init__(self, fp8=False)` computes `self.fp8 = fp8 is not None`, so the default means FP8
    # and the recompute of layer norms asks for TransformerEngine's FP8 state: NameError.
    module.CheckpointWithoutOutput.__init__.__defaults__ = (None,)
    return {}


def _adam(module: ModuleType) -> dict[str, Any]:
    # With torch.optim.AdamW the distributed optimizer refuses to load, and where that is forced,
    # all parameters share one `step` tensor after a resume: every parameter advances it.
    return {"Adam": AdamW, "USING_PYTORCH_OPTIMIZER": False}


def _adam_in_distributed_optimizer(module: ModuleType) -> dict[str, Any]:
    return {"Adam": AdamW, "HAVE_APEX_OR_TE": True, "USING_APEX_OPTIMIZER": True}


def _lost_reduction(module: ModuleType) -> dict[str, Any]:
    # `_reduce` all-reduces `input_.contiguous()` and returns `input_`: where that made a copy, the
    # sum is lost without a word. MLA's shared key meets this with one head per rank, where its
    # gradient is a slice of the keys' gradient.
    def _reduce(input_: torch.Tensor, group: torch.distributed.ProcessGroup) -> torch.Tensor:
        if group.size() == 1:
            return input_
        input_ = input_.contiguous()
        torch.distributed.all_reduce(input_, group=group)
        return input_

    return {"_reduce": _reduce}


def _mixed_dtype_groups(module: ModuleType) -> dict[str, Any]:
    # A parameter group with fp32 and bf16 members (A_log beside norm weights, routers beside
    # matrices) is numbered in the order of the gradient buffers, but the inner optimizer gets its
    # fp32 members first: saving then reads another parameter's state. Numbering them the same way
    # mends it.
    optimizer = module.DistributedOptimizer
    original = optimizer._build_optimizer_group_ranges

    def build(cls: type, param_groups: Any, gbuf_ranges: Any) -> tuple[dict, list]:
        order, groups = original(param_groups, gbuf_ranges)
        for index, group in enumerate(groups):
            group["params"].sort(key=lambda param: param.dtype != torch.float32)
            order.update({param: (index, place) for place, param in enumerate(group["params"])})
        return order, groups

    optimizer._build_optimizer_group_ranges = classmethod(build)
    return {}


def _momentum_only(module: ModuleType) -> dict[str, Any]:
    # Saving and loading take for granted that every parameter has Adam's two moments. For one
    # marked `momentum_only` a stand-in of zeros (without memory) goes through the gathering, and
    # what comes out of it is neither written nor asked for.
    optimizer = module.DistributedOptimizer
    states_of = optimizer._get_main_param_and_optimizer_states
    sharded = optimizer.sharded_param_state_fully_reshardable

    def states(self: Any, model_param: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        tensors = states_of(self, model_param)
        if getattr(model_param, "momentum_only", False):
            main = tensors["param"]
            tensors["exp_avg_sq"] = main.new_zeros(()).expand_as(main)
        return tensors

    def sharded_state(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = sharded(self, *args, **kwargs)
        params = [param for buffer in self.buffers for param in buffer.param_index_map]
        for index, param in enumerate(params if found else ()):
            if getattr(param, "momentum_only", False):
                del found[index]["exp_avg_sq"]
        return found

    optimizer._get_main_param_and_optimizer_states = states
    optimizer.sharded_param_state_fully_reshardable = sharded_state
    return {}


def _padded_buckets(module: ModuleType) -> dict[str, Any]:
    # Saving puts buckets together without the padding between them and then cuts parameters out by
    # offsets that count it: every parameter after the first padded bucket (with overlapped gradient
    # reduction there are several) is saved from its neighbours' data. Counting the padding as part
    # of the buckets while they are put together makes both agree.
    optimizer = module.DistributedOptimizer
    original = optimizer.get_parameter_state_dp_zero

    def padded(self: Any, *args: Any, **kwargs: Any) -> Any:
        sizes = [(buffer, buffer.numel_unpadded, buffer.numel) for buffer in self.buffers]
        for buffer in self.buffers:
            sizes += [(b, b.numel_unpadded, b.grad_data.numel()) for b in buffer.buckets]
        try:
            for whole, _, size in sizes:
                whole.numel_unpadded = size
            return original(self, *args, **kwargs)
        finally:
            for whole, size, _ in sizes:
                whole.numel_unpadded = size

    optimizer.get_parameter_state_dp_zero = padded
    return {}


def _no_gather_by_parts(module: ModuleType) -> dict[str, Any]:
    # Each part of a chained optimizer (dense weights, experts) gathers the parameters of all
    # chunks after its own update: twice the traffic, and the first time before the experts have
    # changed. `_one_gather` does it once, after the last part.
    optimizer = module.DistributedOptimizer
    optimizer.step_with_ready_grads = module.MixedPrecisionOptimizer.step_with_ready_grads
    return {}


def _one_gather(module: ModuleType) -> dict[str, Any]:
    chained = module.ChainedOptimizer
    original = chained.step_with_ready_grads

    @torch.no_grad()
    def step_with_ready_grads(self: Any) -> bool:
        done = original(self)
        for chunk in self.model_chunks:
            settings = chunk.ddp_config
            if settings.use_distributed_optimizer and not settings.overlap_param_gather:
                chunk.start_param_sync()
        return done

    chained.step_with_ready_grads = step_with_ready_grads
    return {}


def patches(backend: str) -> Patches:
    """The patches for `runtime.backend`; with TransformerEngine its own FusedAdam stays."""
    table: Patches = {
        "transformer.moe.moe_utils": _router_gemm,
        "tensor_parallel.random": _checkpoint_without_output,
        "tensor_parallel.mappings": _lost_reduction,
        "optimizer.optimizer": _one_gather,
        "optimizer.distrib_optimizer": _mixed_dtype_groups,
    }
    for patch in (_momentum_only, _padded_buckets, _no_gather_by_parts):
        table = merge(table, {"optimizer.distrib_optimizer": patch})
    if backend == "torch":
        table = merge(
            table,
            {
                "optimizer": _adam,
                "optimizer.distrib_optimizer": _adam_in_distributed_optimizer,
            },
        )
    return table
