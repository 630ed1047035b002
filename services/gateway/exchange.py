"""One HTTP request and its response: body, JSON, event streams, the client's disconnect."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from services.common.spans import NO_SPAN
from services.common.trace_context import TRACEPARENT, TRACESTATE
from services.gateway.http_errors import HttpError, error_reply
from services.gateway.http_server import BODY_WRITER_EXTENSION, BodyWriter, chunk
from services.gateway.metrics import GatewayMetrics

if TYPE_CHECKING:
    from services.gateway.pipeline import Generation

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
T = TypeVar("T")

REQUEST_ID_HEADER = b"x-request-id"
TRACE_HEADER = b"x-rhizome-trace"
TENANT_HEADER = "x-tenant-id"
AUTHORIZATION_HEADER = "authorization"
_TENANT_HEADER_BYTES = TENANT_HEADER.encode()
_TRACEPARENT_BYTES, _TRACESTATE_BYTES = TRACEPARENT.encode(), TRACESTATE.encode()
_AUTHORIZATION_HEADER = AUTHORIZATION_HEADER.encode()
_MAX_REQUEST_ID_LEN = 128
_MAX_TENANT_LEN = 128
TENANT_RULE = f"{TENANT_HEADER} must be at most {_MAX_TENANT_LEN} printable ASCII characters"
_encode = msgspec.json.Encoder().encode


class ClientGoneError(Exception):
    """The client disconnected; nobody reads an answer."""


class Exchange:
    """One request; at most one response is sent through it."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, max_body_bytes: int) -> None:
        self.scope = scope
        self.arrival_s = time.monotonic()
        self.status = 0
        self._ended = False
        self._receive = receive
        self._send = send
        self._max_body_bytes = max_body_bytes
        self.request_id = ""
        self.tenant = ""
        self.authorization: bytes | None = None
        self.traced = False
        # W3C trace context as the client sent it.
        self.traceparent = ""
        self.tracestate = ""
        self._read_headers()
        self.span = NO_SPAN
        # Of its prompts, once they are tokenized; kept only for a span that is recorded.
        self.generations: Sequence[Generation] = ()

    def use_request_id(self, request_id: str) -> None:
        """Take the body's `rid` for the header's. Raises HttpError for one that cannot be sent."""
        if not valid_request_id(request_id):
            raise HttpError(
                400,
                f"rid must be 1 to {_MAX_REQUEST_ID_LEN} printable ASCII characters",
                param="rid",
            )
        self.request_id = request_id

    async def body(self) -> bytes:
        """The whole body. Raises HttpError 413 for one that is too large."""
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        data: bytes = message.get("body", b"")
        if message.get("more_body"):
            parts = [data]
            size = len(data)
            while message.get("more_body"):
                if size > self._max_body_bytes:
                    break
                message = await self._receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError
                parts.append(message.get("body", b""))
                size += len(parts[-1])
            data = b"".join(parts)
        if len(data) > self._max_body_bytes:
            raise self._too_large()
        return data

    async def reply(
        self,
        status: int,
        body: bytes,
        content_type: bytes = b"application/json",
        headers: list[tuple[bytes, bytes]] | None = None,
    ) -> None:
        """Send a whole response."""
        self.status = status
        await self._send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [
                    (b"content-type", content_type),
                    (b"content-length", str(len(body)).encode()),
                    (REQUEST_ID_HEADER, self.request_id.encode()),
                    *(headers or ()),
                ],
            }
        )
        await self._send({"type": "http.response.body", "body": body})

    async def reply_json(self, payload: object) -> None:
        await self.reply(200, _encode(payload))

    async def reply_error(self, error: Exception) -> None:
        reply = error_reply(error)
        await self.reply(reply.status, reply.body, headers=reply.headers)

    async def watched(self, work: Coroutine[Any, Any, T]) -> T:
        """Await `work`; the client's disconnect cancels it and raises ClientGoneError."""
        task = asyncio.create_task(work)
        watch = asyncio.create_task(self._disconnected())
        gone = False

        def client_gone(_: object) -> None:
            nonlocal gone
            # The end of a response looks like a disconnect too.
            gone = not self._ended and not task.done()
            if gone:
                task.cancel()

        watch.add_done_callback(client_gone)
        try:
            return await task
        except asyncio.CancelledError:
            if gone:
                raise ClientGoneError from None
            raise
        finally:
            watch.cancel()

    async def start_events(self) -> BodyWriter:
        """Send the head of an event stream; the body is written through the result."""
        self.status = 200
        await self._send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [
                    (b"content-type", b"text/event-stream; charset=utf-8"),
                    (b"cache-control", b"no-cache"),
                    (b"x-accel-buffering", b"no"),
                    (REQUEST_ID_HEADER, self.request_id.encode()),
                ],
            }
        )
        writer: BodyWriter = self.scope["extensions"][BODY_WRITER_EXTENSION]
        return writer

    async def end_events(self) -> None:
        self._ended = True
        await self._send({"type": "http.response.body", "body": b""})

    async def _disconnected(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    def _read_headers(self) -> None:
        for name, value in self.scope["headers"]:
            if name == REQUEST_ID_HEADER:
                self.request_id = value.decode("latin-1")
            elif name == _TENANT_HEADER_BYTES:
                self.tenant = value.decode("latin-1")
            elif name == _AUTHORIZATION_HEADER:
                self.authorization = value
            elif name == TRACE_HEADER:
                self.traced = value == b"1"
            elif name == _TRACEPARENT_BYTES:
                self.traceparent = _joined(self.traceparent, value)
            elif name == _TRACESTATE_BYTES:
                self.tracestate = _joined(self.tracestate, value)
        if not self.request_id:
            self.request_id = secrets.token_hex(16)

    def check_headers(self) -> None:
        """Raises HttpError for header values that cannot be honoured."""
        if not valid_request_id(self.request_id):
            self.request_id = secrets.token_hex(16)
            raise HttpError(
                400,
                f"x-request-id must be 1 to {_MAX_REQUEST_ID_LEN} printable ASCII characters",
                param="x-request-id",
            )
        if self.tenant and not valid_tenant(self.tenant):
            raise HttpError(400, TENANT_RULE, param=TENANT_HEADER)
        for name, value in self.scope["headers"]:
            if name == b"content-length" and int(value) > self._max_body_bytes:
                raise self._too_large()

    def _too_large(self) -> HttpError:
        error = HttpError(
            413, f"The request body exceeds the limit of {self._max_body_bytes} bytes"
        )
        # The rest of the body stays unread, so the connection cannot be used again.
        error.headers.append((b"connection", b"close"))
        return error


def _joined(known: str, value: bytes) -> str:
    """A header's values as one, as HTTP has them."""
    text = value.decode("latin-1")
    return f"{known},{text}" if known else text


def valid_request_id(request_id: str) -> bool:
    return (
        0 < len(request_id) <= _MAX_REQUEST_ID_LEN
        and request_id.isascii()
        and request_id.isprintable()
    )


def valid_tenant(tenant: str) -> bool:
    return len(tenant) <= _MAX_TENANT_LEN and tenant.isascii() and tenant.isprintable()


def schedule_id(request_id: str) -> str:
    """A unique name for one prompt; clients may use a request id twice."""
    return f"{request_id}-{secrets.token_hex(4)}"


class EventStream:
    """Server-sent events of one response.

    Events written before `open` wait for it. A client that leaves more than `max_buffered_bytes`
    and one large event unread is dropped: `overflowed` is called once and the connection aborted.
    """

    def __init__(
        self, exchange: Exchange, max_buffered_bytes: int, metrics: GatewayMetrics
    ) -> None:
        self.silent = True
        self.overflowed: Callable[[], object] | None = None
        self._exchange = exchange
        self._max_buffered_bytes = max_buffered_bytes
        # An event up to here needs no room of its own.
        self._largest_event = max_buffered_bytes // 8
        self._metrics = metrics
        self._early: list[bytes] = []
        self._writer: BodyWriter | None = None
        self._send: Callable[[bytes], None] | None = None

    async def open(self) -> None:
        self._writer = await self._exchange.start_events()
        self._writer.limit(self._max_buffered_bytes, self._exceeded)
        self._send = self._writer.send
        if self._early:
            early = b"".join(self._early)
            self._early.clear()
            self.write(early)

    def write(self, event: bytes) -> None:
        """Send one event or comment, its blank line included. Never waits."""
        self.silent = False
        if self._send is None:
            self._early.append(event)
        else:
            if len(event) > self._largest_event:
                self._make_room(event)
            self._send(b"%x\r\n%b\r\n" % (len(event), event))

    def keep_alive(self) -> None:
        """Send a comment unless something was sent since the last call."""
        if self.silent and self._send is not None:
            self._send(chunk(b": keep-alive\n\n"))
        self.silent = True

    async def close(self) -> None:
        if self._writer is not None:
            self._writer.unlimit()
        await self._exchange.end_events()

    def _make_room(self, event: bytes) -> None:
        """Nobody can have read an event that is being written, however fast they read."""
        assert self._writer is not None, "only an open stream sends"
        self._largest_event = len(event)
        self._writer.limit(self._max_buffered_bytes + len(event), self._exceeded)

    def _exceeded(self) -> None:
        if self.overflowed is None or self._writer is None:
            return
        self._metrics.slow_readers.inc()
        self.overflowed()
        self.overflowed = None
        self._writer.abort()


class KeepAlive:
    """Sends comments on the event streams that were silent for a while."""

    def __init__(self, silence_s: float) -> None:
        self.silence_s = silence_s
        self.streams: set[EventStream] = set()

    async def run(self) -> None:
        """For ever; a silence lasts between half of and the whole `silence_s`."""
        while True:
            await asyncio.sleep(self.silence_s / 2)
            for stream in self.streams:
                stream.keep_alive()
