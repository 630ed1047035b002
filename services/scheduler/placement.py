"""Placement: tickets in, reservations out. Ties all the tables together."""

from __future__ import annotations

import enum
import logging
import math
from collections.abc import Callable, Iterable, Sequence

from services.common.errors import (
    DeadlineError,
    InvalidRequestError,
    NotFoundError,
    UnavailableError,
)
from services.common.tenants import TenantSet
from services.scheduler.accounting import Accounting, Outcome
from services.scheduler.admission import Backlog, QueueBounds
from services.scheduler.audit import ReservationAudit
from services.scheduler.charges import charge, charge_of
from services.scheduler.endpoints import Registration, WorkerTable
from services.scheduler.filters import eligible, has_room, may_become_eligible, with_room
from services.scheduler.gauges import BreakerCollector, add_gauges
from services.scheduler.health import WorkerHealth
from services.scheduler.holds import Hold, WorkAhead
from services.scheduler.index_client import WorkerMatch
from services.scheduler.metrics import SchedulerMetrics, priority_label
from services.scheduler.overlay import PredictionOverlay
from services.scheduler.policy import PlacementRequest, Policy, Query
from services.scheduler.pools import Pool, PoolIdentity, PoolSet
from services.scheduler.queue import PoolQueue, Ticket
from services.scheduler.reservations import Reservation, ReservationBook
from services.scheduler.sessions import SessionHomes
from services.scheduler.views import Load, Worker, WorkerView
from services.scheduler.waiting import WaitingTickets

logger = logging.getLogger(__name__)

# Tickets that only some workers may serve let at most so many others pass.
_MAX_PASSED_OVER = 64


class _Attempt(enum.Enum):
    PLACED = enum.auto()
    NO_ROOM = enum.auto()
    # There is room, but not for this one.
    HELD = enum.auto()
    NO_WORKER = enum.auto()


