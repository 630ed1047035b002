"""Which of the scheduler's reservations this worker took over, told once to each scheduler.

A reservation is told with the first load report that counts it: whoever charges it until then
counts every request once.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

# A new registration hears again of what ended this long ago: a scheduler keeps a reservation
# that no report mentioned for about as long.
_REMEMBER_S = 10.0


class ReservationFeed:
    """What one registration has not reported yet."""

    def __init__(self, admitted: list[int], ended: list[int]) -> None:
        self._admitted = admitted
        self._ended = ended

    def add_admitted(self, reservation_id: int) -> None:
        """A reservation's first sequence counts in the engine's load."""
        self._admitted.append(reservation_id)

    def add_ended(self, reservation_id: int) -> None:
        """A reservation's last sequence ended."""
        self._ended.append(reservation_id)

    def take(self) -> tuple[list[int], list[int]]:
        """Admitted and ended since the last call; each is handed out once."""
        taken = self._admitted, self._ended
        self._admitted, self._ended = [], []
        return taken


class ReservationBook:
    """Reservations by the number of their sequences that have not ended.

    Reservation 0 stands for none and is never told.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._num_open: dict[int, int] = {}
        self._admitted: set[int] = set()
        self._ended: deque[tuple[float, int]] = deque()
        self._feeds: set[ReservationFeed] = set()

    def __len__(self) -> int:
        return len(self._num_open)

    def subscribe(self) -> ReservationFeed:
        """A feed for a new registration; it begins with everything that still matters."""
        self._forget()
        feed = ReservationFeed(list(self._admitted), [entry[1] for entry in self._ended])
        self._feeds.add(feed)
        return feed

    def unsubscribe(self, feed: ReservationFeed) -> None:
        """The registration is over."""
        self._feeds.discard(feed)

    def open(self, reservation_id: int) -> None:
        """A sequence of it goes to the engine."""
        if reservation_id:
            self._num_open[reservation_id] = self._num_open.get(reservation_id, 0) + 1

    def admit(self, reservation_id: int) -> None:
        """A sequence of it is in the engine's load: waiting or running."""
        if reservation_id in self._num_open and reservation_id not in self._admitted:
            self._admitted.add(reservation_id)
            for feed in self._feeds:
                feed.add_admitted(reservation_id)

    def close(self, reservation_id: int) -> None:
        """A sequence of it ended, or was refused before it reached the engine."""
        if not reservation_id:
            return
        num_open = self._num_open.get(reservation_id, 1) - 1
        if num_open:
            self._num_open[reservation_id] = num_open
            return
        self._num_open.pop(reservation_id, None)
        self._admitted.discard(reservation_id)
        self._forget()
        self._ended.append((self._clock(), reservation_id))
        for feed in self._feeds:
            feed.add_ended(reservation_id)

    def _forget(self) -> None:
        horizon = self._clock() - _REMEMBER_S
        while self._ended and self._ended[0][0] < horizon:
            self._ended.popleft()
