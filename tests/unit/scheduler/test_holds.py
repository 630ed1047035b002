"""Waiting for the worker that was chosen, rather than taking the first with room."""

from services.scheduler.holds import HOLD_S
from services.scheduler.index_client import WorkerMatch
from services.scheduler.views import Load
from tests.unit.scheduler.build import chain
from tests.unit.scheduler.scheduler import Scheduler, make_scheduler, worker_of

# Prefill of 12,000 tokens is longer than a worker's queue may be.
LONG = {"num_prompt_tokens": 12_000, "prefix_hashes": chain(1, 750)}
HELD = (WorkerMatch("owner", 1, 740),)


def busy_owner(scheduler: Scheduler, num_waiting_tokens: int) -> None:
    """`owner` holds the prefix and has no room; `other` is idle but for a little."""
    owner, other = scheduler.register("owner"), scheduler.register("other")
    scheduler.placer.report_load(
        owner,
        Load(9000, num_running=2, num_waiting=1, num_waiting_uncached_tokens=num_waiting_tokens),
    )
    scheduler.placer.report_load(other, Load(9000, num_running=2))


def test_a_request_waits_for_the_worker_that_holds_its_prefix() -> None:
    scheduler = make_scheduler()
    busy_owner(scheduler, 9000)
    ticket = scheduler.schedule("r", HELD, **LONG)
    assert not ticket.is_settled
    scheduler.placer.report_load(scheduler.registrations["owner"], Load(9000, num_running=2))
    assert worker_of(ticket) == "owner"


def test_it_does_not_wait_where_computing_again_is_faster() -> None:
    scheduler = make_scheduler()
    busy_owner(scheduler, 90_000)
    assert worker_of(scheduler.schedule("r", HELD, **LONG)) == "other"


def test_those_that_wait_for_others_let_it_pass() -> None:
    scheduler = make_scheduler()
    busy_owner(scheduler, 9000)
    held = scheduler.schedule("held", HELD, **LONG)
    passing = scheduler.schedule("passing", num_prompt_tokens=100)
    assert not held.is_settled
    assert worker_of(passing) == "other"


def test_a_line_before_the_owner_sends_the_next_elsewhere() -> None:
    scheduler = make_scheduler()
    busy_owner(scheduler, 9000)
    tickets = [
        scheduler.schedule(
            f"r{number}", HELD, num_prompt_tokens=20_000, prefix_hashes=chain(1, 750)
        )
        for number in range(4)
    ]
    assert not tickets[0].is_settled
    assert "other" in [worker_of(ticket) for ticket in tickets if ticket.is_settled]


def test_a_choice_is_made_anew_when_the_owner_stays_full() -> None:
    scheduler = make_scheduler()
    busy_owner(scheduler, 9000)
    ticket = scheduler.schedule("r", HELD, **LONG)
    scheduler.placer.report_load(
        scheduler.registrations["owner"],
        Load(9000, num_running=2, num_waiting=9, num_waiting_uncached_tokens=90_000),
    )
    assert not ticket.is_settled
    scheduler.clock.advance(2 * HOLD_S)
    scheduler.placer.sweep()
    assert worker_of(ticket) == "other"