class Placer:
    """Decides; every method runs to its end without waiting, so score and charge are one.

    A ticket waits from `open_ticket` until it is settled, and in its pool's queue from `enqueue`
    until then. Whatever may make room ends in `_pump`.
    """

    def __init__(
        self,
        table: WorkerTable,
        pools: PoolSet,
        policy: Policy,
        reservations: ReservationBook,
        overlay: PredictionOverlay,
        metrics: SchedulerMetrics,
        clock: Callable[[], float],
        *,
        max_queued: int,
        worker_wait_s: float,
        max_wait_s: float = math.inf,
        tenants: TenantSet | None = None,
    ) -> None:
        self._table = table
        self._pools = pools
        self._policy = policy
        self._reservations = reservations
        self._overlay = overlay
        self._metrics = metrics
        self._clock = clock
        self._sessions = SessionHomes()
        self._health = WorkerHealth(table, metrics, clock)
        tenants = tenants or TenantSet()
        bounds = QueueBounds(max_queued=max_queued, max_wait_s=max_wait_s)
        self._accounting = Accounting(tenants, metrics)
        backlogs = {pool: Backlog(tenants, bounds, metrics) for pool in pools.pools}
        self._waiting = WaitingTickets(backlogs, worker_wait_s=worker_wait_s)
        self._audit = ReservationAudit(reservations, table)
        add_gauges(metrics, backlogs.values(), reservations, self._audit)
        metrics.registry.register(BreakerCollector(table, self._health))

    @property
    def num_queued(self) -> int:
        return self._waiting.num_queued

    def position(self, ticket: Ticket) -> int:
        """Requests probably placed before it; 0 while it is not queued."""
        return self._waiting.position(ticket)

    def queue(self, pool: Pool) -> PoolQueue:
        """What waits in a pool, for those who look."""
        return self._waiting.backlog(pool).queue

    # Requests

    def find_reservation(self, key: tuple[str, int]) -> Reservation | None:
        """What the same attempt was placed on, while that lives."""
        return self._reservations.find(key)

    def open_ticket(
        self, request: PlacementRequest, remaining_s: float | None, age_s: float = 0.0
    ) -> tuple[Ticket, bool]:
        """The attempt's ticket, and whether it is new; a second caller joins the first's.

        Raises NotFoundError, UnavailableError, InvalidRequestError, OverloadedError, DeadlineError.
        """
        joined = self._waiting.find(request.key)
        if joined is not None:
            joined.num_callers += 1
            return joined, False
        now = self._clock()
        pool = self._find_pool(request)
        if remaining_s is not None and remaining_s <= 0:
            raise DeadlineError("the request's time had passed when it arrived")
        deadline = None if remaining_s is None else now + remaining_s
        ticket = Ticket(request, pool, now, deadline, age_s, self._accounting.service(request))
        self._waiting.open(ticket, now, self._table.num_ready(pool))
        return ticket, True

    def enqueue(self, ticket: Ticket, matches: tuple[WorkerMatch, ...]) -> None:
        """The ticket is ready to be placed: at once, or when its turn has come."""
        backlog = self._waiting.backlog(ticket.pool)
        if ticket.is_settled:
            return
        ticket.matches = matches
        if ticket in backlog.queue:
            return
        gives_way = backlog.make_room(ticket, self._table.num_ready(ticket.pool))
        if gives_way is not None:
            self._waiting.fail(*gives_way)
        if not ticket.is_settled:
            backlog.queue.add(ticket)
            self._pump(ticket.pool)
            ticket.has_waited = not ticket.is_settled

    def has_choice(self, ticket: Ticket) -> bool:
        """Whether what the index says could change where the ticket goes."""
        return self._table.num_workers(ticket.pool) > 1

    def correct(self, ticket: Ticket, matches: tuple[WorkerMatch, ...]) -> None:
        """Take in what the index says of a ticket that was placed without asking it.

        Of the chosen worker only, and never less than was predicted. The overlay has the ticket's
        own pages by now, so it is not asked again.
        """
        reservation = ticket.reservation
        if reservation is None:
            return
        worker, request = reservation.worker, ticket.request
        view = self._table.get(worker.worker_id)
        names = (worker.worker_id, worker.epoch)
        num_pages = max(
            (m.num_pages for m in matches if (m.worker_id, m.epoch) == names), default=0
        )
        cached = min(num_pages * worker.page_size, max(0, request.num_prompt_tokens - 1))
        if view is None or cached <= reservation.predicted_cached_tokens:
            return
        self._reservations.correct(reservation, charge(request, view, cached), cached)
        self._pump(ticket.pool)

    def leave(self, ticket: Ticket) -> None:
        """A caller went away; the last one gives place and reservation back."""
        ticket.num_callers -= 1
        if ticket.num_callers == 0 and not ticket.is_delivered:
            self._waiting.close(ticket)
            if ticket.reservation is not None:
                self._reservations.end(ticket.reservation.reservation_id)
                self._accounting.refund(ticket.reservation.reservation_id)
            self._pump(ticket.pool)
        elif not ticket.is_settled:
            # The caller that left may be the one that was asking the index.
            self.enqueue(ticket, ticket.matches)

    def report_outcomes(self, outcomes: Iterable[Outcome]) -> None:
        """Placed requests ended, well or not; unknown reservations are ignored."""
        for outcome in outcomes:
            self._accounting.settle(outcome)
            self._health.judge(outcome)
            predicted = self._reservations.end(outcome.reservation_id)
            if predicted is None:
                continue
            self._reservations.forget_prediction(outcome.reservation_id)
            if outcome.ended_well:
                self._accounting.learn(outcome, predicted)
        for pool in self._waiting.pools:
            self._pump(pool)

    # Workers

    def register(self, registration: Registration, identity: PoolIdentity) -> None:
        """Take in a worker that its pool accepts."""
        pool = registration.pool
        if not self._table.has_workers(pool) and pool.identity != identity:
            if pool.identity is not None:
                self._waiting.fail_queue(pool, "the pool now serves another model")
            pool.identity = identity
        old = self._table.get(registration.worker.worker_id)
        if old is not None:
            self._forget(old.worker)
        self._table.register(registration, self._clock())
        self._health.apply(registration.worker.worker_id)
        self._pump(pool)

    def unregister(self, registration: Registration) -> None:
        """The worker's stream ended."""
        if self._table.remove(registration):
            self._forget(registration.worker)

    def report_load(
        self,
        registration: Registration,
        load: Load,
        admitted_ids: Sequence[int] = (),
        ended_ids: Iterable[int] = (),
    ) -> None:
        admitted = self._reservations.admit(registration.worker, admitted_ids)
        self._table.report(registration, load, self._clock(), admitted)
        for reservation_id in ended_ids:
            self._reservations.end(reservation_id)
        self._pump(registration.pool)

    def sweep(self) -> None:
        """What happens by time alone; to be called every few tens of milliseconds."""
        now = self._clock()
        for worker in self._table.sweep(now):
            logger.warning("event=lease_ended worker=%s", worker.worker_id)
            self._forget(worker)
        self._metrics.expired.inc(self._reservations.expire(now))
        self._overlay.turn(now)
        self._health.sweep()
        self._audit.look(now)
        for pool in self._waiting.pools:
            self._waiting.sweep(pool, self._table.snapshot(pool), now)
            self._pump(pool)

    # Inside

    def _find_pool(self, request: PlacementRequest) -> Pool:
        pool = self._pools.by_name(request.model)
        if pool is None:
            if not self._pools.names:
                raise UnavailableError("no worker has registered yet")
            raise NotFoundError(f"no pool serves the model {request.model!r}")
        longest = self._table.limits(pool).longest_context
        if request.num_prompt_tokens >= longest and self._table.has_workers(pool):
            raise InvalidRequestError(
                f"the prompt has {request.num_prompt_tokens} tokens; no worker takes more than "
                f"{longest}, output included",
                "prompt",
            )
        return pool

    def _pump(self, pool: Pool) -> None:
        """Place what can be placed, in order; whoever must wait for room holds up those behind."""
        backlog = self._waiting.backlog(pool)
        passed_over: set[Ticket] = set()
        ahead = WorkAhead()
        while len(passed_over) < _MAX_PASSED_OVER:
            ticket = backlog.queue.first(passed_over)
            if ticket is None:
                break
            attempt = self._try_place(ticket, ahead)
            if attempt is _Attempt.PLACED:
                continue
            if attempt is _Attempt.NO_ROOM and not ticket.request.excluded_worker_ids:
                break
            passed_over.add(ticket)
        backlog.rate.observe(
            self._clock(),
            num_waiting=len(backlog.queue),
            num_workers=self._table.num_ready(pool),
        )

    def _try_place(self, ticket: Ticket, ahead: WorkAhead) -> _Attempt:
        now = self._clock()
        request = ticket.request
        if self._still_waits(ticket, ahead, now):
            return _Attempt.HELD
        workers = ahead.views(self._table.snapshot(ticket.pool))
        allowed = eligible(request, workers)
        if not allowed:
            if may_become_eligible(request, workers):
                ticket.workerless_since = None
            elif ticket.workerless_since is None:
                ticket.workerless_since = now
            return _Attempt.NO_WORKER
        ticket.workerless_since = None
        candidates = with_room(request, allowed)
        if not candidates:
            # Nobody is asked what to wait for: in an overload that would be all that is done.
            return _Attempt.NO_ROOM
        if self._policy.waits:
            candidates = allowed
        if request.is_suspect:
            # Workers that it kills with another suspect would say nothing about either.
            candidates = [
                view for view in candidates if not self._reservations.has_suspect(view.worker)
            ]
            if not candidates:
                return _Attempt.HELD
        cached, shared = self._cached_tokens(ticket, workers, now)
        query = Query(
            request,
            cached,
            self._accounting.output_tokens(request),
            self._sessions.find(request.session),
            now,
            now - ticket.opened_at,
            shared,
        )
        chosen = self._policy.choose(query, candidates)
        if self._policy.waits and not has_room(request, chosen):
            hold = Hold(chosen.worker_id, charge_of(query, chosen), now)
            self._waiting.holds.set(ticket, hold)
            ahead.add(hold)
            return _Attempt.HELD
        self._place(ticket, query, chosen, now, len(candidates))
        return _Attempt.PLACED

    def _still_waits(self, ticket: Ticket, ahead: WorkAhead, now: float) -> bool:
        """Whether the worker it was chosen for, a moment ago, still has no room for it."""
        hold = self._waiting.holds.find(ticket, now)
        view = None if hold is None else self._table.get(hold.worker_id)
        if hold is None or view is None or not view.takes_prompts:
            return False
        if has_room(ticket.request, ahead.view(view)):
            return False
        ahead.add(hold)
        return True

    def _cached_tokens(
        self, ticket: Ticket, workers: Sequence[WorkerView], now: float
    ) -> tuple[dict[str, int], dict[str, int]]:
        """The longer of what the index reported and what was placed there lately; the latter."""
        hashes = ticket.request.prefix_hashes
        if not hashes or not workers:
            return {}, {}
        placed = self._overlay.match(hashes, now)
        pages = dict(placed)
        for match in ticket.matches:
            view = self._table.get(match.worker_id)
            if view is not None and view.worker.epoch == match.epoch and match.num_pages:
                pages[match.worker_id] = max(match.num_pages, pages.get(match.worker_id, 0))
        page_size = workers[0].worker.page_size
        # A match leaves at least one token to compute.
        most = max(0, ticket.request.num_prompt_tokens - 1)

        def tokens(of: dict[str, int]) -> dict[str, int]:
            return {worker_id: min(count * page_size, most) for worker_id, count in of.items()}

        return tokens(pages), tokens(placed)

    def _place(
        self, ticket: Ticket, query: Query, chosen: WorkerView, now: float, num_candidates: int
    ) -> None:
        request = ticket.request
        cached = query.cached_tokens.get(chosen.worker_id, 0)
        queued_for_s = now - ticket.opened_at
        branch = self._policy.branch(query, chosen)
        self._waiting.close(ticket)
        reservation = self._reservations.open(
            request.key,
            chosen.worker,
            charge_of(query, chosen),
            now,
            predicted_cached_tokens=cached,
            policy=branch,
            queued_for_s=queued_for_s,
            is_suspect=request.is_suspect,
            num_candidates=num_candidates,
        )
        self._health.note_placed(chosen.worker_id)
        self._overlay.add(chosen.worker_id, request.prefix_hashes, now)
        self._sessions.note(request.session, chosen.worker_id)
        backlog = self._waiting.backlog(ticket.pool)
        service = self._accounting.service(request, cached)
        self._accounting.charge(reservation.reservation_id, backlog.ledger, ticket.account, service)
        backlog.note_placed(ticket)
        self._metrics.placements.labels(branch).inc()
        self._metrics.queue_seconds.labels(priority_label(request.priority)).observe(
            queued_for_s, request.exemplar
        )
        ticket.place(reservation)

    def _forget(self, worker: Worker) -> None:
        self._reservations.end_all_of(worker)
        self._overlay.forget_worker(worker.worker_id)
