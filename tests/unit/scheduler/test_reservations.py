import random

import pytest

from services.scheduler.endpoints import WorkerTable
from services.scheduler.pools import Pool
from services.scheduler.reservations import UNADMITTED_EXPIRY_S, Reservation, ReservationBook
from services.scheduler.views import NO_CHARGE, Charge, Worker
from tests.unit.scheduler.build import make_registration, make_worker

CHARGE = Charge(1, 4, 64, 1_000)


class ForgetfulRandom(random.Random):
    """Draws 0, then 7 twice, then 8: the ids that must not be given."""

    def __init__(self) -> None:
        super().__init__()
        self._draws = [0, 7, 7, 8]

    def getrandbits(self, k: int) -> int:
        return self._draws.pop(0)


@pytest.fixture
def pool() -> Pool:
    return Pool({})


@pytest.fixture
def worker() -> Worker:
    return make_worker("a")


@pytest.fixture
def table(pool: Pool, worker: Worker) -> WorkerTable:
    table = WorkerTable(3.0)
    table.register(make_registration(worker, pool), 0.0)
    return table


@pytest.fixture
def book(table: WorkerTable) -> ReservationBook:
    return ReservationBook(table, random.Random(1))


def _open(book: ReservationBook, worker: Worker, name: str = "r", now: float = 0.0) -> Reservation:
    return book.open(
        (name, 0),
        worker,
        CHARGE,
        now,
        predicted_cached_tokens=48,
        policy="p/cold",
        queued_for_s=0.0,
    )


def _charged(table: WorkerTable, worker: Worker) -> Charge:
    view = table.get(worker.worker_id)
    assert view is not None
    return view.charge


def test_ids_are_never_zero_nor_given_twice(table: WorkerTable, worker: Worker) -> None:
    book = ReservationBook(table, ForgetfulRandom())
    assert _open(book, worker, "r").reservation_id == 7
    assert _open(book, worker, "s").reservation_id == 8


def test_a_reservation_is_charged_until_it_is_admitted(
    book: ReservationBook, table: WorkerTable, worker: Worker
) -> None:
    reservation = _open(book, worker)
    assert _charged(table, worker) == CHARGE
    assert book.admit(worker, [reservation.reservation_id, 12345]) == CHARGE
    assert (book.num_charged, book.num_live) == (0, 1)
    assert book.find(("r", 0)) is reservation


def test_an_admission_counts_once_and_only_from_its_worker(
    book: ReservationBook, worker: Worker
) -> None:
    reservation = _open(book, worker)
    assert book.admit(make_worker("b"), [reservation.reservation_id]) == NO_CHARGE
    assert book.admit(worker, [reservation.reservation_id]) == CHARGE
    assert book.admit(worker, [reservation.reservation_id]) == NO_CHARGE


def test_ending_gives_the_charge_back_once(
    book: ReservationBook, table: WorkerTable, worker: Worker
) -> None:
    reservation = _open(book, worker)
    assert book.end(reservation.reservation_id) == 48
    assert book.end(reservation.reservation_id) == 48
    assert _charged(table, worker) == NO_CHARGE
    assert book.find(("r", 0)) is None
    book.forget_prediction(reservation.reservation_id)
    assert book.end(reservation.reservation_id) is None


def test_what_nobody_admits_expires(
    book: ReservationBook, table: WorkerTable, worker: Worker
) -> None:
    _open(book, worker, "r", now=0.0)
    admitted = _open(book, worker, "s", now=0.0)
    book.admit(worker, [admitted.reservation_id])
    late = _open(book, worker, "t", now=3.0)
    assert book.expire(UNADMITTED_EXPIRY_S - 0.1) == 0
    assert book.expire(UNADMITTED_EXPIRY_S) == 1
    assert book.find(("r", 0)) is None
    assert book.find(("s", 0)) is admitted
    assert book.find(("t", 0)) is late


def test_a_gone_worker_takes_its_reservations_along(book: ReservationBook, worker: Worker) -> None:
    _open(book, worker, "r")
    admitted = _open(book, worker, "s")
    book.admit(worker, [admitted.reservation_id])
    book.end_all_of(worker)
    assert (book.num_live, book.num_charged) == (0, 0)


def test_charges_always_equal_the_charged_reservations(
    book: ReservationBook, table: WorkerTable, worker: Worker
) -> None:
    rng = random.Random(3)
    opened: list[Reservation] = []
    for step in range(500):
        action = rng.randrange(4)
        if action == 0 or not opened:
            opened.append(_open(book, worker, f"r{step}", now=step * 0.1))
        elif action == 1:
            book.end(opened.pop(rng.randrange(len(opened))).reservation_id)
        elif action == 2:
            charge = book.admit(worker, [rng.choice(opened).reservation_id])
            table.remove_charge(worker, charge)
        else:
            book.expire(step * 0.1)
        assert _charged(table, worker).num_sequences == book.num_charged
        assert _charged(table, worker).prefill_ns == book.num_charged * CHARGE.prefill_ns
    book.end_all_of(worker)
    assert _charged(table, worker) == NO_CHARGE
