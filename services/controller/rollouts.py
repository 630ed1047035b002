"""Units whose pods are of an old revision are replaced whole, one after the other."""

from __future__ import annotations

from typing import NamedTuple

from services.controller.autoscaler import Drain
from services.controller.farewells import Farewell
from services.controller.loads import Loads
from services.controller.records import Snapshot, WorkerSet


class Replace(NamedTuple):
    """Delete all pods of a unit."""

    worker_set: WorkerSet


class Rollouts:
    """Decides which unit of a group goes next: never two at a time, never while another is away."""

    def __init__(self) -> None:
        # By group: the unit that is on its way out.
        self._farewells: dict[str, Farewell] = {}

    def decide(
        self,
        group: str,
        sets: list[WorkerSet],
        snapshot: Snapshot,
        loads: Loads | None,
        drain_timeout_s: float,
        now: float,
    ) -> list[Replace | Drain]:
        outdated = [each for each in sets if _is_outdated(each, snapshot)]
        if not outdated or loads is None:
            self._farewells.pop(group, None)
            return []
        farewell = self._farewells.get(group)
        leaving = [
            each for each in outdated if farewell and farewell.worker_id == each.worker_id(0)
        ]
        if farewell is None or not leaving:
            chosen = _next(sets, outdated, snapshot, loads)
            if chosen is None:
                self._farewells.pop(group, None)
                return []
            farewell = Farewell(chosen.worker_id(0), now, drain_timeout_s)
            self._farewells[group], leaving = farewell, [chosen]
        if not farewell.is_over(loads, now):
            reason = "its pods are of an old revision"
            return [Drain(farewell.worker_id, reason)] if farewell.must_ask(loads) else []
        del self._farewells[group]
        return [Replace(leaving[0])]


def _is_outdated(worker_set: WorkerSet, snapshot: Snapshot) -> bool:
    """Whether a unit that waits for others to delete its pods has some of an old revision."""
    return (
        worker_set.is_unit
        and not worker_set.rolls_itself
        and worker_set.replicas > 0
        and bool(worker_set.update_revision)
        and any(
            pod.revision != worker_set.update_revision and not pod.is_leaving
            for pod in snapshot.pods_of(worker_set)
        )
    )


def _next(
    sets: list[WorkerSet], outdated: list[WorkerSet], snapshot: Snapshot, loads: Loads
) -> WorkerSet | None:
    """One that serves nobody as it is; else the highest, if all others of the group serve."""
    away = [each for each in sets if each.replicas and not _serves(each, snapshot, loads)]
    idle = [each for each in outdated if each in away]
    if idle:
        return idle[-1]
    return None if away else outdated[-1]


def _serves(worker_set: WorkerSet, snapshot: Snapshot, loads: Loads) -> bool:
    load = loads.worker(worker_set.worker_id(0))
    pods = snapshot.pods_of(worker_set)
    is_whole = len(pods) == worker_set.replicas and all(pod.is_ready for pod in pods)
    return is_whole and load is not None and load.is_ready
