"""The sequences that have not ended, by key, and when each must have."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from services.worker.engine.batching.sequence import Sequence

# Deadlines of ended sequences that are kept before the heap is rebuilt.
_DEADLINE_SLACK = 1024


class LiveSequences:
    """Sequences from their arrival to their one terminal entry.

    Invariant: each one with a deadline has it in the heap until it is popped; there are at most
    `2 * len(self) + _DEADLINE_SLACK` entries besides the newest. Times are the caller's clock's
    nanoseconds.
    """

    def __init__(self) -> None:
        self._by_key: dict[int, Sequence] = {}
        self._deadlines: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self._by_key)

    def __iter__(self) -> Iterator[Sequence]:
        """The sequences now; ending them meanwhile is safe."""
        return iter(list(self._by_key.values()))

    def __contains__(self, key: int) -> bool:
        return key in self._by_key

    def add(self, sequence: Sequence) -> None:
        """It arrived."""
        self._by_key[sequence.key] = sequence
        deadline_ns = sequence.request.deadline_ns
        if deadline_ns is None:
            return
        if len(self._deadlines) > 2 * len(self._by_key) + _DEADLINE_SLACK:
            self._deadlines = [entry for entry in self._deadlines if entry[1] in self._by_key]
            heapq.heapify(self._deadlines)
        heapq.heappush(self._deadlines, (deadline_ns, sequence.key))

    def get(self, key: int) -> Sequence | None:
        return self._by_key.get(key)

    def remove(self, sequence: Sequence) -> None:
        """It ended."""
        del self._by_key[sequence.key]

    def pop_expired(self, now: int) -> Iterator[Sequence]:
        """Those whose deadline has passed, each once."""
        while self._deadlines and self._deadlines[0][0] <= now:
            _, key = heapq.heappop(self._deadlines)
            sequence = self._by_key.get(key)
            if sequence is not None:
                yield sequence
