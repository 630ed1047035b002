"""A gateway's standing call to one scheduler: all its requests' placements on one stream."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from grpc import aio

from rhizome.scheduler.v1.scheduler_service_pb2 import (
    Placement,
    ScheduleAnswer,
    ScheduleEntry,
    ScheduleFailure,
    ScheduleManyRequest,
    ScheduleManyResponse,
    ScheduleRequest,
)
from services.common.errors import (
    InvalidRequestError,
    OverloadedError,
    RhizomeError,
    UnavailableError,
    error_from_code,
)
from services.common.outbox import Outbox

if TYPE_CHECKING:
    from rhizome.scheduler.v1.scheduler_service_pb2_grpc import SchedulerServiceAsyncStub

# A scheduler says something of every request at least every 500 ms.
SILENCE_S = 1.0


class SchedulerLostError(UnavailableError):
    """The scheduler went silent or away; it said nothing about the request."""


@dataclass(slots=True)
class _Waiting:
    placement: asyncio.Future[Placement]
    # Fires when the scheduler has said nothing of it for too long.
    silence: asyncio.TimerHandle


class ScheduleSession:
    """One ScheduleMany call, opened by the first request and again by the next after it broke.

    `_waiting` holds the handles without a last answer. When the call ends all of them fail.
    """

    def __init__(self, stub: SchedulerServiceAsyncStub) -> None:
        self._stub = stub
        self._handles = itertools.count(1)
        self._waiting: dict[int, _Waiting] = {}
        self._outbox: Outbox[ScheduleManyRequest] = Outbox(ScheduleManyRequest)
        self._serving: asyncio.Task[None] | None = None
        self._last_heard = 0.0

    async def place(self, request: ScheduleRequest) -> Placement:
        """Wait for the placement; being cancelled gives it back.

        Raises the scheduler's verdict, or SchedulerLostError when it goes silent or away.
        """
        loop = asyncio.get_running_loop()
        if self._serving is None:
            # What the broken call left unsent has failed with it.
            self._outbox.clear()
            self._serving = asyncio.create_task(self._serve())
        handle = next(self._handles)
        waiting = _Waiting(
            loop.create_future(), loop.call_later(SILENCE_S, self._went_silent, handle)
        )
        self._waiting[handle] = waiting
        self._outbox.tail(len(request.prefix_hashes)).entries.append(
            ScheduleEntry(handle=handle, request=request)
        )
        try:
            return await waiting.placement
        finally:
            waiting.silence.cancel()
            if self._waiting.pop(handle, None) is not None and self._serving is not None:
                self._outbox.tail().cancels.append(handle)

    async def aclose(self) -> None:
        if self._serving is not None:
            self._serving.cancel()
            await asyncio.gather(self._serving, return_exceptions=True)

    async def _serve(self) -> None:
        """One call, from its opening to its end."""
        call = self._stub.ScheduleMany()
        writer = asyncio.create_task(self._outbox.drain(call))
        reason = "the scheduler ended the call"
        try:
            while isinstance(response := await call.read(), ScheduleManyResponse):
                self._last_heard = asyncio.get_running_loop().time()
                for answer in response.answers:
                    self._on_answer(answer)
        except aio.AioRpcError as rpc_error:
            reason = rpc_error.details() or rpc_error.code().name
        except asyncio.CancelledError:
            reason = "the scheduler says nothing"
            raise
        finally:
            self._serving = None
            call.cancel()
            writer.cancel()
            lost, self._waiting = self._waiting, {}
            for waiting in lost.values():
                _settle(waiting, SchedulerLostError(reason))
            await asyncio.gather(writer, return_exceptions=True)

    def _on_answer(self, answer: ScheduleAnswer) -> None:
        waiting = self._waiting.get(answer.handle)
        if waiting is None:
            return
        if answer.HasField("queued"):
            loop = asyncio.get_running_loop()
            waiting.silence.cancel()
            waiting.silence = loop.call_later(SILENCE_S, self._went_silent, answer.handle)
            return
        del self._waiting[answer.handle]
        _settle(waiting, answer.placed if answer.HasField("placed") else _error(answer.failed))

    def _went_silent(self, handle: int) -> None:
        """Give one request up; and with it the call, when no other was heard of either."""
        if asyncio.get_running_loop().time() - self._last_heard >= SILENCE_S:
            if self._serving is not None:
                self._serving.cancel()
            return
        self._outbox.tail().cancels.append(handle)
        _settle(self._waiting.pop(handle), SchedulerLostError("the scheduler says nothing of it"))


def _settle(waiting: _Waiting, outcome: Placement | RhizomeError) -> None:
    waiting.silence.cancel()
    if waiting.placement.done():
        return
    if isinstance(outcome, RhizomeError):
        waiting.placement.set_exception(outcome)
    else:
        waiting.placement.set_result(outcome)


def _error(failure: ScheduleFailure) -> RhizomeError:
    error = error_from_code(failure.code, failure.message)
    if isinstance(error, InvalidRequestError) and failure.HasField("param"):
        error.param = failure.param
    if isinstance(error, OverloadedError) and failure.HasField("retry_after"):
        error.retry_after_s = failure.retry_after.ToNanoseconds() / 1e9
    return error
