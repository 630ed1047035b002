"""What requests' ends say about their workers, and what follows for the worker table."""

from __future__ import annotations

from collections.abc import Callable

from services.scheduler.accounting import Outcome
from services.scheduler.breakers import BreakerBoard, BreakerState
from services.scheduler.endpoints import WorkerTable
from services.scheduler.metrics import SchedulerMetrics
from services.scheduler.views import WorkerState


class WorkerHealth:
    """Keeps the table's `broken` marks as the breakers have it."""

    def __init__(
        self, table: WorkerTable, metrics: SchedulerMetrics, clock: Callable[[], float]
    ) -> None:
        self._table = table
        self._metrics = metrics
        self._clock = clock
        self._breakers = BreakerBoard()

    def judge(self, outcome: Outcome) -> None:
        """A request ended. A worker that leaves may break off what it likes."""
        if outcome.ended_well:
            self._breakers.note_success(outcome.worker_id)
        elif outcome.worker_failed and not outcome.was_refused:
            view = self._table.get(outcome.worker_id)
            if view is not None and view.state is WorkerState.DRAINING:
                return
            if self._breakers.note_failure(outcome.worker_id, self._clock()):
                self._metrics.worker_failures.inc()
        self.apply(outcome.worker_id)

    def note_placed(self, worker_id: str) -> None:
        """A request goes there: a probe, where the breaker is half open."""
        self._breakers.note_placed(worker_id, self._clock())
        self.apply(worker_id)

    def breaker_state(self, worker_id: str) -> BreakerState:
        """Of one worker, now."""
        return self._breakers.state(worker_id, self._clock())

    def sweep(self) -> None:
        """What happens by time alone."""
        for worker_id in self._breakers.worker_ids:
            self.apply(worker_id)
        self._breakers.forget_old(self._clock())

    def apply(self, worker_id: str) -> None:
        """Bring the table up to date, for a worker that may just have registered."""
        self._table.set_broken(worker_id, self._breakers.is_open(worker_id, self._clock()))
