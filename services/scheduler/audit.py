"""Looks for reservations that nothing will end: there are none unless something is wrong."""

from __future__ import annotations

import logging
from collections import defaultdict

from services.scheduler.endpoints import WorkerTable
from services.scheduler.reservations import Reservation, ReservationBook
from services.scheduler.views import NO_CHARGE, Charge, Worker

logger = logging.getLogger(__name__)

# A worker's reports and the gateways' come in between, several times over.
_INTERVAL_S = 5.0


class ReservationAudit:
    """Counts leaks: what is reserved twice in a row where nothing is left to be promised.

    That is on a worker that is gone or idle, or beyond its expiry. A worker whose charge is not the
    sum of its reservations' counts too.
    """

    def __init__(self, book: ReservationBook, table: WorkerTable) -> None:
        self.num_leaks = 0
        self._book = book
        self._table = table
        self._due = 0.0
        self._suspects: set[int] = set()

    def look(self, now: float) -> None:
        """Count again, now and then."""
        if now < self._due:
            return
        self._due = now + _INTERVAL_S
        charges: defaultdict[Worker, Charge] = defaultdict(lambda: NO_CHARGE)
        suspects = set()
        for reservation in self._book.live():
            if reservation.charged:
                charges[reservation.worker] = charges[reservation.worker].plus(reservation.charge)
            if self._is_suspect(reservation, now):
                suspects.add(reservation.reservation_id)
        lost = suspects & self._suspects
        num_off = sum(view.charge != charges[view.worker] for view in self._table.views())
        if lost or num_off:
            logger.error("event=reservations_leaked reservations=%d workers=%d", len(lost), num_off)
        self.num_leaks = len(lost) + num_off
        self._suspects = suspects

    def _is_suspect(self, reservation: Reservation, now: float) -> bool:
        view = self._table.get(reservation.worker.worker_id)
        if view is None or view.worker is not reservation.worker:
            return True
        if reservation.charged:
            return now > reservation.expires_at
        return view.load.num_running + view.load.num_waiting == 0
