"""Requests that wait for room in one pool: by priority class, fairly between tenants within one."""

from __future__ import annotations

import itertools
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Container, Iterator

from services.common.errors import RhizomeError
from services.scheduler.fairness import Account, ServiceLedger
from services.scheduler.index_client import WorkerMatch
from services.scheduler.policy import PlacementRequest
from services.scheduler.pools import Pool
from services.scheduler.reservations import Reservation

# A class that was passed over so often in a row while it had requests gets one turn: at most 3 % of
# the placements keep the lowest class from starving.
_MAX_PASSED_OVER = 32


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
        work: float = 1.0,
    ) -> None:
        """`age_s` is for how long the request had been under way when it came here, `work` the
        service that it is expected to take."""
        self.request = request
        self.pool = pool
        self.opened_at = now
        self.account = Account(request.priority, request.tenant)
        self.arrival = now - age_s
        self.deadline = deadline
        self.work = work
        self.matches: tuple[WorkerMatch, ...] = ()
        self.num_callers = 1
        self.listeners: list[Callable[[], None]] = []
        # It was not placed at once: from here on it is part of a backlog.
        self.has_waited = False
        # Since when no worker may serve it.
        self.workerless_since: float | None = None
        self.reservation: Reservation | None = None
        self.error: RhizomeError | None = None
        # A caller is being told of the placement: from here on it stands.
        self.is_delivered = False

    @property
    def is_settled(self) -> bool:
        return self.reservation is not None or self.error is not None

    @property
    def is_replay(self) -> bool:
        """It was placed before and lost its worker; its client waits in mid-answer."""
        return self.request.attempt > 0

    def place(self, reservation: Reservation) -> None:
        self._settle(reservation, None)

    def fail(self, error: RhizomeError) -> None:
        self._settle(None, error)

    def _settle(self, reservation: Reservation | None, error: RhizomeError | None) -> None:
        assert not self.is_settled, "a ticket is settled once"
        self.reservation, self.error = reservation, error
        for listener in self.listeners:
            listener()


class _Lane:
    """Tickets by arrival, and the sum of their work."""

    def __init__(self) -> None:
        self.work = 0.0
        self._entries: list[tuple[float, int, Ticket]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Ticket]:
        return (entry[2] for entry in self._entries)

    @property
    def newest(self) -> Ticket:
        return self._entries[-1][2]

    def first(self, passed_over: Container[Ticket]) -> tuple[Ticket | None, float]:
        """The first one that is not passed over, and the work of those before it that are."""
        work = 0.0
        for ticket in self:
            if ticket not in passed_over:
                return ticket, work
            work += ticket.work
        return None, work

    def add(self, ticket: Ticket, number: int) -> None:
        insort(self._entries, (ticket.arrival, number, ticket))
        self.work += ticket.work

    def remove(self, ticket: Ticket, number: int) -> None:
        del self._entries[self.position(ticket, number)]
        self.work = self.work - ticket.work if self._entries else 0.0

    def position(self, ticket: Ticket, number: int) -> int:
        return bisect_left(self._entries, (ticket.arrival, number))

    def work_before(self, ticket: Ticket, number: int) -> float:
        ahead = itertools.islice(self._entries, self.position(ticket, number))
        return sum(entry[2].work for entry in ahead)


class _PriorityClass:
    """One class: replays first, then the tenants that have something waiting."""

    def __init__(self) -> None:
        self.replays = _Lane()
        self.lanes: dict[Account, _Lane] = {}
        self.num_passed_over = 0

    def __len__(self) -> int:
        return len(self.replays) + sum(map(len, self.lanes.values()))

    def __iter__(self) -> Iterator[Ticket]:
        return itertools.chain(self.replays, *self.lanes.values())

    @property
    def work(self) -> float:
        return self.replays.work + sum(lane.work for lane in self.lanes.values())


