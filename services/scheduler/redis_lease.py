"""The lease in Redis by which several schedulers agree on the one that gateways prefer."""

from __future__ import annotations

import secrets

from services.common.lease import LeaseUnknownError
from services.common.shared_store import SharedStore, StoreDownError

_KEY = "rhizome:scheduler:leader"
_DURATION_S = 3.0
_RENEW_INTERVAL_S = 1.0

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
_RELEASE = """
if redis.call('HGET', KEYS[1], 'holder') == ARGV[1] then redis.call('DEL', KEYS[1]) end
"""


class RedisLease:
    """A `Lease` (services/common/lease.py) under one key. Terms are Redis's time in microseconds.

    The store is the caller's to close.
    """

    def __init__(self, store: SharedStore, *, duration_s: float = _DURATION_S) -> None:
        self.duration_s = duration_s
        self.renew_interval_s = _RENEW_INTERVAL_S
        self._store = store
        self._id = secrets.token_hex(8)

    async def claim(self) -> int:
        try:
            (term,) = await self._store.execute(
                ("EVAL", _CLAIM, 1, _KEY, self._id, round(self.duration_s * 1000))
            )
        except StoreDownError as error:
            raise LeaseUnknownError(str(error)) from error
        return int(term)

    async def release(self) -> None:
        try:
            await self._store.execute(("EVAL", _RELEASE, 1, _KEY, self._id))
        except StoreDownError as error:
            raise LeaseUnknownError(str(error)) from error

    async def check(self) -> None:
        await self._store.check()
