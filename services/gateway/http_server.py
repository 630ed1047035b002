"""The HTTP server: uvicorn with httptools, and a direct way to write a streamed body.

ASGI's `send` costs a coroutine and a dictionary per chunk; an event stream writes one chunk a
token. The protocol therefore puts a `BodyWriter` into the scope's extensions, which frames a chunk
and hands it to the transport in one plain call.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

BODY_WRITER_EXTENSION = "rhizome.body_writer"


class BodyWriter:
    """Writes pieces of one response's chunked body straight to its connection.

    To be used only between the ASGI messages `http.response.start` (without a content-length) and
    the last `http.response.body`, which stay with `send`. Nothing happens once the client is gone:
    a closed transport of uvloop raises, and callers learn of the disconnect only later.
    """

    __slots__ = ("_protocol", "_transport")

    def __init__(self, transport: asyncio.Transport, protocol: _Protocol) -> None:
        self._transport = transport
        self._protocol = protocol

    def send(self, data: bytes) -> None:
        """Send what `chunk` made."""
        if not self._transport.is_closing():
            self._transport.write(data)

    def limit(self, max_buffered_bytes: int, exceeded: Callable[[], None]) -> None:
        """Call `exceeded` when the client leaves more than this unread."""
        if self._transport.is_closing():
            return
        self._transport.set_write_buffer_limits(high=max_buffered_bytes)
        self._protocol.buffer_exceeded = exceeded

    def unlimit(self) -> None:
        self._protocol.buffer_exceeded = None

    def abort(self) -> None:
        """Drop the connection with what is buffered."""
        self._transport.abort()


def chunk(data: bytes) -> bytes:
    """One non-empty piece of a body in HTTP's chunked encoding."""
    return b"%x\r\n%b\r\n" % (len(data), data)


class _Protocol(HttpToolsProtocol):
    buffer_exceeded: Callable[[], None] | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        raw_socket = transport.get_extra_info("socket")
        if raw_socket is not None and raw_socket.family in (socket.AF_INET, socket.AF_INET6):
            raw_socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().connection_made(transport)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        extensions: dict[str, Any] = {BODY_WRITER_EXTENSION: BodyWriter(self.transport, self)}
        self.scope["extensions"] = extensions

    def pause_writing(self) -> None:
        super().pause_writing()
        if self.buffer_exceeded is not None:
            self.buffer_exceeded()


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the service's main."""
        yield


@contextlib.asynccontextmanager
async def running_http_server(
    app: Callable[..., Any],
    host: str,
    port: int,
    *,
    grace_s: float,
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[int]:
    """Serve `app` until the block ends, then let running requests finish for `grace_s`.

    Yields the bound port. Raises OSError when the address cannot be bound.
    """
    listener = _bind(host, port)
    config = uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=max(1, round(grace_s)),
        ssl_context_factory=None if tls is None else lambda config, default: tls,
    )
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        while not server.started:
            if task.done():
                task.result()
                raise OSError(f"the HTTP server on {host}:{port} did not start")
            await asyncio.sleep(0.01)
        yield int(listener.getsockname()[1])
    finally:
        server.should_exit = True
        await task


def _bind(host: str, port: int) -> socket.socket:
    family, kind, _, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise OSError(f"cannot listen on {host}:{port}: {error}") from error
    listener.setblocking(False)
    return listener
