"""How busy a pool is, for whoever decides how many workers it has."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, strategies as st

from services.scheduler.filters import MAX_QUEUED_PREFILL_NS, has_room
from services.scheduler.pool_load import (
    PoolLoadCollector,
    PoolLoads,
    kv_used_ratio,
    saturation,
)
from services.scheduler.views import Charge, WorkerState, WorkerView
from tests.unit.scheduler.build import make_request, make_view
from tests.unit.scheduler.scheduler import Scheduler, make_scheduler

SMALL: dict[str, Any] = {"num_pages": 100, "max_running_sequences": 10}


def view(**changes: Any) -> WorkerView:
    """A worker of 100 pages and 10 sequences."""
    return make_view(worker=SMALL, **{"num_free_pages": 100, **changes})


def loads_of(scheduler: Scheduler) -> PoolLoads:
    return PoolLoads(scheduler.pools, scheduler.table, scheduler.placer.queue, scheduler.clock)


def test_an_idle_pool_is_not_saturated() -> None:
    assert saturation([view(), view()], 0) == 0.0
    assert kv_used_ratio([view()]) == 0.0


def test_nothing_is_known_without_a_ready_worker() -> None:
    for views in ([], [view(state=WorkerState.DRAINING, num_running=5)]):
        assert saturation(views, 7) is None
        assert kv_used_ratio(views) is None


def test_saturation_is_the_share_of_sequences_over_all_ready_workers() -> None:
    views = [view(num_running=4, num_waiting=1), view(), view(state=WorkerState.SUSPECT)]
    assert saturation(views, 0) == 5 / 20
    charged = [view(charge=Charge(num_sequences=3)), view()]
    assert saturation(charged, 0) == 3 / 20


def test_it_grows_with_the_backlog_beyond_one() -> None:
    assert saturation([view(num_running=10)], 20) == 3.0


def test_pages_that_are_only_cached_are_free() -> None:
    busy = view(num_running=1, num_free_pages=5, num_evictable_pages=35)
    assert kv_used_ratio([busy, view()]) == pytest.approx(0.3)
    assert saturation([busy], 0) == pytest.approx(0.6)


def test_promised_pages_count_before_they_are_taken() -> None:
    promised = view(charge=Charge(num_pages=90))
    assert saturation([promised], 0) == pytest.approx(0.9)
    assert kv_used_ratio([promised]) == 0.0


def test_one_long_prompt_fills_one_workers_queue_and_no_more() -> None:
    long = view(charge=Charge(prefill_ns=int(50 * MAX_QUEUED_PREFILL_NS)))
    assert saturation([long], 0) == 1.0
    assert saturation([long, view(), view(), view()], 0) == 0.25


@given(
    st.lists(
        st.builds(
            view,
            num_running=st.integers(0, 10),
            num_free_pages=st.integers(0, 60),
            num_evictable_pages=st.integers(0, 40),
            charge=st.builds(
                Charge,
                num_sequences=st.integers(0, 10),
                num_pages=st.integers(0, 100),
                prefill_ns=st.integers(0, int(3 * MAX_QUEUED_PREFILL_NS)),
            ),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_where_no_worker_has_room_for_one_token_something_is_full(views: list[WorkerView]) -> None:
    request = make_request(num_prompt_tokens=1)
    value = saturation(views, 0)
    assert value is not None
    if all(each.num_free_sequences <= 0 for each in views):
        assert value >= 1.0
    if all(each.queued_prefill_ns >= MAX_QUEUED_PREFILL_NS for each in views):
        assert value >= 1.0
    if value == 0.0:
        assert all(has_room(request, each) for each in views)


def test_the_oldest_request_is_the_one_that_waits_longest_here() -> None:
    scheduler = make_scheduler(max_queued=10)
    scheduler.register("w0", max_running_sequences=1)
    assert loads_of(scheduler).read()[0].oldest_queued_s == 0.0
    scheduler.schedule("placed")
    scheduler.schedule("first", priority=-1)
    scheduler.clock.advance(3.0)
    scheduler.schedule("second", priority=1)
    (load,) = loads_of(scheduler).read()
    assert (load.model, load.num_queued, load.oldest_queued_s) == ("model", 2, 3.0)
    assert load.saturation == 3.0


def test_a_pool_that_nobody_has_named_has_no_load() -> None:
    assert loads_of(make_scheduler()).read() == []


def test_unknown_values_have_no_sample() -> None:
    scheduler = make_scheduler()
    scheduler.metrics.registry.register(PoolLoadCollector(loads_of(scheduler)))
    registry = scheduler.metrics.registry

    def value(name: str, **labels: str) -> float | None:
        labels = {"model": "model", **labels}
        return registry.get_sample_value(f"rhizome_scheduler_{name}", labels)

    registration = scheduler.register("w0")
    assert (value("saturation"), value("kv_used_ratio")) == (0.0, 0.0)
    assert (value("workers", state="ready"), value("workers", state="draining")) == (1.0, 0.0)
    scheduler.table.drain("w0", "test")
    assert (value("saturation"), value("kv_used_ratio")) == (None, None)
    assert (value("workers", state="ready"), value("workers", state="draining")) == (0.0, 1.0)
    scheduler.placer.unregister(registration)
    assert value("oldest_queued_seconds") == 0.0
