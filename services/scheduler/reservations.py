"""Reservations: what was promised to placed requests, from placement to their end."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from services.scheduler.endpoints import WorkerTable
from services.scheduler.views import NO_CHARGE, Charge, Worker

# A placement that no worker admitted by then will not come.
UNADMITTED_EXPIRY_S = 5.0
# Ended reservations whose prediction is kept until their outcome is reported.
_MAX_ENDED = 16_384


@dataclass(slots=True)
class Reservation:
    """One placement. `charged` until a load report of the worker includes it."""

    reservation_id: int
    key: tuple[str, int]
    worker: Worker
    charge: Charge
    predicted_cached_tokens: int
    policy: str
    queued_for_s: float
    expires_at: float
    # It may be what its earlier workers died of.
    is_suspect: bool = False
    # Workers that it was chosen from.
    num_candidates: int = 0
    charged: bool = True


class ReservationBook:
    """All live reservations.

    Invariant: the charges in the worker table are exactly the sum of the charged reservations'.
    A reservation lives until its worker says it ended, its outcome is reported, its worker is
    gone, or it expires unadmitted; while it lives, its request and attempt find it.
    """

    def __init__(self, table: WorkerTable, rng: random.Random) -> None:
        self._table = table
        self._rng = rng
        self._live: dict[int, Reservation] = {}
        self._by_key: dict[tuple[str, int], Reservation] = {}
        self._by_worker: dict[Worker, dict[int, Reservation]] = {}
        # In order of expiry; admitted ones leave it.
        self._unadmitted: OrderedDict[int, Reservation] = OrderedDict()
        # Predicted cached tokens of the lately ended.
        self._ended: OrderedDict[int, int] = OrderedDict()

    @property
    def num_live(self) -> int:
        return len(self._live)

    @property
    def num_charged(self) -> int:
        """The balance: placements that no report includes yet. Zero when idle."""
        return len(self._unadmitted)

    def live(self) -> list[Reservation]:
        return list(self._live.values())

    def find(self, key: tuple[str, int]) -> Reservation | None:
        return self._by_key.get(key)

    def open(
        self,
        key: tuple[str, int],
        worker: Worker,
        charge: Charge,
        now: float,
        *,
        predicted_cached_tokens: int,
        policy: str,
        queued_for_s: float,
        is_suspect: bool = False,
        num_candidates: int = 0,
    ) -> Reservation:
        """Promise `worker` to the request and charge it."""
        assert key not in self._by_key, "one attempt has one live reservation"
        reservation_id = self._draw_id()
        reservation = Reservation(
            reservation_id,
            key,
            worker,
            charge,
            predicted_cached_tokens,
            policy,
            queued_for_s,
            now + UNADMITTED_EXPIRY_S,
            is_suspect,
            num_candidates,
        )
        self._live[reservation_id] = reservation
        self._by_key[key] = reservation
        self._by_worker.setdefault(worker, {})[reservation_id] = reservation
        self._unadmitted[reservation_id] = reservation
        self._table.add_charge(worker, charge)
        return reservation

    def correct(self, reservation: Reservation, charge: Charge, cached_tokens: int) -> None:
        """A better prediction came; without effect once the reservation has ended."""
        if reservation.reservation_id not in self._live:
            return
        if reservation.charged:
            self._table.remove_charge(reservation.worker, reservation.charge)
            self._table.add_charge(reservation.worker, charge)
        reservation.charge = charge
        reservation.predicted_cached_tokens = cached_tokens

    def has_suspect(self, worker: Worker) -> bool:
        """Whether a request is placed there that killed workers, perhaps."""
        return any(each.is_suspect for each in self._by_worker.get(worker, {}).values())

    def admit(self, worker: Worker, reservation_ids: Iterable[int]) -> Charge:
        """The worker's report includes these; returns the charge to take off with it."""
        total = NO_CHARGE
        for reservation_id in reservation_ids:
            reservation = self._unadmitted.get(reservation_id)
            if reservation is not None and reservation.worker is worker:
                del self._unadmitted[reservation_id]
                reservation.charged = False
                total = total.plus(reservation.charge)
        return total

    def end(self, reservation_id: int) -> int | None:
        """Give a reservation back, if it lives; returns its predicted cached tokens if known."""
        reservation = self._live.pop(reservation_id, None)
        if reservation is None:
            return self._ended.get(reservation_id)
        del self._by_key[reservation.key]
        of_worker = self._by_worker[reservation.worker]
        del of_worker[reservation_id]
        if not of_worker:
            del self._by_worker[reservation.worker]
        if reservation.charged:
            reservation.charged = False
            del self._unadmitted[reservation_id]
            self._table.remove_charge(reservation.worker, reservation.charge)
        self._ended[reservation_id] = reservation.predicted_cached_tokens
        if len(self._ended) > _MAX_ENDED:
            self._ended.popitem(last=False)
        return reservation.predicted_cached_tokens

    def forget_prediction(self, reservation_id: int) -> None:
        """Its outcome is known: a second report of it counts nothing."""
        self._ended.pop(reservation_id, None)

    def end_all_of(self, worker: Worker) -> None:
        """The worker is gone, and what it was promised with it."""
        for reservation_id in list(self._by_worker.get(worker, ())):
            self.end(reservation_id)

    def expire(self, now: float) -> int:
        """Give back what no worker admitted in time; returns how many."""
        num_expired = 0
        while self._unadmitted:
            oldest = next(iter(self._unadmitted.values()))
            if oldest.expires_at > now:
                break
            self.end(oldest.reservation_id)
            num_expired += 1
        return num_expired

    def _draw_id(self) -> int:
        """Random, so that several schedulers' ids do not meet; never 0."""
        while True:
            drawn = self._rng.getrandbits(64)
            if drawn and drawn not in self._live:
                return drawn
