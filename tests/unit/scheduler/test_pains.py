"""Known failures of other routers, played through the real placer under load-aware policies."""

import random
from collections import Counter
from typing import Any

import pytest

from services.common.policies import PolicyName
from services.scheduler.policies import make_policy
from services.scheduler.policy import Policy
from services.scheduler.views import Load
from tests.unit.scheduler.build import PAGE_SIZE, chain
from tests.unit.scheduler.scheduler import Scheduler, make_scheduler, worker_of

# Those that are meant to be used; the others are baselines.
OURS: tuple[PolicyName, ...] = ("prefix_load", "e2")
LOAD_AWARE: tuple[PolicyName, ...] = (
    *OURS,
    "least_loaded",
    "least_outstanding",
    "power_of_two",
    "dynamo_cost",
    "session_affinity",
)


def _policy(name: PolicyName, **weights: float) -> Policy:
    return make_policy(name, random.Random(1), **weights)


def _scheduler(policy: Policy, num_workers: int = 4) -> Scheduler:
    scheduler = make_scheduler(max_queued=100, policy=policy)
    for number in range(num_workers):
        scheduler.register(f"w{number}")
    return scheduler


def _report(scheduler: Scheduler, worker_id: str, *admitted_ids: int, **load: Any) -> None:
    report = Load(**{"num_free_pages": 10_000, **load})
    scheduler.placer.report_load(scheduler.registrations[worker_id], report, admitted_ids)


def _place(scheduler: Scheduler, number: int, num_pages: int, **changes: Any) -> str:
    """Where a prompt that shares nothing with other numbers' goes at once."""
    ticket = scheduler.schedule(
        f"r{number}",
        prefix_hashes=chain(number, num_pages),
        num_prompt_tokens=num_pages * PAGE_SIZE + 5,
        **changes,
    )
    return worker_of(ticket)


@pytest.mark.parametrize("name", OURS)
def test_pain_01_p_cold_prompts_do_not_follow_each_other_to_the_emptiest_cache(
    name: PolicyName,
) -> None:
    scheduler = _scheduler(_policy(name))
    # The first worker is new and empty. The pages of the others are those of prefixes, and one
    # that is evicted would cost every tenth request its 16 tokens.
    curve = tuple(40_000.0 * 2**power for power in range(14))
    full = {"num_free_pages": 0, "num_evictable_pages": 10_000, "eviction_cost_ns": curve}
    for number in (1, 2, 3):
        _report(scheduler, f"w{number}", **full)
    chosen = Counter(_place(scheduler, number, num_pages=60) for number in range(24))
    assert max(chosen.values()) <= 8
    # Nor do its requests follow each other when it dies.
    scheduler.placer.unregister(scheduler.registrations["w0"])
    moved = Counter(
        _place(scheduler, number, 60, attempt=1, excluded_worker_ids=frozenset({"w0"}))
        for number in range(6)
    )
    assert len(moved) == 3
    assert max(moved.values()) <= 3


@pytest.mark.parametrize("name", LOAD_AWARE)
def test_pain_03_p_load_counts_before_any_worker_reports_it(name: PolicyName) -> None:
    scheduler = _scheduler(_policy(name))
    busy = _place(scheduler, 0, num_pages=100, num_choices=20)
    chosen = Counter(_place(scheduler, number, num_pages=12) for number in range(1, 10))
    assert chosen[busy] == 0
    assert max(chosen.values()) <= 4


def test_pain_04_p_what_decodes_does_not_count_as_prefill() -> None:
    scheduler = _scheduler(_policy("prefix_load"), num_workers=1)
    ticket = scheduler.schedule("r", num_prompt_tokens=4000)
    assert scheduler.view("w0").queued_prefill_ns > 50e6
    assert ticket.reservation is not None
    reservation_id = ticket.reservation.reservation_id
    _report(scheduler, "w0", reservation_id, num_running=1, num_running_context_tokens=4000)
    view = scheduler.view("w0")
    assert (view.queued_prefill_ns, view.num_active) == (0.0, 1)


def test_pain_05_p_a_prefix_that_all_ask_for_is_soon_on_every_worker() -> None:
    scheduler = _scheduler(_policy("prefix_load"))
    running: Counter[str] = Counter()
    for number in range(120):
        ticket = scheduler.schedule(
            f"r{number}", prefix_hashes=chain(0, 60), num_prompt_tokens=60 * PAGE_SIZE + 5
        )
        chosen = worker_of(ticket)
        running[chosen] += 1
        assert ticket.reservation is not None
        num = running[chosen]
        admitted = ticket.reservation.reservation_id
        _report(scheduler, chosen, admitted, num_running=num, num_running_context_tokens=num * 1000)
    assert len(running) == 4
    assert max(running.values()) <= 60


def test_pain_06_p_a_placement_makes_one_workers_view_anew() -> None:
    scheduler = _scheduler(_policy("prefix_load"), num_workers=1000)
    before = scheduler.table.snapshot(scheduler.pool)
    chosen = _place(scheduler, 0, num_pages=60)
    after = scheduler.table.snapshot(scheduler.pool)
    changed = [new.worker_id for old, new in zip(before, after, strict=True) if old is not new]
    assert changed == [chosen]


@pytest.mark.parametrize("name", LOAD_AWARE)
def test_pain_08_p_prompts_shorter_than_a_page_spread(name: PolicyName) -> None:
    scheduler = _scheduler(_policy(name))
    busy = _place(scheduler, 0, num_pages=100, num_choices=20)
    chosen = Counter(_place(scheduler, number, num_pages=0) for number in range(1, 13))
    assert chosen[busy] == 0
    assert max(chosen.values()) <= 5


@pytest.mark.parametrize("load_weight", [0.01, 1.0, 100.0])
def test_pain_08_p_prompts_shorter_than_a_page_feel_load_whatever_its_weight(
    load_weight: float,
) -> None:
    scheduler = _scheduler(_policy("prefix_load", load_weight=load_weight))
    _report(scheduler, "w0", num_running=20, num_running_context_tokens=20_000)
    chosen = Counter(_place(scheduler, number, num_pages=0) for number in range(12))
    assert chosen == {"w1": 4, "w2": 4, "w3": 4}
