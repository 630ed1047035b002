"""Carries out what is decided about groups' sizes and revisions."""

from __future__ import annotations

import logging
from collections.abc import Callable

from services.controller.autoscaler import Autoscaler, Drain, Scale
from services.controller.cluster import Cluster
from services.controller.loads import Loads
from services.controller.metrics import ControllerMetrics
from services.controller.records import Snapshot, WorkerSet
from services.controller.rollouts import Replace, Rollouts
from services.controller.rules import ScalingRules, read_rules
from services.controller.schedulers import Schedulers

logger = logging.getLogger(__name__)

# Where a group has no rules of its own.
_DRAIN_TIMEOUT_S = 600.0


class Scaling:
    """Owns the decisions of one leader's time."""

    def __init__(
        self,
        cluster: Cluster,
        schedulers: Schedulers,
        metrics: ControllerMetrics,
        clock: Callable[[], float],
    ) -> None:
        self._cluster = cluster
        self._schedulers = schedulers
        self._metrics = metrics
        self._clock = clock
        self._autoscaler = Autoscaler()
        self._rollouts = Rollouts()
        self._known: set[str] = set()
        # Annotations that were found wrong, by group.
        self._refused: dict[str, str] = {}

    def needs_loads(self, snapshot: Snapshot) -> bool:
        """Whether anything could follow from them."""
        return any(
            each.scaling is not None or not each.rolls_itself for each in snapshot.sets.values()
        )

    async def apply(self, snapshot: Snapshot, loads: Loads | None) -> list[WorkerSet]:
        """Scale and drain; returns the units whose pods are to be replaced."""
        groups = snapshot.groups
        if groups.keys() != self._known:
            self._known = set(groups)
            self._autoscaler.forget_others(self._known)
            self._metrics.forget_groups()
        replaced = []
        for group, sets in groups.items():
            self._metrics.workers.labels(group).set(sum(each.num_workers for each in sets))
            rules = await self._rules(group, sets[0])
            timeout_s = rules.drain_timeout_seconds if rules else _DRAIN_TIMEOUT_S
            steps = self._rollouts.decide(group, sets, snapshot, loads, timeout_s, self._clock())
            for step in steps:
                if isinstance(step, Replace):
                    replaced.append(step.worker_set)
                else:
                    await self._drain(step)
            if rules is not None:
                await self._scale(group, sets, rules, loads)
        return replaced

    async def _scale(
        self, group: str, sets: list[WorkerSet], rules: ScalingRules, loads: Loads | None
    ) -> None:
        verdict = self._autoscaler.decide(group, sets, rules, loads, self._clock())
        is_missing = verdict.wanted is None and verdict.current > 0
        self._metrics.signals_missing.labels(group).set(is_missing)
        if verdict.wanted is not None:
            self._metrics.wanted_workers.labels(group).set(verdict.wanted)
        for action in verdict.actions:
            if isinstance(action, Drain):
                await self._drain(action)
            else:
                await self._set_replicas(action)

    async def _set_replicas(self, action: Scale) -> None:
        worker_set = action.worker_set
        if not await self._cluster.scale(worker_set, action.replicas):
            return
        direction = "up" if action.replicas > worker_set.replicas else "down"
        self._metrics.scalings.labels(worker_set.group, direction).inc()
        change = f"from {worker_set.replicas} to {action.replicas} replicas: {action.reason}"
        logger.info("event=scaled set=%s change=%r", worker_set.name, change)
        await self._cluster.tell(worker_set, "Scaled", change, warn=False)

    async def _drain(self, action: Drain) -> None:
        logger.info("event=drain worker=%s reason=%r", action.worker_id, action.reason)
        await self._schedulers.drain(action.worker_id, action.reason, self._schedulers.addresses)

    async def _rules(self, group: str, worker_set: WorkerSet) -> ScalingRules | None:
        """None for a group that keeps its size; a wrong annotation is told of once."""
        if worker_set.scaling is None:
            self._refused.pop(group, None)
            return None
        try:
            rules = read_rules(worker_set.scaling)
        except ValueError as error:
            if self._refused.get(group) != worker_set.scaling:
                self._refused[group] = worker_set.scaling
                message = f"the group keeps its size: rhizome.ai/autoscaling: {error}"
                logger.warning("event=rules_refused group=%s detail=%r", group, str(error))
                await self._cluster.tell(worker_set, "AutoscalingRefused", message, warn=True)
            return None
        self._refused.pop(group, None)
        return rules
