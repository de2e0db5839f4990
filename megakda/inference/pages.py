"""Who holds which page of latents: a page belongs to sequences and to saved prefixes alike."""

from __future__ import annotations

from collections.abc import Iterable


class PagePool:
    """Counts holders of pages; a page without holders is free.

    Args:
        pages: how many there are. size: tokens of each.
    """

    def __init__(self, pages: int, size: int):
        self.size = size
        self._holders = [0] * pages
        self._free = list(range(pages - 1, -1, -1))

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    @property
    def total(self) -> int:
        """All pages."""
        return len(self._holders)

    def holders(self, page: int) -> int:
        """How many hold a page."""
        return self._holders[page]

    def needed(self, tokens: int) -> int:
        """Pages that so many tokens take."""
        return -(-tokens // self.size)

    def take(self, count: int) -> list[int]:
        """So many free pages, held once."""
        assert count <= self.free
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._holders[page] = 1
        return taken

    def share(self, pages: Iterable[int]) -> None:
        """One more holder of each."""
        for page in pages:
            assert self._holders[page] > 0, page
            self._holders[page] += 1

    def give_back(self, pages: Iterable[int]) -> None:
        """One holder less of each."""
        for page in pages:
            assert self._holders[page] > 0, page
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._free.append(page)
