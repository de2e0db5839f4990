"""How large updates and weights are, by component of the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate

from megakda.optim.matrices import GROUPS, Assignment
from megakda.optim.shards import shards
from megakda.runtime.adamw import AdamW


class UpdateTelemetry:
    """Root mean squares of updates, before the learning rate, and of weights.

    Args:
        optimizer: megatron-core's ChainedOptimizer; updates of others than Muon and our AdamW
            (TransformerEngine's) are not seen.
        assignments: of all parameters.
    """

    def __init__(self, optimizer: Any, assignments: Sequence[Assignment]):
        groups = {assignment.param: assignment.group for assignment in assignments}
        self._parts = list(optimizer.chained_optimizers)
        self._rows = {
            shard.main: GROUPS.index(groups[shard.param])
            for part in self._parts
            for shard in shards(part)
            if param_is_not_tensor_parallel_duplicate(shard.param)
        }
        self._device = torch.device(torch.cuda.current_device())
        self._updates = self._zeros()

    def watch(self, on: bool) -> None:
        """Switches recording on for the next step, or off."""
        self._updates = self._zeros()
        for part in self._parts:
            if isinstance(part.optimizer, AdamW):
                part.optimizer.observer = self._observe if on else None

    def collect(self) -> dict[str, dict[str, float]]:
        """Of the last step, if it was watched and its update not skipped. Collective.

        Returns:
            {"update_rms": {component: ...}, "weight_rms": {...}}.
        """
        weights = self._zeros()
        for main, row in self._rows.items():
            weights[row] += _squares(main)
        joint = torch.stack([self._updates, weights])
        torch.distributed.all_reduce(joint)
        found = {}
        for name, rows in zip(("update_rms", "weight_rms"), joint.tolist(), strict=True):
            found[name] = {
                group: (squares / elements) ** 0.5
                for group, (squares, elements) in zip(GROUPS, rows, strict=True)
                if elements
            }
        return {name: values for name, values in found.items() if values}

    def _zeros(self) -> torch.Tensor:
        """Per component: sum of squares, elements."""
        return torch.zeros(len(GROUPS), 2, dtype=torch.float64, device=self._device)

    def _observe(self, main: torch.Tensor, update: torch.Tensor) -> None:
        row = self._rows.get(main)
        if row is not None:
            self._updates[row] += _squares(update)


def _squares(x: torch.Tensor) -> torch.Tensor:
    """(sum of squares, elements)."""
    return torch.stack([x.square().sum().double(), x.new_tensor(x.numel()).double()])
