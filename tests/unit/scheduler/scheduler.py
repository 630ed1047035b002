"""The scheduler without its service, for tests of placement."""

import math
import random
from dataclasses import dataclass, field
from typing import Any

from services.common.tenants import TenantSet
from services.scheduler.accounting import Outcome
from services.scheduler.endpoints import Registration, WorkerTable
from services.scheduler.index_client import WorkerMatch
from services.scheduler.metrics import SchedulerMetrics
from services.scheduler.overlay import PredictionOverlay
from services.scheduler.placement import Placer
from services.scheduler.policies import make_policy
from services.scheduler.policy import Policy
from services.scheduler.pools import Pool, PoolSet
from services.scheduler.queue import Ticket
from services.scheduler.reservations import ReservationBook
from services.scheduler.views import WorkerView
from tests.unit.scheduler.build import (
    Clock,
    make_identity,
    make_registration,
    make_request,
    make_worker,
)

WORKER_WAIT_S = 2.0


@dataclass
class Scheduler:
    """A placer with real tables and a clock that is moved by hand."""

    clock: Clock
    pools: PoolSet
    table: WorkerTable
    metrics: SchedulerMetrics
    placer: Placer
    # The newest of each worker.
    registrations: dict[str, Registration] = field(default_factory=dict)

    @property
    def pool(self) -> Pool:
        return self.pools.pools[0]

    def register(self, worker_id: str, **changes: Any) -> Registration:
        registration = make_registration(make_worker(worker_id, **changes), self.pool)
        self.placer.register(registration, make_identity())
        self.registrations[worker_id] = registration
        return registration

    def schedule(
        self,
        name: str,
        matches: tuple[WorkerMatch, ...] = (),
        remaining_s: float | None = None,
        **changes: Any,
    ) -> Ticket:
        ticket, _ = self.placer.open_ticket(make_request(name, **changes), remaining_s)
        self.placer.enqueue(ticket, matches)
        return ticket

    def deliver(self, ticket: Ticket) -> None:
        ticket.is_delivered = True
        self.placer.leave(ticket)

    def view(self, worker_id: str) -> WorkerView:
        view = self.table.get(worker_id)
        assert view is not None
        return view

    def finish(self, ticket: Ticket, output_tokens: int, **changes: Any) -> None:
        """Report that a placed request ended well."""
        assert ticket.reservation is not None, ticket.error
        outcome = Outcome(
            ticket.reservation.reservation_id,
            ticket.request.num_prompt_tokens,
            cached_tokens=0,
            output_tokens=output_tokens,
            ended_well=True,
            worker_id=ticket.reservation.worker.worker_id,
        )
        self.placer.report_outcomes([outcome._replace(**changes)])

    @property
    def balance(self) -> float:
        return self.metrics.value("reservations_charged")


def make_scheduler(
    max_queued: int = 4,
    max_wait_s: float = math.inf,
    tenants: TenantSet | None = None,
    policy: Policy | None = None,
) -> Scheduler:
    clock, pools, metrics = Clock(), PoolSet(), SchedulerMetrics()
    rng = random.Random(1)
    table = WorkerTable(3.0)
    placer = Placer(
        table,
        pools,
        policy or make_policy("prefix_load", rng),
        ReservationBook(table, rng),
        PredictionOverlay(clock()),
        metrics,
        clock,
        max_queued=max_queued,
        max_wait_s=max_wait_s,
        tenants=tenants,
        worker_wait_s=WORKER_WAIT_S,
    )
    return Scheduler(clock, pools, table, metrics, placer)


def worker_of(ticket: Ticket) -> str:
    assert ticket.reservation is not None, ticket.error
    return ticket.reservation.worker.worker_id
