"""Which of several schedulers gateways prefer: a lease that the leader renews.

A lease with a fencing token (C. Gray, D. Cheriton, "Leases", SOSP 1989), except that nothing is
fenced: leadership is preference, never correctness. Every scheduler places whoever asks.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from services.common.lease import Lease, LeaseUnknownError

logger = logging.getLogger(__name__)

# Workers find a scheduler that restarts within 2 s: before that it knows only some of them.
_SETTLE_S = 3.0


class Leadership:
    """This scheduler's claim to be the one that gateways prefer.

    `term` is 0 while it leads not, else a number above all earlier leaders'. While the lease's
    keeper is out of reach whoever leads goes on; if another did take it, gateways follow the higher
    term. A scheduler without a ready worker, or with its first for less than `settle_s`,
    does not stand.
    """

    def __init__(
        self,
        lease: Lease,
        has_ready_worker: Callable[[], bool],
        on_change: Callable[[int], None],
        *,
        settle_s: float = _SETTLE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.term = 0
        self._lease = lease
        self._has_ready_worker = has_ready_worker
        self._on_change = on_change
        self._settle_s = settle_s
        self._clock = clock
        self._ready_since: float | None = None

    async def run(self) -> None:
        """Stand for ever; being cancelled leaves the lease to another."""
        try:
            while True:
                try:
                    await self.stand()
                except Exception:
                    logger.exception("event=stand_failed")
                await asyncio.sleep(self._lease.renew_interval_s)
        finally:
            await self.resign()

    async def stand(self) -> None:
        """Take or renew the lease, or give it up for want of workers."""
        if not self._may_lead():
            await self.resign()
            await self._lease.check()
            return
        try:
            term = await self._lease.claim()
        except LeaseUnknownError:
            return
        self._set_term(term)

    async def resign(self) -> None:
        """Lead no more, and say so, so that nobody waits for the lease to end."""
        if not self.term:
            return
        self._set_term(0)
        try:
            await self._lease.release()
        except LeaseUnknownError:
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
