"""Holds: which worker each waiting request waits for, and what that adds to the worker's load.

A request whose prefix one busy worker holds is often served sooner there, in a moment, than by
computing it again on a worker that has room now. So a policy may choose a worker without room, and
the request waits for it in the queue, where fairness is, not in the worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from services.scheduler.queue import Ticket
from services.scheduler.views import NO_CHARGE, Charge, WorkerView, view_of

# A choice is made anew after so long, if the worker has no room until then.
HOLD_S = 0.05


class Hold(NamedTuple):
    """A choice that waits for room; `charge` is what the request will add to the worker."""

    worker_id: str
    charge: Charge
    decided_at: float


class Holds:
    """The newest choice of each waiting ticket that was chosen for a worker without room."""

    def __init__(self) -> None:
        self._holds: dict[Ticket, Hold] = {}

    def find(self, ticket: Ticket, now: float) -> Hold | None:
        """Its choice, while that is new."""
        hold = self._holds.get(ticket)
        return hold if hold is not None and now - hold.decided_at < HOLD_S else None

    def set(self, ticket: Ticket, hold: Hold) -> None:
        self._holds[ticket] = hold

    def drop(self, ticket: Ticket) -> None:
        """The ticket waits no more, or for nobody."""
        self._holds.pop(ticket, None)


class WorkAhead:
    """One pass over a queue: what the tickets passed so far wait for, by worker.

    It counts as if it had been placed, so a worker serves those that wait for it in their order,
    and a long line before a worker sends others elsewhere.
    """

    def __init__(self) -> None:
        self._charges: dict[str, Charge] = {}

    def add(self, hold: Hold) -> None:
        charge = self._charges.get(hold.worker_id, NO_CHARGE)
        self._charges[hold.worker_id] = charge.plus(hold.charge)

    def view(self, view: WorkerView) -> WorkerView:
        """The worker with what waits for it."""
        charge = self._charges.get(view.worker_id)
        if charge is None:
            return view
        held = view.charge.plus(charge)
        return view_of(view.worker, view.state, view.load, view.cost_model, held)

    def views(self, workers: Sequence[WorkerView]) -> Sequence[WorkerView]:
        return [self.view(view) for view in workers] if self._charges else workers
