"""A worker's front over a fake engine, with real sockets on both sides."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

from grpc import aio

from rhizome.common.v1 import pool_identity_pb2, worker_role_pb2
from rhizome.worker.v1 import worker_service_pb2 as pb, worker_service_pb2_grpc as pb_grpc
from services.common.rpc import open_channel
from services.worker.engine_link import engine_link
from services.worker.replica import WorkerIdentity
from services.worker.service import RunningWorker, ServiceOptions, running_worker
from services.worker.session_calls import SessionTimes
from tests.fakes.fake_engine import FakeEngine
from tests.fakes.session_client import SessionClient

EPOCH = 77
_PATIENCE_S = 30.0
IDENTITY = WorkerIdentity(
    worker_id="worker",
    epoch=EPOCH,
    pool=pool_identity_pb2.PoolIdentity(served_model_name="fake", model_revision="r"),
    role=worker_role_pb2.WORKER_ROLE_MIXED,
    model_path="/fake",
)
FAST = SessionTimes(heartbeat_s=0.02, no_progress_s=0.3, hold_s=0.3)


class Bench:
    """A worker over a fake engine, and channels to it."""

    def __init__(self, worker: RunningWorker, engine: FakeEngine, channel: aio.Channel) -> None:
        self.worker = worker
        self.engine = engine
        self.channel = channel
        self.stub: Any = pb_grpc.WorkerServiceStub(channel)

    def client(self, session_id: str = "session") -> SessionClient:
        """A gateway's session."""
        return SessionClient(self.channel, session_id)

    async def info(self) -> pb.GetWorkerInfoResponse:
        """What GetWorkerInfo says."""
        response: pb.GetWorkerInfoResponse = await self.stub.GetWorkerInfo(
            pb.GetWorkerInfoRequest()
        )
        return response


@contextlib.asynccontextmanager
async def running_bench(
    *, schedulers: tuple[str, ...] = (), max_queued_requests: int = 4096, **engine_options: Any
) -> AsyncIterator[Bench]:
    """A worker that is ready (unless the engine is told otherwise); its times are short."""
    options = ServiceOptions(
        identity=IDENTITY,
        listen="localhost:0",
        schedulers=schedulers,
        max_queued_requests=max_queued_requests,
        times=FAST,
    )
    async with engine_link() as link, running_worker(options, link) as worker:
        engine = FakeEngine(link.input_address, link.output_address, **engine_options).start()
        try:
            async with open_channel(f"localhost:{worker.port}") as channel:
                if engine_options.get("ready", True):
                    await until(lambda: worker.replica.ready is not None)
                yield Bench(worker, engine, channel)
        finally:
            engine.close()


async def until(condition: Callable[[], bool]) -> None:
    """Poll; a wait in vain ends with TimeoutError."""
    async with asyncio.timeout(_PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.005)


async def until_idle(bench: Bench) -> pb.WorkerLoad:
    """Wait until nothing is left, as the leak check sees it."""
    async with asyncio.timeout(_PATIENCE_S):
        while True:
            load = (await bench.info()).load
            if not (load.num_sessions or load.num_handles or load.num_running or load.num_waiting):
                assert load.num_free_pages == bench.engine.scheduler.num_pages
                assert not len(bench.worker.replica.router)
                return load
            await asyncio.sleep(0.01)
