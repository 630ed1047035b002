"""TLS between services: what a service shows the others, and how it knows them.

Both sides of a connection show a certificate of the same CA. The files are followed: a server
gives new connections the new certificate, a channel makes new connections for new calls.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

import grpc

from services.common.certificates import ExpiryMetric, KeyPair, check_authorities, key_pair
from services.common.followed_files import LOOK_INTERVAL_S, FollowedFiles, following
from services.common.tls import TlsFlags


@dataclass(frozen=True, slots=True)
class PeerIdentity:
    """What the files said at one time."""

    pair: KeyPair
    authorities: bytes
    channel_credentials: grpc.ChannelCredentials


class PeerTls:
    """One service's standing among the others: `identity` is what its files say now."""

    def __init__(self, files: FollowedFiles[PeerIdentity], server_name: str | None) -> None:
        self.server_name = server_name
        self.expiry = ExpiryMetric([("services", lambda: self.identity.pair)])
        self._files = files

    @property
    def identity(self) -> PeerIdentity:
        return self._files.value


@contextlib.asynccontextmanager
async def peer_tls(
    flags: TlsFlags, look_interval_s: float = LOOK_INTERVAL_S
) -> AsyncIterator[PeerTls | None]:
    """Follow the files until the block ends; None without files. Raises ValueError for bad ones."""
    if flags.files is None:
        yield None
        return
    files = FollowedFiles(flags.files, _identity)
    async with following(files, interval_s=look_interval_s):
        yield PeerTls(files, flags.tls_server_name)


def server_credentials(tls: PeerTls | None) -> grpc.ServerCredentials | None:
    """Those of a server that wants a certificate of the CA from whoever connects."""
    if tls is None:
        return None
    return followed_server_credentials(
        lambda: (tls.identity.pair, tls.identity.authorities), wants_certificate=True
    )


def expiry_metrics(tls: PeerTls | None) -> list[ExpiryMetric]:
    """What the service's metrics say of it."""
    return [] if tls is None else [tls.expiry]


def followed_server_credentials(
    current: Callable[[], tuple[KeyPair, bytes | None]], *, wants_certificate: bool
) -> grpc.ServerCredentials:
    """Credentials whose pair and CA are those that `current` gives when a connection comes.

    `current` is asked from a thread of gRPC's.
    """

    served = current()

    def changed() -> grpc.ServerCertificateConfiguration | None:
        nonlocal served
        newest = current()
        if newest == served:
            return None
        served = newest
        return _server_configuration(*newest)

    return grpc.dynamic_ssl_server_credentials(
        _server_configuration(*served),
        changed,  # type: ignore[arg-type]  # None means no change, which the stub does not know
        require_client_authentication=wants_certificate,
    )


def _server_configuration(
    pair: KeyPair, authorities: bytes | None
) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(pair.key, pair.certificate)], authorities)


def _identity(contents: Sequence[bytes]) -> PeerIdentity:
    certificate, key, authorities = contents
    pair = key_pair(certificate, key)
    check_authorities(authorities)
    return PeerIdentity(
        pair, authorities, grpc.ssl_channel_credentials(authorities, key, certificate)
    )
