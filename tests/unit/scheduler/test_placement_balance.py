"""What ends a reservation, and that nothing stays charged."""

import random

import pytest

from services.common.errors import (
    UnavailableError,
)
from services.scheduler.accounting import Outcome
from services.scheduler.index_client import WorkerMatch
from services.scheduler.queue import Ticket
from services.scheduler.reservations import UNADMITTED_EXPIRY_S
from services.scheduler.views import NO_CHARGE, Load
from tests.unit.scheduler.build import (
    chain,
    make_identity,
    make_registration,
    make_worker,
)
from tests.unit.scheduler.scheduler import Scheduler, make_scheduler, worker_of


@pytest.fixture
def scheduler() -> Scheduler:
    return make_scheduler()


def test_unadmitted_reservations_expire_and_the_balance_is_zero(scheduler: Scheduler) -> None:
    registration = scheduler.register("a")
    scheduler.deliver(scheduler.schedule("r"))
    for _ in range(int(UNADMITTED_EXPIRY_S)):
        scheduler.clock.advance(1.0)
        scheduler.placer.report_load(registration, Load(num_free_pages=10_000))
        scheduler.placer.sweep()
    assert scheduler.balance == 0
    assert scheduler.metrics.value("reservations") == 0
    assert scheduler.metrics.value("reservations_expired_total") == 1
    assert scheduler.view("a").num_active == 0


def test_outcomes_end_reservations_and_compare_predictions_once(scheduler: Scheduler) -> None:
    scheduler.register("a")
    ticket = scheduler.schedule(
        "r", (WorkerMatch("a", 1, 4),), prefix_hashes=chain(1, 4), num_prompt_tokens=100
    )
    assert ticket.reservation is not None
    outcome = Outcome(ticket.reservation.reservation_id, 100, 48, 20, True)
    scheduler.placer.report_outcomes([outcome, outcome, Outcome(12345, 9, 9, 9, True)])
    assert scheduler.balance == 0
    read = scheduler.metrics.value
    assert read("predicted_cached_tokens_total") == 64
    assert read("actual_cached_tokens_total") == 48
    assert read("overpredicted_cached_tokens_total") == 16
    assert read("reported_prompt_tokens_total") == 100


def test_a_worker_that_ends_first_does_not_spoil_the_comparison(scheduler: Scheduler) -> None:
    registration = scheduler.register("a")
    ticket = scheduler.schedule(
        "r", (WorkerMatch("a", 1, 4),), prefix_hashes=chain(1, 4), num_prompt_tokens=100
    )
    assert ticket.reservation is not None
    reservation_id = ticket.reservation.reservation_id
    load = Load(num_free_pages=9)
    scheduler.placer.report_load(registration, load, [reservation_id], [reservation_id])
    scheduler.placer.report_outcomes([Outcome(reservation_id, 100, 64, 20, True)])
    assert scheduler.metrics.value("predicted_cached_tokens_total") == 64


def test_a_gone_worker_returns_its_reservations_and_predictions(scheduler: Scheduler) -> None:
    registration = scheduler.register("a")
    prompt = chain(1, 64)
    scheduler.deliver(scheduler.schedule("r", prefix_hashes=prompt))
    scheduler.placer.unregister(registration)
    assert (scheduler.balance, scheduler.metrics.value("reservations")) == (0, 0)
    scheduler.register("a", epoch=2)
    again = scheduler.schedule("r", prefix_hashes=prompt)
    assert again.reservation is not None
    assert again.reservation.predicted_cached_tokens == 0
    assert again.reservation.worker.epoch == 2


def test_a_restarted_worker_replaces_itself_with_nothing_charged(scheduler: Scheduler) -> None:
    scheduler.register("a", epoch=1)
    scheduler.deliver(scheduler.schedule("r"))
    scheduler.register("a", epoch=2)
    assert scheduler.balance == 0
    assert scheduler.view("a").num_active == 0


def test_an_expired_lease_returns_everything(scheduler: Scheduler) -> None:
    scheduler.register("a")
    scheduler.deliver(scheduler.schedule("r"))
    scheduler.clock.advance(3.5)
    scheduler.placer.sweep()
    assert scheduler.balance == 0
    assert scheduler.table.snapshot(scheduler.pool) == ()


def test_an_empty_pool_that_takes_another_model_fails_who_waited(scheduler: Scheduler) -> None:
    scheduler.placer.unregister(scheduler.register("a"))
    ticket = scheduler.schedule("r")
    registration = make_registration(make_worker("b"), scheduler.pool)
    scheduler.placer.register(registration, make_identity(model_revision="r2"))
    assert isinstance(ticket.error, UnavailableError)


