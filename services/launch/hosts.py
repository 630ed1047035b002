"""What the hosts of one system know of each other: addresses, and whether host 0 still runs."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time

from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.common.nodes import HostPort
from services.common.peer_tls import PeerTls, server_credentials
from services.common.rpc import RunningServer, open_channel, running_server

# Listens on every address of this host.
EVERYWHERE = "0.0.0.0"

# Hosts may start that far apart.
_FIRST_CONTACT_S = 600.0
# A host 0 that is silent for as long, and said nothing of its end, is lost.
_LOST_AFTER_S = 30.0
_RETRY_S = 0.5


class HostUnreachableError(Exception):
    """A host that this one cannot do without; the message names it."""


def host_and_port(host: str, port: int) -> str:
    """A gRPC target, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def own_address(peer: HostPort) -> str:
    """The address from which this host reaches `peer`, which is one that `peer` reaches it by.

    A host's own name is no use: many resolve it to an address that only they can reach. Nothing is
    sent. Raises HostUnreachableError.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(*peer, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as route:
            route.connect(address)
            return str(route.getsockname()[0])
    except OSError as error:
        raise HostUnreachableError(f"host 0, {peer.host}: {error}") from error


def lifetime_shown(
    address: str, tls: PeerTls | None = None
) -> contextlib.AbstractAsyncContextManager[RunningServer]:
    """Host 0's: while the block runs its health is SERVING; at the end it says NOT_SERVING.

    Raises OSError when the address cannot be bound.
    """
    return running_server(lambda server: None, [], address, credentials=server_credentials(tls))


async def until_node_0_ends(
    target: str,
    *,
    tls: PeerTls | None = None,
    first_contact_s: float = _FIRST_CONTACT_S,
    lost_after_s: float = _LOST_AFTER_S,
) -> None:
    """Return once host 0 has said that it ends.

    Raises HostUnreachableError when it goes without a word, or is never heard of.
    """
    deadline = time.monotonic() + first_contact_s
    async with open_channel(target, tls) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        while time.monotonic() < deadline:
            was_heard = False
            with contextlib.suppress(aio.AioRpcError):
                async for reply in stub.Watch(health_pb2.HealthCheckRequest()):
                    if reply.status == health_pb2.HealthCheckResponse.NOT_SERVING:
                        return
                    was_heard = True
            if was_heard:
                deadline = time.monotonic() + lost_after_s
            await asyncio.sleep(_RETRY_S)
    raise HostUnreachableError(f"host 0 does not answer at {target}")
