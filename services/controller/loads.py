"""How busy the release's pools are, as all schedulers that answer see it together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from rhizome.scheduler.v1 import scheduler_service_pb2 as pb


class WorkerLoad(NamedTuple):
    """One worker's; it is ready while any scheduler would still place a request there."""

    is_ready: bool
    is_draining: bool
    num_requests: int


class PoolLoad(NamedTuple):
    """One pool's; what no scheduler knows is None."""

    oldest_queued_s: float
    saturation: float | None
    kv_used_ratio: float | None
    workers: dict[str, WorkerLoad]


class Loads:
    """The pools by model."""

    def __init__(self, pools: dict[str, PoolLoad]) -> None:
        self._pools = pools

    def pool_of(self, worker_ids: Iterable[str]) -> PoolLoad | None:
        """The pool that these are registered in; None for none, and for several."""
        wanted = set(worker_ids)
        found = [pool for pool in self._pools.values() if wanted & pool.workers.keys()]
        return found[0] if len(found) == 1 else None

    def worker(self, worker_id: str) -> WorkerLoad | None:
        """None for one that no scheduler knows."""
        pool = self.pool_of((worker_id,))
        return None if pool is None else pool.workers[worker_id]


def merge(answers: Sequence[Iterable[pb.PoolLoad]]) -> Loads | None:
    """What the schedulers' answers say together; None without an answer.

    Requests wait at the scheduler that was asked to place them, so the busiest answer counts.
    """
    if not answers:
        return None
    pools: dict[str, PoolLoad] = {}
    for answer in answers:
        for message in answer:
            one = _pool(message)
            known = pools.get(message.model)
            pools[message.model] = one if known is None else _both(known, one)
    return Loads(pools)


def _pool(message: pb.PoolLoad) -> PoolLoad:
    return PoolLoad(
        message.oldest_queued.seconds + message.oldest_queued.nanos / 1e9,
        message.saturation if message.HasField("saturation") else None,
        message.kv_used_ratio if message.HasField("kv_used_ratio") else None,
        {worker.worker_id: _worker(worker) for worker in message.workers},
    )


def _worker(message: pb.WorkerLoad) -> WorkerLoad:
    return WorkerLoad(
        message.state == pb.WORKER_STATE_READY,
        message.state == pb.WORKER_STATE_DRAINING,
        message.num_running + message.num_waiting + message.num_promised,
    )


def _both(one: PoolLoad, other: PoolLoad) -> PoolLoad:
    workers = dict(one.workers)
    for worker_id, theirs in other.workers.items():
        ours = workers.get(worker_id)
        workers[worker_id] = (
            theirs
            if ours is None
            else WorkerLoad(
                ours.is_ready or theirs.is_ready,
                ours.is_draining or theirs.is_draining,
                max(ours.num_requests, theirs.num_requests),
            )
        )
    return PoolLoad(
        max(one.oldest_queued_s, other.oldest_queued_s),
        _larger(one.saturation, other.saturation),
        _larger(one.kv_used_ratio, other.kv_used_ratio),
        workers,
    )


def _larger(one: float | None, other: float | None) -> float | None:
    if one is None or other is None:
        return one if other is None else other
    return max(one, other)
