"""Puts the front together around an engine link: sessions, registrations, health, server."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from grpc import aio

from rhizome.worker.v1 import worker_service_pb2 as pb, worker_service_pb2_grpc as pb_grpc
from services.common.errors import UnavailableError
from services.common.metrics import metrics_server
from services.common.peer_tls import expiry_metrics, peer_tls, server_credentials
from services.common.rpc import RunningServer, running_server
from services.common.telemetry import TelemetryFlags, running_tracer
from services.common.tls import TlsFlags
from services.worker.engine_link import EngineLink
from services.worker.metrics import WorkerCollector
from services.worker.registration import Registration, describe
from services.worker.replica import Replica, WorkerIdentity
from services.worker.servicer import WorkerServicer
from services.worker.session_calls import SessionTable, SessionTimes

logger = logging.getLogger(__name__)

_SERVICE = pb.DESCRIPTOR.services_by_name["WorkerService"]

# How long the last frames may take to leave when the worker ends.
_LAST_WORDS_S = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceOptions:
    """How the front serves; the engine has its own options."""

    identity: WorkerIdentity
    listen: str
    # None means: where it listens.
    advertise_address: str | None = None
    schedulers: tuple[str, ...] = ()
    max_queued_requests: int = 4096
    # None means: none are served, of both.
    metrics_port: int | None = None
    health_port: int | None = None
    tls: TlsFlags = field(default_factory=TlsFlags)
    times: SessionTimes = field(default_factory=SessionTimes)
    telemetry: TelemetryFlags = TelemetryFlags()


class RunningWorker:
    """A front that serves. `replica.failed` says when it cannot go on."""

    def __init__(self, server: RunningServer, replica: Replica, sessions: SessionTable) -> None:
        self.port = server.port
        self.replica = replica
        self.sessions = sessions

    async def drain(self, timeout_s: float) -> None:
        """Admit nothing more and let what runs finish, for at most `timeout_s`."""
        self.replica.drain("stopping")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while len(self.replica.router) or self.sessions.has_unsent():
                    await asyncio.sleep(0.02)

    async def close_sessions(self, reason: str) -> None:
        """Let the last frames leave, then end every session."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_S):
                while self.sessions.has_unsent():
                    await asyncio.sleep(0.01)
        self.sessions.end_all(UnavailableError(reason))


@contextlib.asynccontextmanager
async def running_worker(
    options: ServiceOptions, link: EngineLink, engine_pid: int | None = None
) -> AsyncIterator[RunningWorker]:
    """Serve the engine behind `link` until the block ends; `engine_pid` is for metrics."""
    async with contextlib.AsyncExitStack() as stack:
        tls = await stack.enter_async_context(peer_tls(options.tls))
        tracer = await stack.enter_async_context(
            running_tracer(options.telemetry, "worker", options.identity.worker_id)
        )
        limit = options.max_queued_requests
        replica = Replica(options.identity, link, max_queued_requests=limit, tracer=tracer)
        sessions = SessionTable(
            replica, lambda: _heartbeat(replica), epoch=options.identity.epoch, times=options.times
        )
        await stack.enter_async_context(
            metrics_server(
                options.metrics_port,
                WorkerCollector(replica, engine_pid),
                *expiry_metrics(tls),
            )
        )
        server = await stack.enter_async_context(
            running_server(
                _adder(WorkerServicer(replica, sessions)),
                [_SERVICE],
                options.listen,
                ready=False,
                credentials=server_credentials(tls),
                health_port=options.health_port,
            )
        )
        worker = RunningWorker(server, replica, sessions)
        address = advertised(options, server.port)
        jobs: list[Coroutine[Any, Any, None]] = [
            link.receive(replica.handle),
            sessions.tick(),
            _keep_readiness(replica, server),
        ]
        for scheduler in options.schedulers:
            registration = Registration(
                scheduler, replica, lambda: describe(replica, address), tls=tls
            )
            jobs.append(registration.run())
        tasks = [asyncio.create_task(_guard(job, replica)) for job in jobs]
        try:
            yield worker
        finally:
            await worker.close_sessions("the worker is stopping")
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _adder(servicer: WorkerServicer) -> Callable[[aio.Server], None]:
    return lambda server: pb_grpc.add_WorkerServiceServicer_to_server(servicer, server)


def advertised(options: ServiceOptions, port: int) -> str:
    """The target others reach the worker by."""
    if options.advertise_address is not None:
        return options.advertise_address
    if options.listen.startswith("unix:"):
        return options.listen
    return f"{options.listen.rpartition(':')[0]}:{port}"


def _heartbeat(replica: Replica) -> pb.Heartbeat:
    return pb.Heartbeat(
        engine_step_number=replica.step_number,
        engine_busy=replica.busy,
        predicted_step_ns=replica.predicted_step_ns,
        draining=replica.draining,
    )


async def _keep_readiness(replica: Replica, server: RunningServer) -> None:
    changed, told = replica.watch_state(), False
    while True:
        if replica.serving != told:
            told = replica.serving
            await server.set_ready(told)
            logger.info("event=%s port=%s", "ready" if told else "not_ready", server.port)
        await changed.wait()
        changed.clear()


async def _guard(job: Coroutine[Any, Any, None], replica: Replica) -> None:
    """A bug in one of the worker's own tasks ends the worker rather than leaving it half alive."""
    try:
        await job
    except Exception as error:
        logger.exception("event=task_failed")
        replica.fail(f"{type(error).__name__} in the worker's front", permanent=False)
