"""The flags of the public edge, which the launcher passes on to its gateway."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class EdgeFlags:
    """How clients reach the gateway, and who may. Names are SGLang's where it has them."""

    ssl_certfile: Path | None = None
    """PEM file of the certificate of the HTTP and public gRPC APIs, with those between it and the
    CA; read again when it changes. Default: plain text."""

    ssl_keyfile: Path | None = None
    """PEM file of its key."""

    api_key: str | None = field(default=None, repr=False)
    """Key that clients must send (`Authorization: Bearer KEY`). Better given in the environment,
    where other users do not see it. Default: none is asked for."""

    admin_api_key: str | None = field(default=None, repr=False)
    """Key for what changes the server's state, such as `/flush_cache`; it opens the rest, too."""

    api_keys: Path | None = None
    """JSON file of more keys, by their SHA-256 (docs/security.md); read again when it changes."""

    def __post_init__(self) -> None:
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ValueError("ssl_certfile and ssl_keyfile go together: give both or none")
        for name in ("api_key", "admin_api_key"):
            key = getattr(self, name)
            if key is not None and not (key and key.isascii() and key.isprintable()):
                raise ValueError(f"{name} must be of printable ASCII characters, and not empty")
            if key is not None and key != key.strip():
                raise ValueError(f"{name} must not begin or end with a space")

    @property
    def ssl_files(self) -> tuple[Path, Path] | None:
        """Certificate and key."""
        if self.ssl_certfile is None or self.ssl_keyfile is None:
            return None
        return self.ssl_certfile, self.ssl_keyfile

    @property
    def asks_for_keys(self) -> bool:
        """Whether clients need one for what is not an administrator's."""
        return self.api_key is not None or self.api_keys is not None
