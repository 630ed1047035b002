import itertools

import pytest

from services.common.errors import UnavailableError
from services.common.tenants import TenantPolicy, TenantSet
from services.scheduler.fairness import ServiceLedger
from services.scheduler.pools import Pool
from services.scheduler.queue import PoolQueue, Ticket
from tests.unit.scheduler.build import make_request

POOL = Pool({})


@pytest.fixture
def ledger() -> ServiceLedger:
    tenants = TenantSet({"big": TenantPolicy(weight=3.0)})
    return ServiceLedger(tenants.weight)


@pytest.fixture
def queue(ledger: ServiceLedger) -> PoolQueue:
    return PoolQueue(ledger)


def _ticket(
    name: str,
    now: float = 0.0,
    priority: int = 0,
    age_s: float = 0.0,
    tenant: str = "",
    attempt: int = 0,
    work: float = 100.0,
) -> Ticket:
    request = make_request(name, priority=priority, tenant=tenant, attempt=attempt)
    return Ticket(request, POOL, now, age_s=age_s, work=work)


def _serve(queue: PoolQueue, ledger: ServiceLedger, count: int = 10_000) -> list[str]:
    """Names in the order of service, each charged its work."""
    served = []
    while len(served) < count and (ticket := queue.first()) is not None:
        queue.remove(ticket)
        ledger.charge(ticket.account, ticket.work)
        queue.note_turn(ticket.account.priority)
        served.append(ticket.request.request_id)
    return served


def test_priority_goes_first_then_first_arrival(queue: PoolQueue, ledger: ServiceLedger) -> None:
    for ticket in (
        _ticket("late", now=2.0),
        _ticket("early", now=1.0),
        _ticket("resumed", now=3.0, age_s=2.5),
        _ticket("urgent", now=9.0, priority=1),
        _ticket("early_too", now=1.0),
        _ticket("whenever", now=0.0, priority=-1),
    ):
        queue.add(ticket)
    assert _serve(queue, ledger) == ["urgent", "resumed", "early", "early_too", "late", "whenever"]


def test_a_ticket_knows_how_many_are_ahead(queue: PoolQueue) -> None:
    tickets = [_ticket(str(index), now=float(index)) for index in range(4)]
    for ticket in tickets:
        queue.add(ticket)
    assert [queue.position(ticket) for ticket in tickets] == [0, 1, 2, 3]
    queue.remove(tickets[1])
    queue.remove(tickets[1])
    assert tickets[1] not in queue
    assert queue.position(tickets[3]) == 2


def test_pain_30_q_tenants_take_turns_however_much_one_sends(
    queue: PoolQueue, ledger: ServiceLedger
) -> None:
    for index in range(50):
        queue.add(_ticket(f"flood{index}", tenant="flood"))
    for index in range(3):
        queue.add(_ticket(f"calm{index}", now=1.0, tenant="calm"))
    served = _serve(queue, ledger, 8)
    assert [name for name in served if name.startswith("calm")] == ["calm0", "calm1", "calm2"]
    assert served.index("calm2") <= 5


def test_weights_share_service_in_proportion(queue: PoolQueue, ledger: ServiceLedger) -> None:
    for index in range(100):
        queue.add(_ticket(f"big{index}", tenant="big"))
        queue.add(_ticket(f"small{index}", tenant="small"))
    served = _serve(queue, ledger, 80)
    assert sum(name.startswith("big") for name in served) == 60


def test_long_requests_cost_more_turns_than_short_ones(
    queue: PoolQueue, ledger: ServiceLedger
) -> None:
    for index in range(100):
        queue.add(_ticket(f"long{index}", tenant="long", work=900.0))
        queue.add(_ticket(f"short{index}", tenant="short", work=100.0))
    served = _serve(queue, ledger, 50)
    assert sum(name.startswith("long") for name in served) == 5


def test_an_idle_tenant_saves_nothing_up(queue: PoolQueue, ledger: ServiceLedger) -> None:
    for index in range(40):
        queue.add(_ticket(f"busy{index}", tenant="busy"))
    _serve(queue, ledger, 20)
    for index in range(20):
        queue.add(_ticket(f"idle{index}", tenant="idle"))
    served = _serve(queue, ledger, 10)
    assert sum(name.startswith("idle") for name in served) == 5


