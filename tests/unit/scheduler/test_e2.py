"""E2 against the paper's rules (arXiv 2407.00023, section 3.2)."""

from services.scheduler.costs import CostModel
from services.scheduler.policies.e2 import (
    E2,
    MIN_REQUESTS_A_WORKER,
    WINDOW_S,
    e2_branch,
)
from services.scheduler.policy import Query
from services.scheduler.views import WorkerView
from tests.unit.scheduler.build import chain, make_request, make_view

NO_COSTS: list[float] = []
PREFILL_ONLY = CostModel(decode_base_ns=0.0, decode_sequence_ns=0.0, decode_context_ns=0.0)


def query(
    number: int, cached: dict[str, int] | None = None, now_s: float = 0.0, tokens: int = 1600
) -> Query:
    request = make_request(
        f"r{number}", num_prompt_tokens=tokens, prefix_hashes=chain(1, tokens // 16)
    )
    return Query(request, cached or {}, 10, None, now_s)


def choose(policy: E2, asked: Query, workers: list[WorkerView]) -> str:
    return workers[policy(asked, workers, NO_COSTS)].worker_id


def give(policy: E2, worker: WorkerView, count: int, now_s: float = 0.0, first: int = 1000) -> None:
    """Load `worker` with requests of its own."""
    for number in range(first, first + count):
        choose(policy, query(number, {}, now_s), [worker])


def test_a_match_of_more_than_half_is_exploited_whatever_the_load() -> None:
    policy, workers = E2(), [make_view("a"), make_view("b")]
    give(policy, workers[0], 5)
    asked = query(1, {"a": 816})
    assert choose(policy, asked, workers) == "a"
    assert e2_branch(asked, workers[0]) == "exploit"


def test_a_match_of_half_or_less_is_explored_towards_the_least_given_load() -> None:
    policy, workers = E2(), [make_view("a"), make_view("b")]
    give(policy, workers[0], 5)
    asked = query(1, {"a": 800})
    assert choose(policy, asked, workers) == "b"
    assert e2_branch(asked, workers[1]) == "explore"


def test_equal_matches_go_to_the_lighter_holder() -> None:
    policy, workers = E2(), [make_view("a"), make_view("b"), make_view("c")]
    give(policy, workers[0], 2)
    assert choose(policy, query(1, {"a": 1584, "b": 1584}), workers) == "b"


def test_the_load_of_more_than_three_minutes_ago_is_forgotten() -> None:
    policy, workers = E2(), [make_view("a"), make_view("b")]
    give(policy, workers[0], 5)
    give(policy, workers[1], 1, now_s=WINDOW_S, first=2000)
    assert choose(policy, query(1, {}, now_s=WINDOW_S), workers) == "b"
    assert choose(policy, query(2, {}, now_s=WINDOW_S + 1), workers) == "a"


def test_exploring_counts_what_the_worker_would_evict() -> None:
    full = {"num_free_pages": 0, "eviction_cost_ns": (1e9, 2e9, 4e9)}
    empty = {"num_free_pages": 0, "eviction_cost_ns": (1.0, 2.0, 4.0)}
    workers = [make_view("hot", **full), make_view("stale", **empty)]
    policy = E2()
    assert [choose(policy, query(number), workers) for number in range(3)] == ["stale"] * 3


def test_exploring_counts_what_the_worker_lacks() -> None:
    policy, workers = E2(), [make_view("a"), make_view("b")]
    assert choose(policy, query(1, {"b": 640}), workers) == "b"


def test_exploitation_leaves_a_worker_much_heavier_than_the_lightest() -> None:
    policy, workers = E2(), [make_view("a"), make_view("b")]
    give(policy, workers[0], 2 * MIN_REQUESTS_A_WORKER)
    asked = query(1, {"a": 1584})
    assert choose(policy, asked, workers) == "b"
    assert e2_branch(asked, workers[1]) == "shift"


def test_a_prefix_whose_queueing_doubles_gets_another_worker_once() -> None:
    policy, workers = E2(), [make_view("a"), make_view("b")]
    give(policy, workers[0], MIN_REQUESTS_A_WORKER, now_s=100.0)
    give(policy, workers[1], MIN_REQUESTS_A_WORKER, now_s=100.0, first=3000)
    short = [make_view("a", num_waiting_uncached_tokens=1000), workers[1]]
    long = [make_view("a", num_waiting_uncached_tokens=4000), workers[1]]
    cached = {"a": 1584}
    assert choose(policy, query(1, cached, now_s=100.0), short) == "a"
    assert choose(policy, query(2, cached, now_s=200.0), long) == "a"
    assert choose(policy, query(3, cached, now_s=201.0), long) == "b"
    assert choose(policy, query(4, cached, now_s=202.0), long) == "a"


def test_prompts_that_mostly_prefill_go_where_decoding_prevails() -> None:
    policy = E2()
    decoding = make_view("decoding", num_running=8)
    prefilling = make_view("prefilling", cost_model=PREFILL_ONLY)
    for number in range(3):
        request = make_request(f"d{number}", num_prompt_tokens=16)
        policy(Query(request, {}, 500), [decoding], NO_COSTS)
    give(policy, prefilling, 1)
    workers = [prefilling, make_view("decoding", num_running=8, cost_model=PREFILL_ONLY)]
    assert choose(policy, query(1, tokens=32_000), workers) == "decoding"


def test_an_assignment_is_final_while_the_worker_is_there() -> None:
    policy, workers = E2(), [make_view("a"), make_view("b")]
    asked = query(1, {"a": 1584})
    assert choose(policy, asked, workers) == "a"
    give(policy, workers[0], 9)
    assert choose(policy, query(1, {"b": 1584}), workers) == "a"
    assert choose(policy, query(1, {"b": 1584}), workers[1:]) == "b"
