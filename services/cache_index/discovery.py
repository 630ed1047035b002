"""Learns from the schedulers which workers there are, and keeps one follower for each."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

import grpc

from rhizome.scheduler.v1 import scheduler_service_pb2 as pb
from rhizome.scheduler.v1.scheduler_service_pb2_grpc import SchedulerServiceStub
from services.cache_index.follower import Follower
from services.cache_index.index import PrefixIndex
from services.common.peer_tls import PeerTls
from services.common.rpc import open_channel

logger = logging.getLogger(__name__)

# A scheduler says something every 500 ms; one silent for this long is asked anew.
_SILENCE_S = 3.0
_RETRY_S = 0.5
_SCRUB_PERIOD_S = 0.1

WorkerKey = tuple[str, str]


class Discovery:
    """The set of followers: one for each (worker id, address) that some scheduler knows.

    A scheduler that is gone keeps its last table. A worker missing from every table keeps its
    follower for `linger_s` more, so that a restarted scheduler, whose table starts empty, costs
    no snapshots; then its pages are scrubbed.
    """

    def __init__(
        self,
        index: PrefixIndex,
        schedulers: Iterable[str],
        *,
        linger_s: float = 5.0,
        tls: PeerTls | None = None,
    ) -> None:
        self.followers: dict[WorkerKey, Follower] = {}
        self._index = index
        self._schedulers = tuple(schedulers)
        self._linger_s = linger_s
        self._tls = tls
        self._turns = asyncio.Lock()
        self._tables: dict[str, frozenset[WorkerKey]] = {}
        self._tasks: dict[WorkerKey, asyncio.Task[None]] = {}
        self._stopping: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Watch, follow and scrub until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                for scheduler in self._schedulers:
                    group.create_task(self._watch(scheduler))
                group.create_task(self._scrub())
        finally:
            for key in list(self._tasks):
                self._stop(key)
            await asyncio.gather(*self._stopping, return_exceptions=True)

    def set_table(self, scheduler: str, workers: Iterable[WorkerKey]) -> None:
        """Take a scheduler's whole table: follow who is new, let go who is in none any more."""
        self._tables[scheduler] = frozenset(workers)
        known = self._known
        for worker_id, address in known - self._tasks.keys():
            follower = Follower(self._index, worker_id, address, self._turns, tls=self._tls)
            self.followers[worker_id, address] = follower
            self._tasks[worker_id, address] = asyncio.create_task(follower.run())
            logger.info("event=follow worker=%s address=%s", worker_id, address)
        for key in self._tasks.keys() - known:
            asyncio.get_running_loop().call_later(self._linger_s, self._stop_if_gone, key)

    @property
    def _known(self) -> frozenset[WorkerKey]:
        return frozenset().union(*self._tables.values())

    def _stop_if_gone(self, key: WorkerKey) -> None:
        if key in self._tasks and key not in self._known:
            logger.info("event=unfollow worker=%s address=%s", *key)
            self._stop(key)

    def _stop(self, key: WorkerKey) -> None:
        del self.followers[key]
        task = self._tasks.pop(key)
        self._stopping.add(task)
        task.add_done_callback(self._stopping.discard)
        task.cancel()

    async def _watch(self, scheduler: str) -> None:
        """Take tables from one scheduler for ever."""
        # One that was never heard may just not be up yet: no news.
        silent = True
        async with open_channel(scheduler, self._tls) as channel:
            stub = SchedulerServiceStub(channel)
            while True:
                call = stub.WatchWorkers(pb.WatchWorkersRequest())
                try:
                    while True:
                        async with asyncio.timeout(_SILENCE_S):
                            response = await call.read()
                        if not isinstance(response, pb.WatchWorkersResponse):
                            break
                        silent = False
                        if not response.unchanged:
                            self.set_table(scheduler, _workers(response))
                except (grpc.aio.AioRpcError, TimeoutError) as error:
                    if not silent:
                        logger.warning(
                            "event=scheduler_silent scheduler=%s error=%s",
                            *(scheduler, type(error).__name__),
                        )
                    silent = True
                except Exception:
                    logger.exception("event=watch_failed scheduler=%s", scheduler)
                finally:
                    call.cancel()
                await asyncio.sleep(_RETRY_S)

    async def _scrub(self) -> None:
        """Free the slots of workers that are gone, a slice at a time."""
        while True:
            while self._index.scrub():
                await asyncio.sleep(0)
            await asyncio.sleep(_SCRUB_PERIOD_S)


def _workers(table: pb.WatchWorkersResponse) -> list[WorkerKey]:
    return [(entry.worker_id, entry.address) for pool in table.pools for entry in pool.workers]
