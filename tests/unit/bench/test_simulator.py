"""The simulator: what arrives ends, equal seeds give equal results, and time is only virtual."""

from typing import get_args

import pytest

from bench.simulator.clock import VirtualClock
from bench.simulator.cluster import Cluster
from bench.simulator.records import Delays, Loss
from bench.simulator.run import Setting, capacity, figures, simulate
from bench.simulator.worker import WorkerShape
from bench.simulator.workloads import (
    SMALL_WORKLOADS,
    WORKLOADS,
    Conversation,
    Segment,
    Turn,
    Workload,
    make_workload,
)
from services.common.policies import PolicyName

SMALL = Setting(workload="zipf", num_workers=3, num_requests=60)


def test_actions_run_by_time_and_then_in_the_order_they_were_asked_for() -> None:
    clock, ran = VirtualClock(), []
    for name, delay in (("late", 5), ("first", 1), ("second", 1)):
        clock.after(delay, lambda name=name: ran.append((clock.now_ns, name)))
    clock.run(until=lambda: len(ran) == 3)
    assert ran == [(1, "first"), (1, "second"), (5, "late")]


def test_a_run_that_cannot_end_says_so() -> None:
    with pytest.raises(RuntimeError, match="nothing is left"):
        VirtualClock().run(until=lambda: False)


@pytest.mark.parametrize("policy", get_args(PolicyName))
def test_every_request_ends_under_every_policy(policy: PolicyName) -> None:
    result = simulate(SMALL, policy, rate=200.0)
    assert result.num_served == SMALL.num_requests
    assert 0 <= result.hit_rate <= 1
    assert result.mean_first_token_s <= result.mean_s <= result.p99_s * SMALL.num_requests


@pytest.mark.parametrize("workload", [*WORKLOADS, *SMALL_WORKLOADS])
def test_every_workload_is_served_whole(workload: str) -> None:
    setting = Setting(workload=workload, num_workers=2, num_requests=16)
    assert simulate(setting, "prefix_load", rate=5.0).num_served == 16


def test_equal_seeds_give_equal_results_and_others_do_not() -> None:
    first = simulate(SMALL, "prefix_load", 100.0)
    assert simulate(SMALL, "prefix_load", 100.0) == first
    other = Setting(workload="zipf", num_workers=3, num_requests=60, seed=9)
    assert simulate(other, "prefix_load", 100.0) != first


def test_a_lost_workers_requests_end_on_others_with_every_token() -> None:
    workload = make_workload("random", 40, seed=1)
    cluster = Cluster(3, "prefix_load", shape=WorkerShape(), delays=Delays(), seed=1)
    arrivals = workload.arrivals_ns(100.0, seed=3)
    served = cluster.serve(workload, arrivals, (Loss(at_s=0.5, worker=0, back_after_s=1.0),))
    assert len(served) == 40
    assert sum(request.num_attempts > 1 for request in served) > 0
    assert [metrics.value("reservations_charged") for metrics in cluster.metrics] == [0]


def test_several_schedulers_serve_everything_and_charge_nothing_in_the_end() -> None:
    workload = make_workload("shared_prefix", 60, seed=1)
    cluster = Cluster(
        3, "prefix_load", shape=WorkerShape(), delays=Delays(), seed=1, num_schedulers=2
    )
    assert len(cluster.serve(workload, workload.arrivals_ns(20.0, seed=3))) == 60
    assert [metrics.value("reservations_charged") for metrics in cluster.metrics] == [0, 0]
    placed = [
        metrics.value("queue_seconds_count", priority="normal") for metrics in cluster.metrics
    ]
    assert placed == [30, 30]


@pytest.mark.parametrize("output_len", [1, 16, 64, 128, 512])
def test_64_requests_with_one_new_prefix_cost_at_most_2_prefills_of_it(output_len: int) -> None:
    prefix, own_len = Segment(1000, 4096), 8
    turns = [Turn((prefix, Segment(10_000 + 8 * i, own_len)), output_len) for i in range(64)]
    burst = Workload("burst", tuple(Conversation((turn,)) for turn in turns), burst=64)
    cluster = Cluster(4, "prefix_load", shape=WorkerShape(), delays=Delays(), seed=1)
    served = cluster.serve(burst, burst.arrivals_ns(1.0, seed=1))
    computed = sum(request.prompt_tokens - request.cached_tokens for request in served)
    assert computed <= 2 * prefix.length + 64 * (own_len + WorkerShape().page_size)


def test_a_shared_prefix_is_found_and_an_unshared_one_is_not() -> None:
    shared = Setting(workload="shared_prefix", num_workers=1, num_requests=200)
    assert simulate(shared, "prefix_load", 20.0).hit_rate > 0.5
    unshared = Setting(workload="random", num_workers=1, num_requests=20)
    assert simulate(unshared, "prefix_load", 20.0).hit_rate == 0


def test_a_later_turn_finds_its_history() -> None:
    setting = Setting(workload="multi_turn", num_workers=1, num_requests=60)
    assert simulate(setting, "prefix_load", 2.0).hit_rate > 0.6


def test_capacity_is_what_round_robin_ends_at_saturation() -> None:
    setting = Setting(workload="random", num_workers=2, num_requests=60)
    rate = capacity(setting, "round_robin")
    doubled = Setting(workload="random", num_workers=4, num_requests=120)
    assert capacity(doubled, "round_robin") == pytest.approx(2 * rate, rel=0.25)
    assert (
        simulate(setting, "round_robin", rate / 4).mean_s
        < simulate(setting, "round_robin", rate * 2).mean_s
    )


def test_slow_reports_and_events_change_results_and_lose_nothing() -> None:
    slow = Delays(report=400_000_000, events=800_000_000, schedule=20_000_000)
    delayed = Setting(workload="zipf", num_workers=3, num_requests=60, delays=slow)
    result = simulate(delayed, "prefix_load", 100.0)
    assert result.num_served == 60
    assert result.mean_s > simulate(SMALL, "prefix_load", 100.0).mean_s


def test_requests_of_the_warm_up_are_not_measured() -> None:
    workload = make_workload("random", 20, seed=1)
    cluster = Cluster(1, "random", shape=WorkerShape(), delays=Delays(), seed=1)
    served = cluster.serve(workload, workload.arrivals_ns(5.0, seed=1))
    assert figures(served, 1).num_requests == 18


def test_the_preble_workloads_have_the_lengths_of_its_table() -> None:
    table = {"toolbench": 1835, "embodied": 2285, "videoqa": 9865, "loogle": 23474}
    for name, mean in table.items():
        workload = make_workload(name, 2000, seed=1)
        lengths = [turn.prompt_len for item in workload.conversations for turn in item.turns]
        assert sum(lengths) / len(lengths) == pytest.approx(mean, rel=0.25), name
