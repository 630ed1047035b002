"""Which of several controllers acts: the one that holds a lease, for as long as it is sure to."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from services.common.lease import Lease, LeaseUnknownError

logger = logging.getLogger(__name__)


class Candidacy:
    """This replica's claim to act.

    Otherwise than a scheduler, a controller that cannot renew its lease stops when the lease ends
    by its own clock: nobody else has it before.
    """

    def __init__(self, lease: Lease, clock: Callable[[], float] = time.monotonic) -> None:
        self._lease = lease
        self._clock = clock
        self._until = 0.0
        self._led = False

    @property
    def leads(self) -> bool:
        return self._clock() < self._until

    async def run(self) -> None:
        """Stand for ever; being cancelled leaves the lease to another."""
        try:
            while True:
                await self.stand()
                await asyncio.sleep(self._lease.renew_interval_s)
        finally:
            self._until = 0.0
            try:
                await self._lease.release()
            except LeaseUnknownError:
                logger.debug("event=lease_left_to_expire")

    async def stand(self) -> None:
        """Take or renew the lease."""
        asked_at = self._clock()
        try:
            term = await self._lease.claim()
            self._until = asked_at + self._lease.duration_s if term else 0.0
        except LeaseUnknownError:
            logger.debug("event=lease_unknown")
        except Exception:
            logger.exception("event=stand_failed")
        if self.leads != self._led:
            self._led = self.leads
            logger.info("event=%s", "leads" if self._led else "leads_no_more")
