"""A micro-batch on its way to one rank: its share of the tokens, and where documents begin."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region

from megakda.errors import CommunicationError
from megakda.layers.context_layout import Documents, documents_of
from megakda.layers.context_parallel import ContextParallel, exchange


@dataclass(frozen=True)
class RankBatch:
    """What one rank sees of a micro-batch of b rows of T tokens, on its device.

    Attributes:
        tokens, labels, position_ids: int64 [b, T / P], P ranks of context parallelism.
        loss_mask: float [b, T / P].
        padding_mask: bool [b, T / P], true where there is no token, or None if nothing is packed.
        documents: of the whole micro-batch, or None if nothing is packed.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    loss_mask: torch.Tensor
    padding_mask: torch.Tensor | None
    documents: Documents | None


def rank_batch(
    batch: dict[str, torch.Tensor], context: ContextParallel, device: torch.device
) -> RankBatch:
    """This rank's share of `batch`, as `megakda.data.datasets.micro_batches` yields it.

    Raises:
        ValueError: rows that the layout cannot cut, or cu_seqlens that break its rules.
    """
    batch = dict(batch)
    cu_seqlens = batch.pop("cu_seqlens", None)
    rows, tokens = batch["tokens"].shape
    documents = None if cu_seqlens is None else documents_of(cu_seqlens, rows, tokens)
    own = {
        name: context.layout.take(x, context.rank).to(device, non_blocking=True)
        for name, x in batch.items()
    }
    return RankBatch(
        tokens=own["tokens"],
        labels=own["labels"],
        position_ids=own["position_ids"],
        loss_mask=own["loss_mask"],
        padding_mask=own.get("padding_mask"),
        documents=documents,
    )


def sequence_parallel_share(padding_mask: torch.Tensor) -> torch.Tensor:
    """[b, s] -> [b, s / TP]. megatron-core splits the mask on the first pipeline stage only."""
    return scatter_to_sequence_parallel_region(padding_mask.T.contiguous()).T.contiguous()


class SameBatches:
    """That ranks which share sequences read the same ones.

    Tensor- and context-parallel ranks and the stages of a pipeline each read the data set for
    themselves. Ranks with other documents would exchange the states of other documents, or wait for
    ever, so documents are compared before each micro-batch is worked on, within a stage; the tokens
    of all stages are compared once per step.
    """

    def __init__(self) -> None:
        self._sharers = parallel_state.get_tensor_and_context_parallel_group()
        stages = parallel_state.get_pipeline_model_parallel_group()
        self._groups = [group for group in (self._sharers, stages) if group.size() > 1]
        self._digest: int | None = None  # of the step so far; None where nothing was read

    def see(self, batch: dict[str, torch.Tensor], documents: Documents | None) -> None:
        """Takes note of a micro-batch, as read. Collective where something is packed.

        Raises:
            CommunicationError: another rank of the stage has other documents; on all of them.
        """
        if not self._groups:
            return
        digest = zlib.crc32(batch["tokens"].numpy().data)
        if documents is not None:
            bounds = zlib.crc32(repr(documents).encode())
            digest += bounds
            _compare_documents(documents, bounds, self._sharers)
        self._digest = (self._digest or 0) + digest  # stages may read in another order

    def differ(self) -> bool:
        """Whether another rank read something else since the last call. Collective."""
        if not self._groups:
            return False
        nothing = -(2**62)
        own = [nothing, nothing] if self._digest is None else [self._digest, -self._digest]
        self._digest = None
        extremes = torch.tensor(own, dtype=torch.int64, device=torch.cuda.current_device())
        for group in self._groups:
            torch.distributed.all_reduce(extremes, torch.distributed.ReduceOp.MAX, group)
        highest, lowest = extremes.tolist()
        return highest != nothing and highest != -lowest


def _compare_documents(
    documents: Documents, digest: int, group: torch.distributed.ProcessGroup
) -> None:
    if group.size() == 1:
        return
    own = torch.tensor([digest], dtype=torch.int64, device=torch.cuda.current_device())
    found = own.new_empty(group.size())
    with exchange("the comparison of cu_seqlens", group):
        torch.distributed.all_gather_into_tensor(found, own, group=group)
    values = found.tolist()
    if len(set(values)) > 1:
        ranks = torch.distributed.get_process_group_ranks(group)
        common = max(values, key=values.count)
        others = [rank for rank, value in zip(ranks, values, strict=True) if value != common]
        raise CommunicationError(
            f"ranks {ranks} share sequences, but ranks {others} have other cu_seqlens than the "
            f"rest (this is rank {torch.distributed.get_rank()}, with {len(documents.bounds) - 1} "
            f"documents): {SAME_DATA}"
        )


SAME_DATA = (
    "all must read the same data in the same order; compare data.paths, data.cache and train.seed "
    "on their machines"
)
