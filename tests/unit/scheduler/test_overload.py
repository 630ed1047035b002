"""Who is refused, and when: bounds of the queue, predicted waits, retry hints."""

import math
from collections import deque
from collections.abc import Sequence

import pytest

from services.common.errors import OverloadedError
from services.common.tenants import TenantPolicy, TenantSet
from services.scheduler.policy import Policy, Query
from services.scheduler.queue import Ticket
from services.scheduler.views import Load, WorkerView
from tests.unit.scheduler.scheduler import Scheduler, make_scheduler

FULL = Load(num_free_pages=0, num_running=64)
ROOM_FOR_ONE = Load(num_free_pages=10_000, num_running=63)


def _busy_scheduler(
    max_queued: int = 100, max_wait_s: float = math.inf, tenants: TenantSet | None = None
) -> Scheduler:
    """One full worker, whose queue was seen to drain one request (1,200 of service) a second."""
    scheduler = make_scheduler(max_queued, max_wait_s, tenants)
    registration = scheduler.register("a", max_running_sequences=64)
    scheduler.placer.report_load(registration, FULL)
    waiting = deque([scheduler.schedule("warm0"), scheduler.schedule("warm1")])
    for index in range(2, 32):
        ticket = waiting.popleft()
        scheduler.clock.advance(1.0)
        scheduler.placer.report_load(registration, ROOM_FOR_ONE)
        assert ticket.reservation is not None
        admitted = [ticket.reservation.reservation_id]
        scheduler.placer.report_load(registration, FULL, admitted, admitted)
        if index < 30:
            waiting.append(scheduler.schedule(f"warm{index}"))
    assert scheduler.placer.num_queued == 0
    return scheduler


def _refused(scheduler: Scheduler, name: str, **changes: object) -> OverloadedError:
    with pytest.raises(OverloadedError) as caught:
        scheduler.schedule(name, **changes)  # type: ignore[arg-type]
    return caught.value


def _sheds(scheduler: Scheduler, reason: str, priority: str = "normal") -> float:
    return scheduler.metrics.value("sheds_total", reason=reason, priority=priority)


def test_what_cannot_start_in_time_is_refused_at_once() -> None:
    scheduler = _busy_scheduler()
    for index in range(10):
        scheduler.schedule(f"r{index}", remaining_s=30.0)
    error = _refused(scheduler, "late", remaining_s=4.0)
    # Ten requests are ahead, one goes each second; in six its four seconds would do.
    assert error.retry_after_s == 6.0
    assert "its turn is predicted in 10" in error.message
    assert _sheds(scheduler, "deadline") == 1
    scheduler.schedule("patient", remaining_s=12.0)
    scheduler.schedule("endless")
    assert scheduler.placer.num_queued == 12


def test_an_empty_queue_refuses_nobody_for_its_deadline() -> None:
    scheduler = _busy_scheduler()
    assert not scheduler.schedule("r", remaining_s=0.1).is_settled


def test_a_bound_on_the_predicted_wait_holds_without_deadlines() -> None:
    scheduler = _busy_scheduler(max_wait_s=5.0)
    for index in range(6):
        scheduler.schedule(f"r{index}")
    assert _refused(scheduler, "x").retry_after_s == 1.0
    assert _sheds(scheduler, "wait") == 1


def test_higher_classes_and_other_tenants_wait_for_less() -> None:
    scheduler = _busy_scheduler(max_wait_s=5.0)
    for index in range(6):
        scheduler.schedule(f"r{index}", tenant="flood")
    _refused(scheduler, "x", tenant="flood")
    assert not scheduler.schedule("calm", tenant="calm").is_settled
    assert not scheduler.schedule("urgent", tenant="flood", priority=1).is_settled


def test_a_full_queue_hints_at_its_predicted_drain() -> None:
    scheduler = _busy_scheduler(max_queued=30)
    for index in range(30):
        scheduler.schedule(f"r{index}")
    error = _refused(scheduler, "x")
    assert error.retry_after_s == pytest.approx(30.0, abs=1.0)
    assert _sheds(scheduler, "full") == 1


