"""How ranks find each other: rank 0's store, and the channels of ranks on other hosts.

The store is torch's TCPStore. A rank of another host asks it where rank 0 takes channels, connects
there and says which rank it is.
"""

from __future__ import annotations

import logging
import socket
import time
from datetime import timedelta

import msgspec
from torch._C._distributed_c10d import TCPStore

from services.common.nodes import HostPort
from services.worker.engine.distributed.channel import Channel, Kind, RankLostError

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"

# How long nodes may start apart from each other.
JOIN_TIMEOUT_S = 600.0
_GREETING_TIMEOUT_S = 5.0
_CHANNEL_PORT_KEY = "rhizome/channel_port"


class RankHello(msgspec.Struct, frozen=True):
    """A rank's first words."""

    rank: int


def create_store(size: int, address: HostPort | None = None) -> tuple[TCPStore, HostPort]:
    """Rank 0's store and where it listens: at `address`, else on a free port for this host alone.

    Raises ValueError when the address cannot be had.
    """
    host, port = address or HostPort(LOOPBACK, 0)
    # By itself the store listens on all addresses, and it asks nobody who they are.
    own = None if address is not None else socket.create_server((LOOPBACK, 0))
    if own is not None:
        port = own.getsockname()[1]
    try:
        store = TCPStore(
            host,
            port,
            size,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=JOIN_TIMEOUT_S),
            # The store closes it.
            master_listen_fd=None if own is None else own.detach(),
        )
    except RuntimeError as error:
        raise ValueError(f"cannot listen on nccl-init-addr {host}:{port}: {error}") from error
    return store, HostPort(host, store.port)


def join_store(address: HostPort, size: int) -> TCPStore:
    """Another rank's connection to rank 0's store. Raises RankLostError when none answers."""
    try:
        return TCPStore(
            address.host,
            address.port,
            size,
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=JOIN_TIMEOUT_S),
        )
    except RuntimeError as error:
        raise RankLostError(f"no rank 0 at {address.host}:{address.port}: {error}") from error


def accept_ranks(store: TCPStore, ranks: range, timeout_s: float) -> dict[int, Channel]:
    """Rank 0's channels to `ranks`, each of which must connect in time."""
    channels: dict[int, Channel] = {}
    deadline = time.monotonic() + timeout_s
    with _listening_socket() as listener:
        store.set(_CHANNEL_PORT_KEY, str(listener.getsockname()[1]))
        while missing := [rank for rank in ranks if rank not in channels]:
            listener.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                end, peer = listener.accept()
            except TimeoutError as error:
                _close_all(channels)
                raise RankLostError(
                    f"ranks {missing} of other nodes did not join in time"
                ) from error
            channel = Channel(end, _GREETING_TIMEOUT_S)
            rank = _greeted_rank(channel)
            if rank not in missing:
                logger.warning("event=stranger_refused peer=%s rank=%s", peer[0], rank)
                channel.close()
                continue
            channels[rank] = channel
    return channels


def connect_to_rank_0(store: TCPStore, host: str, rank: int) -> socket.socket:
    """The socket of this rank's channel, once rank 0 takes channels. Raises RankLostError."""
    try:
        port = int(store.get(_CHANNEL_PORT_KEY))
        end = socket.create_connection((host, port), timeout=_GREETING_TIMEOUT_S)
    except (OSError, RuntimeError) as error:
        raise RankLostError(f"cannot reach rank 0 at {host}: {error}") from error
    Channel(end).send(Kind.HELLO, msgspec.json.encode(RankHello(rank)))
    return end


def own_address(towards: HostPort) -> str:
    """This host's address on the way to rank 0, where other ranks can reach it."""
    family, kind, _, _, address = socket.getaddrinfo(
        towards.host, towards.port, type=socket.SOCK_DGRAM
    )[0]
    with socket.socket(family, kind) as probe:
        # Connecting a datagram socket sends nothing; it only looks up the route.
        probe.connect(address)
        return str(probe.getsockname()[0])


def _listening_socket() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _greeted_rank(channel: Channel) -> int | None:
    """None for whoever does not speak as a rank does."""
    try:
        kind, payload = channel.receive()
        return msgspec.json.decode(payload, type=RankHello).rank if kind is Kind.HELLO else None
    except (RankLostError, ValueError):
        return None


def _close_all(channels: dict[int, Channel]) -> None:
    for channel in channels.values():
        channel.close()
