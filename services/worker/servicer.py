"""The WorkerService's rpcs, each in a few lines over the sessions, the replica and the events."""

from __future__ import annotations

import asyncio
from typing import Any

from rhizome.worker.v1 import worker_service_pb2 as pb, worker_service_pb2_grpc as pb_grpc
from services.common.errors import UnimplementedError, error_from_code
from services.common.trace_context import from_metadata
from services.worker.engine.messages import SequenceError, StartProfile, StopProfile
from services.worker.frames import FRAME_BYTES, FrameBuilder
from services.worker.outputs import Delivery
from services.worker.replica import Replica, worker_info
from services.worker.session_calls import SessionTable


class WorkerServicer(pb_grpc.WorkerServiceServicer):
    """Serves one replica. Owns nothing but the count of Generate calls under way."""

    def __init__(self, replica: Replica, sessions: SessionTable) -> None:
        self._replica = replica
        self._sessions = sessions
        self._num_generating = 0

    async def Connect(  # type: ignore[override]
        self, request_iterator: Any, context: Any
    ) -> None:
        await self._sessions.serve(context)

    async def Generate(  # type: ignore[override]
        self, request: pb.GenerateRequest, context: Any
    ) -> None:
        output = _SingleOutput()
        submit = request.submit
        if not submit.traceparent:
            submit.traceparent, _ = from_metadata(context.invocation_metadata())
        if not submit.num_token_ids:
            submit.num_token_ids = len(submit.token_ids)
        log = self._replica.submit(submit, list(submit.token_ids), submit.handle, output)
        self._num_generating += 1
        try:
            ended = False
            while not ended:
                await output.wake.wait()
                output.wake.clear()
                complete = False
                while not complete:
                    frame = FrameBuilder(output.step_number)
                    complete = log.move_into(frame, FRAME_BYTES)
                    for response in _responses(frame.frame):
                        await context.write(response)
                        ended = ended or response.HasField("finish")
                if isinstance(log.end, SequenceError):
                    raise error_from_code(log.end.code, log.end.message)
        finally:
            self._num_generating -= 1
            self._replica.abandon([log])

    async def Embed(self, request: pb.EmbedRequest, context: Any) -> pb.EmbedResponse:
        raise UnimplementedError("Embed comes in a later release")

    async def GetWorkerInfo(
        self, request: pb.GetWorkerInfoRequest, context: Any
    ) -> pb.GetWorkerInfoResponse:
        num_handles = self._sessions.num_handles + self._num_generating
        return worker_info(self._replica, len(self._sessions), num_handles)

    async def WatchCacheEvents(  # type: ignore[override]
        self, request: pb.WatchCacheEventsRequest, context: Any
    ) -> None:
        async for response in self._replica.cache_events.watch(request):
            await context.write(response)

    async def FlushCache(
        self, request: pb.FlushCacheRequest, context: Any
    ) -> pb.FlushCacheResponse:
        return pb.FlushCacheResponse(num_freed_pages=await self._replica.flush_cache())

    async def StartProfile(
        self, request: pb.StartProfileRequest, context: Any
    ) -> pb.StartProfileResponse:
        await self._replica.profile(
            StartProfile(
                num_steps=request.num_steps,
                with_stack=request.with_stack if request.HasField("with_stack") else True,
                record_shapes=request.record_shapes,
            )
        )
        return pb.StartProfileResponse()

    async def StopProfile(
        self, request: pb.StopProfileRequest, context: Any
    ) -> pb.StopProfileResponse:
        return pb.StopProfileResponse(trace_path=await self._replica.profile(StopProfile()))

    async def TransferPages(  # type: ignore[override]
        self, request_iterator: Any, context: Any
    ) -> None:
        raise UnimplementedError("TransferPages comes in a later release")


class _SingleOutput:
    """The sink of one Generate call: wakes it and leaves the output in the log."""

    def __init__(self) -> None:
        self.wake = asyncio.Event()
        self.step_number = 0

    def deliver(self, step_number: int, delivery: Delivery) -> None:
        """Mark what came as unsent."""
        self.step_number = step_number
        for _ in delivery.mark_unsent():
            pass
        self.wake.set()


def _responses(frame: pb.StepFrame) -> list[pb.GenerateResponse]:
    """A frame of one handle as messages: ids and the finish in the last of them."""
    responses = [pb.GenerateResponse(logprobs=entry.block) for entry in frame.logprobs]
    if not responses and (frame.token_ids or frame.finishes or frame.admissions):
        responses.append(pb.GenerateResponse())
    if responses:
        responses[-1].token_ids.extend(frame.token_ids)
    if frame.finishes:
        responses[-1].finish.CopyFrom(frame.finishes[0])
    if frame.admissions:
        responses[0].admission.CopyFrom(frame.admissions[0])
    return responses
