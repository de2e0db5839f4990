"""Muon for matrices and AdamW for everything else, in one optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from megakda.config.schema import MuonConfig, OptimConfig
from megakda.optim.matrices import Assignment
from megakda.optim.matrix_exchange import Held, MatrixExchange
from megakda.optim.shards import Shard
from megakda.runtime.adamw import AdamW, gradients


class Muon(AdamW):
    """The inner optimizer of megatron-core's: it updates this rank's fp32 shards.

    With momentum M <- m M + (1 - m) G of a matrix and, with Nesterov's form, N = m M + (1 - m) G,

        W <- (1 - lr wd) W - lr update_rms sqrt(max(rows, columns)) NewtonSchulz(N)

    (K. Jordan et al., 2024; Moonlight, arXiv 2502.16982, eq. 1 and 4; the factors of G do not
    matter, since the orthogonalisation scales its argument). The scale gives updates the size of
    AdamW's, so that one learning rate and one weight decay serve both. A matrix has one state,
    `exp_avg`, the momentum; a parameter of AdamW has two.

    A call of `step` is collective over the ranks of a pipeline stage.

    Args:
        groups: megatron-core's parameter groups; `lr` and `weight_decay` are read from them.
        shards: this rank's share of each parameter.
        assignments: of the same parameters.
        config: of both; the learning rate and the decay are read from the groups.
        group: of a pipeline stage.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        shards: Sequence[Shard],
        assignments: Mapping[torch.nn.Parameter, Assignment],
        config: OptimConfig,
        group: torch.distributed.ProcessGroup,
    ):
        # torch's constructor refuses shards of fp32 parameters, which are views.
        super().__init__(
            [torch.empty(0)],
            lr=config.lr,
            weight_decay=config.weight_decay,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
        )
        self.param_groups = groups
        self.muon = muon = config.muon
        held: list[Held] = []
        self._places: list[tuple[torch.Tensor, int, float]] = []  # per held: shard, offset, scale
        self._matrix_shards: list[torch.Tensor] = []
        for param, main, first, last in shards:
            blocks = assignments[param].blocks
            if blocks:
                self._matrix_shards.append(main)
            for place, block in blocks:
                start, end = max(first, place), min(last, place + block.size)
                if start < end:
                    held.append(Held(block, start - place, end - place))
                    size = max(block.matrix.rows, block.matrix.columns)
                    scale = muon.update_rms * math.sqrt(size)
                    self._places.append((main, start - first, scale))
        self._is_matrix = set(self._matrix_shards)
        self.exchange = MatrixExchange(
            held, group, newton_schulz_dtype(muon), muon.newton_schulz_steps
        )
        for param_group in self.param_groups:  # all states exist from the beginning, for loading
            for param in param_group["params"]:
                if param in self._is_matrix:
                    self.state[param]["exp_avg"] = torch.zeros_like(param)
                else:
                    self._state(param)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter."""
        assert closure is None
        for group in self.param_groups:
            group["step"] = int(group.get("step", 0)) + 1
            self.update(group, [p for p in group["params"] if p not in self._is_matrix])

        updates = self._directions()
        parts = [
            updates[main].view(-1)[first : first + held.end - held.start]
            for held, (main, first, _) in zip(self.exchange.held, self._places, strict=True)
        ]
        self.exchange.orthogonalize(parts)
        if parts:
            torch._foreach_mul_(parts, [scale for _, _, scale in self._places])
        if self.observer is not None:
            for main, update in updates.items():
                self.observer(main, update)
        for group in self.param_groups:
            mains = [p for p in group["params"] if p in self._is_matrix]
            if mains:
                torch._foreach_mul_(mains, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(mains, [updates[p] for p in mains], alpha=-group["lr"])

    def _directions(self) -> dict[torch.Tensor, torch.Tensor]:
        """Per shard of matrices, its momentum after this step's gradient, with Nesterov's look.

        It takes the memory of the gradients, which nobody reads after the update.
        """
        shards, momentum = self._matrix_shards, self.muon.momentum
        if not shards:
            return {}
        grads = gradients(shards)
        averages = [self.state[shard]["exp_avg"] for shard in shards]
        torch._foreach_lerp_(averages, grads, 1 - momentum)
        if self.muon.nesterov:
            torch._foreach_lerp_(grads, averages, momentum)
        else:
            torch._foreach_copy_(grads, averages)
        return dict(zip(shards, grads, strict=True))


def newton_schulz_dtype(config: MuonConfig) -> torch.dtype:
    """bf16 where matrix units are fast in it, fp32 on a CPU, or what `config.dtype` says."""
    if config.dtype == "auto":
        on_gpu = torch.device(torch.cuda.current_device()).type == "cuda"
        return torch.bfloat16 if on_gpu else torch.float32
    return torch.bfloat16 if config.dtype == "bf16" else torch.float32
