"""Which of several schedulers gateways prefer: a lease in Redis that the leader renews.

A lease with a fencing token (C. Gray, D. Cheriton, "Leases", SOSP 1989), except that nothing is
fenced: leadership is preference, never correctness. Every scheduler places whoever asks.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable

from services.common.shared_store import SharedStore, StoreDownError

logger = logging.getLogger(__name__)

_KEY = "rhizome:scheduler:leader"
LEASE_S = 3.0
_RENEW_INTERVAL_S = 1.0
# Workers find a scheduler that restarts within 2 s: before that it knows only some of them.
_SETTLE_S = 3.0

# Takes the lease when it is free, renews it when it is ours. Replies the leader's term, 0 when it
# is another's. Redis's own clock makes terms grow, also over a Redis that lost its data.
_CLAIM = """
local lease = redis.call('HMGET', KEYS[1], 'holder', 'term')
if lease[1] and lease[1] ~= ARGV[1] then return 0 end
local term = lease[2]
if not term then
  local now = redis.call('TIME')
  term = string.format('%.0f', now[1] * 1000000 + now[2])
  redis.call('HSET', KEYS[1], 'holder', ARGV[1], 'term', term)
end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return tonumber(term)
"""
_RESIGN = """
if redis.call('HGET', KEYS[1], 'holder') == ARGV[1] then redis.call('DEL', KEYS[1]) end
"""


class Leadership:
    """This scheduler's claim to be the one that gateways prefer.

    `term` is 0 while it leads not, else a number above all earlier leaders'. While Redis is down
    nobody can take the lease, so whoever leads goes on; if another did take it, gateways follow
    the higher term. A scheduler without a ready worker, or with its first for less than `settle_s`,
    does not stand.
    """

    def __init__(
        self,
        store: SharedStore,
        has_ready_worker: Callable[[], bool],
        on_change: Callable[[int], None],
        *,
        lease_s: float = LEASE_S,
        settle_s: float = _SETTLE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.term = 0
        self._store = store
        self._has_ready_worker = has_ready_worker
        self._on_change = on_change
        self._lease_s = lease_s
        self._settle_s = settle_s
        self._clock = clock
        self._id = secrets.token_hex(8)
        self._ready_since: float | None = None

    async def run(self) -> None:
        """Stand for ever; being cancelled leaves the lease to another."""
        try:
            while True:
                try:
                    await self.stand()
                except Exception:
                    logger.exception("event=stand_failed")
                await asyncio.sleep(_RENEW_INTERVAL_S)
        finally:
            await self.resign()

    async def stand(self) -> None:
        """Take or renew the lease, or give it up for want of workers."""
        if not self._may_lead():
            await self.resign()
            await self._store.check()
            return
        try:
            (term,) = await self._store.execute(
                ("EVAL", _CLAIM, 1, _KEY, self._id, round(self._lease_s * 1000))
            )
        except StoreDownError:
            return
        self._set_term(int(term))

    async def resign(self) -> None:
        """Lead no more, and say so, so that nobody waits for the lease to end."""
        if not self.term:
            return
        self._set_term(0)
        try:
            await self._store.execute(("EVAL", _RESIGN, 1, _KEY, self._id))
        except StoreDownError:
            logger.debug("event=lease_left_to_expire")

    def _may_lead(self) -> bool:
        if not self._has_ready_worker():
            self._ready_since = None
            return False
        if self._ready_since is None:
            self._ready_since = self._clock()
        return self._clock() - self._ready_since >= self._settle_s

    def _set_term(self, term: int) -> None:
        if term == self.term:
            return
        logger.info("event=%s term=%d", "leads" if term else "leads_no_more", term or self.term)
        self.term = term
        self._on_change(term)
