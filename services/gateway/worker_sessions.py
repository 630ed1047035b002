"""Worker sessions: one Connect stream per worker carries every sequence this gateway runs there.

A step frame is dispatched in one pass: new ids to their choices and, as one message, to the text
session. A broken stream is resumed within the time the worker holds its sequences; after that
every choice of the session is lost to it and its generation goes on elsewhere.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import time
from collections.abc import Callable, Sequence

import grpc
from grpc import aio

from rhizome.common.v1.finish_reason_pb2 import FINISH_REASON_CANCELLED
from rhizome.common.v1.logprobs_pb2 import LogprobOptions
from rhizome.common.v1.pool_identity_pb2 import ProtocolRange
from rhizome.worker.v1.worker_service_pb2 import (
    ConnectRequest,
    ConnectResponse,
    Heartbeat,
    IdFragment,
    OpenSession,
    StepFrame,
    Submit,
)
from rhizome.worker.v1.worker_service_pb2_grpc import WorkerServiceStub
from services.common.errors import (
    NotFoundError,
    OverloadedError,
    PreconditionError,
    RhizomeError,
    SessionBrokenError,
    UnavailableError,
    error_from_code,
    error_from_rpc,
)
from services.common.outbox import MAX_MESSAGE_IDS, Outbox
from services.common.peer_tls import PeerTls
from services.common.rpc import MAX_PROTOCOL_REVISION, MIN_PROTOCOL_REVISION, open_channel
from services.gateway.generation import Choice, ChoiceFinish, remaining_time
from services.gateway.silence import Silence
from services.gateway.step_watch import StepWatch
from services.gateway.text_sessions import TextSession
from services.gateway.tokenizers import TokenizerPool

logger = logging.getLogger(__name__)

# How long a worker keeps the sequences of a broken stream, and how often we try meanwhile.
_RESUME_WINDOW_S = 2.0
_RESUME_RETRY_S = 0.05
# Heartbeats come every 100 ms; silence for this long, which counts as part of the window, means a
# dead connection or a stopped worker. Where no other worker could go on there is no hurry.
_SILENCE_S = 1.0
_ALONE_SILENCE_S = 3.0
# Longest time in which a worker answers the first opening of a session.
_OPEN_S = 2.0

_UNRESUMABLE = (PreconditionError, NotFoundError)
_RETRYABLE = (UnavailableError, SessionBrokenError, OverloadedError)


class WorkerSession:
    """One gateway's standing with one epoch of one worker.

    `_choices` holds the handles whose tokens are wanted; a handle that was cancelled leaves it at
    once, and its terminal entry is acknowledged when it comes.
    """

    def __init__(
        self,
        gateway_id: str,
        worker_id: str,
        address: str,
        epoch: int,
        tokenizers: TokenizerPool,
        handles: itertools.count[int],
        has_others: Callable[[str], bool],
        tls: PeerTls | None = None,
    ) -> None:
        """`has_others` says whether a worker other than the named one could go on."""
        self.worker_id = worker_id
        self.address = address
        self.epoch = epoch
        self.dead = False
        self._gateway_id = gateway_id
        self._session_id = secrets.token_hex(8)
        self._handles = handles
        self._has_others = has_others
        # It said so: what it gives up now, it does not die of.
        self._draining = False
        self._choices: dict[int, Choice] = {}
        self._outbox: Outbox[ConnectRequest] = Outbox(ConnectRequest)
        self._channel = open_channel(address, tls)
        self._stub = WorkerServiceStub(self._channel)
        self._call: aio.StreamStreamCall[ConnectRequest, ConnectResponse] | None = None
        self._was_open = False
        self._silence = Silence()
        self._step_watch = StepWatch()
        self._text = TextSession(tokenizers, self._cancel_handle)
        self._task = asyncio.create_task(self._run())

    @property
    def num_choices(self) -> int:
        return len(self._choices)

    @property
    def num_open_texts(self) -> int:
        """Choices whose last text is still on its way, running ones included."""
        return self._text.num_open

    def submit(self, choice: Choice, reservation_id: int, logprobs: LogprobOptions | None) -> None:
        """Run `choice` here, from its start or from where it stands."""
        handle = next(self._handles)
        choice.handle = handle
        self._choices[handle] = choice
        self._text.open(handle, choice)
        prompt, spec = choice.prompt, choice.prompt.spec
        ids = list(prompt.token_ids) + choice.output_ids
        first = ids[:MAX_MESSAGE_IDS]
        submit = Submit(
            handle=handle,
            request_id=spec.schedule_id,
            choice_index=choice.index,
            prompt_len=len(prompt.token_ids),
            num_token_ids=len(ids),
            token_ids=first,
            sampling=spec.sampling,
            logprobs=logprobs,
            namespace=prompt.namespace,
            reservation_id=reservation_id,
            traceparent=choice.span.traceparent,
            tenant=spec.tenant,
            priority=spec.priority,
            remaining=remaining_time(spec.deadline),
        )
        self._outbox.tail(len(first)).submits.append(submit)
        for offset in range(MAX_MESSAGE_IDS, len(ids), MAX_MESSAGE_IDS):
            part = ids[offset : offset + MAX_MESSAGE_IDS]
            self._outbox.tail(len(part)).id_fragments.append(
                IdFragment(handle=handle, offset=offset, token_ids=part)
            )

    def cancel(self, choice: Choice) -> None:
        """Stop `choice` here; nothing more of it is delivered. Idempotent."""
        self._text.close(choice.handle)
        self._cancel_handle(choice.handle)

    def check(self) -> None:
        """Break a stream that has gone silent; called every CHECK_INTERVAL_S."""
        self._text.check()
        if self._call is None or not self._was_open:
            return
        patience_s = _SILENCE_S if self._has_others(self.worker_id) else _ALONE_SILENCE_S
        if self._silence.check() > patience_s:
            logger.warning("event=worker_silent worker=%s", self.worker_id)
            self._call.cancel()

    async def aclose(self) -> None:
        self.dead = True
        self._task.cancel()
        await asyncio.gather(self._task, self._text.aclose(), return_exceptions=True)
        await self._channel.close()

    def _cancel_handle(self, handle: int) -> None:
        if self._choices.pop(handle, None) is not None:
            self._outbox.tail().cancels.append(handle)

    async def _run(self) -> None:
        """Keep the stream, resuming it when it breaks, until it cannot be resumed."""
        resume_until: float | None = None
        while True:
            window_s = _RESUME_WINDOW_S
            try:
                await self._serve(resume_until)
            except aio.AioRpcError as rpc_error:
                error = error_from_rpc(rpc_error)
            except RhizomeError as own_error:
                error = own_error
            except asyncio.CancelledError:
                if asyncio.current_task().cancelling():  # type: ignore[union-attr]
                    raise
                error = UnavailableError("the worker went silent")
                window_s -= _SILENCE_S
            except Exception:
                # Nobody else would notice: its sequences go on elsewhere instead of never.
                logger.exception("event=worker_session_failed worker=%s", self.worker_id)
                error = UnavailableError("the worker's stream cannot be understood")
                break
            now = time.monotonic()
            if self._was_open:
                self._was_open = False
                resume_until = now + window_s
                logger.warning(
                    "event=worker_session_broken worker=%s choices=%d error=%s",
                    self.worker_id,
                    len(self._choices),
                    error.message,
                )
                for choice in self._choices.values():
                    choice.span.add_event("session_broken", reason=error.message)
            if resume_until is None or now > resume_until or isinstance(error, _UNRESUMABLE):
                break
            await asyncio.sleep(_RESUME_RETRY_S)
        if isinstance(error, NotFoundError):
            # The worker lives: nothing that it ran can have killed it.
            error = UnavailableError(error.message)
        elif resume_until is not None and not self._draining:
            error = SessionBrokenError(error.message)
        self._lose_all(error)

    async def _serve(self, resume_until: float | None) -> None:
        """One call, from opening to its break, which raises; None opens the session anew."""
        resume = resume_until is not None
        call = self._stub.Connect()
        self._call = call
        writer: asyncio.Task[None] | None = None
        try:
            opening_s = _OPEN_S if resume_until is None else resume_until - time.monotonic()
            async with asyncio.timeout(opening_s):
                await call.write(ConnectRequest(open=self._open_message(resume)))
                first = await call.read()
            if not isinstance(first, ConnectResponse) or first.WhichOneof("message") != "opened":
                raise SessionBrokenError("the worker ended the session before it opened")
            self._silence.end()
            self._was_open = True
            if resume:
                self._resumed(first.opened.resumed, first.opened.lost_handles)
            writer = asyncio.create_task(self._outbox.drain(call))
            while isinstance(response := await call.read(), ConnectResponse):
                self._silence.end()
                if response.HasField("frame"):
                    self._on_frame(response.frame)
                elif response.HasField("heartbeat"):
                    self._on_heartbeat(response.heartbeat)
            await _raise_status(call)
        except TimeoutError as error:
            raise UnavailableError("the worker did not open the session") from error
        finally:
            self._call = None
            call.cancel()
            if writer is not None:
                writer.cancel()
                await asyncio.gather(writer, return_exceptions=True)

    def _open_message(self, resume: bool) -> OpenSession:
        # A submit that waits in the outbox is nothing the worker could have lost.
        unsent = {submit.handle for message in self._outbox.pending for submit in message.submits}
        resumed = [handle for handle in self._choices if handle not in unsent] if resume else []
        return OpenSession(
            gateway_id=self._gateway_id,
            session_id=self._session_id,
            epoch=self.epoch,
            protocol=ProtocolRange(
                min_revision=MIN_PROTOCOL_REVISION, max_revision=MAX_PROTOCOL_REVISION
            ),
            resume=resume,
            resume_handles=resumed,
            resume_offsets=[len(self._choices[handle].output_ids) for handle in resumed],
        )

    def _resumed(self, resumed: bool, lost_handles: Sequence[int]) -> None:
        if not resumed:
            raise NotFoundError("the worker no longer has the session")
        for handle in lost_handles:
            self._lose(handle, UnavailableError("the worker lost the sequence"))
        for choice in self._choices.values():
            choice.span.add_event("session_resumed")

    def _on_heartbeat(self, heartbeat: Heartbeat) -> None:
        self._draining = heartbeat.draining
        has_others = self._has_others(self.worker_id)
        if self._step_watch.is_hung(heartbeat, time.monotonic(), has_others):
            raise PreconditionError("the worker's engine hangs")

    def _on_frame(self, frame: StepFrame) -> None:
        choices = self._choices
        for admission in frame.admissions:
            if (choice := choices.get(admission.handle)) is not None:
                choice.cached_tokens = max(choice.cached_tokens, admission.cached_tokens)
                choice.queue_ns += admission.queue_ns
        for entry in frame.logprobs:
            if (choice := choices.get(entry.handle)) is not None:
                choice.logprobs_arrived(entry.block)
        trimmed = {
            finish.handle
            for finish in frame.finishes
            if finish.HasField("matched_token_id")
            and (choice := choices.get(finish.handle)) is not None
            and choice.trim_stop_id
        }
        handles: list[int] = []
        offsets: list[int] = []
        counts: list[int] = []
        ids: list[int] = []
        frame_ids = list(frame.token_ids)
        start = 0
        for handle, offset, count in zip(
            frame.handles, frame.token_offsets, frame.num_tokens, strict=True
        ):
            new_ids = frame_ids[start : start + count]
            start += count
            choice = choices.get(handle)
            if choice is None:
                continue
            received = len(choice.output_ids)
            if offset != received:
                if offset > received:
                    raise SessionBrokenError(
                        f"tokens {received} to {offset} of a sequence are missing"
                    )
                del new_ids[: received - offset]
            if not new_ids:
                continue
            if received == 0:
                choice.tokens_arrived()
            choice.output_ids += new_ids
            if handle in trimmed:
                choice.num_trimmed = 1
                new_ids.pop()
            if new_ids:
                handles.append(handle)
                offsets.append(received)
                counts.append(len(new_ids))
                ids += new_ids
        finished = self._on_terminals(frame) if frame.finishes or frame.errors else []
        if handles or finished:
            self._text.feed(handles, offsets, counts, ids, finished)

    def _on_terminals(self, frame: StepFrame) -> list[int]:
        """Acknowledge what ended; returns the handles whose text is to be finished."""
        closes = self._outbox.tail().closes
        finished = []
        for finish in frame.finishes:
            closes.append(finish.handle)
            choice = self._choices.get(finish.handle)
            if choice is None:
                continue
            if finish.reason == FINISH_REASON_CANCELLED:
                self._lose(finish.handle, UnavailableError("the worker gave the sequence up"))
                continue
            if finish.num_output_tokens != len(choice.output_ids):
                raise SessionBrokenError("a sequence ended before all of its tokens came")
            choice.cached_tokens = max(choice.cached_tokens, finish.cached_tokens)
            if choice.span.is_recording:
                choice.prefill_ns += finish.prefill_ns
                choice.decode_ns += finish.decode_ns
            choice.worker_finish = ChoiceFinish(
                finish.reason,
                finish.matched_token_id if finish.HasField("matched_token_id") else None,
            )
            del self._choices[finish.handle]
            finished.append(finish.handle)
        for failure in frame.errors:
            closes.append(failure.handle)
            error = error_from_code(failure.code, failure.message)
            if isinstance(error, _RETRYABLE):
                self._lose(failure.handle, error)
            elif (choice := self._choices.pop(failure.handle, None)) is not None:
                self._text.close(failure.handle)
                choice.fail(error)
        return finished

    def _lose(self, handle: int, error: RhizomeError) -> None:
        choice = self._choices.pop(handle, None)
        if choice is not None:
            self._text.close(handle)
            choice.owner.choice_lost(choice, error)

    def _lose_all(self, error: RhizomeError) -> None:
        self.dead = True
        if self._choices:
            logger.warning(
                "event=worker_session_lost worker=%s choices=%d error=%s",
                self.worker_id,
                len(self._choices),
                error.message,
            )
        for handle in list(self._choices):
            self._lose(handle, error)


async def _raise_status(call: aio.StreamStreamCall[ConnectRequest, ConnectResponse]) -> None:
    """Raise what an ended call means; a worker never ends one well while we want it."""
    if await call.code() != grpc.StatusCode.OK:
        raise error_from_code(int((await call.code()).value[0]), await call.details() or "")
    raise SessionBrokenError("the worker ended the session")
