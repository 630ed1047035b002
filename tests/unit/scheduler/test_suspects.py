"""Workers that are suspected, and requests that are: who gets what meanwhile."""

import pytest

from services.common.errors import UnavailableError
from services.scheduler.accounting import Outcome
from services.scheduler.endpoints import Registration
from services.scheduler.queue import Ticket
from services.scheduler.views import Load, WorkerState
from tests.unit.scheduler.scheduler import WORKER_WAIT_S, Scheduler, make_scheduler, worker_of


@pytest.fixture
def scheduler() -> Scheduler:
    return make_scheduler(max_queued=100)


def _run_for(
    scheduler: Scheduler, seconds: float, loads: dict[Registration, Load], steps: bool = False
) -> None:
    """Reports keep coming; step numbers grow only where the engine `steps`."""
    for tick in range(round(seconds * 10)):
        scheduler.clock.advance(0.1)
        for registration, load in loads.items():
            number = load.engine_step_number + (tick if steps else 0)
            report = load._replace(engine_step_number=number)
            scheduler.placer.report_load(registration, report)
        scheduler.placer.sweep()


BUSY = Load(num_free_pages=10_000, num_running=1, engine_busy=True, engine_step_number=7)


def _state(scheduler: Scheduler, worker_id: str) -> WorkerState:
    return scheduler.view(worker_id).state


def test_pain_22_h_an_engine_stuck_in_a_step_gets_nothing_new_and_recovers_by_itself(
    scheduler: Scheduler,
) -> None:
    stuck, fine = scheduler.register("stuck"), scheduler.register("fine")
    load = BUSY._replace(predicted_step_ns=10_000_000)
    _run_for(scheduler, 0.9, {stuck: load, fine: Load(num_free_pages=10_000)})
    assert _state(scheduler, "stuck") is WorkerState.READY
    _run_for(scheduler, 0.4, {stuck: load, fine: Load(num_free_pages=10_000)})
    assert _state(scheduler, "stuck") is WorkerState.SUSPECT
    for index in range(6):
        assert worker_of(scheduler.schedule(f"r{index}")) == "fine"
    again = load._replace(engine_step_number=8)
    scheduler.placer.report_load(stuck, again)
    assert _state(scheduler, "stuck") is WorkerState.READY
    assert {worker_of(scheduler.schedule(f"s{index}")) for index in range(8)} == {"stuck", "fine"}


def test_patience_is_five_predicted_steps(scheduler: Scheduler) -> None:
    registration = scheduler.register("slow")
    load = BUSY._replace(predicted_step_ns=600_000_000)
    _run_for(scheduler, 2.9, {registration: load})
    assert _state(scheduler, "slow") is WorkerState.READY
    _run_for(scheduler, 0.4, {registration: load})
    assert _state(scheduler, "slow") is WorkerState.SUSPECT


def test_pain_22_h_engines_that_step_or_idle_are_never_suspected(scheduler: Scheduler) -> None:
    registration = scheduler.register("w")
    _run_for(scheduler, 5.0, {registration: BUSY}, steps=True)
    assert _state(scheduler, "w") is WorkerState.READY
    _run_for(scheduler, 5.0, {registration: BUSY._replace(engine_busy=False)})
    assert _state(scheduler, "w") is WorkerState.READY
    # After idling, patience starts with the work.
    _run_for(scheduler, 0.9, {registration: BUSY})
    assert _state(scheduler, "w") is WorkerState.READY


def test_requests_wait_for_a_suspect_but_not_for_a_hung_worker(scheduler: Scheduler) -> None:
    registration = scheduler.register("w")
    _run_for(scheduler, 1.5, {registration: BUSY})
    ticket = scheduler.schedule("r")
    _run_for(scheduler, 3 * WORKER_WAIT_S, {registration: BUSY})
    assert not ticket.is_settled
    scheduler.placer.report_load(registration, BUSY._replace(engine_step_number=8))
    assert worker_of(ticket) == "w"

    late = scheduler.schedule("late")
    assert worker_of(late) == "w"
    _run_for(scheduler, 1.5, {registration: BUSY})
    lost = scheduler.schedule("lost")
    _run_for(scheduler, 30.0 + WORKER_WAIT_S, {registration: BUSY})
    assert _state(scheduler, "w") is WorkerState.HUNG
    assert isinstance(lost.error, UnavailableError)


