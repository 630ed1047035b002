"""What a Redis URL looks like; apart from the store, so that a config need not load the client."""

from __future__ import annotations

from urllib.parse import urlsplit

_SCHEMES = ("redis", "rediss", "unix")


def check_redis_url(url: str | None) -> None:
    """Raise ValueError for a URL that is none of Redis, without what may be a password in it."""
    if url is None:
        return
    scheme = urlsplit(url).scheme
    if scheme not in _SCHEMES:
        raise ValueError(
            f"redis_url must begin with redis://, rediss:// or unix://, got {scheme or 'none'!r}"
        )
