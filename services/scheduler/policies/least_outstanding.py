"""The worker with the fewest requests, whatever they cost: what most load balancers do."""

from __future__ import annotations

from collections.abc import Sequence

from services.scheduler.pickers import Rotation
from services.scheduler.policy import Query
from services.scheduler.views import WorkerView


class LeastOutstanding:
    """Takes the worker with the fewest active sequences; equals in turn."""

    def __init__(self) -> None:
        self._rotation = Rotation()

    def __call__(self, query: Query, workers: Sequence[WorkerView], costs: Sequence[float]) -> int:
        fewest = min(view.num_active for view in workers)
        return self._rotation.next_of(
            workers, [index for index, view in enumerate(workers) if view.num_active == fewest]
        )
