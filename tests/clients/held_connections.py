"""A TCP proxy that does not tell the server when a client is gone.

Through it, a program that ends is not seen to end: what frees its call is the cancellation that it
sent, and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

_CHUNK_BYTES = 65536


@contextlib.asynccontextmanager
async def held_connections(port: int) -> AsyncIterator[int]:
    """The port of a proxy to `port` of this host, whose connections stay open until the end."""
    writers: list[asyncio.StreamWriter] = []

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("localhost", port)
        writers.extend((writer, far_writer))
        await asyncio.gather(_carry(reader, far_writer), _carry(far_reader, writer))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for writer in writers:
            writer.transport.abort()


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One direction; what comes for a client that is gone is dropped."""
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(_CHUNK_BYTES):
            with contextlib.suppress(ConnectionError):
                writer.write(data)
                await writer.drain()
