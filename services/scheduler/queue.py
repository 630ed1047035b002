"""Requests that wait for room in one pool: by priority, then by arrival."""

from __future__ import annotations

import itertools
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterator

from services.common.errors import OverloadedError, RhizomeError
from services.scheduler.index_client import WorkerMatch
from services.scheduler.policy import PlacementRequest
from services.scheduler.pools import Pool
from services.scheduler.reservations import Reservation

_RETRY_AFTER_S = (1.0, 30.0)
_RATE_SAMPLES = 64


class Ticket:
    """One request's way to a placement, shared by the calls that ask for the same attempt.

    It is settled once, by a reservation or an error, and then tells its listeners.
    """

    def __init__(
        self,
        request: PlacementRequest,
        pool: Pool,
        now: float,
        deadline: float | None = None,
        age_s: float = 0.0,
    ) -> None:
        """`age_s` is for how long the request had been under way when it came here."""
        self.request = request
        self.pool = pool
        self.opened_at = now
        self.order = (-request.priority, now - age_s)
        self.deadline = deadline
        self.matches: tuple[WorkerMatch, ...] = ()
        self.num_callers = 1
        self.listeners: list[Callable[[], None]] = []
        # Since when no worker may serve it.
        self.workerless_since: float | None = None
        self.reservation: Reservation | None = None
        self.error: RhizomeError | None = None
        # A caller is being told of the placement: from here on it stands.
        self.is_delivered = False

    @property
    def is_settled(self) -> bool:
        return self.reservation is not None or self.error is not None

    def place(self, reservation: Reservation) -> None:
        self._settle(reservation, None)

    def fail(self, error: RhizomeError) -> None:
        self._settle(None, error)

    def _settle(self, reservation: Reservation | None, error: RhizomeError | None) -> None:
        assert not self.is_settled, "a ticket is settled once"
        self.reservation, self.error = reservation, error
        for listener in self.listeners:
            listener()


class PoolQueue:
    """Tickets in order, at most `max_len` of them.

    A sorted list: thousands of entries move in a microsecond, and a ticket's position is a
    bisection.
    """

    def __init__(self, max_len: int) -> None:
        self._max_len = max_len
        self._entries: list[tuple[tuple[float, float], int, Ticket]] = []
        self._numbers = itertools.count()
        self._number_of: dict[Ticket, int] = {}
        self._left_at: deque[float] = deque(maxlen=_RATE_SAMPLES)

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Ticket]:
        """The tickets now, in order; changing the queue meanwhile is safe."""
        return iter([entry[2] for entry in self._entries])

    def __getitem__(self, position: int) -> Ticket:
        return self._entries[position][2]

    def __contains__(self, ticket: Ticket) -> bool:
        return ticket in self._number_of

    def require_room(self, now: float) -> None:
        """Raises OverloadedError, with the time the queue needs to move, when it is full."""
        if len(self._entries) >= self._max_len:
            raise OverloadedError(
                f"the queue is full ({self._max_len} requests)", self._retry_after_s(now)
            )

    def add(self, ticket: Ticket) -> None:
        number = next(self._numbers)
        self._number_of[ticket] = number
        insort(self._entries, (ticket.order, number, ticket))

    def remove(self, ticket: Ticket) -> None:
        """Without effect when it is not queued."""
        if ticket in self._number_of:
            del self._entries[self.position(ticket)]
            del self._number_of[ticket]

    def position(self, ticket: Ticket) -> int:
        """Requests ahead of it."""
        return bisect_left(self._entries, (ticket.order, self._number_of[ticket]))

    def note_placed(self, now: float) -> None:
        """A request left for a worker: the pace that retry hints are made from."""
        self._left_at.append(now)

    def _retry_after_s(self, now: float) -> float:
        low, high = _RETRY_AFTER_S
        if len(self._left_at) < 2:
            return low
        pace = len(self._left_at) / max(now - self._left_at[0], 1e-3)
        return min(max(len(self._entries) / pace, low), high)
