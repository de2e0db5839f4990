"""Numbers about a step that live on many ranks, brought together in one reduction each."""

from __future__ import annotations

import resource
import sys
from typing import Any

import torch
from megatron.core import parallel_state

from megakda.layers.kda import KimiDeltaAttention
from megakda.models.sharding import ModelChunk
from megakda.optim.finalize import GradFinalizer


def parameter_and_expert_metrics(
    chunks: list[ModelChunk], finalizer: GradFinalizer
) -> dict[str, float]:
    """Parameter norm, and expert load and bias where the model has experts. Collective.

    Returns:
        param_norm; expert_load_max_over_mean (1 is perfect balance; mean over MoE layers) and
        expert_bias_norm (over all layers).
    """
    world = torch.distributed.get_world_size()
    data = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    expert_data = parallel_state.get_expert_data_parallel_world_size()
    first_in_tensor_group = parallel_state.get_tensor_model_parallel_rank() == 0
    squares = 0.0
    for chunk in chunks:
        for param in chunk.parameters():
            is_expert = not getattr(param, "allreduce", True)
            is_split = getattr(param, "tensor_model_parallel", False)
            if is_expert or is_split or first_in_tensor_group:
                copies = expert_data if is_expert else data
                squares += float(param.detach().float().square().sum()) / copies
    experts = finalizer.expert_metrics()
    totals = torch.tensor(
        [squares, experts["layers"], experts["max_over_mean"], experts["bias_square"]],
        dtype=torch.float64,
        device=torch.cuda.current_device(),
    )
    torch.distributed.all_reduce(totals)
    squares, layers, ratio, bias_square = totals.tolist()
    metrics = {"param_norm": squares**0.5}
    if layers:
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        metrics["expert_load_max_over_mean"] = ratio / layers
        metrics["expert_bias_norm"] = (bias_square * stages / world) ** 0.5
    return metrics


class KdaTelemetry:
    """Health of every linear attention layer: mean decay, mean beta, share of saturated decays."""

    def __init__(self, chunks: list[ModelChunk], num_layers: int):
        self._layers = [
            module
            for chunk in chunks
            for module in chunk.modules()
            if isinstance(module, KimiDeltaAttention)
        ]
        self._num_layers = num_layers

    def watch(self, on: bool) -> None:
        """Switches recording on for the next step, or off."""
        for layer in self._layers:
            layer.watch = on
            layer.telemetry = None

    def collect(self) -> dict[str, dict[str, float]]:
        """Means over the batch and all heads, by layer number (1-based). Collective.

        Returns:
            {"decay_mean": {"1": ...}, "beta_mean": {...}, "gate_saturated": {...}}.
        """
        sums = torch.zeros(
            self._num_layers, 4, dtype=torch.float64, device=torch.cuda.current_device()
        )
        for layer in self._layers:
            if layer.telemetry is not None:
                sums[layer.layer_number - 1] += layer.telemetry.double()
        torch.distributed.all_reduce(sums)
        names = ("decay_mean", "beta_mean", "gate_saturated")
        rows = {str(i + 1): row for i, row in enumerate(sums.tolist()) if row[3] > 0}
        return {
            name: {layer: row[column] / row[3] for layer, row in rows.items()}
            for column, name in enumerate(names)
        }


class Telemetry:
    """Several recorders as one: switched on together, their findings in one row."""

    def __init__(self, *recorders: Any):
        self._recorders = recorders

    def watch(self, on: bool) -> None:
        """Switches recording on for the next step, or off."""
        for recorder in self._recorders:
            recorder.watch(on)

    def collect(self) -> dict[str, Any]:
        """What the last step has left. Collective."""
        return {
            name: row for recorder in self._recorders for name, row in recorder.collect().items()
        }


def memory_gib(device: torch.device) -> float:
    """Peak memory of this rank in GiB: allocated on the GPU, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
