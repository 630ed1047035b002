"""The placer with real tables and a clock that is moved by hand."""

import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest

from services.common.errors import (
    DeadlineError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    UnavailableError,
)
from services.scheduler.endpoints import Registration, WorkerTable
from services.scheduler.index_client import WorkerMatch
from services.scheduler.metrics import SchedulerMetrics
from services.scheduler.overlay import PredictionOverlay
from services.scheduler.placement import Outcome, Placer
from services.scheduler.policies import make_policy
from services.scheduler.pools import Pool, PoolSet
from services.scheduler.queue import Ticket
from services.scheduler.reservations import UNADMITTED_EXPIRY_S, ReservationBook
from services.scheduler.views import Load, WorkerView
from tests.unit.scheduler.build import (
    PAGE_SIZE,
    Clock,
    chain,
    make_identity,
    make_registration,
    make_request,
    make_worker,
)

WORKER_WAIT_S = 2.0


@dataclass
class Fixture:
    clock: Clock
    pools: PoolSet
    table: WorkerTable
    metrics: SchedulerMetrics
    placer: Placer

    @property
    def pool(self) -> Pool:
        return self.pools.pools[0]

    def register(self, worker_id: str, **changes: Any) -> Registration:
        registration = make_registration(make_worker(worker_id, **changes), self.pool)
        self.placer.register(registration, make_identity())
        return registration

    def schedule(
        self,
        name: str,
        matches: tuple[WorkerMatch, ...] = (),
        remaining_s: float | None = None,
        **changes: Any,
    ) -> Ticket:
        ticket, _ = self.placer.open_ticket(make_request(name, **changes), remaining_s)
        self.placer.enqueue(ticket, matches)
        return ticket

    def deliver(self, ticket: Ticket) -> None:
        ticket.is_delivered = True
        self.placer.leave(ticket)

    def view(self, worker_id: str) -> WorkerView:
        view = self.table.get(worker_id)
        assert view is not None
        return view

    @property
    def balance(self) -> float:
        return self.metrics.value("reservations_charged")


@pytest.fixture
def scheduler() -> Fixture:
    clock, pools, metrics = Clock(), PoolSet(), SchedulerMetrics()
    rng = random.Random(1)
    table = WorkerTable(3.0)
    placer = Placer(
        table,
        pools,
        make_policy("prefix_load", rng),
        ReservationBook(table, rng),
        PredictionOverlay(clock()),
        metrics,
        clock,
        max_queued=4,
        worker_wait_s=WORKER_WAIT_S,
    )
    return Fixture(clock, pools, table, metrics, placer)


def _worker_of(ticket: Ticket) -> str:
    assert ticket.reservation is not None, ticket.error
    return ticket.reservation.worker.worker_id


FULL = {"num_free_pages": 0, "num_running": 64}


def test_a_request_is_placed_and_charged_at_once(scheduler: Fixture) -> None:
    scheduler.register("a")
    ticket = scheduler.schedule("r", num_prompt_tokens=160, num_choices=3)
    assert ticket.reservation is not None
    assert ticket.reservation.reservation_id != 0
    assert ticket.reservation.policy == "prefix_load/cold"
    charge = scheduler.view("a").charge
    assert (charge.num_sequences, charge.num_pages, charge.num_context_tokens) == (3, 10, 480)
    assert scheduler.balance == 1


def test_an_unknown_model_is_not_found(scheduler: Fixture) -> None:
    with pytest.raises(UnavailableError):
        scheduler.schedule("r")
    scheduler.register("a")
    with pytest.raises(NotFoundError):
        scheduler.schedule("r", model="other")


def test_a_prompt_longer_than_any_context_is_refused(scheduler: Fixture) -> None:
    scheduler.register("a", context_length=100)
    with pytest.raises(InvalidRequestError):
        scheduler.schedule("r", num_prompt_tokens=100)
    assert scheduler.schedule("r", num_prompt_tokens=99).reservation is not None


def test_the_same_attempt_finds_its_reservation_while_it_lives(scheduler: Fixture) -> None:
    registration = scheduler.register("a")
    ticket = scheduler.schedule("r")
    scheduler.deliver(ticket)
    assert ticket.reservation is not None
    reservation_id = ticket.reservation.reservation_id
    assert scheduler.placer.find_reservation(("r", 0)) is ticket.reservation
    assert scheduler.placer.find_reservation(("r", 1)) is None
    scheduler.placer.report_load(registration, Load(num_free_pages=9), [reservation_id], [])
    assert scheduler.placer.find_reservation(("r", 0)) is ticket.reservation
    scheduler.placer.report_load(registration, Load(num_free_pages=9), [], [reservation_id])
    assert scheduler.placer.find_reservation(("r", 0)) is None


