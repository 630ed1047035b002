"""What happened to the cached pages, in order, on its way to those who route by it."""

from __future__ import annotations

from services.worker.engine.messages import CacheCleared, CacheEvent, PagesRemoved, PagesStored


class CacheEventCollector:
    """Collects changes of the set of held prefix hashes and joins consecutive ones into runs.

    Each hash is announced once however many pages carry it (a forged collision may give two
    prefixes one hash), so listeners see a proper set: a page is stored while its parent is held,
    and removed after its children.
    """

    def __init__(self) -> None:
        self._events: list[CacheEvent] = []
        # Pages by prefix hash; more than 1 only after a collision.
        self._num_pages: dict[int, int] = {}

    @property
    def held_hashes(self) -> set[int]:
        """Every hash that listeners believe to be held."""
        return set(self._num_pages)

    def store(self, parent_hash: int, prefix_hash: int) -> None:
        """A page came under the page that `parent_hash` names (ROOT_HASH for none)."""
        if prefix_hash in self._num_pages:
            self._num_pages[prefix_hash] += 1
            return
        self._num_pages[prefix_hash] = 1
        last = self._events[-1] if self._events else None
        if type(last) is PagesStored and last.prefix_hashes[-1] == parent_hash:
            last.prefix_hashes.append(prefix_hash)
        else:
            self._events.append(PagesStored(parent_hash, [prefix_hash]))

    def remove(self, prefix_hash: int) -> None:
        """A page without children is gone."""
        num_pages = self._num_pages[prefix_hash]
        if num_pages > 1:
            self._num_pages[prefix_hash] = num_pages - 1
            return
        del self._num_pages[prefix_hash]
        last = self._events[-1] if self._events else None
        if type(last) is PagesRemoved:
            last.prefix_hashes.append(prefix_hash)
        else:
            self._events.append(PagesRemoved([prefix_hash]))

    def clear(self) -> None:
        """All pages are gone."""
        self._num_pages.clear()
        self._events.append(CacheCleared())

    def take(self) -> list[CacheEvent]:
        """What happened since the last call, oldest first."""
        events, self._events = self._events, []
        return events
