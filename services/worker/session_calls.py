"""Connect calls over sessions: reading, writing, heartbeats, time limits."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from grpc import aio

from rhizome.worker.v1 import worker_service_pb2 as pb
from services.common.errors import (
    InternalError,
    InvalidRequestError,
    OverloadedError,
    PreconditionError,
    RhizomeError,
)
from services.worker import wire
from services.worker.sessions import Call, Sequences, Session, check_open

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionTimes:
    """The wire's time limits in seconds (architecture.md, section 4)."""

    heartbeat_s: float = 0.1
    # Longest time one write may take.
    no_progress_s: float = 5.0
    # How long a broken call's sequences wait for a resume.
    hold_s: float = 2.0


class StreamContext(Protocol):
    """What is used of grpc.aio's context of a bidirectional call."""

    async def read(self) -> Any: ...
    async def write(self, message: pb.ConnectResponse) -> None: ...


class SessionTable:
    """All sessions of this worker, attached or held."""

    def __init__(
        self,
        sequences: Sequences,
        heartbeat: Callable[[], pb.Heartbeat],
        *,
        epoch: int,
        times: SessionTimes,
    ) -> None:
        self._sequences = sequences
        self._heartbeat = heartbeat
        self._epoch = epoch
        self._times = times
        self._sessions: dict[tuple[str, str], Session] = {}
        self._expiries: dict[Session, asyncio.TimerHandle] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        return iter(self._sessions.values())

    @property
    def num_handles(self) -> int:
        """Handles of all sessions that were not closed."""
        return sum(len(session) for session in self._sessions.values())

    async def serve(self, context: StreamContext) -> None:
        """Serve one Connect call to its end. Raises what becomes its status."""
        first = await context.read()
        if first is aio.EOF:
            raise InvalidRequestError("the call ended before it opened a session", "open")
        session, call = self._open(check_open(first))
        tasks: list[asyncio.Task[None]] = []
        try:
            session.handle(first)
            tasks.append(asyncio.create_task(_read(session, call, context)))
            tasks.append(asyncio.create_task(_write(session, call, context)))
            over: set[asyncio.Future[Any]] = {tasks[1], call.failed}
            await asyncio.wait(over, return_when=asyncio.FIRST_COMPLETED)
            if call.failed.done():
                raise call.failed.result()
            if session.finished(call):
                self._close(session, call)
        except RhizomeError:
            self._close(session, call)
            raise
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._detach(session, call)

    async def tick(self) -> None:
        """Heartbeats and the no-progress limit, for ever."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self._times.heartbeat_s)
            now = loop.time()
            for session in self._sessions.values():
                if (call := session.call) is None:
                    continue
                began = call.write_began
                if began is not None and now - began > self._times.no_progress_s:
                    logger.warning("event=session_stuck session=%s", "/".join(session.name))
                    call.fail(OverloadedError("the reader made no progress"))
                call.heartbeat_due = True
                call.wake.set()

    def end_all(self, error: RhizomeError) -> None:
        """End every call with this status; their sequences are given up."""
        for session in list(self._sessions.values()):
            if session.call is not None:
                session.call.fail(error)
            else:
                self._forget(session)

    def has_unsent(self) -> bool:
        """Whether an attached call still has something to write."""
        return any(session.has_unsent for session in self._sessions.values())

    def _open(self, opening: pb.OpenSession) -> tuple[Session, Call]:
        if opening.epoch not in (0, self._epoch):
            raise PreconditionError(f"this worker's epoch is {self._epoch}")
        opened = pb.SessionOpened(
            epoch=self._epoch, protocol_revision=wire.common_revision(opening.protocol)
        )
        name = (opening.gateway_id, opening.session_id)
        session = self._sessions.get(name)
        if session is not None:
            session.take_over()
        if session is not None and opening.resume:
            opened.resumed = True
            opened.lost_handles.extend(
                session.resume(list(opening.resume_handles), list(opening.resume_offsets))
            )
        else:
            if session is not None:
                self._forget(session)
            session = self._sessions[name] = Session(name, self._sequences, self._heartbeat)
            opened.lost_handles.extend(opening.resume_handles)
        if (expiry := self._expiries.pop(session, None)) is not None:
            expiry.cancel()
        call = Call(opened)
        session.attach(call)
        return session, call

    def _detach(self, session: Session, call: Call) -> None:
        """The call is over; its session, unless closed or taken over, is held for a while."""
        if not session.detach(call) or self._sessions.get(session.name) is not session:
            return
        loop = asyncio.get_running_loop()
        self._expiries[session] = loop.call_later(self._times.hold_s, self._forget, session)

    def _close(self, session: Session, call: Call) -> None:
        """The call ended the session for good."""
        if session.call is call:
            self._forget(session)

    def _forget(self, session: Session) -> None:
        if (expiry := self._expiries.pop(session, None)) is not None:
            expiry.cancel()
        if self._sessions.get(session.name) is session:
            del self._sessions[session.name]
        session.abandon()


async def _read(session: Session, call: Call, context: StreamContext) -> None:
    try:
        while (request := await context.read()) is not aio.EOF:
            if session.call is not call:
                return
            if request.HasField("open"):
                raise InvalidRequestError("a session opens only once", "open")
            session.handle(request)
    except RhizomeError as error:
        call.fail(error)
    except Exception:
        logger.exception("event=session_read_failed session=%s", "/".join(session.name))
        call.fail(InternalError("internal error"))
    else:
        call.half_closed = True
        call.wake.set()


async def _write(session: Session, call: Call, context: StreamContext) -> None:
    """Write what there is until the session is finished; ends early when the call broke."""
    loop = asyncio.get_running_loop()
    try:
        while not session.finished(call) or call.opened is not None:
            await call.wake.wait()
            call.wake.clear()
            while (message := session.next_message(call)) is not None:
                call.write_began = loop.time()
                await context.write(message)
                call.write_began = None
    except aio.UsageError as error:
        logger.debug("event=session_call_broken session=%s reason=%s", session.name, error)
    except Exception:
        logger.exception("event=session_write_failed session=%s", "/".join(session.name))
        call.fail(InternalError("internal error"))
