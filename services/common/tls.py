"""The flags of TLS between services; apart from what uses them, so that a config loads no gRPC."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class TlsFlags:
    """One service's certificate and whom it trusts; without files, services speak plain text."""

    tls_cert_file: Path | None = None
    """PEM file of this service's certificate, with those between it and the CA. With the two
    files below, services prove to each other who they are, in both directions, and encrypt what
    they say; files that change are read again (docs/security.md). Default: plain text."""

    tls_key_file: Path | None = None
    """PEM file of the certificate's key."""

    tls_ca_file: Path | None = None
    """PEM file of the CA whose certificates the other services must have."""

    tls_server_name: str | None = None
    """Name that certificates of called services must carry. Default: the host they are called
    by."""

    def __post_init__(self) -> None:
        files = (self.tls_cert_file, self.tls_key_file, self.tls_ca_file)
        num_given = sum(file is not None for file in files)
        if num_given not in (0, len(files)):
            raise ValueError(
                "tls_cert_file, tls_key_file and tls_ca_file go together: give all or none"
            )
        if self.tls_server_name is not None and not num_given:
            raise ValueError("tls_server_name means nothing without tls_cert_file")

    @property
    def files(self) -> tuple[Path, Path, Path] | None:
        """Certificate, key, CA."""
        cert, key, ca = self.tls_cert_file, self.tls_key_file, self.tls_ca_file
        if cert is None or key is None or ca is None:
            return None
        return cert, key, ca
