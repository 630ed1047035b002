"""How busy a pool is: what says whether it has too few workers, or too many."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from services.scheduler.endpoints import WorkerTable
from services.scheduler.filters import MAX_QUEUED_PREFILL_NS
from services.scheduler.pools import Pool, PoolSet
from services.scheduler.queue import PoolQueue
from services.scheduler.views import WorkerState, WorkerView

_PREFIX = "rhizome_scheduler_"
# How those who are stuck are shown to others, too.
_STATE_LABELS = {
    WorkerState.READY: "ready",
    WorkerState.DRAINING: "draining",
    WorkerState.SUSPECT: "suspect",
    WorkerState.HUNG: "suspect",
}


class PoolLoad(NamedTuple):
    """One pool's load now; ratios are None while no worker is ready."""

    model: str
    num_queued: int
    # Of the request that waits longest; 0 when none waits.
    oldest_queued_s: float
    saturation: float | None
    kv_used_ratio: float | None
    workers: tuple[WorkerView, ...]


class PoolLoads:
    """Reads the loads of all pools that have an identity, when somebody asks."""

    def __init__(
        self,
        pools: PoolSet,
        table: WorkerTable,
        queue_of: Callable[[Pool], PoolQueue],
        clock: Callable[[], float],
    ) -> None:
        self._pools = pools
        self._table = table
        self._queue_of = queue_of
        self._clock = clock

    def read(self) -> list[PoolLoad]:
        return [
            self._read(pool, pool.identity.served_model_name)
            for pool in self._pools.pools
            if pool.identity is not None
        ]

    def _read(self, pool: Pool, model: str) -> PoolLoad:
        queue = self._queue_of(pool)
        num_queued, oldest = len(queue), queue.oldest_opened_at
        views = self._table.snapshot(pool)
        return PoolLoad(
            model,
            num_queued,
            0.0 if oldest is None else max(0.0, self._clock() - oldest),
            saturation(views, num_queued),
            kv_used_ratio(views),
            views,
        )


class PoolLoadCollector(Collector):
    """The loads as gauges by model; a value that is not known has no sample."""

    def __init__(self, loads: PoolLoads) -> None:
        self._loads = loads

    def collect(self) -> Iterator[Metric]:
        saturations = _family("saturation", "Room that is taken in the ready workers, 1 is all")
        oldest = _family("oldest_queued_seconds", "For how long the oldest request waits")
        kv_used = _family("kv_used_ratio", "Pages of the ready workers that sequences hold")
        workers = _family("workers", "Registered workers by state", "state")
        for load in self._loads.read():
            oldest.add_metric((load.model,), load.oldest_queued_s)
            for family, value in (
                (saturations, load.saturation),
                (kv_used, load.kv_used_ratio),
            ):
                if value is not None:
                    family.add_metric((load.model,), value)
            labels = [_STATE_LABELS[view.state] for view in load.workers]
            for label in sorted(set(_STATE_LABELS.values())):
                workers.add_metric((load.model, label), labels.count(label))
        yield from (saturations, oldest, kv_used, workers)


def saturation(views: Sequence[WorkerView], num_queued: int) -> float | None:
    """The fullest of the three things a worker needs to have room (`filters.has_room`).

    Sequences (those that wait in the scheduler count as well, so it grows with the backlog), pages,
    and the workers' own queues of prefill. Over all ready workers, since any of them will do.
    """
    ready = [view for view in views if view.state is WorkerState.READY]
    if not ready:
        return None
    num_slots = sum(view.worker.max_running_sequences for view in ready)
    num_tokens = sum(view.worker.num_pages * view.worker.page_size for view in ready)
    num_taken = num_tokens - sum(view.num_available_tokens for view in ready)
    # A single long prompt fills one worker's queue and says nothing of the others.
    queues = [min(1.0, view.queued_prefill_ns / MAX_QUEUED_PREFILL_NS) for view in ready]
    return max(
        (sum(view.num_active for view in ready) + num_queued) / num_slots,
        num_taken / num_tokens if num_tokens else 0.0,
        sum(queues) / len(queues),
    )


def kv_used_ratio(views: Sequence[WorkerView]) -> float | None:
    """Pages that running and waiting sequences hold; those that are only cached are free."""
    ready = [view for view in views if view.state is WorkerState.READY]
    num_pages = sum(view.worker.num_pages for view in ready)
    if not num_pages:
        return None
    num_free = sum(view.load.num_free_pages + view.load.num_evictable_pages for view in ready)
    return max(0.0, 1.0 - num_free / num_pages)


def _family(name: str, documentation: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"{_PREFIX}{name}", documentation, labels=("model", *labels))
