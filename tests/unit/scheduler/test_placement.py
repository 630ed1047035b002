"""Placing requests: where they go, how they wait, what they give back."""

from collections import Counter

import pytest

from services.common.errors import (
    DeadlineError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    UnavailableError,
)
from services.scheduler.index_client import WorkerMatch
from services.scheduler.views import Load
from tests.unit.scheduler.build import (
    PAGE_SIZE,
    chain,
    make_request,
)
from tests.unit.scheduler.scheduler import WORKER_WAIT_S, Scheduler, make_scheduler, worker_of


@pytest.fixture
def scheduler() -> Scheduler:
    return make_scheduler()


FULL = {"num_free_pages": 0, "num_running": 64}


def test_pain_04_p_a_request_is_charged_as_it_is_placed(scheduler: Scheduler) -> None:
    scheduler.register("a")
    ticket = scheduler.schedule("r", num_prompt_tokens=160, num_choices=3)
    assert ticket.reservation is not None
    assert ticket.reservation.reservation_id != 0
    assert ticket.reservation.policy == "prefix_load/cold"
    charge = scheduler.view("a").charge
    assert (charge.num_sequences, charge.num_pages, charge.num_context_tokens) == (3, 10, 480)
    assert scheduler.balance == 1


def test_an_unknown_model_is_not_found(scheduler: Scheduler) -> None:
    with pytest.raises(UnavailableError):
        scheduler.schedule("r")
    scheduler.register("a")
    with pytest.raises(NotFoundError):
        scheduler.schedule("r", model="other")


def test_a_prompt_longer_than_any_context_is_refused(scheduler: Scheduler) -> None:
    scheduler.register("a", context_length=100)
    with pytest.raises(InvalidRequestError):
        scheduler.schedule("r", num_prompt_tokens=100)
    assert scheduler.schedule("r", num_prompt_tokens=99).reservation is not None


def test_the_same_attempt_finds_its_reservation_while_it_lives(scheduler: Scheduler) -> None:
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


def test_callers_of_one_attempt_share_a_ticket(scheduler: Scheduler) -> None:
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


def test_a_burst_with_one_new_prefix_stays_together(scheduler: Scheduler) -> None:
    for name in "abcd":
        scheduler.register(name)
    prompt = chain(1, 64)
    tickets = [
        scheduler.schedule(f"r{i}", prefix_hashes=prompt, num_prompt_tokens=64 * PAGE_SIZE + 5)
        for i in range(4)
    ]
    assert len({worker_of(ticket) for ticket in tickets}) == 1
    assert tickets[3].reservation is not None
    assert tickets[3].reservation.predicted_cached_tokens == 64 * PAGE_SIZE
    assert tickets[3].reservation.policy == "prefix_load/affinity"


def test_a_prefix_placed_lately_counts_as_context_once(scheduler: Scheduler) -> None:
    scheduler.register("a")
    for i in range(3):
        scheduler.schedule(
            f"r{i}", prefix_hashes=chain(1, 64), num_prompt_tokens=64 * PAGE_SIZE + 5
        )
    view = scheduler.table.snapshot(scheduler.pool)[0]
    assert view.charge.num_context_tokens == 64 * PAGE_SIZE + 3 * 5


def test_bursts_with_different_prefixes_spread(scheduler: Scheduler) -> None:
    for name in "abcd":
        scheduler.register(name)
    chosen = Counter(
        worker_of(
            scheduler.schedule(f"{i}", prefix_hashes=chain(i, 64), num_prompt_tokens=64 * 16 + 5)
        )
        for i in range(8)
    )
    assert chosen == {"a": 2, "b": 2, "c": 2, "d": 2}


def test_what_the_index_reports_counts_for_the_right_epoch_only(scheduler: Scheduler) -> None:
    for name in "abc":
        scheduler.register(name, epoch=5)
    matches = (WorkerMatch("b", 5, 60), WorkerMatch("c", 4, 64), WorkerMatch("gone", 5, 64))
    ticket = scheduler.schedule(
        "r", matches, prefix_hashes=chain(1, 64), num_prompt_tokens=64 * PAGE_SIZE
    )
    assert worker_of(ticket) == "b"
    assert ticket.reservation is not None
    assert ticket.reservation.predicted_cached_tokens == 60 * PAGE_SIZE