def _fail_on(scheduler: Scheduler, ticket: Ticket) -> None:
    scheduler.finish(ticket, 0, ended_well=False, worker_failed=True)


def test_a_worker_that_fails_again_and_again_is_probed_with_one_request(
    scheduler: Scheduler,
) -> None:
    scheduler.register("w")
    for index in range(3):
        _fail_on(scheduler, scheduler.schedule(f"r{index}"))
        scheduler.clock.advance(1.0)
        scheduler.placer.sweep()
        scheduler.placer.report_load(_registration(scheduler), Load(num_free_pages=10_000))
    assert scheduler.metrics.value("worker_failures_total") == 3
    probe = scheduler.schedule("probe")
    assert probe.is_settled
    waiting = [scheduler.schedule(f"s{index}") for index in range(3)]
    assert _state(scheduler, "w") is WorkerState.SUSPECT
    _fail_on(scheduler, probe)
    assert not any(ticket.is_settled for ticket in waiting)
    for _ in range(21):
        scheduler.clock.advance(0.1)
        scheduler.placer.report_load(_registration(scheduler), Load(num_free_pages=10_000))
        scheduler.placer.sweep()
    probes = [ticket for ticket in waiting if ticket.is_settled]
    assert len(probes) == 1
    scheduler.finish(probes[0], 5)
    assert all(ticket.is_settled for ticket in waiting)
    assert _state(scheduler, "w") is WorkerState.READY


def _registration(scheduler: Scheduler) -> Registration:
    return scheduler.registrations["w"]


def test_refusals_for_lack_of_room_open_no_breaker(scheduler: Scheduler) -> None:
    scheduler.register("w")
    for index in range(5):
        ticket = scheduler.schedule(f"r{index}")
        scheduler.finish(ticket, 0, ended_well=False, worker_failed=True, was_refused=True)
        scheduler.clock.advance(0.5)
        scheduler.placer.report_load(_registration(scheduler), Load(num_free_pages=10_000))
    assert _state(scheduler, "w") is WorkerState.READY


def test_a_breaker_outlives_a_restart_of_its_worker(scheduler: Scheduler) -> None:
    scheduler.register("w")
    for epoch in range(2, 5):
        _fail_on(scheduler, scheduler.schedule(f"r{epoch}"))
        scheduler.clock.advance(1.0)
        scheduler.register("w", epoch=epoch)
    scheduler.placer.report_outcomes([Outcome(1, 0, 0, 0, False, True, worker_id="w")])
    assert _state(scheduler, "w") is WorkerState.SUSPECT
    scheduler.register("w", epoch=9)
    assert _state(scheduler, "w") is WorkerState.SUSPECT


def test_suspected_requests_run_one_on_a_worker(scheduler: Scheduler) -> None:
    for name in "abc":
        scheduler.register(name)
    suspects = [
        scheduler.schedule(f"r{index}", num_losses=2, attempt=2, num_prompt_tokens=10)
        for index in range(5)
    ]
    placed = [ticket for ticket in suspects if ticket.is_settled]
    assert sorted(map(worker_of, placed)) == ["a", "b", "c"]
    # Others are not held up by those that wait for a worker of their own.
    assert scheduler.schedule("other", num_losses=1).is_settled
    scheduler.finish(placed[1], 5)
    settled = [ticket for ticket in suspects if ticket.is_settled]
    assert len(settled) == 4
    assert worker_of(settled[3]) == worker_of(placed[1])
