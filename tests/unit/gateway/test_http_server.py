"""The direct way to write a streamed body, on the event loop that the gateway runs on."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import uvloop

from services.gateway.exchange import EventStream, Exchange
from services.gateway.http_server import (
    BODY_WRITER_EXTENSION,
    BodyWriter,
    chunk,
    running_http_server,
)
from services.gateway.metrics import GatewayMetrics

Message = dict[str, Any]


def test_writing_to_a_client_that_is_gone_does_nothing() -> None:
    uvloop.run(_write_after_a_disconnect())


async def _write_after_a_disconnect() -> None:
    outcome: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def app(
        scope: dict[str, Any],
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        writer: BodyWriter = scope["extensions"][BODY_WRITER_EXTENSION]
        writer.send(chunk(b"here"))
        while (await receive())["type"] != "http.disconnect":
            pass
        try:
            writer.send(chunk(b"gone"))
            writer.limit(1000, lambda: None)
            writer.abort()
        except Exception as error:
            outcome.set_exception(error)
        else:
            outcome.set_result(None)

    async with running_http_server(app, "127.0.0.1", 0, grace_s=0.1) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nhost: test\r\n\r\n")
        await reader.readuntil(b"here")
        writer.transport.abort()
        async with asyncio.timeout(5):
            await outcome


def test_an_event_larger_than_what_may_be_unread_reaches_a_client_that_reads() -> None:
    uvloop.run(_write_a_large_event())


async def _write_a_large_event() -> None:
    large = b"data: " + b"x" * 32_000_000 + b"\n\n"

    async def app(
        scope: dict[str, Any],
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        events = EventStream(Exchange(scope, receive, send, 1000), 50_000, GatewayMetrics())
        events.overflowed = lambda: None
        await events.open()
        events.write(large)
        events.write(b"data: [DONE]\n\n")
        await events.close()

    async with running_http_server(app, "127.0.0.1", 0, grace_s=0.1) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**26)
        with contextlib.closing(writer):
            writer.write(b"GET / HTTP/1.1\r\nhost: test\r\n\r\n")
            async with asyncio.timeout(20):
                received = await reader.readuntil(b"[DONE]")
        assert large in received
