"""The loops: look at the cluster and at the schedulers, decide, act where this replica leads."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable

from services.controller.candidacy import Candidacy
from services.controller.cluster import Cluster
from services.controller.follower import Follower
from services.controller.gangs import GangKeeper, Restart
from services.controller.metrics import ControllerMetrics
from services.controller.records import Pod, Snapshot
from services.controller.scaling import Scaling
from services.controller.schedulers import Schedulers

logger = logging.getLogger(__name__)

# What happens by time alone is seen this late.
_TICK_S = 1.0
# Changes come in bursts, and those of StatefulSets beside those of their pods.
_PAUSE_S = 0.05
_SCALING_INTERVAL_S = 5.0


class Controller:
    """Owns the tasks of one replica.

    Restarts are decided by all replicas and done by the leader, so that whoever follows it knows
    which pods started together.
    """

    def __init__(
        self,
        follower: Follower,
        cluster: Cluster,
        schedulers: Schedulers,
        candidacy: Candidacy,
        metrics: ControllerMetrics,
        *,
        force_delete_after_s: float | None = None,
        scaling_interval_s: float = _SCALING_INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._follower = follower
        self._cluster = cluster
        self._schedulers = schedulers
        self._candidacy = candidacy
        self._metrics = metrics
        self._force_delete_after_s = force_delete_after_s
        self._scaling_interval_s = scaling_interval_s
        self._clock = clock
        self._wall_clock = wall_clock
        self._gangs = GangKeeper()
        self._scaling: Scaling | None = None
        # By the uid of a pod that leaves: the schedulers that know, and the calls under way.
        self._told: dict[str, set[str]] = {}
        self._telling: dict[str, asyncio.Task[None]] = {}
        metrics.show_leading(lambda: float(candidacy.leads))

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Until the block ends."""
        loops = [
            asyncio.create_task(self._candidacy.run()),
            asyncio.create_task(self._watch_for_ever()),
            asyncio.create_task(self._scale_for_ever()),
        ]
        try:
            async with self._follower.following():
                yield
        finally:
            tasks = [*loops, *self._telling.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def watch(self) -> None:
        """One look at pods and StatefulSets."""
        snapshot = self._follower.snapshot
        if snapshot is None:
            return
        restarts = self._gangs.decide(snapshot, self._clock())
        if not self._candidacy.leads:
            return
        self._tell_of_leaving(snapshot)
        await asyncio.gather(*map(self._restart, restarts))

    async def scale(self) -> None:
        """One look at the load, and at what takes its time."""
        if not self._candidacy.leads:
            # A new leader starts with what it sees, and waits for the windows to pass.
            if self._scaling is not None:
                self._metrics.forget_groups()
            self._scaling = None
            return
        if self._scaling is None:
            self._scaling = Scaling(self._cluster, self._schedulers, self._metrics, self._clock)
        snapshot = self._follower.snapshot
        if snapshot is None:
            return
        loads = await self._schedulers.loads() if self._scaling.needs_loads(snapshot) else None
        # It may have changed meanwhile, and so may the leader.
        snapshot = self._follower.snapshot
        if snapshot is None or not self._candidacy.leads:
            return
        for worker_set in await self._scaling.apply(snapshot, loads):
            pods = snapshot.pods_of(worker_set)
            await self._restart(self._gangs.replace(worker_set, pods, self._clock()))
            self._metrics.rollouts.labels(worker_set.group).inc()
        await self._delete_by_force(snapshot)

    async def _watch_for_ever(self) -> None:
        changed = self._follower.changed
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_TICK_S):
                    await changed.wait()
            await asyncio.sleep(_PAUSE_S)
            changed.clear()
            try:
                await self.watch()
            except Exception:
                logger.exception("event=watch_failed")

    async def _scale_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self._scaling_interval_s)
            try:
                await self.scale()
            except Exception:
                logger.exception("event=scale_failed")

    def _tell_of_leaving(self, snapshot: Snapshot) -> None:
        """Schedulers stop placing requests on workers whose pods are being deleted."""
        leaving = {pod.uid: pod for pod in snapshot.pods.values() if pod.is_leaving}
        self._told = {uid: told for uid, told in self._told.items() if uid in leaving}
        for uid, pod in leaving.items():
            worker_set = snapshot.sets.get(pod.set_name)
            told = self._told.setdefault(uid, set())
            missing = set(self._schedulers.addresses) - told
            if worker_set is None or not missing or uid in self._telling:
                continue
            ordinal = int(pod.name.rpartition("-")[2])
            telling = self._tell(worker_set.worker_id(ordinal), pod, missing, told)
            self._telling[uid] = asyncio.create_task(telling)

    async def _tell(self, worker_id: str, pod: Pod, missing: set[str], told: set[str]) -> None:
        try:
            told |= await self._schedulers.drain(
                worker_id, f"pod {pod.name} is being deleted", missing
            )
            logger.info(
                "event=worker_leaves worker=%s pod=%s schedulers=%d",
                *(worker_id, pod.name, len(told)),
            )
        finally:
            del self._telling[pod.uid]

    async def _restart(self, restart: Restart) -> None:
        worker_set = restart.worker_set
        await asyncio.gather(*map(self._cluster.delete_pod, restart.pods))
        names = ", ".join(pod.name for pod in restart.pods)
        logger.warning(
            "event=unit_restarted unit=%s reason=%r pods=%r next_delay_s=%g",
            *(worker_set.name, restart.reason, names, restart.next_delay_s),
        )
        message = f"{restart.reason}: deleted {names}"
        if restart.next_delay_s:
            self._metrics.gang_restarts.labels(worker_set.group).inc()
            message += f"; not again within {restart.next_delay_s:g} s"
        await self._cluster.tell(
            worker_set, "RanksRestarted", message, warn=restart.next_delay_s > 0
        )

    async def _delete_by_force(self, snapshot: Snapshot) -> None:
        """Pods that nobody will ever report as gone."""
        limit_s = self._force_delete_after_s
        if limit_s is None:
            return
        now = self._wall_clock()
        for pod in snapshot.pods.values():
            if pod.due is None or now - pod.due < limit_s or not pod.node_name:
                continue
            if await self._cluster.is_node_ready(pod.node_name):
                continue
            if await self._cluster.delete_pod(pod, by_force=True):
                self._metrics.forced_deletions.inc()
                logger.warning("event=pod_deleted_by_force pod=%s node=%s", pod.name, pod.node_name)
