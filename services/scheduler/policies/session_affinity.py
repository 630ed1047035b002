"""A session stays on its worker; everything else goes to the fewest requests."""

from __future__ import annotations

from collections.abc import Sequence

from services.scheduler.policies.least_outstanding import LeastOutstanding
from services.scheduler.policy import Query
from services.scheduler.views import WorkerView


class SessionAffinity:
    """Takes the worker that served the session last while it is there."""

    def __init__(self) -> None:
        self._others = LeastOutstanding()

    def __call__(self, query: Query, workers: Sequence[WorkerView], costs: Sequence[float]) -> int:
        for index, view in enumerate(workers):
            if view.worker_id == query.home_worker_id:
                return index
        return self._others(query, workers, costs)
