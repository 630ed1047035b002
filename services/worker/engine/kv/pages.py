"""Which pages of the pool are free. Owns page ids, not their contents."""

from __future__ import annotations

from collections.abc import Sequence


class PageAllocator:
    """A free list of the page ids 0 to `num_pages` - 1.

    Every page is either free or held by exactly one caller. The page freed last is handed out
    first.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages must be >= 1, got {num_pages}")
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Pages that can be allocated now."""
        return len(self._free)

    @property
    def num_held(self) -> int:
        """Pages that callers hold."""
        return self.num_pages - len(self._free)

    def allocate(self, num_pages: int) -> list[int]:
        """Take pages. The caller makes sure that as many are free."""
        remaining = len(self._free) - num_pages
        assert 0 <= remaining <= len(self._free), f"{num_pages} pages of {len(self._free)} free"
        taken = self._free[remaining:]
        del self._free[remaining:]
        return taken

    def free(self, pages: Sequence[int]) -> None:
        """Give pages back."""
        self._free.extend(pages)
        assert len(self._free) <= self.num_pages, "a page was freed twice"

    def check(self, held: Sequence[int]) -> None:
        """Raise AssertionError unless `held` and the free list partition the pool."""
        everything = sorted([*self._free, *held])
        assert everything == list(range(self.num_pages)), _difference(
            self._free, held, self.num_pages
        )


def _difference(free: Sequence[int], held: Sequence[int], num_pages: int) -> str:
    leaked = set(range(num_pages)) - set(free) - set(held)
    shared = set(free) & set(held)
    repeated = len(free) + len(held) - len(set(free)) - len(set(held))
    return f"pages leaked: {len(leaked)}, free but held: {len(shared)}, held twice: {repeated}"
