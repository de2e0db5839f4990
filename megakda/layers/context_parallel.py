"""What all layers share under context parallelism: the layout, the groups, and clear failures."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megakda.errors import CommunicationError
from megakda.layers.context_layout import ContextLayout, ContextPlan, Documents, plan_context
from megakda.runtime.distributed import DEAD_OR_STUCK, first_line

Group = torch.distributed.ProcessGroup


@dataclass(frozen=True)
class ContextParallel:
    """How the sequence is shared by the ranks of a context-parallel group.

    Attributes:
        layout: which tokens each rank holds, the same for all layers.
        group: the whole group.
        heads_group: neighbours in `group` among which KDA exchanges tokens for heads (all-to-all),
            or None: then no heads are exchanged.
        state_group: ranks with the same place in their heads group, among which KDA exchanges
            states, or None.
        attention: how MLA meets the keys of other ranks, "all_gather" or "ring".
    """

    layout: ContextLayout
    group: Group | None = None
    heads_group: Group | None = None
    state_group: Group | None = None
    attention: str = "all_gather"

    @property
    def rank(self) -> int:
        return 0 if self.group is None else self.group.rank()

    @property
    def heads_ranks(self) -> int:
        return 1 if self.heads_group is None else self.heads_group.size()

    def plan(self, documents: Documents) -> ContextPlan:
        """The pieces of documents that this rank holds."""
        return plan_context(self.layout, documents, self.rank)

    def state_plan(self, documents: Documents) -> ContextPlan:
        """The pieces of documents that this rank's heads group holds together."""
        layout = self.layout.outer(self.heads_ranks)
        return plan_context(layout, documents, self.rank // self.heads_ranks)


ALONE = ContextParallel(ContextLayout("contiguous", 1))
"""One rank holds whole sequences."""


@contextlib.contextmanager
def exchange(what: str, group: Group) -> Iterator[None]:
    """Names the exchange that fails, instead of a socket.

    Raises:
        CommunicationError: in the place of a backend's RuntimeError.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, (CommunicationError, torch.OutOfMemoryError)):
            raise
        raise CommunicationError(
            f"{what} among {group.size()} ranks that share sequences failed on rank "
            f"{torch.distributed.get_rank()}: {first_line(error)}; {DEAD_OR_STUCK}"
        ) from error
