"""How many workers a group should have: a function of what is seen, and of what was lately.

The formula is that of Kubernetes' HorizontalPodAutoscaler: workers times the value over its target,
with a tolerance, and windows against going up and down. Otherwise than there a worker is drained
before it goes, and the number of workers at most doubles with those that are ready.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from services.controller.farewells import Farewell
from services.controller.loads import Loads, PoolLoad
from services.controller.records import WorkerSet
from services.controller.rules import ScalingRules

# Values this near to their targets change nothing.
_TOLERANCE = 0.1
# What binary fractions are off by must not cost a worker.
_EPSILON = 1e-9
# A worker that drains and has nothing to do ends at once, if it is ending. One that does not was
# drained for good, by a controller before this one perhaps.
_DRAINED_AFTER_S = 30.0


class Scale(NamedTuple):
    """Set a StatefulSet's replicas."""

    worker_set: WorkerSet
    replicas: int
    reason: str


class Drain(NamedTuple):
    """Ask a worker to finish what it has."""

    worker_id: str
    reason: str


class Verdict(NamedTuple):
    """What to do about one group, and what was found."""

    actions: list[Scale | Drain]
    current: int
    # What the values ask for now, windows aside; None where a value is missing.
    wanted: int | None


@dataclass(slots=True)
class _History:
    """What one group asked for lately, and the worker that is on its way out."""

    # (when, how many workers).
    wanted: deque[tuple[float, int]] = field(default_factory=deque)
    farewell: Farewell | None = None
    # The group's last worker, and since when it drains and has nothing to do.
    idle: tuple[str, float] | None = None


class Autoscaler:
    """Decides for one group after the other; remembers only what their windows need."""

    def __init__(self) -> None:
        self._histories: dict[str, _History] = {}

    def decide(
        self,
        group: str,
        sets: list[WorkerSet],
        rules: ScalingRules,
        loads: Loads | None,
        now: float,
    ) -> Verdict:
        """For a group's StatefulSets in the order of their units. Never empties a group."""
        current = sum(each.num_workers for each in sets)
        if current == 0:
            # Somebody turned the group off.
            self._histories.pop(group, None)
            return Verdict([], 0, None)
        history = self._histories.setdefault(group, _History())
        most = min(rules.max_replicas, len(sets)) if sets[0].is_unit else rules.max_replicas
        least = min(rules.min_replicas, most)
        leaving = history.farewell.worker_id if history.farewell is not None else None
        wanted = None if loads is None else _wanted(sets, rules, loads, leaving)
        if wanted is not None:
            wanted = min(max(wanted, least), most)
        # What is not known asks for what is there.
        history.wanted.append((now, current if wanted is None else wanted))
        target = _target(history, rules, current, now)
        actions: list[Scale | Drain] = []
        if current < least:
            actions = _grow(sets, least, "there are fewer than minReplicas")
        elif (
            loads is not None and current > least and _is_leaving(history, sets, rules, loads, now)
        ):
            actions = _shrink(history, sets, loads, now)
        elif target > current:
            actions = _grow(sets, target, f"{target} workers are needed")
        elif loads is not None and min(target, most) < current:
            history.farewell = Farewell(_last(sets)[1], now, rules.drain_timeout_seconds)
            actions = _shrink(history, sets, loads, now)
        return Verdict(actions, current, wanted)

    def forget_others(self, groups: set[str]) -> None:
        """Only these groups are left."""
        self._histories = {name: each for name, each in self._histories.items() if name in groups}


def _is_leaving(
    history: _History, sets: list[WorkerSet], rules: ScalingRules, loads: Loads, now: float
) -> bool:
    """Whether the group's last worker is on its way out, by this or an earlier decision."""
    worker_id = _last(sets)[1]
    if history.farewell is not None:
        if history.farewell.worker_id == worker_id:
            return True
        history.farewell = None
    load = loads.worker(worker_id)
    if load is None or not load.is_draining or load.num_requests:
        history.idle = None
    elif history.idle is None or history.idle[0] != worker_id:
        history.idle = worker_id, now
    elif now - history.idle[1] >= _DRAINED_AFTER_S:
        history.farewell = Farewell(worker_id, now, rules.drain_timeout_seconds)
    return history.farewell is not None


