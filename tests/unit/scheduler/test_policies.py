"""Each policy on small snapshots, and the default one against the peers' known failures."""

import random
from collections import Counter

import pytest

from services.common.policies import PolicyName
from services.scheduler.policies import make_policy
from services.scheduler.policy import Policy, Query
from services.scheduler.views import Charge, WorkerView
from tests.unit.scheduler.build import make_query, make_request, make_view


def _policy(name: PolicyName = "prefix_load") -> Policy:
    return make_policy(name, random.Random(1))


def _picks(policy: Policy, query: Query, workers: list[WorkerView], count: int) -> Counter[str]:
    return Counter(policy.choose(query, workers).worker_id for _ in range(count))


def test_round_robin_takes_each_in_turn() -> None:
    workers = [make_view(name) for name in "abc"]
    policy = _policy("round_robin")
    chosen = [policy.choose(make_query(), workers).worker_id for _ in range(6)]
    assert chosen == ["a", "b", "c", "a", "b", "c"]


def test_rotation_goes_on_when_a_worker_leaves() -> None:
    policy = _policy("round_robin")
    workers = [make_view(name) for name in "abc"]
    assert policy.choose(make_query(), workers).worker_id == "a"
    assert policy.choose(make_query(), workers[1:]).worker_id == "b"
    assert policy.choose(make_query(), workers).worker_id == "c"


def test_random_reaches_every_worker() -> None:
    workers = [make_view(name) for name in "abc"]
    assert set(_picks(_policy("random"), make_query(), workers, 100)) == {"a", "b", "c"}


def test_least_loaded_takes_the_shortest_wait() -> None:
    workers = [
        make_view("busy", num_waiting_uncached_tokens=5000, num_waiting=2),
        make_view("idle"),
        make_view("charged", charge=Charge(1, prefill_ns=100_000_000)),
    ]
    assert _policy("least_loaded").choose(make_query(), workers).worker_id == "idle"


def test_power_of_two_never_takes_the_worst_of_all() -> None:
    workers = [
        make_view("worst", num_waiting_uncached_tokens=9000, num_waiting=2),
        *(make_view(name) for name in "abc"),
    ]
    picks = _picks(_policy("power_of_two"), make_query(), workers, 200)
    assert picks["worst"] == 0
    assert set(picks) == {"a", "b", "c"}


def test_power_of_two_takes_a_single_worker() -> None:
    assert _policy("power_of_two").choose(make_query(), [make_view("a")]).worker_id == "a"


def test_a_long_match_wins_over_a_little_load() -> None:
    workers = [make_view("owner", num_running=4), make_view("idle")]
    query = make_query(make_request(num_prompt_tokens=4000), {"owner": 3900})
    policy = _policy()
    chosen = policy.choose(query, workers)
    assert chosen.worker_id == "owner"
    assert policy.branch(query, chosen) == "prefix_load/affinity"


def test_pain_05_p_a_hot_prefix_leaves_its_overloaded_owner() -> None:
    workers = [
        make_view("owner", num_waiting=3, num_waiting_uncached_tokens=7000, num_running=30),
        make_view("idle"),
    ]
    query = make_query(make_request(num_prompt_tokens=4000), {"owner": 3900})
    policy = _policy()
    chosen = policy.choose(query, workers)
    assert chosen.worker_id == "idle"
    assert policy.branch(query, chosen) == "prefix_load/spread"


def test_pain_02_p_imbalance_elsewhere_does_not_end_affinity() -> None:
    workers = [
        make_view("swamped", num_waiting=9, num_waiting_uncached_tokens=50_000, num_running=60),
        make_view("owner", num_running=5),
        make_view("idle"),
    ]
    query = make_query(make_request(num_prompt_tokens=4000), {"owner": 3900})
    assert _policy().choose(query, workers).worker_id == "owner"


def test_pain_08_p_short_prompts_spread_over_equal_workers() -> None:
    workers = [make_view(name) for name in "abcd"]
    query = make_query(make_request(num_prompt_tokens=5))
    policy = _policy()
    assert _picks(policy, query, workers, 40) == {"a": 10, "b": 10, "c": 10, "d": 10}
    assert policy.branch(query, workers[0]) == "prefix_load/cold"


def test_near_ties_go_to_the_less_active() -> None:
    workers = [make_view("a", num_running=2), make_view("b", num_running=1)]
    query = make_query(make_request(num_prompt_tokens=5))
    assert _picks(_policy(), query, workers, 5) == {"b": 5}


def test_a_short_cached_prefix_wins_a_near_tie() -> None:
    workers = [make_view("a"), make_view("b", num_running=1)]
    query = make_query(make_request(num_prompt_tokens=40), {"b": 32})
    assert _picks(_policy(), query, workers, 5) == {"b": 5}


def test_a_follow_up_goes_home_without_a_known_match() -> None:
    workers = [make_view("a"), make_view("home", num_running=2)]
    query = make_query(make_request(num_prompt_tokens=4000), home_worker_id="home")
    assert _policy().choose(query, workers).worker_id == "home"


@pytest.mark.parametrize("matched", [0, 64])
def test_a_weight_of_zero_turns_a_term_off(matched: int) -> None:
    policy = make_policy("prefix_load", random.Random(1), load_weight=0.0, stall_weight=0.0)
    workers = [make_view("a", num_running=60), make_view("b")]
    query = make_query(make_request(num_prompt_tokens=4000), {"a": 3900, "b": matched})
    assert policy.choose(query, workers).worker_id == "a"
