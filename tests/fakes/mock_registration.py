"""A mock worker's standing with one scheduler: who it is, then its load, for ever."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import grpc

from rhizome.scheduler.v1 import scheduler_service_pb2 as pb
from rhizome.scheduler.v1.scheduler_service_pb2_grpc import SchedulerServiceStub
from services.common.rpc import open_channel
from tests.fakes.mock_engine import MockEngine

logger = logging.getLogger(__name__)

_MIN_PERIOD_S = 0.02
_MAX_PERIOD_S = 0.5
_RETRY_S = 0.2


class MockRegistration:
    """Keeps a RegisterWorker stream open; `refused` holds what the scheduler found different.

    Each new stream reports all live reservations as admitted, so that a scheduler that knows
    nothing rebuilds its charges from it.
    """

    def __init__(
        self,
        scheduler: str,
        description: pb.WorkerDescription,
        engine: MockEngine,
        draining: Callable[[], bool],
        on_drain: Callable[[], None],
    ) -> None:
        self.accepted = asyncio.Event()
        self.refused: list[pb.Mismatch] = []
        self._scheduler = scheduler
        self._description = description
        self._engine = engine
        self._draining = draining
        self._on_drain = on_drain
        self._changed = asyncio.Event()
        self._admitted: list[int] = []
        self._ended: list[int] = []
        engine.on_reservation.append(self._note)

    async def run(self) -> None:
        """Stay registered until cancelled or refused."""
        try:
            async with open_channel(self._scheduler) as channel:
                stub = SchedulerServiceStub(channel)
                while not self.refused:
                    call = stub.RegisterWorker()
                    try:
                        await self._register(call)
                    except grpc.aio.AioRpcError as error:
                        logger.info("event=registration_broken status=%s", error.code().name)
                    finally:
                        call.cancel()
                    self.accepted.clear()
                    await asyncio.sleep(_RETRY_S)
        finally:
            self._engine.on_reservation.remove(self._note)

    async def _register(
        self, call: grpc.aio.StreamStreamCall[pb.RegisterWorkerRequest, pb.RegisterWorkerResponse]
    ) -> None:
        await call.write(pb.RegisterWorkerRequest(description=self._description))
        self._admitted, self._ended = list(self._engine.reservations), []
        reports = asyncio.create_task(self._report(call))
        try:
            while isinstance(response := await call.read(), pb.RegisterWorkerResponse):
                kind = response.WhichOneof("message")
                if kind == "accepted":
                    self.accepted.set()
                elif kind == "refused":
                    self.refused = list(response.refused.mismatches)
                    logger.error("event=refused fields=%s", [m.field for m in self.refused])
                    return
                else:
                    self._on_drain()
                    self._changed.set()
        finally:
            reports.cancel()
            await asyncio.wait([reports])

    async def _report(
        self, call: grpc.aio.StreamStreamCall[pb.RegisterWorkerRequest, pb.RegisterWorkerResponse]
    ) -> None:
        """Push the load on change, at most every 20 ms and at least every 500 ms."""
        await self.accepted.wait()
        sequence_number = 0
        while True:
            sequence_number += 1
            self._changed.clear()
            load = self._load(sequence_number)
            await call.write(pb.RegisterWorkerRequest(load=load))
            await asyncio.sleep(_MIN_PERIOD_S)
            try:
                async with asyncio.timeout(_MAX_PERIOD_S - _MIN_PERIOD_S):
                    await self._changed.wait()
            except TimeoutError:
                continue

    def _load(self, sequence_number: int) -> pb.LoadReport:
        engine = self._engine
        admitted, self._admitted = self._admitted, []
        ended, self._ended = self._ended, []
        return pb.LoadReport(
            sequence_number=sequence_number,
            num_running=engine.num_running,
            num_waiting=engine.num_waiting,
            num_waiting_uncached_tokens=engine.num_waiting_uncached_tokens,
            num_free_pages=engine.cache.num_pages - len(engine.cache),
            num_evictable_pages=len(engine.cache),
            engine_step_number=engine.step_number,
            predicted_step_ns=int(engine.step_s * 1e9),
            admitted_reservation_ids=admitted,
            ended_reservation_ids=ended,
            cost_model=pb.CostModel(
                prefill_token_ns=1e9 / engine.prefill_tokens_per_s,
                decode_base_ns=engine.step_s * 1e9,
            ),
            num_running_context_tokens=engine.num_context_tokens,
            draining=self._draining(),
            engine_busy=engine.busy,
        )

    def _note(self, reservation_id: int, admitted: bool) -> None:
        (self._admitted if admitted else self._ended).append(reservation_id)
        self._changed.set()
