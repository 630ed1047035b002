"""What each tenant may have in a minute: requests and tokens, counted over all gateways.

A sliding window made of two fixed ones: what the last minute had counts for the part of it that
lies less than 60 s back, as if it had been spread evenly.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal, NamedTuple

from services.common.errors import OverloadedError
from services.common.shared_store import Command, SharedStore, StoreDownError
from services.common.tenants import TenantSet
from services.gateway.metrics import GatewayMetrics

logger = logging.getLogger(__name__)

_WINDOW_S = 60
_MAX_COUNTS = 65_536
_SYNC_INTERVAL_S = 0.1
# So often nothing is exchanged before the store is asked whether it is there.
_IDLE_INTERVALS = 10
# Counts sent in one go; what is over waits for the next.
_MAX_COMMANDS = 1000
# A window's counts outlive the minute after it, in which they still matter.
_KEPT_S = 3 * _WINDOW_S

Limit = Literal["requests", "tokens"]


class _Key(NamedTuple):
    """What is counted: one tenant's requests or tokens in one window."""

    window: int
    limit: Limit
    tenant: str


@dataclass(slots=True)
class _Count:
    """`mine` was counted here, `sent` of it told to the store, which had `others` beside it."""

    mine: int = 0
    sent: int = 0
    others: int = 0

    @property
    def total(self) -> int:
        return self.mine + self.others

    def learn(self, part: int, total: int) -> None:
        """The store was told `part` more and has `total` now."""
        self.sent += part
        if total >= self.sent:
            self.others = total - self.sent
        else:
            # It lost its data: tell it everything again, and go on with what is known of others.
            self.sent = part


class RateLimits:
    """Admits prompts and counts them; never waits.

    A tenant's prompt passes while something is left of each of its limits, so the last one may
    exceed the limit in tokens, which the next minute pays for. Counts of other gateways are those
    of the last exchange with the store (`share`): without it, each gateway limits what it sees.
    """

    def __init__(
        self, tenants: TenantSet, metrics: GatewayMetrics, clock: Callable[[], float] = time.time
    ) -> None:
        self._tenants = tenants
        self._metrics = metrics
        self._clock = clock
        # Least recently touched first.
        self._counts: OrderedDict[_Key, _Count] = OrderedDict()
        # Touched since the last exchange, oldest first.
        self._touched: dict[_Key, None] = {}

    def require(self, tenant: str) -> None:
        """Raise OverloadedError, with the time until something is left, when a limit is reached."""
        for limit, most in self._limits_of(tenant):
            wait_s = self._wait_s(limit, tenant, most)
            if wait_s > 0:
                self._metrics.rate_limited.labels(self._tenants.label(tenant), limit).inc()
                raise OverloadedError(
                    f"the tenant has had its {most} {limit} of this minute",
                    float(math.ceil(wait_s)),
                )

    def charge(self, tenant: str, *, num_requests: int = 0, num_tokens: int = 0) -> None:
        """Count what was admitted, and tokens once they are known."""
        amounts = {"requests": num_requests, "tokens": num_tokens}
        for limit, _ in self._limits_of(tenant):
            if amounts[limit]:
                self._touch(_Key(self._window, limit, tenant)).mine += amounts[limit]

    async def share(self, store: SharedStore) -> None:
        """Exchange counts with the other gateways, for ever."""
        num_idle = 0
        while True:
            num_idle = 0 if self._touched else num_idle + 1
            try:
                if self._touched:
                    await self.exchange(store)
                elif num_idle % _IDLE_INTERVALS == 1:
                    await store.check()
            except Exception:
                logger.exception("event=exchange_failed")
            await asyncio.sleep(_SYNC_INTERVAL_S)

    async def exchange(self, store: SharedStore) -> None:
        """Tell the store what was counted and learn what it has; what fails is told later."""
        keys = self._due()
        if not keys:
            return
        parts = [self._counts[key].mine - self._counts[key].sent for key in keys]
        commands: list[Command] = [
            ("HINCRBY", _store_key(key.window), f"{key.limit}:{key.tenant}", part)
            for key, part in zip(keys, parts, strict=True)
        ]
        windows = {key.window for key in keys}
        commands += [("EXPIRE", _store_key(window), _KEPT_S) for window in windows]
        try:
            replies = await store.execute(*commands)
        except StoreDownError:
            return
        for key, part, total in zip(keys, parts, replies[: len(keys)], strict=True):
            count = self._counts.get(key)
            if count is None:
                continue
            count.learn(part, int(total))
            if count.mine == count.sent:
                self._touched.pop(key, None)

    def _due(self) -> list[_Key]:
        """What to exchange now. Windows that matter no more are left out for good."""
        oldest = self._window - 1
        keys = list(islice(self._touched, _MAX_COMMANDS))
        for key in keys:
            if key.window < oldest:
                del self._touched[key]
        return [key for key in keys if key.window >= oldest]

    @property
    def _window(self) -> int:
        return int(self._clock() // _WINDOW_S)

    def _limits_of(self, tenant: str) -> Iterator[tuple[Limit, int]]:
        policy = self._tenants.of(tenant)
        if policy.requests_per_minute is not None:
            yield "requests", policy.requests_per_minute
        if policy.tokens_per_minute is not None:
            yield "tokens", policy.tokens_per_minute

    def _wait_s(self, limit: Limit, tenant: str, most: int) -> float:
        """Seconds until the sliding window has less than `most`; 0 when it has."""
        window = self._window
        passed_s = self._clock() - window * _WINDOW_S
        now = self._touch(_Key(window, limit, tenant)).total
        last = _Key(window - 1, limit, tenant)
        # One that was never touched here may have been at another gateway.
        before = (self._counts.get(last) or self._touch(last)).total
        if now + before * (1 - passed_s / _WINDOW_S) < most:
            return 0.0
        if now < most:
            return _WINDOW_S * (1 - (most - now) / before) - passed_s + 0.001
        return _WINDOW_S - passed_s + _WINDOW_S * (1 - most / now) + 0.001

    def _touch(self, key: _Key) -> _Count:
        count = self._counts.get(key)
        if count is None:
            count = self._counts[key] = _Count()
            if len(self._counts) > _MAX_COUNTS:
                forgotten, _ = self._counts.popitem(last=False)
                self._touched.pop(forgotten, None)
        self._counts.move_to_end(key)
        self._touched[key] = None
        return count


def _store_key(window: int) -> str:
    return f"rhizome:rate:{window}"
