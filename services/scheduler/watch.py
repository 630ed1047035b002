"""Tells watchers that the worker table changed: at once, or paced where it is load alone."""

from __future__ import annotations

import asyncio
import contextlib

from rhizome.scheduler.v1.scheduler_service_pb2 import WatchWorkersResponse
from services.scheduler.endpoints import WorkerTable
from services.scheduler.pools import PoolSet
from services.scheduler.wire import table_response

_LOAD_INTERVAL_S = 0.05
_UNCHANGED_INTERVAL_S = 0.5


class TableWatch:
    """Wakes watchers, and builds one message a version for all of them.

    `leader_term` goes with every message.
    """

    def __init__(self, table: WorkerTable, pools: PoolSet) -> None:
        self.leader_term = 0
        self._table = table
        self._pools = pools
        self._message = WatchWorkersResponse()
        # Replaced when set: each wait is for the next change.
        self._any_change = asyncio.Event()
        self._membership_change = asyncio.Event()

    def notify(self, membership: bool) -> None:
        self._any_change.set()
        self._any_change = asyncio.Event()
        if membership:
            self._membership_change.set()
            self._membership_change = asyncio.Event()

    def table_message(self) -> WatchWorkersResponse:
        """The table now."""
        if self._message.table_version != self._table.version:
            self._message = table_response(self._table, self._pools)
        self._message.leader_term = self.leader_term
        return self._message

    def unchanged_message(self) -> WatchWorkersResponse:
        """The table is as it was."""
        return WatchWorkersResponse(
            table_version=self._table.version, unchanged=True, leader_term=self.leader_term
        )

    def lead(self, term: int) -> None:
        """This scheduler leads from now on, or, with term 0, no more."""
        self.leader_term = term
        self.notify(membership=True)

    async def wait_beyond(self, sent_version: int) -> None:
        """Until there is something to say to a watcher that was just sent `sent_version`.

        Membership may change at once, load not before 50 ms; 500 ms pass in any case.
        """
        await _wait(self._membership_change, _LOAD_INTERVAL_S)
        if self._table.version == sent_version:
            await _wait(self._any_change, _UNCHANGED_INTERVAL_S - _LOAD_INTERVAL_S)


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()