def test_callers_of_one_attempt_share_a_ticket(scheduler: Fixture) -> None:
    registration = scheduler.register("a")
    scheduler.placer.report_load(registration, Load(**FULL))
    first, first_is_new = scheduler.placer.open_ticket(make_request("r"), None)
    second, second_is_new = scheduler.placer.open_ticket(make_request("r"), None)
    assert first is second
    assert (first_is_new, second_is_new) == (True, False)
    scheduler.placer.leave(first)
    assert scheduler.placer.num_queued == 1
    scheduler.placer.leave(second)
    assert scheduler.placer.num_queued == 0


def test_a_burst_with_one_new_prefix_stays_together(scheduler: Fixture) -> None:
    for name in "abcd":
        scheduler.register(name)
    prompt = chain(1, 64)
    tickets = [
        scheduler.schedule(f"r{i}", prefix_hashes=prompt, num_prompt_tokens=64 * PAGE_SIZE + 5)
        for i in range(8)
    ]
    assert len({_worker_of(ticket) for ticket in tickets}) == 1
    assert tickets[7].reservation is not None
    assert tickets[7].reservation.predicted_cached_tokens == 64 * PAGE_SIZE
    assert tickets[7].reservation.policy == "prefix_load/affinity"


def test_bursts_with_different_prefixes_spread(scheduler: Fixture) -> None:
    for name in "abcd":
        scheduler.register(name)
    chosen = Counter(
        _worker_of(
            scheduler.schedule(f"{i}", prefix_hashes=chain(i, 64), num_prompt_tokens=64 * 16 + 5)
        )
        for i in range(8)
    )
    assert chosen == {"a": 2, "b": 2, "c": 2, "d": 2}


def test_what_the_index_reports_counts_for_the_right_epoch_only(scheduler: Fixture) -> None:
    for name in "abc":
        scheduler.register(name, epoch=5)
    matches = (WorkerMatch("b", 5, 60), WorkerMatch("c", 4, 64), WorkerMatch("gone", 5, 64))
    ticket = scheduler.schedule(
        "r", matches, prefix_hashes=chain(1, 64), num_prompt_tokens=64 * PAGE_SIZE
    )
    assert _worker_of(ticket) == "b"
    assert ticket.reservation is not None
    assert ticket.reservation.predicted_cached_tokens == 60 * PAGE_SIZE


def test_a_prediction_leaves_one_token_to_compute(scheduler: Fixture) -> None:
    scheduler.register("a")
    ticket = scheduler.schedule(
        "r", (WorkerMatch("a", 1, 4),), prefix_hashes=chain(1, 4), num_prompt_tokens=64
    )
    assert ticket.reservation is not None
    assert ticket.reservation.predicted_cached_tokens == 63


def test_requests_wait_for_room_and_go_in_order(scheduler: Fixture) -> None:
    registration = scheduler.register("a", max_running_sequences=2)
    scheduler.placer.report_load(registration, Load(num_free_pages=9000, num_running=2))
    low = scheduler.schedule("low")
    high = scheduler.schedule("high", priority=5)
    assert (scheduler.placer.position(high), scheduler.placer.position(low)) == (0, 1)
    scheduler.clock.advance(0.7)
    scheduler.placer.report_load(registration, Load(num_free_pages=9000, num_running=1))
    assert high.reservation is not None
    assert high.reservation.queued_for_s == pytest.approx(0.7)
    assert not low.is_settled


def test_backlog_stays_in_the_scheduler(scheduler: Fixture) -> None:
    registration = scheduler.register("a")
    tickets = [scheduler.schedule(f"r{i}", num_prompt_tokens=4000) for i in range(4)]
    placed = [ticket for ticket in tickets if ticket.is_settled]
    assert 1 <= len(placed) <= 3
    ids = [ticket.reservation.reservation_id for ticket in placed if ticket.reservation]
    scheduler.placer.report_load(registration, Load(num_free_pages=9000, num_running=3), ids)
    assert sum(ticket.is_settled for ticket in tickets) > len(placed)


def test_a_full_queue_refuses(scheduler: Fixture) -> None:
    registration = scheduler.register("a")
    scheduler.placer.report_load(registration, Load(**FULL))
    for index in range(4):
        scheduler.schedule(f"r{index}")
    with pytest.raises(OverloadedError):
        scheduler.schedule("r4")
    assert scheduler.placer.num_queued == 4


def test_time_passes_in_the_queue(scheduler: Fixture) -> None:
    registration = scheduler.register("a")
    scheduler.placer.report_load(registration, Load(**FULL))
    ticket = scheduler.schedule("r", remaining_s=1.0)
    patient = scheduler.schedule("p")
    scheduler.clock.advance(1.1)
    scheduler.placer.sweep()
    assert isinstance(ticket.error, DeadlineError)
    assert not patient.is_settled
    with pytest.raises(DeadlineError):
        scheduler.schedule("late", remaining_s=0.0)


