"""Gauges over queues, reservations and workers, read when somebody scrapes."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from services.scheduler.admission import Backlog
from services.scheduler.audit import ReservationAudit
from services.scheduler.endpoints import WorkerTable
from services.scheduler.health import WorkerHealth
from services.scheduler.metrics import SchedulerMetrics, priority_label
from services.scheduler.reservations import ReservationBook


def add_gauges(
    metrics: SchedulerMetrics,
    backlogs: Collection[Backlog],
    reservations: ReservationBook,
    audit: ReservationAudit,
) -> None:
    """Register them; they keep what they read alive."""

    def queued(label: str) -> float:
        return sum(
            count
            for backlog in backlogs
            for priority, count in backlog.queue.num_by_priority().items()
            if priority_label(priority) == label
        )

    metrics.gauge_by_priority("queued_requests", "Waiting requests, by priority class", queued)
    metrics.gauge(
        "tenant_counter_gap",
        "Largest distance of service counters between tenants that wait in one class",
        lambda: max(backlog.queue.counter_gap for backlog in backlogs),
    )
    metrics.gauge(
        "tenants_waiting",
        "Tenants that have requests waiting",
        lambda: sum(backlog.queue.num_tenants for backlog in backlogs),
    )
    metrics.gauge(
        "drain_rate",
        "Service that one worker takes off a waiting queue in a second, in weighted tokens",
        lambda: max(backlog.rate.per_worker or 0.0 for backlog in backlogs),
    )
    metrics.gauge(
        "reservations_charged",
        "Balance: placements that no load report includes yet; zero when idle",
        lambda: reservations.num_charged,
    )
    metrics.gauge("reservations", "Live reservations", lambda: reservations.num_live)
    metrics.gauge(
        "reservation_leaks",
        "Reservations and workers' charges that nothing will end; zero unless something is wrong",
        lambda: audit.num_leaks,
    )


class BreakerCollector(Collector):
    """The breaker of every registered worker, as it is now."""

    def __init__(self, table: WorkerTable, health: WorkerHealth) -> None:
        self._table = table
        self._health = health

    def collect(self) -> Iterator[Metric]:
        breakers = GaugeMetricFamily(
            "rhizome_scheduler_breaker",
            "A worker's breaker: 0 closed, 1 half open, 2 open",
            labels=("worker",),
        )
        for view in self._table.views():
            state = self._health.breaker_state(view.worker_id)
            breakers.add_metric((view.worker_id,), state.value)
        yield breakers
