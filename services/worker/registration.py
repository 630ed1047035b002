"""A worker's standing with one scheduler: who it is, then its load, for as long as both live."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
from grpc import aio

from rhizome.scheduler.v1 import (
    scheduler_service_pb2 as pb,
    scheduler_service_pb2_grpc as pb_grpc,
)
from services.common.peer_tls import PeerTls
from services.common.rpc import open_channel
from services.worker import wire
from services.worker.cost_model import CostCoefficients, eviction_cost_ns
from services.worker.replica import Replica
from services.worker.reservations import ReservationFeed

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportTimes:
    """How often load is reported and registrations are tried, in seconds."""

    min_interval_s: float = 0.02
    max_interval_s: float = 0.5
    retry_s: float = 0.2
    max_retry_s: float = 2.0
    # A refusal needs an operator, so there is no hurry.
    refused_retry_s: float = 5.0


class RefusedError(Exception):
    """The scheduler will not have this worker."""


class Registration:
    """Holds RegisterWorker at one scheduler and comes back whenever it ends.

    A refusal stays in `replica.refusals` until that scheduler accepts or is gone.
    """

    def __init__(
        self,
        address: str,
        replica: Replica,
        describe: Callable[[], pb.WorkerDescription],
        times: ReportTimes | None = None,
        tls: PeerTls | None = None,
    ) -> None:
        self._address = address
        self._replica = replica
        self._describe = describe
        self._times = times or ReportTimes()
        self._tls = tls
        self._changed = replica.watch()

    async def run(self) -> None:
        """Register for ever."""
        retry_s = self._times.retry_s
        while True:
            await self._wait_until_ready()
            try:
                await self._register()
                retry_s = self._times.retry_s
            except RefusedError as error:
                self._set_refusal(str(error))
                retry_s = self._times.refused_retry_s
            except aio.AioRpcError as error:
                self._set_refusal(None)
                if self._set_accepted(False):
                    retry_s = self._times.retry_s
                    logger.warning(
                        "event=registration_lost scheduler=%s status=%s details=%s",
                        self._address,
                        error.code().name,
                        error.details(),
                    )
                else:
                    logger.debug("event=scheduler_unreachable scheduler=%s", self._address)
            self._set_accepted(False)
            await asyncio.sleep(retry_s)
            retry_s = min(2 * retry_s, max(self._times.max_retry_s, retry_s))

    async def _wait_until_ready(self) -> None:
        while self._replica.ready is None:
            self._changed.clear()
            await self._changed.wait()

    async def _register(self) -> None:
        """One call from its description to its end."""
        feed = self._replica.reservations.subscribe()
        channel = open_channel(self._address, self._tls)
        try:
            async with channel:
                call = pb_grpc.SchedulerServiceStub(channel).RegisterWorker()
                await call.write(pb.RegisterWorkerRequest(description=self._describe()))
                listening = asyncio.create_task(self._listen(call))
                reporting = asyncio.create_task(self._report(call, feed))
                try:
                    await asyncio.wait((listening, reporting), return_when=asyncio.FIRST_COMPLETED)
                    if reporting.done():
                        reporting.result()
                    await listening
                finally:
                    listening.cancel()
                    reporting.cancel()
                    await asyncio.gather(listening, reporting, return_exceptions=True)
        finally:
            self._replica.reservations.unsubscribe(feed)

    async def _listen(self, call: Any) -> None:
        """Take the scheduler's answers until the call ends. Raises RefusedError, AioRpcError."""
        while (response := await call.read()) is not aio.EOF:
            kind = response.WhichOneof("message")
            if kind == "accepted":
                self._set_refusal(None)
                self._set_accepted(True)
            elif kind == "refused":
                raise RefusedError(_mismatches(response.refused))
            elif kind == "drain":
                self._replica.drain(response.drain.reason or "asked by the scheduler")
        if await call.code() is not grpc.StatusCode.OK:
            raise aio.AioRpcError(
                await call.code(),
                await call.initial_metadata(),
                await call.trailing_metadata(),
                details=await call.details(),
            )

    async def _report(self, call: Any, feed: ReservationFeed) -> None:
        """Push load on change, at most and at least as often as the contract says.

        Returns when the call is over, whose status then says why.
        """
        times, sequence_number = self._times, 0
        while True:
            sequence_number += 1
            report = self._load_report(feed, sequence_number)
            self._changed.clear()
            try:
                await call.write(pb.RegisterWorkerRequest(load=report))
            except (aio.AioRpcError, asyncio.InvalidStateError):
                return
            await asyncio.sleep(times.min_interval_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(times.max_interval_s - times.min_interval_s):
                    await self._changed.wait()

    def _load_report(self, feed: ReservationFeed, sequence_number: int) -> pb.LoadReport:
        replica, load = self._replica, self._replica.load
        admitted, ended = feed.take()
        fitted = replica.cost_model.recent(time.monotonic())
        return pb.LoadReport(
            sequence_number=sequence_number,
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            num_waiting_uncached_tokens=load.num_waiting_uncached_tokens,
            num_free_pages=load.num_free_pages,
            num_evictable_pages=load.num_evictable_pages,
            engine_step_number=replica.step_number,
            predicted_step_ns=replica.predicted_step_ns,
            admitted_reservation_ids=admitted,
            ended_reservation_ids=ended,
            cost_model=None if fitted is None else _cost_model(fitted),
            eviction_cost_ns=(() if fitted is None else eviction_cost_ns(replica.eviction, fitted)),
            num_running_context_tokens=load.num_running_context_tokens,
            draining=replica.draining,
            engine_busy=replica.busy,
        )

    def _set_refusal(self, reason: str | None) -> None:
        refusals = self._replica.refusals
        if refusals.get(self._address) == reason:
            return
        if reason is None:
            refusals.pop(self._address, None)
        else:
            refusals[self._address] = reason
            logger.error(
                "event=registration_refused scheduler=%s mismatches=%s", self._address, reason
            )
        self._replica.notify_state()

    def _set_accepted(self, accepted: bool) -> bool:
        """Note the standing; returns what it was."""
        acceptances = self._replica.acceptances
        was = self._address in acceptances
        if accepted and not was:
            acceptances.add(self._address)
            logger.info("event=registered scheduler=%s", self._address)
            self._replica.notify_state()
        elif was and not accepted:
            acceptances.discard(self._address)
            self._replica.notify_state()
        return was


def describe(replica: Replica, address: str) -> pb.WorkerDescription:
    """Who this worker is; the engine must be ready."""
    identity, ready = replica.identity, replica.ready
    assert ready is not None, "a worker registers only when its engine is ready"
    return pb.WorkerDescription(
        worker_id=identity.worker_id,
        address=address,
        epoch=identity.epoch,
        identity=identity.pool,
        protocol=wire.PROTOCOL,
        role=identity.role,
        num_pages=ready.num_pages,
        max_running_sequences=ready.max_running_sequences,
        context_length=ready.context_length,
        tp_size=ready.tp_size,
        labels=identity.labels,
        vocab_size=ready.vocab_size,
    )


def _cost_model(fitted: CostCoefficients) -> pb.CostModel:
    return pb.CostModel(
        prefill_base_ns=fitted.prefill_base_ns,
        prefill_token_ns=fitted.prefill_token_ns,
        prefill_context_ns=fitted.prefill_context_ns,
        decode_base_ns=fitted.decode_base_ns,
        decode_sequence_ns=fitted.decode_sequence_ns,
        decode_context_ns=fitted.decode_context_ns,
    )


def _mismatches(refused: pb.Refused) -> str:
    return ", ".join(
        f"{mismatch.field} is {mismatch.worker_value}, the pool has {mismatch.pool_value}"
        for mismatch in refused.mismatches
    )
