"""Which pages running prefills are about to compute, so that nobody else computes them too."""

from __future__ import annotations

from services.worker.engine.batching.sequence import Sequence
from services.worker.engine.kv.radix import Node


class ComingPages:
    """Of each sequence in the middle of its prefill: the page it stores next.

    A waiting sequence whose match ends exactly there waits on: it shares that page a step later,
    and never runs ahead of pages that are not scheduled yet. What a sequence has already
    scheduled is in the tree.
    """

    def __init__(self) -> None:
        self._owners: dict[tuple[Node, bytes], Sequence] = {}
        self._places: dict[Sequence, tuple[Node, bytes]] = {}

    def announce(self, sequence: Sequence) -> None:
        """A chunk of a sequence was scheduled and more of its prefill is to come."""
        self.withdraw(sequence)
        tail = sequence.tail
        if tail.depth < len(sequence.keys):
            place = (tail, sequence.keys[tail.depth])
            if place not in self._owners:
                self._owners[place] = sequence
                self._places[sequence] = place

    def withdraw(self, sequence: Sequence) -> None:
        """A sequence's prefill is all scheduled, or it runs no more."""
        place = self._places.pop(sequence, None)
        if place is not None:
            del self._owners[place]

    def includes_next_of(self, sequence: Sequence, max_pages: int) -> bool:
        """Whether the page after the matched ones of a waiting sequence is about to come."""
        tail = sequence.tail
        return tail.depth < max_pages and (tail, sequence.keys[tail.depth]) in self._owners
