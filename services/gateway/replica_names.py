"""Targets that stand for all addresses of a name, such as the pods behind a headless Service."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable

logger = logging.getLogger(__name__)

_PREFIX = "dns+all:"
# How often a name is looked up; sooner while nothing is known of it.
LOOK_UP_INTERVAL_S = 5.0
_UNKNOWN_INTERVAL_S = 0.5

Resolve = Callable[[str, int], Awaitable[frozenset[str]]]


def names_all(target: str) -> bool:
    """Whether a target is `dns+all:host:port`. Raises ValueError where it is meant to be."""
    if not target.startswith(_PREFIX):
        return False
    _split(target)
    return True


def host_of(target: str) -> str:
    """The name in a target that stands for all of its addresses."""
    return _split(target)[0]


def _split(target: str) -> tuple[str, int]:
    host, _, port = target.removeprefix(_PREFIX).rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) <= 65535:
        raise ValueError(f"{target!r} must be {_PREFIX}host:port")
    return host, int(port)


async def resolve(host: str, port: int) -> frozenset[str]:
    """Every address of the host now, as gRPC targets. Raises OSError."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return frozenset(
        f"[{address[0]}]:{port}" if family == socket.AF_INET6 else f"{address[0]}:{port}"
        for family, *_, address in found
    )


async def follow_name(
    target: str,
    on_change: Callable[[frozenset[str]], None],
    resolve: Resolve = resolve,
    *,
    interval_s: float = LOOK_UP_INTERVAL_S,
    unknown_interval_s: float = _UNKNOWN_INTERVAL_S,
) -> None:
    """Tell of the name's addresses whenever they change, for ever.

    Those that were known stand while the name cannot be looked up, or has no address at all.
    """
    host, port = _split(target)
    known: frozenset[str] = frozenset()
    is_lost = False
    while True:
        try:
            found = await resolve(host, port)
        except OSError as error:
            if not is_lost:
                logger.warning("event=name_not_found target=%s detail=%r", target, str(error))
            is_lost = True
        else:
            is_lost = False
            if found and found != known:
                logger.info("event=name_found target=%s addresses=%d", target, len(found))
                known = found
                on_change(known)
        await asyncio.sleep(interval_s if known else unknown_interval_s)
