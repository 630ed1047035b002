"""The schedulers as a gateway knows them: who answers, who leads, which one to ask first."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable

from grpc import aio

from rhizome.scheduler.v1.scheduler_service_pb2 import (
    Placement,
    ReportRequestsRequest,
    RequestOutcome,
    ScheduleRequest,
    WatchWorkersRequest,
    WatchWorkersResponse,
)
from rhizome.scheduler.v1.scheduler_service_pb2_grpc import SchedulerServiceStub
from services.common.peer_tls import PeerTls
from services.common.process import background
from services.common.rpc import open_channel
from services.gateway.schedule_session import SILENCE_S, SchedulerLostError, ScheduleSession

logger = logging.getLogger(__name__)

# Two messages of a scheduler's table may be 500 ms apart.
_WATCH_SILENCE_S = 2 * SILENCE_S
_RECONNECT_S = 0.2
_REPORT_INTERVAL_S = 0.1
_REPORT_TIMEOUT_S = 2.0
_MAX_UNREPORTED = 10_000
# Workers find a scheduler that restarts within 2 s: before that it knows only some of them.
_SETTLE_S = 3.0


class SchedulerPeer:
    """One scheduler: its standing calls, its last table, and whether it answers.

    `answers_since` is None while it is silent: from its first failure until its table's stream is
    heard again. A scheduler never heard of is neither silent nor answering.
    """

    def __init__(
        self,
        address: str,
        on_change: Callable[[SchedulerPeer], None],
        tls: PeerTls | None = None,
    ) -> None:
        self.address = address
        self.is_silent = False
        self.answers_since: float | None = None
        self.leader_term = 0
        # None before its first.
        self.table: WatchWorkersResponse | None = None
        self._on_change = on_change
        self._channel = open_channel(address, tls)
        self._stub = SchedulerServiceStub(self._channel)
        self._session = ScheduleSession(self._stub)
        self._outcomes: list[RequestOutcome] = []

    async def place(self, request: ScheduleRequest) -> Placement:
        """Raises its verdict, or SchedulerLostError when it does not answer."""
        try:
            return await self._session.place(request)
        except SchedulerLostError:
            self._note_silent()
            raise

    def report(self, outcome: RequestOutcome) -> None:
        """Tell it, soon and at most once, how a placement went."""
        if not self.is_silent and len(self._outcomes) < _MAX_UNREPORTED:
            self._outcomes.append(outcome)

    async def run(self) -> None:
        """Follow its table and send outcomes until cancelled."""
        try:
            await asyncio.gather(self._watch(), self._report())
        finally:
            await self._send_outcomes()
            await self._session.aclose()
            await self._channel.close()

    async def _watch(self) -> None:
        while True:
            call = self._stub.WatchWorkers(WatchWorkersRequest())
            try:
                while True:
                    async with asyncio.timeout(_WATCH_SILENCE_S):
                        response = await call.read()
                    if not isinstance(response, WatchWorkersResponse):
                        break
                    self._hear(response)
            except (aio.AioRpcError, TimeoutError) as error:
                status = error.code().name if isinstance(error, aio.AioRpcError) else "SILENT"
                logger.debug("event=watch_lost scheduler=%s status=%s", self.address, status)
            except Exception:
                logger.exception("event=watch_failed scheduler=%s", self.address)
            finally:
                call.cancel()
            self._note_silent()
            await asyncio.sleep(_RECONNECT_S)

    def _hear(self, response: WatchWorkersResponse) -> None:
        if self.answers_since is None:
            self.answers_since = time.monotonic()
            self.is_silent = False
        self.leader_term = response.leader_term
        if not response.unchanged:
            self.table = response
        self._on_change(self)

    def _note_silent(self) -> None:
        if self.is_silent:
            return
        self.is_silent = True
        self.answers_since = None
        self.leader_term = 0
        # They only correct estimates; its leases cover what is missing.
        self._outcomes.clear()
        self._on_change(self)

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(_REPORT_INTERVAL_S)
            await self._send_outcomes()

    async def _send_outcomes(self) -> None:
        if not self._outcomes:
            return
        request = ReportRequestsRequest(outcomes=self._outcomes)
        self._outcomes = []
        try:
            await self._stub.ReportRequests(request, timeout=_REPORT_TIMEOUT_S)
        except aio.AioRpcError as error:
            logger.debug(
                "event=report_failed scheduler=%s status=%s", self.address, error.code().name
            )


class SchedulerSet:
    """All schedulers of the configuration, in the order in which to ask them.

    First whoever leads by the highest term; else, and then, the order of the configuration. One
    that answers for less than 3 s comes after those that answer for longer, one never heard of
    after all that answer, and a silent one is not asked. `on_table` gets the table of the first.
    """

    def __init__(
        self,
        addresses: Iterable[str],
        on_table: Callable[[WatchWorkersResponse], None],
        clock: Callable[[], float] = time.monotonic,
        tls: PeerTls | None = None,
    ) -> None:
        self.peers = [SchedulerPeer(address, self._on_change, tls) for address in addresses]
        self._on_table = on_table
        self._clock = clock
        # Who comes first now, and its term.
        self._preferred: tuple[SchedulerPeer | None, int] = (None, 0)

    @contextlib.asynccontextmanager
    async def following(self) -> AsyncIterator[None]:
        """Follow all of them until the block ends."""
        async with background(*(peer.run() for peer in self.peers)):
            yield

    @property
    def num_answering(self) -> int:
        return sum(peer.answers_since is not None for peer in self.peers)

    def in_order(self) -> list[SchedulerPeer]:
        """Those worth asking, the preferred one first."""
        now = self._clock()
        return sorted(
            (peer for peer in self.peers if not peer.is_silent), key=lambda peer: _rank(peer, now)
        )

    def report(self, outcome: RequestOutcome) -> None:
        """Tell all of them: each keeps breakers, one has the reservation."""
        for peer in self.peers:
            peer.report(outcome)

    def _on_change(self, peer: SchedulerPeer) -> None:
        """Take the table of the first, when it is new or another's turn has come."""
        first = next(iter(self.in_order()), None)
        preferred = (first, 0 if first is None else first.leader_term)
        if preferred != self._preferred:
            self._preferred = preferred
            logger.info(
                "event=scheduler_preferred scheduler=%s term=%d",
                *("none" if first is None else first.address, preferred[1]),
            )
        elif peer is not first:
            return
        if first is not None and first.table is not None:
            self._on_table(first.table)


def _rank(peer: SchedulerPeer, now: float) -> tuple[bool, int, bool]:
    since = peer.answers_since
    return (since is None, -peer.leader_term, since is not None and now - since < _SETTLE_S)
