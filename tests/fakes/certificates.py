"""A certificate authority of the tests' own, and files as an operator lays them out."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.rsa import (
    RSAPrivateKey,
    RSAPublicKey,
    generate_private_key,
)
from cryptography.x509.oid import NameOID

from services.common.tls import TlsFlags

_NAMES = ("localhost",)


@dataclass(frozen=True)
class Issued:
    """A certificate and its key as PEM text."""

    certificate: bytes
    key: bytes
    expires_s: float


class Authority:
    """Signs certificates for any name and time."""

    def __init__(self, name: str = "tests' CA") -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _x509_name(name)
        builder = _builder(self._name, self._name, self._key.public_key(), days=3650)
        builder = builder.add_extension(x509.BasicConstraints(True, None), critical=True)
        self.certificate = _pem(builder.sign(self._key, hashes.SHA256()))

    def issue(
        self,
        name: str = "service",
        *,
        dns_names: Sequence[str] = _NAMES,
        days: float = 30,
        rsa: bool = False,
    ) -> Issued:
        """A pair for this machine. `days` until it ends, negative when it has."""
        key = (
            generate_private_key(public_exponent=65537, key_size=2048)
            if rsa
            else ec.generate_private_key(ec.SECP256R1())
        )
        builder = _builder(_x509_name(name), self._name, key.public_key(), days=days)
        alternatives: list[x509.GeneralName] = [x509.DNSName(dns) for dns in dns_names]
        if "localhost" in dns_names:
            alternatives.append(x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
        builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        signed = builder.sign(self._key, hashes.SHA256())
        return Issued(_pem(signed), key_text(key), signed.not_valid_after_utc.timestamp())


@dataclass(frozen=True)
class TlsFiles:
    """The three files of one service in a directory."""

    directory: Path

    def write(self, issued: Issued, authorities: bytes) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self.cert.write_bytes(issued.certificate)
        self.key.write_bytes(issued.key)
        self.ca.write_bytes(authorities)

    @property
    def cert(self) -> Path:
        return self.directory / "tls.crt"

    @property
    def key(self) -> Path:
        return self.directory / "tls.key"

    @property
    def ca(self) -> Path:
        return self.directory / "ca.crt"

    def flags(self, server_name: str | None = None) -> TlsFlags:
        return TlsFlags(
            tls_cert_file=self.cert,
            tls_key_file=self.key,
            tls_ca_file=self.ca,
            tls_server_name=server_name,
        )


def files_of(directory: Path, authority: Authority, issued: Issued | None = None) -> TlsFiles:
    """Files that hold a pair of `authority` and trust it."""
    files = TlsFiles(directory)
    files.write(issued or authority.issue(), authority.certificate)
    return files


def key_text(
    key: ec.EllipticCurvePrivateKey | RSAPrivateKey, password: bytes | None = None
) -> bytes:
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if password is not None:
        encryption = serialization.BestAvailableEncryption(password)
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
    )


def _x509_name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey | RSAPublicKey,
    days: float,
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=365))
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