class PoolQueue:
    """Tickets of one pool. Invariant: a tenant has a lane in its class while it has tickets there,
    and its counter was lifted when it got it (`ServiceLedger.activate`).

    The order is decided anew with each placement, since counters move; positions are predictions.
    """

    def __init__(self, ledger: ServiceLedger) -> None:
        self._ledger = ledger
        # Highest priority first; only classes that have tickets.
        self._classes: dict[int, _PriorityClass] = {}
        self._numbers = itertools.count()
        self._number_of: dict[Ticket, int] = {}
        self._num_of_tenant: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._number_of)

    def __iter__(self) -> Iterator[Ticket]:
        """The tickets now, class by class; changing the queue meanwhile is safe."""
        return iter([ticket for cls in self._classes.values() for ticket in cls])

    def __contains__(self, ticket: object) -> bool:
        return ticket in self._number_of

    def num_of(self, tenant: str) -> int:
        return self._num_of_tenant[tenant]

    @property
    def num_tenants(self) -> int:
        return len(self._num_of_tenant)

    @property
    def oldest_opened_at(self) -> float | None:
        """When the ticket came that has waited longest; None for an empty queue."""
        # The list is made at once: metrics are read in another thread.
        return min((ticket.opened_at for ticket in list(self._number_of)), default=None)

    def num_by_priority(self) -> dict[int, int]:
        return {priority: len(cls) for priority, cls in self._classes.items()}

    def first(self, passed_over: Container[Ticket] = ()) -> Ticket | None:
        """Whose turn it is, but for those `passed_over`, which count as if they had had theirs."""
        starving = [
            cls for cls in self._classes.values() if cls.num_passed_over >= _MAX_PASSED_OVER
        ]
        for cls in itertools.chain(starving, self._classes.values()):
            ticket = self._first_of(cls, passed_over)
            if ticket is not None:
                return ticket
        return None

    def add(self, ticket: Ticket) -> None:
        account = ticket.account
        cls = self._classes.get(account.priority)
        if cls is None:
            self._classes[account.priority] = cls = _PriorityClass()
            self._classes = dict(sorted(self._classes.items(), reverse=True))
        lane = cls.replays if ticket.is_replay else cls.lanes.get(account)
        if lane is None:
            self._ledger.activate(account, cls.lanes)
            lane = cls.lanes[account] = _Lane()
        number = self._number_of[ticket] = next(self._numbers)
        lane.add(ticket, number)
        self._num_of_tenant[account.tenant] += 1

    def remove(self, ticket: Ticket) -> None:
        """Without effect when it is not queued."""
        number = self._number_of.pop(ticket, None)
        if number is None:
            return
        account = ticket.account
        cls = self._classes[account.priority]
        if ticket.is_replay:
            cls.replays.remove(ticket, number)
        else:
            lane = cls.lanes[account]
            lane.remove(ticket, number)
            if not lane:
                del cls.lanes[account]
                self._ledger.deactivate(account)
        if not cls.replays and not cls.lanes:
            del self._classes[account.priority]
        self._num_of_tenant[account.tenant] -= 1
        if not self._num_of_tenant[account.tenant]:
            del self._num_of_tenant[account.tenant]

    def note_turn(self, priority: int) -> None:
        """A ticket of this class was placed: lower classes that wait were passed over."""
        for other, cls in self._classes.items():
            if other < priority:
                cls.num_passed_over += 1
            elif other == priority:
                cls.num_passed_over = 0

    def position(self, ticket: Ticket) -> int:
        """Requests probably served before it."""
        cls = self._classes[ticket.account.priority]
        number = self._number_of[ticket]
        ahead = sum(len(c) for p, c in self._classes.items() if p > ticket.account.priority)
        if ticket.is_replay:
            return ahead + cls.replays.position(ticket, number)
        own = cls.lanes[ticket.account]
        in_lane = own.position(ticket, number)
        work_before = own.work_before(ticket, number)
        ahead += len(cls.replays) + in_lane
        for account, lane in cls.lanes.items():
            if account != ticket.account:
                share = self._share_before(ticket.account, work_before, account, lane)
                ahead += round(len(lane) * share / lane.work)
        return ahead

    def work_before(self, ticket: Ticket) -> float:
        """Work that would be placed before a ticket that came now."""
        priority, account = ticket.account.priority, ticket.account
        work = sum(cls.work for other, cls in self._classes.items() if other > priority)
        cls = self._classes.get(priority)
        if cls is None:
            return work
        work += cls.replays.work
        if ticket.is_replay:
            return work
        own = cls.lanes.get(account)
        own_work = 0.0 if own is None else own.work
        return (
            work
            + own_work
            + sum(
                self._share_before(account, own_work, other, lane)
                for other, lane in cls.lanes.items()
                if other != account
            )
        )

    def heaviest(self, ticket: Ticket) -> Ticket | None:
        """Who should give way to `ticket` in a full queue: the newest of whoever holds most.

        First from classes below its own, then from a tenant of its class that would still hold
        more for its weight; None where there is no such.
        """
        for priority in reversed(self._classes):
            cls = self._classes[priority]
            if priority > ticket.account.priority or not cls.lanes:
                continue
            account, lane = max(
                cls.lanes.items(), key=lambda item: len(item[1]) / self._ledger.weight(item[0])
            )
            if priority < ticket.account.priority:
                return lane.newest
            own = cls.lanes.get(ticket.account, ())
            claim = (len(own) + 1) / self._ledger.weight(ticket.account)
            if account != ticket.account and len(lane) / self._ledger.weight(account) > claim:
                return lane.newest
        return None

    @property
    def counter_gap(self) -> float:
        """Largest distance between counters of tenants that wait in one class."""
        gaps = [0.0]
        for cls in self._classes.values():
            counters = [self._ledger.counter(account) for account in cls.lanes]
            if counters:
                gaps.append(max(counters) - min(counters))
        return max(gaps)

    def _first_of(self, cls: _PriorityClass, passed_over: Container[Ticket]) -> Ticket | None:
        first, _ = cls.replays.first(passed_over)
        if first is not None:
            return first
        ledger = self._ledger
        if len(cls.lanes) == 1:
            (lane,) = cls.lanes.values()
            return lane.first(passed_over)[0]
        best: tuple[float, float] | None = None
        for account, lane in cls.lanes.items():
            ticket, work = lane.first(passed_over)
            if ticket is None:
                continue
            key = ledger.counter(account) + work / ledger.weight(account), ticket.arrival
            if best is None or key < best:
                best, first = key, ticket
        return first

    def _share_before(
        self, account: Account, own_work: float, other: Account, lane: _Lane
    ) -> float:
        """Work in another tenant's lane that goes before `account` had `own_work` done."""
        ledger = self._ledger
        reached = own_work / ledger.weight(account) + ledger.lifted(
            account, self._classes[account.priority].lanes
        )
        before = (reached - ledger.counter(other)) * ledger.weight(other)
        return min(lane.work, max(0.0, before))
