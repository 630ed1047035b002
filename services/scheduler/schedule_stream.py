"""One ScheduleMany call: many requests' waits and answers on one stream."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from grpc import aio

from rhizome.scheduler.v1 import scheduler_service_pb2 as pb
from services.common.errors import InternalError, InvalidRequestError, RhizomeError
from services.common.outbox import Outbox
from services.scheduler import wire

logger = logging.getLogger(__name__)

# Writes one response of a Schedule call.
Answer = Callable[[pb.ScheduleResponse], Awaitable[None]]
# A Schedule call's work: answers until it is placed, or raises.
Schedule = Callable[[pb.ScheduleRequest, Answer], Awaitable[None]]


class ScheduleStream:
    """Runs `schedule` for each entry of the call, side by side.

    Answers that become ready while one is being written leave together. Invariant: `_tasks` has
    the handles that got no last answer yet; they are cancelled with the call.
    """

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._outbox: Outbox[pb.ScheduleManyResponse] = Outbox(pb.ScheduleManyResponse)
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._last_handle = -1

    async def run(self, context: Any) -> None:
        """Until the call ends, by whomever. Raises InvalidRequestError for a handle used again."""
        halves = (
            asyncio.create_task(self._read(context)),
            asyncio.create_task(self._outbox.drain(context)),
        )
        try:
            done, _ = await asyncio.wait(halves, return_when=asyncio.FIRST_COMPLETED)
            for half in done:
                half.result()
        finally:
            tasks = [*halves, *self._tasks.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, context: Any) -> None:
        while (message := await context.read()) is not aio.EOF:
            for entry in message.entries:
                self._start(entry.handle, entry.request)
            for handle in message.cancels:
                if (task := self._tasks.get(handle)) is not None:
                    task.cancel()

    def _start(self, handle: int, request: pb.ScheduleRequest) -> None:
        if handle <= self._last_handle:
            raise InvalidRequestError(f"handle {handle} was used before", "entries.handle")
        self._last_handle = handle
        task = asyncio.create_task(self._run_entry(handle, request))
        self._tasks[handle] = task
        task.add_done_callback(lambda _: self._tasks.pop(handle, None))

    async def _run_entry(self, handle: int, request: pb.ScheduleRequest) -> None:
        async def answer(response: pb.ScheduleResponse) -> None:
            answers = self._outbox.tail().answers
            if response.HasField("placed"):
                answers.add(handle=handle, placed=response.placed)
            else:
                answers.add(handle=handle, queued=response.queued)

        try:
            await self._schedule(request, answer)
        except RhizomeError as error:
            self._fail(handle, error)
        except Exception:
            logger.exception("event=schedule_failed request_id=%s", request.request_id)
            self._fail(handle, InternalError("internal error"))

    def _fail(self, handle: int, error: RhizomeError) -> None:
        self._outbox.tail().answers.add(handle=handle, failed=wire.schedule_failure(error))