def test_without_a_worker_a_request_waits_a_little_then_fails(scheduler: Fixture) -> None:
    registration = scheduler.register("a")
    scheduler.placer.unregister(registration)
    served = scheduler.schedule("served")
    scheduler.clock.advance(WORKER_WAIT_S - 0.1)
    scheduler.placer.sweep()
    scheduler.register("b")
    assert _worker_of(served) == "b"

    failed = scheduler.schedule("failed", excluded_worker_ids=frozenset({"b"}))
    scheduler.clock.advance(0.5)
    scheduler.placer.sweep()
    assert not failed.is_settled
    scheduler.clock.advance(WORKER_WAIT_S)
    scheduler.placer.sweep()
    assert isinstance(failed.error, UnavailableError)
    assert scheduler.placer.num_queued == 0


def test_a_request_with_exclusions_does_not_hold_up_others(scheduler: Fixture) -> None:
    scheduler.register("a")
    scheduler.schedule("picky", excluded_worker_ids=frozenset({"a"}))
    assert _worker_of(scheduler.schedule("easy")) == "a"


def test_an_excluded_worker_is_not_chosen(scheduler: Fixture) -> None:
    scheduler.register("a")
    scheduler.register("b")
    for index in range(4):
        ticket = scheduler.schedule(f"r{index}", excluded_worker_ids=frozenset({"a"}))
        assert _worker_of(ticket) == "b"


def test_leaving_the_queue_lets_others_move_up(scheduler: Fixture) -> None:
    registration = scheduler.register("a")
    scheduler.placer.report_load(registration, Load(**FULL))
    first, second = scheduler.schedule("first"), scheduler.schedule("second")
    scheduler.placer.leave(first)
    assert scheduler.placer.position(second) == 0
    assert scheduler.placer.num_queued == 1


def test_a_caller_that_leaves_before_delivery_gives_the_reservation_back(
    scheduler: Fixture,
) -> None:
    scheduler.register("a")
    ticket = scheduler.schedule("r")
    assert scheduler.balance == 1
    scheduler.placer.leave(ticket)
    assert scheduler.balance == 0
    assert scheduler.view("a").num_active == 0


def test_a_caller_that_leaves_after_delivery_keeps_it(scheduler: Fixture) -> None:
    scheduler.register("a")
    scheduler.deliver(scheduler.schedule("r"))
    assert scheduler.balance == 1


def test_a_ticket_whose_asker_left_is_queued_for_the_other_caller(scheduler: Fixture) -> None:
    scheduler.register("a")
    ticket, _ = scheduler.placer.open_ticket(make_request("r"), None)
    scheduler.placer.open_ticket(make_request("r"), None)
    scheduler.placer.leave(ticket)
    assert _worker_of(ticket) == "a"


def test_unadmitted_reservations_expire_and_the_balance_is_zero(scheduler: Fixture) -> None:
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


def test_outcomes_end_reservations_and_compare_predictions_once(scheduler: Fixture) -> None:
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


def test_a_worker_that_ends_first_does_not_spoil_the_comparison(scheduler: Fixture) -> None:
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


def test_a_gone_worker_returns_its_reservations_and_predictions(scheduler: Fixture) -> None:
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


def test_a_restarted_worker_replaces_itself_with_nothing_charged(scheduler: Fixture) -> None:
    scheduler.register("a", epoch=1)
    scheduler.deliver(scheduler.schedule("r"))
    scheduler.register("a", epoch=2)
    assert scheduler.balance == 0
    assert scheduler.view("a").num_active == 0


def test_an_expired_lease_returns_everything(scheduler: Fixture) -> None:
    scheduler.register("a")
    scheduler.deliver(scheduler.schedule("r"))
    scheduler.clock.advance(3.5)
    scheduler.placer.sweep()
    assert scheduler.balance == 0
    assert scheduler.table.snapshot(scheduler.pool) == ()


def test_an_empty_pool_that_takes_another_model_fails_who_waited(scheduler: Fixture) -> None:
    scheduler.placer.unregister(scheduler.register("a"))
    ticket = scheduler.schedule("r")
    registration = make_registration(make_worker("b"), scheduler.pool)
    scheduler.placer.register(registration, make_identity(model_revision="r2"))
    assert isinstance(ticket.error, UnavailableError)


def test_sessions_return_to_their_worker(scheduler: Fixture) -> None:
    for name in "abcd":
        scheduler.register(name)
    first = scheduler.schedule("r0", session=("tenant", "s"))
    scheduler.schedule("other")
    again = scheduler.schedule("r1", session=("tenant", "s"))
    assert _worker_of(again) == _worker_of(first)


def test_random_traffic_ends_with_a_zero_balance(scheduler: Fixture) -> None:
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
