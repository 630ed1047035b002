"""Which requests may wait: bounds on a pool's queue, refusals before a wait that is too long."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NoReturn

from services.common.errors import OverloadedError
from services.common.tenants import TenantSet
from services.scheduler.drain import DrainRate
from services.scheduler.fairness import ServiceLedger
from services.scheduler.metrics import SchedulerMetrics, priority_label
from services.scheduler.queue import PoolQueue, Ticket

# Retry hints: where nothing is known yet, and the bounds of what is told.
_LEAST_RETRY_S = 1.0
_MOST_RETRY_S = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class QueueBounds:
    """What the operator allows to wait in one pool."""

    max_queued: int
    # Longest predicted wait; infinity leaves only the requests' own deadlines.
    max_wait_s: float = math.inf


class Backlog:
    """One pool's queue, its tenants' counters, and how fast it is worked off.

    Invariant: at most `max_queued` tickets, replays aside, and of each tenant at most its own
    bound. A replay (a request that lost its worker) is never refused here: its client was served
    before.
    """

    def __init__(self, tenants: TenantSet, bounds: QueueBounds, metrics: SchedulerMetrics) -> None:
        self.ledger = ServiceLedger(tenants.weight)
        self.queue = PoolQueue(self.ledger)
        self.rate = DrainRate()
        self._tenants = tenants
        self._bounds = bounds
        self._metrics = metrics

    def require_admissible(self, ticket: Ticket, now: float, num_workers: int) -> None:
        """Raise OverloadedError, with a retry hint, when the ticket may not wait here."""
        if ticket.is_replay or not self.queue:
            return
        wait_s = self.rate.seconds_for(self.queue.work_before(ticket), num_workers)
        tenant = ticket.account.tenant
        most = self._tenants.of(tenant).max_queued
        if most is not None and self.queue.num_of(tenant) >= most:
            self._refuse(ticket, "tenant_full", f"{most} requests of this tenant wait", wait_s)
        if self._is_full and self.queue.heaviest(ticket) is None:
            self._refuse(
                ticket, "full", f"the queue is full ({self._bounds.max_queued} requests)", wait_s
            )
        if wait_s is None:
            return
        if ticket.deadline is not None and wait_s > ticket.deadline - now:
            left_s = ticket.deadline - now
            message = f"its turn is predicted in {wait_s:.1f} s, its time is over in {left_s:.1f} s"
            self._refuse(ticket, "deadline", message, wait_s - left_s)
        most_s = self._bounds.max_wait_s
        if wait_s > most_s:
            message = f"its turn is predicted in {wait_s:.1f} s, more than {most_s:g} s"
            self._refuse(ticket, "wait", message, wait_s - most_s)

    def make_room(self, ticket: Ticket, num_workers: int) -> tuple[Ticket, OverloadedError] | None:
        """Who has to give way before `ticket` is queued, and with which error; None for nobody.

        `require_admissible` found that there is somebody; where that is no longer so, it is the
        ticket itself.
        """
        if ticket.is_replay or not self._is_full:
            return None
        victim = self.queue.heaviest(ticket) or ticket
        wait_s = self.rate.seconds_for(self.queue.work_before(victim), num_workers)
        self._count(victim, "pushed_out")
        return victim, OverloadedError(
            "the queue is full, and others that wait for less took its place", _retry_s(wait_s)
        )

    def note_placed(self, ticket: Ticket) -> None:
        """It left the queue for a worker."""
        self.queue.note_turn(ticket.account.priority)
        if ticket.has_waited:
            self.rate.note_placed(ticket.work)

    @property
    def _is_full(self) -> bool:
        return len(self.queue) >= self._bounds.max_queued

    def _refuse(self, ticket: Ticket, reason: str, message: str, retry_s: float | None) -> NoReturn:
        self._count(ticket, reason)
        raise OverloadedError(message, _retry_s(retry_s))

    def _count(self, ticket: Ticket, reason: str) -> None:
        self._metrics.sheds.labels(reason, priority_label(ticket.account.priority)).inc()


def _retry_s(predicted_s: float | None) -> float:
    """A whole number of seconds: HTTP's Retry-After knows no others."""
    if predicted_s is None:
        return _LEAST_RETRY_S
    return float(math.ceil(min(max(predicted_s, _LEAST_RETRY_S), _MOST_RETRY_S)))
