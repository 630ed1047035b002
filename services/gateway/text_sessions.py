"""Text sessions: one StreamText call carries the text of all choices of one worker session.

Each step frame's ids go out as one message. When the call breaks, the session reopens on another
tokenizer replica, which replays the ids and goes on after the bytes that were already delivered.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import grpc
from grpc import aio

from rhizome.common.v1.finish_reason_pb2 import FINISH_REASON_STOP
from rhizome.tokenizer.v1.tokenizer_service_pb2 import (
    OpenText,
    StreamTextRequest,
    StreamTextResponse,
    TextEnd,
)
from services.common.errors import (
    InternalError,
    RhizomeError,
    UnavailableError,
    error_from_code,
)
from services.common.outbox import Outbox
from services.gateway.generation import Choice
from services.gateway.silence import Silence
from services.gateway.tokenizers import TokenizerPool, TokenizerReplica

logger = logging.getLogger(__name__)

# Prompt ids a tokenizer may need to decode the first output id in its context.
_NUM_CONTEXT_IDS = 8
# Choices fail when no tokenizer was found for this long.
_PATIENCE_S = 10.0
# A replica that answers nothing for this long while ids wait is given up; later where it is the
# only one, since replaying all ids makes a slow one slower.
_SILENCE_S = 1.0
_ALONE_SILENCE_S = 5.0
_RETRY_S = 0.1


class TextSession:
    """Turns ids into text for the choices that are open, and tells each choice.

    `stopped` is called with a handle whose text ended, or failed, before its worker had finished.
    """

    def __init__(self, tokenizers: TokenizerPool, stopped: Callable[[int], None]) -> None:
        self._tokenizers = tokenizers
        self._stopped = stopped
        self._choices: dict[int, Choice] = {}
        self._outbox: Outbox[StreamTextRequest] = Outbox(StreamTextRequest)
        self._call: aio.StreamStreamCall[StreamTextRequest, StreamTextResponse] | None = None
        # Whether ids were sent and nothing came since.
        self._unanswered = False
        self._silence = Silence()
        # Who answers the call.
        self._replica: TokenizerReplica | None = None
        self._opened = asyncio.Event()
        self._task = asyncio.create_task(self._run())

    @property
    def num_open(self) -> int:
        return len(self._choices)

    def open(self, handle: int, choice: Choice) -> None:
        """Start `handle`, or go on where the choice's text stands."""
        self._choices[handle] = choice
        if self._call is not None:
            self._send_open(handle, choice)
        self._opened.set()

    def feed(
        self,
        handles: list[int],
        offsets: list[int],
        counts: list[int],
        token_ids: list[int],
        finishes: list[int],
    ) -> None:
        """Hand on one frame's ids; `finishes` get no more."""
        if self._call is None:
            # All ids are replayed when a call opens.
            return
        self._outbox.push(
            StreamTextRequest(
                handles=handles,
                id_offsets=offsets,
                num_ids=counts,
                token_ids=token_ids,
                finishes=finishes,
            )
        )
        self._unanswered = True

    def close(self, handle: int) -> None:
        """Nobody wants this handle's text any more. Idempotent."""
        if self._choices.pop(handle, None) is not None and self._call is not None:
            self._outbox.tail().closes.append(handle)

    def check(self) -> None:
        """Give up a replica that has gone silent; called every CHECK_INTERVAL_S."""
        replica = self._replica
        if self._call is None or replica is None or not self._unanswered:
            self._silence.end()
            return
        patience_s = _SILENCE_S if self._tokenizers.has_others(replica) else _ALONE_SILENCE_S
        if self._silence.check() > patience_s:
            logger.warning("event=text_session_silent handles=%d", len(self._choices))
            self._call.cancel()

    async def aclose(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            await self._opened.wait()
            replica = await self._find_replica()
            if replica is None:
                self._fail_all(UnavailableError("no tokenizer can be reached"))
                continue
            try:
                await self._serve(replica)
            except aio.AioRpcError as error:
                logger.warning(
                    "event=text_session_broken tokenizer=%s handles=%d status=%s message=%s",
                    replica.address,
                    len(self._choices),
                    error.code().name,
                    error.details(),
                )
                replica.suspect()
            except asyncio.CancelledError:
                if asyncio.current_task().cancelling():  # type: ignore[union-attr]
                    raise
                # `check` cancelled the call, not this task.
                replica.suspect()
            except Exception:
                # Nobody else would notice: its choices end instead of never.
                logger.exception("event=text_session_failed tokenizer=%s", replica.address)
                self._fail_all(InternalError("the tokenizer's stream cannot be understood"))
            if not self._choices:
                self._opened.clear()

    async def _find_replica(self) -> TokenizerReplica | None:
        deadline = time.monotonic() + _PATIENCE_S
        while (replica := self._tokenizers.pick()) is None:
            if time.monotonic() > deadline:
                return None
            await asyncio.sleep(_RETRY_S)
        return replica

    async def _serve(self, replica: TokenizerReplica) -> None:
        call = replica.stub.StreamText()
        self._outbox.clear()
        self._heard()
        self._call, self._replica = call, replica
        for handle, choice in sorted(self._choices.items()):
            self._send_open(handle, choice)
        writer = asyncio.create_task(self._outbox.drain(call))
        try:
            while isinstance(response := await call.read(), StreamTextResponse):
                self._heard()
                self._on_response(response)
            raise aio.AioRpcError(
                grpc.StatusCode.UNAVAILABLE,
                aio.Metadata(),
                aio.Metadata(),
                details="the tokenizer ended the stream",
            )
        finally:
            self._call = None
            writer.cancel()
            call.cancel()
            await asyncio.gather(writer, return_exceptions=True)

    def _heard(self) -> None:
        self._unanswered = False
        self._silence.end()

    def _send_open(self, handle: int, choice: Choice) -> None:
        spec = choice.prompt.spec
        replay = choice.output_ids[: choice.num_text_ids]
        message = self._outbox.tail(len(replay))
        message.opens.append(
            OpenText(
                handle=handle,
                options=spec.text_options,
                context_ids=choice.prompt.token_ids[-_NUM_CONTEXT_IDS:],
                replay_ids=replay,
                emitted_bytes=choice.emitted_bytes,
            )
        )
        if choice.worker_finish is not None:
            message.finishes.append(handle)

    def _on_response(self, response: StreamTextResponse) -> None:
        choices = self._choices
        for handle, consumed, text in zip(
            response.handles, response.ids_consumed, response.texts, strict=True
        ):
            choice = choices.get(handle)
            if choice is not None:
                choice.text_arrived(text, consumed)
        for end in response.ends:
            choice = choices.pop(end.handle, None)
            if choice is not None:
                self._on_end(end, choice)

    def _on_end(self, end: TextEnd, choice: Choice) -> None:
        match end.WhichOneof("end"):
            case "finished":
                if choice.worker_finish is None:
                    early = UnavailableError("the tokenizer ended a text too early")
                    self._fail(end.handle, choice, early)
                else:
                    choice.end(choice.worker_finish)
            case "stop":
                if choice.worker_finish is None:
                    self._stopped(end.handle)
                choice.stop_at(end.stop.id_index + 1, end.stop.stop, FINISH_REASON_STOP)
            case _:
                error = error_from_code(end.error.code, end.error.message)
                self._fail(end.handle, choice, error)

    def _fail_all(self, error: RhizomeError) -> None:
        choices = list(self._choices.items())
        self._choices.clear()
        self._opened.clear()
        for handle, choice in choices:
            self._fail(handle, choice, error)

    def _fail(self, handle: int, choice: Choice, error: RhizomeError) -> None:
        if choice.worker_finish is None:
            self._stopped(handle)
        choice.fail(error)
