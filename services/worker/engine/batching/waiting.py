"""The sequences that do not run yet, in the order in which they should."""

from __future__ import annotations

import bisect
from collections.abc import Iterator

from services.worker.engine.batching.sequence import Sequence

# -priority, 0 after a preemption else 1, arrival, order of entry.
_Place = tuple[int, int, int, int]


class WaitingQueue:
    """Ordered by priority (higher first), within one by arrival; preempted ones at its head.

    Also keeps the sum of the tokens that its sequences would have to compute.
    """

    def __init__(self) -> None:
        self._places: list[_Place] = []
        self._sequences: dict[_Place, Sequence] = {}
        self._place_of: dict[Sequence, _Place] = {}
        self._uncached_tokens: dict[Sequence, int] = {}
        self._num_added = 0
        self.num_uncached_tokens = 0

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._place_of

    def __iter__(self) -> Iterator[Sequence]:
        """In order. The sequence just handed out, and no other, may be removed meanwhile."""
        index = 0
        while index < len(self._places):
            place = self._places[index]
            yield self._sequences[place]
            if place in self._sequences:
                index += 1

    def add(self, sequence: Sequence, num_uncached_tokens: int) -> None:
        """Queue a sequence that would have to compute so many tokens."""
        assert sequence not in self, "a sequence is queued once"
        self._num_added += 1
        preempted = sequence.num_preemptions > 0
        place = (
            -sequence.request.priority,
            0 if preempted else 1,
            sequence.arrival_ns,
            self._num_added,
        )
        bisect.insort(self._places, place)
        self._sequences[place] = sequence
        self._place_of[sequence] = place
        self._uncached_tokens[sequence] = num_uncached_tokens
        self.num_uncached_tokens += num_uncached_tokens

    def update(self, sequence: Sequence, num_uncached_tokens: int) -> None:
        """The cache has more or less of its tokens than before."""
        self.num_uncached_tokens += num_uncached_tokens - self._uncached_tokens[sequence]
        self._uncached_tokens[sequence] = num_uncached_tokens

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it stands."""
        place = self._place_of.pop(sequence)
        del self._places[bisect.bisect_left(self._places, place)]
        del self._sequences[place]
        self.num_uncached_tokens -= self._uncached_tokens.pop(sequence)