def test_what_waits_in_the_worker_is_counted_once(scheduler: Scheduler) -> None:
    registration = scheduler.register("a")
    tickets = [scheduler.schedule(f"r{index}", num_prompt_tokens=160) for index in range(2)]
    before = scheduler.view("a")
    ids = [ticket.reservation.reservation_id for ticket in tickets if ticket.reservation]
    load = Load(num_free_pages=10_000, num_waiting=2, num_waiting_uncached_tokens=320)
    scheduler.placer.report_load(registration, load, ids)
    after = scheduler.view("a")
    assert scheduler.balance == 0
    assert (before.num_active, after.num_active) == (2, 2)
    # Nor are its pages and context given to anybody else before it has them.
    assert after.num_available_tokens == before.num_available_tokens
    assert after.decode_step_ns == before.decode_step_ns


def test_sessions_return_to_their_worker(scheduler: Scheduler) -> None:
    for name in "abcd":
        scheduler.register(name)
    first = scheduler.schedule("r0", session=("tenant", "s"))
    scheduler.schedule("other")
    assert first.reservation is not None
    home = scheduler.registrations[worker_of(first)]
    ended = [first.reservation.reservation_id]
    scheduler.placer.report_load(home, Load(10_000), ended, ended)
    again = scheduler.schedule("r1", session=("tenant", "s"))
    assert worker_of(again) == worker_of(first)


def test_pain_04_p_random_traffic_ends_with_a_zero_balance(scheduler: Scheduler) -> None:
    rng = random.Random(11)
    registrations = {name: scheduler.register(name) for name in "abc"}
    live: list[Ticket] = []
    for step in range(600):
        action = rng.randrange(6)
        if action <= 1 and scheduler.placer.num_queued < 4:
            live.append(scheduler.schedule(f"r{step}", prefix_hashes=chain(rng.randrange(4), 60)))
        elif action == 2 and live:
            scheduler.placer.leave(live.pop(rng.randrange(len(live))))
        elif action == 3:
            name = rng.choice("abc")
            ids = [
                ticket.reservation.reservation_id
                for ticket in live
                if ticket.reservation and ticket.reservation.worker.worker_id == name
            ]
            load = Load(num_free_pages=rng.randrange(10_000), num_running=rng.randrange(64))
            scheduler.placer.report_load(registrations[name], load, ids, ids[:1])
        elif action == 4 and step % 40 == 0:
            name = rng.choice("abc")
            scheduler.placer.unregister(registrations[name])
            registrations[name] = scheduler.register(name, epoch=step)
        else:
            scheduler.clock.advance(rng.random() * 0.02)
            scheduler.placer.sweep()
        charged = sum(scheduler.view(name).charge.num_sequences for name in registrations)
        assert charged == scheduler.balance
    for ticket in live:
        scheduler.placer.leave(ticket)
    for registration in registrations.values():
        scheduler.placer.report_load(registration, Load(num_free_pages=1))
    scheduler.clock.advance(UNADMITTED_EXPIRY_S)
    scheduler.placer.sweep()
    assert scheduler.balance == 0
    assert scheduler.placer.num_queued == 0


def test_a_correction_lowers_the_charge_and_leaves_no_remainder(scheduler: Scheduler) -> None:
    scheduler.register("a")
    ticket = scheduler.schedule("r", prefix_hashes=chain(1, 4), num_prompt_tokens=100)
    uncorrected = scheduler.view("a").charge
    for matches in ((), (WorkerMatch("b", 1, 4),), (WorkerMatch("a", 2, 4),)):
        scheduler.placer.correct(ticket, matches)
        assert scheduler.view("a").charge == uncorrected
    scheduler.placer.correct(ticket, (WorkerMatch("a", 1, 4),))
    assert scheduler.view("a").charge.prefill_ns < uncorrected.prefill_ns
    assert scheduler.view("a").charge.num_pages == uncorrected.num_pages - 4
    assert ticket.reservation is not None
    scheduler.placer.report_outcomes(
        [Outcome(ticket.reservation.reservation_id, 100, 64, 20, True)]
    )
    assert scheduler.metrics.value("predicted_cached_tokens_total") == 64
    assert scheduler.view("a").charge == NO_CHARGE


def test_a_correction_after_the_end_charges_nothing(scheduler: Scheduler) -> None:
    scheduler.register("a")
    ticket = scheduler.schedule("r", prefix_hashes=chain(1, 4), num_prompt_tokens=100)
    assert ticket.reservation is not None
    scheduler.placer.report_outcomes([Outcome(ticket.reservation.reservation_id, 100, 0, 20, True)])
    scheduler.placer.correct(ticket, (WorkerMatch("a", 1, 4),))
    assert scheduler.view("a").charge == NO_CHARGE
    assert scheduler.balance == 0


def test_only_several_workers_are_a_choice(scheduler: Scheduler) -> None:
    scheduler.register("a")
    ticket = scheduler.schedule("r")
    assert not scheduler.placer.has_choice(ticket)
    scheduler.register("b")
    assert scheduler.placer.has_choice(ticket)
