"""SchedulerService over gRPC: waits, streams and reports; decisions are the placer's."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import Any

from grpc import aio

from rhizome.scheduler.v1 import scheduler_service_pb2 as pb, scheduler_service_pb2_grpc as pb_grpc
from services.common.errors import InvalidRequestError, RhizomeError
from services.common.spans import NO_SPAN, NO_TRACER, Span, SpanKind, Tracer
from services.common.trace_context import from_metadata
from services.scheduler import wire
from services.scheduler.endpoints import Registration, WorkerTable
from services.scheduler.index_client import IndexClient, WorkerMatch
from services.scheduler.metrics import SchedulerMetrics
from services.scheduler.placement import Placer
from services.scheduler.policy import PlacementRequest
from services.scheduler.pool_load import PoolLoads
from services.scheduler.pools import (
    OUR_PROTOCOL,
    Mismatch,
    Pool,
    PoolIdentity,
    PoolSet,
    ProtocolRange,
    protocol_mismatch,
)
from services.scheduler.queue import Ticket
from services.scheduler.schedule_stream import Answer, ScheduleStream
from services.scheduler.spans import describe_request, describe_reservation
from services.scheduler.watch import TableWatch

logger = logging.getLogger(__name__)

_SCHEDULE = "rhizome.scheduler.v1.SchedulerService/Schedule"
# `queued` is due within 100 ms, then every 500 ms.
_FIRST_QUEUED_S = 0.05
_QUEUED_INTERVAL_S = 0.5
# Tickets this near the head get fresh matches with each `queued`.
_REFRESH_POSITIONS = 64


class SchedulerServicer(pb_grpc.SchedulerServiceServicer):
    """One call's waiting and streaming a method; holds nothing but references."""

    def __init__(
        self,
        placer: Placer,
        table: WorkerTable,
        pools: PoolSet,
        watch: TableWatch,
        metrics: SchedulerMetrics,
        index: IndexClient | None,
        lease_s: float,
        loads: PoolLoads,
        tracer: Tracer = NO_TRACER,
    ) -> None:
        self._placer = placer
        self._table = table
        self._pools = pools
        self._watch = watch
        self._metrics = metrics
        self._index = index
        self._lease_s = lease_s
        self._loads = loads
        self._tracer = tracer

    async def Schedule(self, request: pb.ScheduleRequest, context: Any) -> None:  # type: ignore[override]
        if self._tracer.is_on and not request.traceparent:
            request.traceparent, _ = from_metadata(context.invocation_metadata())
        await self._schedule(request, context.write)

    async def ScheduleMany(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]
        await ScheduleStream(self._schedule).run(context)

    async def ReportRequests(
        self, request: pb.ReportRequestsRequest, context: Any
    ) -> pb.ReportRequestsResponse:
        self._placer.report_outcomes(wire.outcomes(request))
        return pb.ReportRequestsResponse()

    async def RegisterWorker(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]
        first = await context.read()
        if first is aio.EOF or not first.HasField("description"):
            raise InvalidRequestError("a registration starts with a description", "description")
        worker = wire.worker(first.description)
        identity = wire.pool_identity(first.description.identity)
        protocol = wire.protocol_range(first.description)
        pool, mismatches = self._compare(identity, protocol)
        if pool is None or mismatches:
            self._note_refusal(worker.worker_id, mismatches)
            await context.write(wire.refused_response(mismatches))
            return
        orders: asyncio.Queue[str | RhizomeError] = asyncio.Queue()
        registration = Registration(worker, pool, orders.put_nowait, orders.put_nowait)
        self._placer.register(registration, identity)
        logger.info(
            "event=worker_registered worker=%s epoch=%x address=%s pool=%s",
            *(worker.worker_id, worker.epoch, worker.address, pool.name),
        )
        try:
            revision = OUR_PROTOCOL.highest_common(protocol)
            assert revision is not None, "protocol_mismatch found none"
            await context.write(wire.accepted_response(revision, self._lease_s))
            await self._follow(registration, orders, context)
        finally:
            self._placer.unregister(registration)
            logger.info(
                "event=worker_unregistered worker=%s epoch=%x", worker.worker_id, worker.epoch
            )

    async def WatchWorkers(self, request: pb.WatchWorkersRequest, context: Any) -> None:  # type: ignore[override]
        sent = 0
        while True:
            if self._table.version != sent:
                message = self._watch.table_message()
                sent = message.table_version
            else:
                message = self._watch.unchanged_message()
            await context.write(message)
            await self._watch.wait_beyond(sent)

    async def DrainWorker(
        self, request: pb.DrainWorkerRequest, context: Any
    ) -> pb.DrainWorkerResponse:
        self._table.drain(request.worker_id, request.reason)
        logger.info("event=worker_drain worker=%s reason=%r", request.worker_id, request.reason)
        return pb.DrainWorkerResponse()

    async def GetPoolLoad(
        self, request: pb.GetPoolLoadRequest, context: Any
    ) -> pb.GetPoolLoadResponse:
        return pb.GetPoolLoadResponse(pools=map(wire.pool_load_message, self._loads.read()))

    async def _schedule(self, message: pb.ScheduleRequest, answer: Answer) -> None:
        try:
            with self._tracer.begin(_SCHEDULE, message.traceparent) as span:
                await self._place(message, answer, span)
        except RhizomeError as error:
            self._metrics.failures.labels(error.status.name).inc()
            raise

    async def _place(self, message: pb.ScheduleRequest, answer: Answer, span: Span) -> None:
        request = wire.placement_request(message, span.exemplar)
        if span.is_recording:
            describe_request(span, message)
        reservation = self._placer.find_reservation(request.key)
        if reservation is not None:
            await answer(wire.placed_response(reservation))
            return
        ticket, is_new = self._placer.open_ticket(
            request, wire.remaining_s(message), wire.age_s(message, time.time())
        )
        # With one worker the index could change what is charged, but not the answer.
        ask_first = is_new and self._placer.has_choice(ticket)
        try:
            if is_new:
                self._placer.enqueue(ticket, await self._match(request, span) if ask_first else ())
            if not ticket.is_settled:
                await self._wait(ticket, answer, span)
            if ticket.error is not None:
                raise ticket.error
            assert ticket.reservation is not None, "settled without an error"
            # A caller may cancel as soon as it has read this, so from here on the placement
            # stands; one that never arrives expires unadmitted.
            ticket.is_delivered = True
            await answer(wire.placed_response(ticket.reservation))
            if span.is_recording:
                describe_reservation(span, ticket.reservation)
            span.end()
            if is_new and not ask_first:
                self._placer.correct(ticket, await self._match(request, span))
        finally:
            self._placer.leave(ticket)

    async def _wait(self, ticket: Ticket, answer: Answer, span: Span) -> None:
        """Until the ticket is settled, say how many are ahead and keep its matches fresh."""
        settled = asyncio.Event()
        ticket.listeners.append(settled.set)
        delay = _FIRST_QUEUED_S
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await settled.wait()
            if ticket.is_settled:
                return
            position = self._placer.position(ticket)
            await answer(wire.queued_response(position))
            if delay == _FIRST_QUEUED_S:
                span.add_event("queued", position=position)
            delay = _QUEUED_INTERVAL_S
            if position < _REFRESH_POSITIONS:
                self._placer.enqueue(ticket, await self._match(ticket.request))

    async def _match(
        self, request: PlacementRequest, span: Span = NO_SPAN
    ) -> tuple[WorkerMatch, ...]:
        if self._index is None:
            return ()
        if not span.is_recording or not request.prefix_hashes:
            return await self._index.match(request.prefix_hashes)
        with span.child("match", SpanKind.CLIENT) as asking:
            matches = await self._index.match(request.prefix_hashes, asking.traceparent)
            asking.set(num_workers=len(matches), is_skipped=self._index.is_skipped)
            return matches

    def _compare(
        self, identity: PoolIdentity, protocol: ProtocolRange
    ) -> tuple[Pool | None, list[Mismatch]]:
        """The pool a worker belongs to, and in what it differs from it."""
        mismatches = protocol_mismatch(protocol)
        pool = self._pools.for_worker(identity)
        if pool is None:
            names = ", ".join(self._pools.names)
            mismatches.append(Mismatch("served_model_name", identity.served_model_name, names))
        else:
            mismatches += pool.mismatches(identity, self._table.has_workers(pool))
        return pool, mismatches

    def _note_refusal(self, worker_id: str, mismatches: list[Mismatch]) -> None:
        for mismatch in mismatches:
            self._metrics.refusals.labels(mismatch.field).inc()
            logger.warning(
                "event=worker_refused worker=%s field=%s worker_value=%r pool_value=%r",
                *(worker_id, mismatch.field, mismatch.worker_value, mismatch.pool_value),
            )

    async def _follow(
        self, registration: Registration, orders: asyncio.Queue[str | RhizomeError], context: Any
    ) -> None:
        """Take reports and pass orders on, until the worker leaves or must."""
        tasks = (
            asyncio.create_task(self._read_loads(registration, context)),
            asyncio.create_task(_write_orders(orders, context)),
        )
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read_loads(self, registration: Registration, context: Any) -> None:
        while (message := await context.read()) is not aio.EOF:
            if not message.HasField("load"):
                raise InvalidRequestError("only load follows a registration's description", "load")
            report = message.load
            self._placer.report_load(
                registration,
                wire.load(report),
                report.admitted_reservation_ids,
                report.ended_reservation_ids,
            )


async def _write_orders(orders: asyncio.Queue[str | RhizomeError], context: Any) -> None:
    """Drains are written; an error ends the registration."""
    while True:
        order = await orders.get()
        if isinstance(order, RhizomeError):
            raise order
        await context.write(wire.drain_response(order))
