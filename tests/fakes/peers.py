"""Two sides of a gRPC connection that say whose certificate the other one showed."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc import aio

from services.common.certificates import expiry_s
from services.common.peer_tls import PeerTls, peer_tls, server_credentials
from services.common.rpc import RunningServer, open_channel, running_server
from services.common.tls import TlsFlags

# Follow files at once.
LOOK_S = 0.01


async def _who(request: bytes, context: Any) -> bytes:
    """The client's common name."""
    return b",".join(context.auth_context().get("x509_common_name", ()))


async def _echo(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
    async for request in requests:
        yield request


def _add(server: aio.Server) -> None:
    handlers = {
        "Who": grpc.unary_unary_rpc_method_handler(_who, bytes, bytes),
        "Echo": grpc.stream_stream_rpc_method_handler(_echo, bytes, bytes),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("Peer", handlers),))


@contextlib.asynccontextmanager
async def running_peer(
    flags: TlsFlags, address: str = "localhost:0", **options: Any
) -> AsyncIterator[RunningServer]:
    async with (
        peer_tls(flags, LOOK_S) as tls,
        running_server(
            _add, [], address, grace_s=0.1, credentials=server_credentials(tls), **options
        ) as server,
    ):
        yield server


@contextlib.asynccontextmanager
async def calling(flags: TlsFlags, port: int) -> AsyncIterator[tuple[aio.Channel, PeerTls | None]]:
    async with peer_tls(flags, LOOK_S) as tls, open_channel(f"localhost:{port}", tls) as channel:
        yield channel, tls


async def who(channel: aio.Channel) -> str:
    """Who the server says that the caller is. Raises AioRpcError."""
    call: Any = channel.unary_unary("/Peer/Who")
    return str(await call(b"", timeout=5.0), "utf-8")


def echo(channel: aio.Channel) -> Any:
    """A stream that answers with what it gets."""
    call: Any = channel.stream_stream("/Peer/Echo")
    return call()


async def shown_expiry_s(port: int, flags: TlsFlags | None = None) -> float:
    """When the certificate ends that a new connection to the port is shown."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    if flags is not None and flags.files is not None:
        context.load_cert_chain(*flags.files[:2])
    _, writer = await asyncio.open_connection("localhost", port, ssl=context)
    try:
        der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    return expiry_s(der)


async def refusal(channel: aio.Channel) -> str:
    """Why a call fails."""
    with pytest.raises(aio.AioRpcError) as refused:
        await who(channel)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE, refused.value
    return refused.value.details() or ""
