"""The gateway's public edge: TLS towards clients, and their keys."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

import grpc

from services.common.certificates import ExpiryMetric, KeyPair, key_pair, load_pair
from services.common.edge_flags import EdgeFlags
from services.common.followed_files import LOOK_INTERVAL_S, FollowedFiles, following
from services.common.peer_tls import followed_server_credentials
from services.gateway.access import Access
from services.gateway.api_keys import parse_keys
from services.gateway.metrics import GatewayMetrics


class EdgeTls:
    """The certificate that clients see, over HTTP and over gRPC; new connections see a new one."""

    def __init__(self, pair: Callable[[], KeyPair]) -> None:
        """`pair` gives the newest."""
        self.expiry = ExpiryMetric([("edge", pair)])
        self._pair = pair
        self._shown = pair()
        self._newest = _context(self._shown)
        # Servers keep the context they are given, so each handshake is moved to the newest.
        self.context = _context(self._shown)
        self.context.sni_callback = self._use_newest

    def server_credentials(self) -> grpc.ServerCredentials:
        return followed_server_credentials(lambda: (self._pair(), None), wants_certificate=False)

    def _use_newest(
        self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext
    ) -> None:
        pair = self._pair()
        if pair is not self._shown:
            self._newest, self._shown = _context(pair), pair
        connection.context = self._newest


@dataclass(frozen=True, slots=True)
class Edge:
    """None for `tls` is plain text."""

    tls: EdgeTls | None
    access: Access


@contextlib.asynccontextmanager
async def following_edge(
    flags: EdgeFlags, metrics: GatewayMetrics, look_interval_s: float = LOOK_INTERVAL_S
) -> AsyncIterator[Edge]:
    """Follow certificates and keys until the block ends. Raises ValueError for bad files."""
    async with contextlib.AsyncExitStack() as stack:
        tls = None
        if flags.ssl_files is not None:
            pairs = FollowedFiles(flags.ssl_files, _pair)
            tls = EdgeTls(lambda: pairs.value)
            metrics.registry.register(tls.expiry)
            await stack.enter_async_context(following(pairs, look_interval_s))
        if flags.api_keys is None:
            access = Access(flags, metrics)
        else:
            keys = FollowedFiles([flags.api_keys], parse_keys)
            access = Access(flags, metrics, lambda: keys.value)
            await stack.enter_async_context(following(keys, look_interval_s))
        yield Edge(tls, access)


def _pair(contents: Sequence[bytes]) -> KeyPair:
    return key_pair(contents[0], contents[1])


def _context(pair: KeyPair) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["http/1.1"])
    load_pair(context, pair.certificate, pair.key)
    return context
