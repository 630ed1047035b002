"""The pages of sequences: allocator and prefix tree together, as a sequence sees them."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

from services.worker.engine.batching.sequence import Sequence
from services.worker.engine.kv.events import CacheEventCollector
from services.worker.engine.kv.pages import PageAllocator
from services.worker.engine.kv.radix import Node, RadixTree, page_keys


class SequenceCache:
    """Every page is free, in the tree, one sequence's own, or retired.

    Retired pages are doubles of pages in the tree: the step being planned still writes them, so
    they become free only when it was issued (`free_retired`).
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.num_pages = num_pages
        self.events = CacheEventCollector()
        self.tree = RadixTree(page_size, self.events)
        self._allocator = PageAllocator(num_pages)
        self._retired: list[int] = []
        # Since the start; a flush evicts nothing.
        self.num_evicted = 0

    @property
    def num_free(self) -> int:
        """Pages that nobody uses."""
        return self._allocator.num_free

    @property
    def num_available(self) -> int:
        """Pages that can be had by evicting if need be."""
        return self._allocator.num_free + self.tree.num_evictable

    def keys(self, namespace: str, token_ids: list[int]) -> list[bytes]:
        """The tree's keys of the full pages. Raises OverflowError for an impossible id."""
        return page_keys(namespace, token_ids, self.page_size)

    def pages_of(self, num_tokens: int) -> int:
        """Pages that so many tokens take."""
        return -(-num_tokens // self.page_size)

    def match(self, sequence: Sequence) -> Node:
        """How far the tree has the tokens of a waiting sequence; remembered in its `tail`."""
        max_pages = sequence.max_matched_tokens() // self.page_size
        self._extend_keys(sequence, max_pages)
        sequence.tail = self.tree.match(sequence.keys, max_pages, after=sequence.tail)
        return sequence.tail

    def num_missing(self, sequence: Sequence) -> int:
        """Pages that `acquire` takes out of the available ones, those it locks included."""
        missing = self.pages_of(len(sequence.token_ids)) - sequence.tail.depth
        return missing + self.tree.num_unlocked(sequence.tail)

    def acquire(self, sequence: Sequence) -> None:
        """Lock what was matched and allocate pages for all other known tokens."""
        tail = sequence.tail
        self.tree.lock(tail)
        pages = [node.page for node in tail.path()]
        pages.reverse()
        pages += self.allocate(self.pages_of(len(sequence.token_ids)) - tail.depth)
        sequence.pages = pages

    def allocate(self, num_pages: int) -> list[int]:
        """Pages, by eviction if need be. The caller makes sure that as many are available."""
        lacking = num_pages - self._allocator.num_free
        if lacking > 0:
            evicted = self.tree.evict(lacking)
            self.num_evicted += len(evicted)
            self._allocator.free(evicted)
        return self._allocator.allocate(num_pages)

    def store(self, sequence: Sequence, num_tokens: int) -> list[int]:
        """Put the full pages of the first `num_tokens` tokens into the tree.

        Their ids are known and their keys and values are in place before any later work.
        Returns the indices of pages that were there already: the sequence uses those from the
        next step on.
        """
        node, pages = sequence.tail, sequence.pages
        stop = num_tokens // self.page_size
        self._extend_keys(sequence, stop)
        swapped = []
        for index in range(node.depth, stop):
            node = self.tree.insert(node, sequence.keys[index], pages[index])
            if node.page != pages[index]:
                self._retired.append(pages[index])
                pages[index] = node.page
                swapped.append(index)
        sequence.tail = node
        return swapped

    def release(self, sequence: Sequence) -> None:
        """Unlock its pages in the tree and free its own; `tail` stays as a hint for a match."""
        self._allocator.free(sequence.pages[sequence.tail.depth :])
        self.tree.unlock(sequence.tail)
        sequence.pages = []

    def free_retired(self) -> None:
        """All planned steps were issued: only earlier work still touches retired pages."""
        if self._retired:
            self._allocator.free(self._retired)
            self._retired = []

    def flush(self) -> int:
        """Drop every page that no sequence uses; returns how many."""
        pages = self.tree.clear()
        self._allocator.free(pages)
        return len(pages)

    def check(self, running: Iterable[Sequence]) -> None:
        """Raise AssertionError unless every page has exactly one owner."""
        sequences = list(running)
        self.tree.check([sequence.tail for sequence in sequences])
        held = [*self.tree.pages(), *self._retired]
        for sequence in sequences:
            shared = [node.page for node in sequence.tail.path()]
            depth = sequence.tail.depth
            assert sequence.pages[:depth] == shared[::-1], "a shared page that is not the tree's"
            held += sequence.pages[depth:]
        self._allocator.check(held)

    def _extend_keys(self, sequence: Sequence, num_pages: int) -> None:
        keys = sequence.keys
        if len(keys) >= num_pages:
            return
        if not keys:
            keys += self.keys(sequence.request.namespace, sequence.token_ids)
        size = self.page_size
        for start in range(len(keys) * size, num_pages * size, size):
            keys.append(array("I", sequence.token_ids[start : start + size]).tobytes())
