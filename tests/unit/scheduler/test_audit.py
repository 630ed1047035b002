"""Leaked reservations are found, and those that live are none."""

import random

import pytest

from services.scheduler.audit import ReservationAudit
from services.scheduler.endpoints import WorkerTable
from services.scheduler.pools import Pool
from services.scheduler.reservations import ReservationBook
from services.scheduler.views import Charge, Load, Worker
from tests.unit.scheduler.build import make_registration, make_worker
from tests.unit.scheduler.scheduler import make_scheduler

CHARGE = Charge(1, 4, 64, 1_000)


class Reserved:
    """One worker with one reservation."""

    def __init__(self) -> None:
        self.worker: Worker = make_worker("a")
        self.registration = make_registration(self.worker, Pool({}))
        self.table = WorkerTable(3.0)
        self.table.register(self.registration, 0.0)
        self.book = ReservationBook(self.table, random.Random(1))
        self.reservation = self.book.open(
            ("r", 0),
            self.worker,
            CHARGE,
            0.0,
            predicted_cached_tokens=0,
            policy="p",
            queued_for_s=0.0,
        )
        self.audit = ReservationAudit(self.book, self.table)

    def report(self, load: Load, now: float) -> None:
        admitted = self.book.admit(self.worker, [self.reservation.reservation_id])
        self.table.report(self.registration, load, now, admitted)

    def num_leaks(self, now: float) -> int:
        self.audit.look(now)
        return self.audit.num_leaks


@pytest.fixture
def reserved() -> Reserved:
    return Reserved()


def test_what_a_worker_runs_is_no_leak(reserved: Reserved) -> None:
    assert reserved.num_leaks(0.0) == 0
    reserved.report(Load(num_free_pages=9, num_running=1), 1.0)
    assert [reserved.num_leaks(now) for now in (5.0, 10.0, 15.0)] == [0, 0, 0]


def test_what_an_idle_worker_admitted_is_one_when_it_is_seen_twice(reserved: Reserved) -> None:
    reserved.report(Load(num_free_pages=9), 1.0)
    assert [reserved.num_leaks(now) for now in (5.0, 9.0, 10.0)] == [0, 0, 1]
    reserved.book.end(reserved.reservation.reservation_id)
    assert reserved.num_leaks(15.0) == 0


def test_what_stays_of_a_worker_that_is_gone_is_one(reserved: Reserved) -> None:
    reserved.table.remove(reserved.registration)
    assert [reserved.num_leaks(now) for now in (0.0, 5.0)] == [0, 1]


def test_what_outlives_its_expiry_is_one(reserved: Reserved) -> None:
    assert [reserved.num_leaks(now) for now in (4.0, 10.0, 15.0)] == [0, 0, 1]


def test_a_charge_without_its_reservation_is_one(reserved: Reserved) -> None:
    reserved.table.add_charge(reserved.worker, CHARGE)
    assert reserved.num_leaks(0.0) == 1


def test_the_placer_looks_and_says_what_it_found() -> None:
    scheduler = make_scheduler()
    registration = scheduler.register("a")
    ticket = scheduler.schedule("r")
    assert ticket.reservation is not None
    admitted = [ticket.reservation.reservation_id]
    scheduler.placer.report_load(registration, Load(num_free_pages=10_000), admitted)
    found = []
    for _ in range(2):
        scheduler.clock.advance(0.5)
        scheduler.placer.report_load(registration, Load(num_free_pages=10_000))
        scheduler.placer.sweep()
        found.append(scheduler.metrics.value("reservation_leaks"))
        for _ in range(10):
            scheduler.clock.advance(0.5)
            scheduler.placer.report_load(registration, Load(num_free_pages=10_000))
    assert found == [0, 1]
    assert scheduler.metrics.value("breaker", worker="a") == 0