def ratio(rules: ScalingRules, pool: PoolLoad) -> float | None:
    """The largest of the values over their targets; None where one is missing."""
    pairs = (
        (rules.saturation, pool.saturation),
        (rules.queue_seconds, pool.oldest_queued_s),
        (rules.kv_used, pool.kv_used_ratio),
    )
    ratios = []
    for target, value in pairs:
        if target is None:
            continue
        if value is None or not math.isfinite(value):
            return None
        ratios.append(value / target)
    return max(ratios)


def _wanted(
    sets: list[WorkerSet], rules: ScalingRules, loads: Loads, leaving: str | None
) -> int | None:
    """Workers that would bring every value to its target; None where one is missing."""
    worker_ids = [worker_id for each in sets for worker_id in each.worker_ids]
    current = len(worker_ids)
    pool = loads.pool_of(worker_ids)
    factor = None if pool is None else ratio(rules, pool)
    if pool is None or factor is None:
        return None
    known = [pool.workers[worker_id] for worker_id in worker_ids if worker_id in pool.workers]
    num_ready = sum(worker.is_ready for worker in known)
    if not num_ready:
        return None
    if abs(factor - 1.0) <= _TOLERANCE:
        return current
    if factor > 1.0:
        # Those that start are expected to help, so they ask for no more.
        needed = math.ceil(num_ready * min(factor, 2.0) - _EPSILON)
        return max(current, needed)
    # Those that are not ready are taken to be as busy as they should be, but for who is to go.
    num_away = current - num_ready
    if leaving in worker_ids and not (leaving in pool.workers and pool.workers[leaving].is_ready):
        num_away -= 1
    needed = math.ceil(num_ready * factor + num_away - _EPSILON)
    return min(current, needed)


def _target(history: _History, rules: ScalingRules, current: int, now: float) -> int:
    """What was needed all the time of the one window or the other."""
    up_s, down_s = rules.scale_up_window_seconds, rules.scale_down_window_seconds
    up = [wanted for at, wanted in history.wanted if now - at <= up_s]
    down = [wanted for at, wanted in history.wanted if now - at <= down_s]
    covers_up = now - history.wanted[0][0] >= up_s
    covers_down = now - history.wanted[0][0] >= down_s
    # One entry from before the windows says that they are covered.
    while len(history.wanted) > 1 and now - history.wanted[1][0] >= max(up_s, down_s):
        history.wanted.popleft()
    if covers_up and min(up) > current:
        return min(up)
    if covers_down and max(down) < current:
        return max(down)
    return current


def _last(sets: list[WorkerSet]) -> tuple[WorkerSet, str]:
    """The worker that goes first: the highest ordinal, or the highest unit that is on."""
    worker_set = [each for each in sets if each.num_workers][-1]
    return worker_set, worker_set.worker_ids[-1]


def _grow(sets: list[WorkerSet], target: int, reason: str) -> list[Scale | Drain]:
    if not sets[0].is_unit:
        return [Scale(sets[0], target, reason)]
    missing = target - sum(each.num_workers for each in sets)
    off = [each for each in sets if not each.replicas]
    return [Scale(each, each.nodes, reason) for each in off[:missing]]


def _shrink(
    history: _History, sets: list[WorkerSet], loads: Loads, now: float
) -> list[Scale | Drain]:
    """The group's last worker goes, once nothing is left there."""
    farewell = history.farewell
    assert farewell is not None, "somebody is to go"
    if not farewell.is_over(loads, now):
        reason = "the group gets smaller"
        return [Drain(farewell.worker_id, reason)] if farewell.must_ask(loads) else []
    # The next one of this name is another worker.
    history.farewell = history.idle = None
    worker_set, worker_id = _last(sets)
    replicas = 0 if worker_set.is_unit else worker_set.replicas - 1
    return [Scale(worker_set, replicas, f"worker {worker_id} is not needed")]
