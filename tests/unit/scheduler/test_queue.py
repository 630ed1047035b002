import pytest

from services.common.errors import OverloadedError, UnavailableError
from services.scheduler.pools import Pool
from services.scheduler.queue import PoolQueue, Ticket
from tests.unit.scheduler.build import make_request


def _ticket(name: str, now: float = 0.0, priority: int = 0, age_s: float = 0.0) -> Ticket:
    return Ticket(make_request(name, priority=priority), Pool({}), now, age_s=age_s)


def _names(queue: PoolQueue) -> list[str]:
    return [ticket.request.request_id for ticket in queue]


def test_priority_goes_first_then_first_arrival() -> None:
    queue = PoolQueue(10)
    for ticket in (
        _ticket("late", now=2.0),
        _ticket("early", now=1.0),
        _ticket("resumed", now=3.0, age_s=2.5),
        _ticket("urgent", now=9.0, priority=1),
        _ticket("early_too", now=1.0),
        _ticket("whenever", now=0.0, priority=-1),
    ):
        queue.add(ticket)
    assert _names(queue) == ["urgent", "resumed", "early", "early_too", "late", "whenever"]


def test_a_ticket_knows_how_many_are_ahead() -> None:
    queue = PoolQueue(10)
    tickets = [_ticket(str(index), now=float(index)) for index in range(4)]
    for ticket in tickets:
        queue.add(ticket)
    assert [queue.position(ticket) for ticket in tickets] == [0, 1, 2, 3]
    queue.remove(tickets[1])
    queue.remove(tickets[1])
    assert tickets[1] not in queue
    assert queue.position(tickets[3]) == 2
    assert queue[2] is tickets[3]


def test_a_full_queue_hints_at_its_pace() -> None:
    queue = PoolQueue(4)
    for index in range(4):
        queue.require_room(0.0)
        queue.add(_ticket(str(index)))
    with pytest.raises(OverloadedError) as unknown_pace:
        queue.require_room(0.0)
    assert unknown_pace.value.retry_after_s == 1.0
    for second in range(0, 20, 4):
        queue.note_placed(float(second))
    with pytest.raises(OverloadedError) as known_pace:
        queue.require_room(20.0)
    assert known_pace.value.retry_after_s == pytest.approx(16.0)


def test_a_settled_ticket_tells_its_listeners_once() -> None:
    ticket = _ticket("r")
    told: list[int] = []
    ticket.listeners.append(lambda: told.append(1))
    ticket.fail(UnavailableError("gone"))
    assert ticket.is_settled
    assert told == [1]
