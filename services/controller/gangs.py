"""Ranks start together or not at all: when one pod of a unit is lost, all others are replaced."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from services.controller.records import Pod, Snapshot, WorkerSet

# The first restart is at once; before the next one the unit is left alone for so long, doubled
# each time, until it has been ready for a while.
_FIRST_DELAY_S = 10.0
_MAX_DELAY_S = 300.0
_STABLE_AFTER_S = 600.0
# A pod that came back while others were still going may have met one of these, and start again.
_SETTLE_S = 10.0
# A unit that is ready again, while it waits for its restart, needs none.
_MENDED_AFTER_S = 30.0
# A pod that was to be deleted and is still there is deleted again.
_RETRY_S = 5.0
# Some pods of a unit have nodes and others find none: what the first hold, such as half of a rack,
# may be why. Node autoscalers need minutes, so it is given some.
_DIVIDED_S = 600.0


class Restart(NamedTuple):
    """Delete these pods, so that the unit starts as one."""

    worker_set: WorkerSet
    pods: tuple[Pod, ...]
    reason: str
    # False where an earlier attempt at the same restart failed, or was not this replica's to make.
    is_new: bool = True
    # How long the unit will be left alone; 0 where it was no loss, or not new.
    next_delay_s: float = 0.0


class _Member(NamedTuple):
    uid: str
    num_restarts: int


@dataclass(slots=True)
class _Unit:
    """What is known of one unit that is on."""

    # The pods that started together, by name; None until all are there.
    members: dict[str, _Member] | None = None
    formed_at: float = 0.0
    # Pods, by uid, that must be gone before the next ones count.
    leaving: set[str] = field(default_factory=set)
    reason: str = ""
    deleted_at: float = 0.0
    broken: str | None = None
    broken_at: float = 0.0
    ready_since: float | None = None
    # Since when some pods have a node and others none.
    divided_since: float | None = None
    # When it may be restarted next, and how long it is left alone after that.
    due: float = 0.0
    delay_s: float = _FIRST_DELAY_S


class GangKeeper:
    """Decides which units start anew.

    It remembers which pods started together; one that has just begun takes those it finds for
    such. Whoever does not act may decide all the same, and then knows what whoever acted knew.
    Time is the caller's clock.
    """

    def __init__(self) -> None:
        self._units: dict[str, _Unit] = {}

    def decide(self, snapshot: Snapshot, now: float) -> list[Restart]:
        """What to delete now; each restart is told once, and again only where pods stay."""
        restarts = []
        kept = {}
        for worker_set in snapshot.sets.values():
            if not worker_set.is_unit or worker_set.replicas == 0:
                continue
            unit = kept[worker_set.uid] = self._units.get(worker_set.uid, _Unit())
            restart = self._decide(unit, worker_set, snapshot.pods_of(worker_set), now)
            if restart is not None:
                restarts.append(restart)
        self._units = kept
        return restarts

    def replace(self, worker_set: WorkerSet, pods: Iterable[Pod], now: float) -> Restart:
        """A restart that somebody asked for: it is no failure, and delays none."""
        unit = self._units.setdefault(worker_set.uid, _Unit())
        return _begin(unit, worker_set, list(pods), "the pods are of an old revision", now)

    def _decide(
        self, unit: _Unit, worker_set: WorkerSet, pods: list[Pod], now: float
    ) -> Restart | None:
        if unit.leaving:
            staying = [pod for pod in pods if pod.uid in unit.leaving]
            if staying:
                return _again(unit, worker_set, staying, now)
            unit.leaving.clear()
        is_whole = len(pods) == worker_set.replicas and not any(
            pod.is_leaving or pod.has_failed for pod in pods
        )
        self._note_readiness(unit, is_whole and all(pod.is_ready for pod in pods), now)
        _note_division(unit, pods, now)
        if unit.broken is None:
            unit.broken = _flaw(unit, pods, now)
            unit.broken_at = now
        if unit.broken is None or _is_mended(unit, now):
            if is_whole and (unit.members is None or unit.broken is not None):
                unit.members = {pod.name: _Member(pod.uid, pod.num_restarts) for pod in pods}
                unit.formed_at, unit.broken = now, None
            return None
        if all(pod.is_leaving for pod in pods):
            # Somebody deletes all of them: that is a restart.
            _begin(unit, worker_set, pods, unit.broken, now)
            return None
        if now < unit.due:
            return None
        restart = _begin(unit, worker_set, pods, unit.broken, now)
        unit.due = now + unit.delay_s
        restart = restart._replace(next_delay_s=unit.delay_s)
        unit.delay_s = min(2 * unit.delay_s, _MAX_DELAY_S)
        return restart

    def _note_readiness(self, unit: _Unit, is_ready: bool, now: float) -> None:
        if not is_ready:
            unit.ready_since = None
        elif unit.ready_since is None:
            unit.ready_since = now
        elif now - unit.ready_since >= _STABLE_AFTER_S:
            unit.delay_s, unit.due = _FIRST_DELAY_S, 0.0


def _note_division(unit: _Unit, pods: list[Pod], now: float) -> None:
    if len({bool(pod.node_name) for pod in pods if not pod.is_leaving}) < 2:
        unit.divided_since = None
    elif unit.divided_since is None:
        unit.divided_since = now


def _begin(unit: _Unit, worker_set: WorkerSet, pods: list[Pod], reason: str, now: float) -> Restart:
    unit.members, unit.broken, unit.ready_since, unit.divided_since = None, None, None, None
    unit.leaving = {pod.uid for pod in pods}
    unit.deleted_at, unit.reason = now, reason
    return Restart(worker_set, tuple(pod for pod in pods if not pod.is_leaving), reason)


def _again(unit: _Unit, worker_set: WorkerSet, staying: list[Pod], now: float) -> Restart | None:
    forgotten = tuple(pod for pod in staying if not pod.is_leaving)
    if not forgotten or now - unit.deleted_at < _RETRY_S:
        return None
    unit.deleted_at = now
    return Restart(worker_set, forgotten, unit.reason, is_new=False)


def _flaw(unit: _Unit, pods: list[Pod], now: float) -> str | None:
    """Why the pods are not, or no longer, those that started together."""
    for pod in pods:
        if pod.has_failed and not pod.is_leaving:
            return f"pod {pod.name} failed"
        if pod.is_leaving:
            return f"pod {pod.name} is being deleted"
    if unit.divided_since is not None and now - unit.divided_since >= _DIVIDED_S:
        names = ", ".join(pod.name for pod in pods if not pod.node_name)
        return f"no node was found for {names} in {_DIVIDED_S:g} s"
    if unit.members is None:
        return None
    found = {pod.name: pod for pod in pods}
    for name, member in list(unit.members.items()):
        if name not in found:
            return f"pod {name} is gone"
        pod = found[name]
        if pod.uid != member.uid:
            return f"pod {name} was replaced"
        if pod.num_restarts > member.num_restarts:
            if now - unit.formed_at >= _SETTLE_S:
                return f"a container of pod {name} was restarted"
            unit.members[name] = _Member(pod.uid, pod.num_restarts)
    return None


def _is_mended(unit: _Unit, now: float) -> bool:
    """Whether all pods have been ready for a while since it broke."""
    if unit.broken is None or unit.ready_since is None:
        return False
    return now - max(unit.ready_since, unit.broken_at) >= _MENDED_AFTER_S
