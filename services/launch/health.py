"""Whether a service that was started is ready."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from urllib.parse import urlsplit

import grpc
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.common.peer_tls import PeerTls
from services.common.rpc import open_channel

_TIMEOUT_S = 1.0


@contextlib.asynccontextmanager
async def health_check(
    target: str, tls: PeerTls | None = None
) -> AsyncIterator[Callable[[], Awaitable[bool]]]:
    """What asks once, by gRPC or at an https:// URL; never raises."""
    if target.startswith("https://"):
        yield partial(_is_ok, target)
        return
    async with open_channel(target, tls) as channel:
        yield partial(_is_serving, channel)


async def _is_serving(channel: aio.Channel) -> bool:
    stub = health_pb2_grpc.HealthStub(channel)
    try:
        reply = await stub.Check(health_pb2.HealthCheckRequest(), timeout=_TIMEOUT_S)
    except grpc.aio.AioRpcError:
        return False
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


async def _is_ok(url: str) -> bool:
    """Whether a GET answers 200."""
    parts = urlsplit(url)
    # It is a child of ours on this host, and gets nothing but this question; the certificate's
    # name is that by which clients know it.
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port, ssl=context)
            try:
                request = f"GET {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\n"
                writer.write(f"{request}Connection: close\r\n\r\n".encode())
                status_line = await reader.readline()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False
    return status_line.split(b" ")[1:2] == [b"200"]
