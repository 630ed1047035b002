from services.scheduler.filters import eligible, with_room
from services.scheduler.views import Charge, WorkerRole, WorkerState
from tests.unit.scheduler.build import make_request, make_view


def test_only_ready_prefilling_workers_that_were_not_excluded_are_eligible() -> None:
    workers = [
        make_view("ready"),
        make_view("draining", state=WorkerState.DRAINING),
        make_view("suspect", state=WorkerState.SUSPECT),
        make_view("decode", worker={"role": WorkerRole.DECODE}),
        make_view("prefill", worker={"role": WorkerRole.PREFILL}),
        make_view("small", worker={"context_length": 1000}),
        make_view("excluded"),
    ]
    request = make_request(excluded_worker_ids=frozenset({"excluded"}))
    assert [view.worker_id for view in eligible(request, workers)] == ["ready", "prefill"]


def test_a_worker_with_a_long_queue_has_no_room() -> None:
    workers = [
        make_view("short", num_waiting=1, num_waiting_uncached_tokens=7_000),
        make_view("long", num_waiting=1, num_waiting_uncached_tokens=9_000),
        make_view("charged", charge=Charge(1, prefill_ns=200_000_000)),
    ]
    assert [view.worker_id for view in with_room(make_request(), workers)] == ["short"]


def test_a_worker_with_all_sequences_taken_has_no_room() -> None:
    limit = {"max_running_sequences": 4}
    workers = [
        make_view("two", worker=limit, num_running=2),
        make_view("three", worker=limit, num_running=3),
        make_view("charged", worker=limit, num_running=2, charge=Charge(1)),
    ]
    request = make_request(num_choices=2)
    assert [view.worker_id for view in with_room(request, workers)] == ["two"]


def test_pages_must_suffice_evictable_ones_included() -> None:
    workers = [
        make_view("enough", num_running=1, num_free_pages=50, num_evictable_pages=50),
        make_view("promised", num_running=1, num_free_pages=100, charge=Charge(0, 50)),
        make_view("few", num_running=1, num_free_pages=50),
    ]
    assert [view.worker_id for view in with_room(make_request(), workers)] == ["enough"]


def test_an_idle_worker_has_room_for_anything() -> None:
    idle = make_view("idle", num_free_pages=0, worker={"max_running_sequences": 1})
    assert with_room(make_request(num_choices=8), [idle]) == [idle]