def test_a_prediction_leaves_one_token_to_compute(scheduler: Scheduler) -> None:
    scheduler.register("a")
    ticket = scheduler.schedule(
        "r", (WorkerMatch("a", 1, 4),), prefix_hashes=chain(1, 4), num_prompt_tokens=64
    )
    assert ticket.reservation is not None
    assert ticket.reservation.predicted_cached_tokens == 63


def test_requests_wait_for_room_and_go_in_order(scheduler: Scheduler) -> None:
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


def test_backlog_stays_in_the_scheduler(scheduler: Scheduler) -> None:
    registration = scheduler.register("a")
    tickets = [scheduler.schedule(f"r{i}", num_prompt_tokens=4000) for i in range(4)]
    placed = [ticket for ticket in tickets if ticket.is_settled]
    assert 1 <= len(placed) <= 3
    ids = [ticket.reservation.reservation_id for ticket in placed if ticket.reservation]
    scheduler.placer.report_load(registration, Load(num_free_pages=9000, num_running=3), ids)
    assert sum(ticket.is_settled for ticket in tickets) > len(placed)


def test_a_full_queue_refuses(scheduler: Scheduler) -> None:
    registration = scheduler.register("a")
    scheduler.placer.report_load(registration, Load(**FULL))
    for index in range(4):
        scheduler.schedule(f"r{index}")
    with pytest.raises(OverloadedError):
        scheduler.schedule("r4")
    assert scheduler.placer.num_queued == 4


def test_time_passes_in_the_queue(scheduler: Scheduler) -> None:
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


def test_without_a_worker_a_request_waits_a_little_then_fails(scheduler: Scheduler) -> None:
    registration = scheduler.register("a")
    scheduler.placer.unregister(registration)
    served = scheduler.schedule("served")
    scheduler.clock.advance(WORKER_WAIT_S - 0.1)
    scheduler.placer.sweep()
    scheduler.register("b")
    assert worker_of(served) == "b"

    failed = scheduler.schedule("failed", excluded_worker_ids=frozenset({"b"}))
    scheduler.clock.advance(0.5)
    scheduler.placer.sweep()
    assert not failed.is_settled
    scheduler.clock.advance(WORKER_WAIT_S)
    scheduler.placer.sweep()
    assert isinstance(failed.error, UnavailableError)
    assert scheduler.placer.num_queued == 0


def test_a_request_with_exclusions_does_not_hold_up_others(scheduler: Scheduler) -> None:
    scheduler.register("a")
    scheduler.schedule("picky", excluded_worker_ids=frozenset({"a"}))
    assert worker_of(scheduler.schedule("easy")) == "a"


def test_an_excluded_worker_is_not_chosen(scheduler: Scheduler) -> None:
    scheduler.register("a")
    scheduler.register("b")
    for index in range(4):
        ticket = scheduler.schedule(f"r{index}", excluded_worker_ids=frozenset({"a"}))
        assert worker_of(ticket) == "b"


def test_leaving_the_queue_lets_others_move_up(scheduler: Scheduler) -> None:
    registration = scheduler.register("a")
    scheduler.placer.report_load(registration, Load(**FULL))
    first, second = scheduler.schedule("first"), scheduler.schedule("second")
    scheduler.placer.leave(first)
    assert scheduler.placer.position(second) == 0
    assert scheduler.placer.num_queued == 1


def test_a_caller_that_leaves_before_delivery_gives_the_reservation_back(
    scheduler: Scheduler,
) -> None:
    scheduler.register("a")
    ticket = scheduler.schedule("r")
    assert scheduler.balance == 1
    scheduler.placer.leave(ticket)
    assert scheduler.balance == 0
    assert scheduler.view("a").num_active == 0


def test_a_caller_that_leaves_after_delivery_keeps_it(scheduler: Scheduler) -> None:
    scheduler.register("a")
    scheduler.deliver(scheduler.schedule("r"))
    assert scheduler.balance == 1


def test_a_ticket_whose_asker_left_is_queued_for_the_other_caller(scheduler: Scheduler) -> None:
    scheduler.register("a")
    ticket, _ = scheduler.placer.open_ticket(make_request("r"), None)
    scheduler.placer.open_ticket(make_request("r"), None)
    scheduler.placer.leave(ticket)
    assert worker_of(ticket) == "a"
