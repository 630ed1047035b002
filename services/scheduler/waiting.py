"""The tickets that wait for a placement: found by their attempt, queued by pool, ended by time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from services.common.errors import DeadlineError, RhizomeError, UnavailableError
from services.scheduler.admission import Backlog
from services.scheduler.filters import may_become_eligible
from services.scheduler.holds import Holds
from services.scheduler.pools import Pool
from services.scheduler.queue import Ticket
from services.scheduler.views import WorkerState, WorkerView


class WaitingTickets:
    """Owns the tickets that are not settled, each pool's backlog, and what tickets hold out for.

    Invariant: a ticket is found by its attempt from `open` until `close`, and is in its pool's
    queue for a part of that time at most; `close` comes before a ticket is settled.
    """

    def __init__(self, backlogs: Mapping[Pool, Backlog], *, worker_wait_s: float) -> None:
        """`worker_wait_s` is for how long a ticket waits for a worker that may serve it."""
        self.holds = Holds()
        self._backlogs = backlogs
        self._worker_wait_s = worker_wait_s
        self._tickets: dict[tuple[str, int], Ticket] = {}

    @property
    def pools(self) -> Iterable[Pool]:
        return self._backlogs.keys()

    @property
    def num_queued(self) -> int:
        return sum(len(backlog.queue) for backlog in self._backlogs.values())

    def backlog(self, pool: Pool) -> Backlog:
        return self._backlogs[pool]

    def position(self, ticket: Ticket) -> int:
        """Requests probably placed before it; 0 while it is not queued."""
        queue = self._backlogs[ticket.pool].queue
        return queue.position(ticket) if ticket in queue else 0

    def find(self, key: tuple[str, int]) -> Ticket | None:
        """The ticket of a request's attempt."""
        return self._tickets.get(key)

    def open(self, ticket: Ticket, now: float, num_workers: int) -> None:
        """Let others find it. Raises OverloadedError when it may not wait."""
        self._backlogs[ticket.pool].require_admissible(ticket, now, num_workers)
        self._tickets[ticket.request.key] = ticket

    def close(self, ticket: Ticket) -> None:
        """It waits no more. Idempotent."""
        self._backlogs[ticket.pool].queue.remove(ticket)
        self.holds.drop(ticket)
        if self._tickets.get(ticket.request.key) is ticket:
            del self._tickets[ticket.request.key]

    def fail(self, ticket: Ticket, error: RhizomeError) -> None:
        """Settle it with an error."""
        self.close(ticket)
        ticket.fail(error)

    def fail_queue(self, pool: Pool, reason: str) -> None:
        for ticket in self._backlogs[pool].queue:
            self.fail(ticket, UnavailableError(reason))

    def sweep(self, pool: Pool, workers: Sequence[WorkerView], now: float) -> None:
        """Fail what waited for too long: for its turn, or for a worker that may serve it."""
        states = {view.state for view in workers}
        any_left = not states.isdisjoint((WorkerState.READY, WorkerState.SUSPECT))
        for ticket in self._backlogs[pool].queue:
            if ticket.deadline is not None and now >= ticket.deadline:
                self.fail(ticket, DeadlineError("the request's time passed in the queue"))
                continue
            if not any_left:
                if ticket.workerless_since is None:
                    ticket.workerless_since = now
            elif ticket.workerless_since is not None and may_become_eligible(
                ticket.request, workers
            ):
                ticket.workerless_since = None
            since = ticket.workerless_since
            if since is not None and now - since >= self._worker_wait_s:
                error = UnavailableError(f"no worker of {pool.name!r} may serve this request")
                self.fail(ticket, error)
