"""Redis, where several gateways or schedulers share a little state. It helps; nothing needs it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from services.common.redis_url import check_redis_url

logger = logging.getLogger(__name__)

# Callers are background tasks: this bounds how stale they get, not what a request waits.
_TIMEOUT_S = 0.25
# How long a store that failed is not asked.
_RETRY_S = 1.0

Command = Sequence[str | int]


class StoreDownError(Exception):
    """Redis did not answer, refused, or failed so lately that it was not asked."""


class SharedStore:
    """Owns the connections to one Redis; runs commands while it answers, none for a while after.

    A failure opens the circuit: for `retry_s` every call fails at once, then one is let through.
    The change of state is logged once and shown as `<prefix>_redis_up`. Whoever calls must have
    an answer of its own for StoreDownError, and must not be on a request's path.
    """

    def __init__(
        self,
        url: str,
        registry: CollectorRegistry,
        prefix: str,
        *,
        timeout_s: float = _TIMEOUT_S,
        retry_s: float = _RETRY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises ValueError for a URL that is none of Redis. Connects when first asked."""
        check_redis_url(url)
        self._redis: Redis = Redis.from_url(
            url,
            # The whole call has one time limit, and the circuit is the only one to try again.
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
        )
        self._timeout_s = timeout_s
        self._retry_s = retry_s
        self._clock = clock
        # None before the first answer or failure.
        self._is_up: bool | None = None
        self._closed_until = 0.0
        self._failures = Counter(
            f"{prefix}_redis_failures", "Calls that Redis did not answer.", registry=registry
        )
        Gauge(
            f"{prefix}_redis_up", "Whether Redis answered the last call.", registry=registry
        ).set_function(lambda: float(self.is_up))

    @property
    def is_up(self) -> bool:
        return self._is_up is True

    async def execute(self, *commands: Command) -> list[Any]:
        """The commands' replies, sent as one pipeline. Raises StoreDownError."""
        if self._clock() < self._closed_until:
            raise StoreDownError("redis failed a moment ago")
        pipeline = self._redis.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        try:
            async with asyncio.timeout(self._timeout_s):
                replies = await pipeline.execute()
        except (RedisError, OSError, TimeoutError) as error:
            # A reply that comes late must not be taken for another call's.
            await self._redis.connection_pool.disconnect()
            self._note_failure(error)
            raise StoreDownError(str(error)) from error
        if not self._is_up:
            self._is_up = True
            logger.info("event=redis_up")
        return list(replies)

    async def check(self) -> None:
        """Find out whether it answers, for those who watch; where nothing else is to be asked."""
        with contextlib.suppress(StoreDownError):
            await self.execute(("PING",))

    async def aclose(self) -> None:
        await self._redis.aclose()

    def _note_failure(self, error: Exception) -> None:
        self._failures.inc()
        self._closed_until = self._clock() + self._retry_s
        if self._is_up is not False:
            self._is_up = False
            logger.warning("event=redis_down error=%s detail=%r", type(error).__name__, str(error))
