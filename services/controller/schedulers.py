"""The release's schedulers: what they say of the load, and workers that they shall drain."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterable

import grpc
from grpc import aio

from rhizome.scheduler.v1 import scheduler_service_pb2 as pb, scheduler_service_pb2_grpc as pb_grpc
from services.common.peer_tls import PeerTls
from services.common.rpc import open_channel
from services.controller.loads import Loads, merge
from services.controller.metrics import ControllerMetrics

logger = logging.getLogger(__name__)

_TIMEOUT_S = 2.0


class Schedulers:
    """Owns a channel to each. Calls go to all of them at once; who does not answer is left out."""

    def __init__(
        self, addresses: Iterable[str], metrics: ControllerMetrics, tls: PeerTls | None = None
    ) -> None:
        self._channels = {address: open_channel(address, tls) for address in addresses}
        self._stubs = {
            address: pb_grpc.SchedulerServiceStub(channel)
            for address, channel in self._channels.items()
        }
        self._metrics = metrics
        self._silent: set[str] = set()

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[Schedulers]:
        """Itself; its channels are closed when the block ends."""
        try:
            yield self
        finally:
            for channel in self._channels.values():
                await channel.close()

    @property
    def addresses(self) -> tuple[str, ...]:
        return tuple(self._stubs)

    async def loads(self) -> Loads | None:
        """What those that answer know together; None when none answers."""
        answers = await asyncio.gather(*map(self._load, self._stubs))
        return merge([answer.pools for answer in answers if answer is not None])

    async def drain(self, worker_id: str, reason: str, addresses: Iterable[str]) -> set[str]:
        """Which of these schedulers will place nothing there any more."""
        asked = list(addresses)
        done = await asyncio.gather(*(self._drain(each, worker_id, reason) for each in asked))
        return {address for address, is_done in zip(asked, done, strict=True) if is_done}

    async def _load(self, address: str) -> pb.GetPoolLoadResponse | None:
        try:
            answer = await self._stubs[address].GetPoolLoad(
                pb.GetPoolLoadRequest(), timeout=_TIMEOUT_S
            )
        except aio.AioRpcError as error:
            self._note(address, error)
            return None
        self._note(address, None)
        return answer

    async def _drain(self, address: str, worker_id: str, reason: str) -> bool:
        try:
            await self._stubs[address].DrainWorker(
                pb.DrainWorkerRequest(worker_id=worker_id, reason=reason), timeout=_TIMEOUT_S
            )
        except aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                return True
            self._note(address, error)
            return False
        self._metrics.drains.inc()
        return True

    def _note(self, address: str, error: aio.AioRpcError | None) -> None:
        """Say when one falls silent, and when it is back."""
        if error is not None:
            self._metrics.scheduler_failures.inc()
            if address not in self._silent:
                self._silent.add(address)
                logger.warning(
                    "event=scheduler_silent scheduler=%s status=%s", address, error.code().name
                )
        elif address in self._silent:
            self._silent.remove(address)
            logger.info("event=scheduler_answers scheduler=%s", address)
