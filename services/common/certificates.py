"""Certificates and their keys as PEM text: whether they fit, and until when they are valid."""

from __future__ import annotations

import contextlib
import os
import re
import ssl
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
# Tags of DER (X.690), of which an X.509 certificate is made.
_EXPLICIT_0 = 0xA0
_UTC_TIME = 0x17


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A certificate, those between it and its CA, and its key, which belongs to it."""

    certificate: bytes
    key: bytes = field(repr=False)
    # When the certificate ends, in seconds since 1970.
    expires_s: float


def key_pair(certificate: bytes, key: bytes) -> KeyPair:
    """Raises ValueError where the two do not fit or one is none. One that has ended is none the
    less a pair: whoever is asked to trust it will say so.
    """
    load_pair(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), certificate, key)
    first = _CERTIFICATE.search(certificate)
    if first is None:
        # OpenSSL reads more than gRPC does.
        raise ValueError("the certificate must begin with -----BEGIN CERTIFICATE-----")
    return KeyPair(certificate, key, expiry_s(ssl.PEM_cert_to_DER_cert(first[0].decode("ascii"))))


def load_pair(context: ssl.SSLContext, certificate: bytes, key: bytes) -> None:
    """Have `context` present the pair from now on. Raises ValueError."""
    # OpenSSL reads it from files only. These are in memory, so what was checked is what is loaded.
    with _memory_file(certificate) as cert_path, _memory_file(key) as key_path:
        try:
            context.load_cert_chain(str(cert_path), str(key_path), password=_no_password)
        except ssl.SSLError as error:
            reason = (error.reason or "not PEM").replace("_", " ").lower()
            raise ValueError(f"certificate and key do not fit: {reason}") from error


def check_authorities(certificates: bytes) -> None:
    """Raise ValueError for what holds no certificate, or one that cannot be read."""
    try:
        text = certificates.decode("ascii")
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=text)
    except (ValueError, ssl.SSLError) as error:
        raise ValueError("the CA's file holds no certificates") from error


def expiry_s(der: bytes) -> float:
    """When a certificate ends, in seconds since 1970.

    RFC 5280, 4.1: Certificate is a sequence whose first part is a sequence of version (optional),
    serial number, algorithm, issuer, and validity, a sequence of two times.
    """
    try:
        _, body, _ = _der_value(der)
        _, to_be_signed, _ = _der_value(body)
        tag, _, rest = _der_value(to_be_signed)
        for _ in range(3 if tag == _EXPLICIT_0 else 2):
            _, _, rest = _der_value(rest)
        _, validity, _ = _der_value(rest)
        _, _, rest = _der_value(validity)
        tag, not_after, _ = _der_value(rest)
        text = not_after.decode("ascii")
        if tag == _UTC_TIME:
            # Two digits of the year: 50 and more are of the last century.
            text = ("20" if text < "50" else "19") + text
        return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC).timestamp()
    except (IndexError, ValueError) as error:
        raise ValueError("the certificate does not say when it ends") from error


class ExpiryMetric(Collector):
    """When the certificates that a service presents end, `certificate` telling them apart."""

    def __init__(self, pairs: Iterable[tuple[str, Callable[[], KeyPair]]]) -> None:
        self._pairs = tuple(pairs)

    def collect(self) -> Iterable[GaugeMetricFamily]:
        gauge = GaugeMetricFamily(
            "rhizome_tls_certificate_expiry_timestamp_seconds",
            "When the certificate in use ends, in seconds since 1970.",
            labels=("certificate",),
        )
        for name, pair in self._pairs:
            gauge.add_metric((name,), pair().expires_s)
        yield gauge


def _der_value(data: bytes) -> tuple[int, bytes, bytes]:
    """The first value's tag and contents, and what follows it."""
    length, start = data[1], 2
    if length & 0x80:
        start += length & 0x7F
        length = int.from_bytes(data[2:start])
    if len(data) < start + length:
        raise ValueError("cut off")
    return data[0], data[start : start + length], data[start + length :]


@contextlib.contextmanager
def _memory_file(content: bytes) -> Iterator[Path]:
    descriptor = os.memfd_create("pem")
    try:
        os.write(descriptor, content)
        yield Path(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


def _no_password() -> NoReturn:
    raise ValueError("the key is encrypted; services take keys without a password")