def test_who_comes_to_an_empty_queue_starts_where_the_last_one_left(
    queue: PoolQueue, ledger: ServiceLedger
) -> None:
    queue.add(_ticket("a", tenant="a", work=5000.0))
    _serve(queue, ledger)
    fresh = _ticket("b", tenant="b")
    queue.add(fresh)
    assert ledger.counter(fresh.account) == 5000.0


def test_classes_keep_separate_counters(queue: PoolQueue, ledger: ServiceLedger) -> None:
    for index in range(10):
        queue.add(_ticket(f"urgent{index}", tenant="a", priority=5))
    _serve(queue, ledger)
    queue.add(_ticket("a", tenant="a"))
    queue.add(_ticket("b", tenant="b", now=1.0))
    assert _serve(queue, ledger) == ["a", "b"]


def test_a_request_that_lost_its_worker_goes_before_its_class(
    queue: PoolQueue, ledger: ServiceLedger
) -> None:
    queue.add(_ticket("waiting", tenant="a"))
    queue.add(_ticket("lost", now=5.0, tenant="b", attempt=1))
    queue.add(_ticket("urgent", now=6.0, tenant="a", priority=1))
    assert _serve(queue, ledger) == ["urgent", "lost", "waiting"]


def test_pain_30_q_low_priority_gets_a_trickle(queue: PoolQueue, ledger: ServiceLedger) -> None:
    names = (f"high{index}" for index in itertools.count())
    for index in range(3):
        queue.add(_ticket(f"low{index}", priority=-1))
    for _ in range(4):
        queue.add(_ticket(next(names), priority=1))
    served = []
    for _ in range(100):
        served += _serve(queue, ledger, 1)
        queue.add(_ticket(next(names), priority=1))
    assert [served.index(f"low{index}") for index in range(3)] == [32, 65, 98]


def test_passed_over_tickets_do_not_hold_up_others(queue: PoolQueue) -> None:
    first, second = _ticket("first"), _ticket("second")
    other = _ticket("other", tenant="other", now=1.0)
    for ticket in (first, second, other):
        queue.add(ticket)
    # Who is passed over has had a turn: the other tenant is next.
    assert queue.first({first}) is other
    assert queue.first({first, other}) is second
    assert queue.first({first, other, second}) is None


def test_the_one_who_holds_most_gives_way(queue: PoolQueue) -> None:
    for index in range(5):
        queue.add(_ticket(f"flood{index}", now=float(index), tenant="flood"))
    for index in range(3):
        queue.add(_ticket(f"calm{index}", now=float(index), tenant="calm"))
    newest = queue.heaviest(_ticket("x", tenant="new"))
    assert newest is not None
    assert newest.request.request_id == "flood4"
    assert queue.heaviest(_ticket("x", tenant="flood")) is None
    below = queue.heaviest(_ticket("x", tenant="flood", priority=1))
    assert below is newest
    assert queue.heaviest(_ticket("x", tenant="new", priority=-1)) is None


def test_work_ahead_counts_what_probably_goes_first(
    queue: PoolQueue, ledger: ServiceLedger
) -> None:
    for index in range(10):
        queue.add(_ticket(f"flood{index}", tenant="flood"))
    queue.add(_ticket("urgent", tenant="flood", priority=1))
    assert queue.work_before(_ticket("x", tenant="flood")) == 1100.0
    assert queue.work_before(_ticket("x", tenant="calm")) == 100.0
    queue.add(_ticket("calm0", tenant="calm"))
    queue.add(_ticket("calm1", tenant="calm"))
    assert queue.work_before(_ticket("x", tenant="calm")) == 500.0
    assert queue.work_before(_ticket("x", tenant="calm", attempt=1)) == 100.0


def test_a_settled_ticket_tells_its_listeners_once() -> None:
    ticket = _ticket("r")
    told: list[int] = []
    ticket.listeners.append(lambda: told.append(1))
    ticket.fail(UnavailableError("gone"))
    assert ticket.is_settled
    assert told == [1]