def test_without_anything_learned_the_hint_is_a_second() -> None:
    scheduler = make_scheduler(max_queued=1)
    scheduler.placer.report_load(scheduler.register("a"), FULL)
    scheduler.schedule("r")
    assert _refused(scheduler, "x").retry_after_s == 1.0


def test_a_tenant_has_its_own_bound() -> None:
    tenants = TenantSet({"small": TenantPolicy(max_queued=2)})
    scheduler = _busy_scheduler(tenants=tenants)
    for index in range(2):
        scheduler.schedule(f"r{index}", tenant="small")
    _refused(scheduler, "x", tenant="small")
    assert _sheds(scheduler, "tenant_full") == 1
    assert not scheduler.schedule("y", tenant="other").is_settled


def test_a_flooded_queue_still_takes_others() -> None:
    scheduler = _busy_scheduler(max_queued=8)
    flood = [scheduler.schedule(f"flood{index}", tenant="flood") for index in range(8)]
    calm = [scheduler.schedule(f"calm{index}", tenant="calm") for index in range(4)]
    assert scheduler.placer.num_queued == 8
    assert not any(ticket.is_settled for ticket in calm)
    pushed_out = [ticket for ticket in flood if ticket.is_settled]
    assert pushed_out == flood[4:]
    assert all(isinstance(ticket.error, OverloadedError) for ticket in pushed_out)
    assert _sheds(scheduler, "pushed_out") == 4
    _refused(scheduler, "calm4", tenant="calm")


def test_a_higher_class_takes_places_from_a_lower_one() -> None:
    scheduler = _busy_scheduler(max_queued=2)
    low = [scheduler.schedule(f"low{index}", priority=-1) for index in range(2)]
    assert not scheduler.schedule("normal").is_settled
    assert [ticket.is_settled for ticket in low] == [False, True]
    assert _sheds(scheduler, "pushed_out", "low") == 1


def test_a_request_that_lost_its_worker_is_never_refused() -> None:
    scheduler = _busy_scheduler(max_queued=3, max_wait_s=3.0)
    for index in range(2):
        scheduler.schedule(f"r{index}")
    replays = [scheduler.schedule(f"lost{index}", attempt=1) for index in range(5)]
    assert not any(ticket.is_settled for ticket in replays)
    assert [scheduler.placer.position(ticket) for ticket in replays] == list(range(5))


def test_queue_metrics_tell_classes_apart() -> None:
    scheduler = _busy_scheduler()
    for index in range(3):
        scheduler.schedule(f"r{index}", priority=index - 1)
    scheduler.schedule("very", priority=2**31 - 1, tenant="t")
    value = scheduler.metrics.value
    assert [value("queued_requests", priority=name) for name in ("high", "normal", "low")] == [
        *(2, 1, 1)
    ]
    assert value("queue_seconds_count", priority="normal") == 30
    assert value("tenants_waiting") == 2
    assert value("drain_rate") == pytest.approx(1200.0, rel=0.1)


def test_service_is_counted_for_listed_tenants() -> None:
    scheduler = make_scheduler(tenants=TenantSet({"a": TenantPolicy()}))
    scheduler.register("w")
    for name, tenant in (("r0", "a"), ("r1", "b"), ("r2", "")):
        ticket: Ticket = scheduler.schedule(name, tenant=tenant)
        scheduler.finish(ticket, output_tokens=10)
    value = scheduler.metrics.value
    for label in ("a", "other", "none"):
        assert value("tenant_service_total", tenant=label) == 1020.0


def test_a_full_pool_is_not_asked_who_could_wait_for_what() -> None:
    """In an overload that would be done for many requests with every load report."""
    num_asked = 0

    def ask(query: Query, workers: Sequence[WorkerView], costs: Sequence[float]) -> int:
        nonlocal num_asked
        num_asked += 1
        return 0

    scheduler = make_scheduler(max_queued=100, policy=Policy("p", (), ask, waits=True))
    registration = scheduler.register("a")
    scheduler.placer.report_load(registration, FULL)
    for index in range(50):
        scheduler.schedule(f"r{index}")
        scheduler.clock.advance(0.1)
        scheduler.placer.report_load(registration, FULL)
    assert num_asked == 0
    scheduler.placer.report_load(registration, ROOM_FOR_ONE)
    assert scheduler.placer.num_queued == 49
