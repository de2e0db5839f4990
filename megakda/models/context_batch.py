"""A micro-batch on its way to one rank: its share of the tokens, and where documents begin."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
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


def check_agreement(documents: Documents, group: torch.distributed.ProcessGroup) -> None:
    """That all ranks of `group` have the same documents. Collective.

    Ranks that disagree would exchange states of different sizes, or of different documents without
    noticing.

    Raises:
        CommunicationError: they do not, on every rank.
    """
    if group.size() == 1:
        return
    digest = hashlib.sha256(repr(documents).encode()).digest()
    own = torch.tensor(
        [int.from_bytes(digest[:7], "big")], dtype=torch.int64, device=torch.cuda.current_device()
    )
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
            "documents): all must read the same data in the same order; compare data.paths, "
            "data.cache and train.seed on their machines"
        )
