"""WorkerService over a mock worker: the calls, with everything else behind them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from rhizome.worker.v1 import worker_service_pb2 as pb
from rhizome.worker.v1.worker_service_pb2_grpc import WorkerServiceServicer
from services.common.errors import (
    InvalidRequestError,
    RhizomeError,
    UnimplementedError,
    error_from_code,
)
from tests.fakes.mock_sessions import Call, MockSession

if TYPE_CHECKING:
    from tests.fakes.mock_worker import MockWorker


class MockServicer(WorkerServiceServicer):
    """Answers with what the worker's engine, sessions and cache say."""

    def __init__(self, worker: MockWorker) -> None:
        self._worker = worker

    async def Connect(
        self, request_iterator: AsyncIterator[pb.ConnectRequest], context: Any
    ) -> None:
        first = await anext(request_iterator, None)
        if first is None or not first.HasField("open"):
            raise InvalidRequestError("the first message of a session must carry `open`", "open")
        call = Call()
        session, opened = self._worker.sessions.open(first.open, call)
        tasks = [
            asyncio.create_task(_read(session, call, first, request_iterator)),
            asyncio.create_task(self._write(session, call, opened, context)),
        ]
        try:
            await asyncio.wait([tasks[1], call.failed], return_when=asyncio.FIRST_COMPLETED)
            if call.failed.done():
                raise call.failed.result()
            await tasks[1]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._worker.sessions.leave(session, call)

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> None:
        session = MockSession(self._worker.engine)
        session.call = call = Call()
        try:
            submit = pb.Submit()
            submit.CopyFrom(request.submit)
            submit.handle = 1
            if len(submit.token_ids) != submit.num_token_ids:
                raise InvalidRequestError("all ids must be in token_ids", "token_ids")
            session.take(pb.ConnectRequest(submits=[submit]))
            while not session.finished:
                await call.wake.wait()
                call.wake.clear()
                if (frame := session.next_frame()) is not None:
                    await context.write(_response(frame))
        finally:
            session.abandon()

    async def GetWorkerInfo(
        self, request: pb.GetWorkerInfoRequest, context: Any
    ) -> pb.GetWorkerInfoResponse:
        return self._worker.info()

    async def WatchCacheEvents(self, request: pb.WatchCacheEventsRequest, context: Any) -> None:
        async for response in self._worker.cache.watch(request):
            await context.write(response)

    async def FlushCache(
        self, request: pb.FlushCacheRequest, context: Any
    ) -> pb.FlushCacheResponse:
        return pb.FlushCacheResponse(num_freed_pages=self._worker.cache.clear())

    async def Embed(self, request: pb.EmbedRequest, context: Any) -> pb.EmbedResponse:
        raise UnimplementedError("a mock worker has no embeddings")

    async def StartProfile(
        self, request: pb.StartProfileRequest, context: Any
    ) -> pb.StartProfileResponse:
        raise UnimplementedError("a mock worker has no profile")

    async def StopProfile(
        self, request: pb.StopProfileRequest, context: Any
    ) -> pb.StopProfileResponse:
        raise UnimplementedError("a mock worker has no profile")

    async def TransferPages(
        self, request_iterator: AsyncIterator[pb.TransferPagesRequest], context: Any
    ) -> None:
        raise UnimplementedError("a mock worker has no pages")

    async def _write(
        self, session: MockSession, call: Call, opened: pb.SessionOpened, context: Any
    ) -> None:
        """Write what there is until the gateway said all it will and got everything."""
        await context.write(pb.ConnectResponse(opened=opened))
        loop = asyncio.get_running_loop()
        while not (call.half_closed and session.finished):
            await call.wake.wait()
            call.wake.clear()
            call.write_began = loop.time()
            if call.heartbeat_due:
                call.heartbeat_due = False
                await context.write(pb.ConnectResponse(heartbeat=self._worker.heartbeat()))
            if (frame := session.next_frame()) is not None:
                await context.write(pb.ConnectResponse(frame=frame))
            call.write_began = None


async def _read(
    session: MockSession,
    call: Call,
    first: pb.ConnectRequest,
    requests: AsyncIterator[pb.ConnectRequest],
) -> None:
    try:
        session.take(first)
        async for request in requests:
            session.take(request)
    except RhizomeError as error:
        call.fail(error)
        return
    call.half_closed = True
    call.wake.set()


def _response(frame: pb.StepFrame) -> pb.GenerateResponse:
    """One frame of a session with one handle. Raises the error that ended it."""
    if frame.errors:
        raise error_from_code(frame.errors[0].code, frame.errors[0].message)
    return pb.GenerateResponse(
        token_ids=frame.token_ids,
        logprobs=frame.logprobs[0].block if frame.logprobs else None,
        admission=frame.admissions[0] if frame.admissions else None,
        finish=frame.finishes[0] if frame.finishes else None,
    )
