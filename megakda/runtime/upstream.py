"""Bugs of megatron-core 0.16.1 that appear where TransformerEngine is absent, on any device.

Each entry says what goes wrong. All of them are reported by the stack trace or the wrong resume
that they cause; drop an entry once a megatron-core release no longer needs it.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from megakda.runtime.adamw import AdamW
from megakda.runtime.hook import Patches


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


def patches(backend: str) -> Patches:
    """The patches for `runtime.backend`; with TransformerEngine its own FusedAdam stays."""
    table: dict[str, Any] = {
        "transformer.moe.moe_utils": _router_gemm,
        "tensor_parallel.random": _checkpoint_without_output,
    }
    if backend == "torch":
        table["optimizer"] = _adam
        table["optimizer.distrib_optimizer"] = _adam_in_distributed_optimizer
    return table
