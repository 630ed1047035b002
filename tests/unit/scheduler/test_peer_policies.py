"""The policies of other systems, each against its own rule."""

from collections import Counter

from services.scheduler.policies.dynamo_cost import dynamo_blocks
from services.scheduler.policies.least_outstanding import LeastOutstanding
from services.scheduler.policies.prefix_hash import PrefixHash
from services.scheduler.policies.prefix_threshold import PrefixThreshold
from services.scheduler.policies.session_affinity import SessionAffinity
from services.scheduler.policy import Picker, Query
from services.scheduler.views import Charge, WorkerView
from tests.unit.scheduler.build import chain, make_query, make_request, make_view


def pick(picker: Picker, query: Query, workers: list[WorkerView]) -> str:
    return workers[picker(query, workers, [0.0] * len(workers))].worker_id


def test_least_outstanding_counts_requests_and_not_their_cost() -> None:
    workers = [
        make_view("two_small", num_running=2),
        make_view("one_huge", num_waiting=1, num_waiting_uncached_tokens=90_000),
        make_view("three", num_running=1, charge=Charge(2)),
    ]
    assert pick(LeastOutstanding(), make_query(), workers) == "one_huge"


def test_least_outstanding_takes_equals_in_turn() -> None:
    workers = [make_view(name) for name in "abc"]
    picker = LeastOutstanding()
    assert [pick(picker, make_query(), workers) for _ in range(4)] == ["a", "b", "c", "a"]


def test_prefix_threshold_takes_the_longest_match_above_the_threshold() -> None:
    workers = [make_view("a", num_running=60), make_view("b"), make_view("c")]
    query = make_query(make_request(num_prompt_tokens=1000), {"a": 320, "b": 304})
    assert pick(PrefixThreshold(), query, workers) == "a"


def test_prefix_threshold_takes_the_emptiest_cache_below_the_threshold() -> None:
    workers = [
        make_view("a", num_free_pages=100),
        make_view("b", num_free_pages=9000, num_running=9),
        make_view("c", num_free_pages=9500, charge=Charge(0, 1000)),
    ]
    query = make_query(make_request(num_prompt_tokens=1000), {"a": 288})
    assert pick(PrefixThreshold(), query, workers) == "b"


def test_prefix_threshold_leaves_its_match_only_when_both_bounds_are_passed() -> None:
    query = make_query(make_request(num_prompt_tokens=1000), {"a": 992})
    for idle, busy, chosen in ((1, 66, "b"), (1, 65, "a"), (200, 290, "a")):
        workers = [make_view("a", num_running=busy), make_view("b", num_running=idle)]
        assert pick(PrefixThreshold(), query, workers) == chosen


def test_dynamo_adds_the_blocks_to_prefill_and_to_decode() -> None:
    worker = make_view(
        "a",
        num_waiting_uncached_tokens=160,
        num_running_context_tokens=320,
        charge=Charge(1, num_pages=5, num_context_tokens=80),
    )
    query = make_query(make_request(num_prompt_tokens=1600), {"a": 800})
    prefill, decode = 10 + 50 + 5, 20 + 5 + 100
    assert dynamo_blocks(query, [worker]) == [prefill + decode]


def test_a_session_stays_where_it_is_and_moves_when_that_is_gone() -> None:
    workers = [make_view("home", num_running=60), make_view("b")]
    picker = SessionAffinity()
    assert pick(picker, make_query(home_worker_id="home"), workers) == "home"
    assert pick(picker, make_query(home_worker_id="gone"), workers) == "b"
    assert pick(picker, make_query(), workers) == "b"


def hashed(name: int, num_pages: int = 60) -> Query:
    return make_query(make_request(prefix_hashes=chain(name, num_pages)))


def test_prefix_hash_keeps_prompts_with_one_beginning_together() -> None:
    workers = [make_view(name) for name in "abcd"]
    long, longer = hashed(7, 20), hashed(7, 60)
    assert pick(PrefixHash(), long, workers) == pick(PrefixHash(), longer, workers)
    spread = Counter(pick(PrefixHash(), hashed(name), workers) for name in range(200))
    assert set(spread) == set("abcd")


def test_prefix_hash_moves_only_prompts_of_a_worker_that_leaves() -> None:
    workers = [make_view(name) for name in "abcd"]
    before = {name: pick(PrefixHash(), hashed(name), workers) for name in range(100)}
    after = {name: pick(PrefixHash(), hashed(name), workers[1:]) for name in range(100)}
    assert {name for name in before if before[name] != after[name]} == {
        name for name in before if before[name] == "a"
    }


def test_prefix_hash_passes_over_a_worker_with_more_than_its_share() -> None:
    query = hashed(7)
    idle = [make_view(name) for name in "abcd"]
    owner = pick(PrefixHash(), query, idle)
    # The bound of 4 workers with 11 + 1 requests is 1.25 x 3, rounded up.
    at_bound = [make_view(n, num_running=4 if n == owner else 2 + (n > owner)) for n in "abcd"]
    assert pick(PrefixHash(), query, at_bound) != owner
    below = [make_view(n, num_running=3) for n in "abcd"]
    assert pick(PrefixHash(), query, below) == owner


def test_prefix_hash_spreads_prompts_too_short_to_hash() -> None:
    workers = [make_view("a", num_running=1), make_view("b")]
    assert pick(PrefixHash(), make_query(make_request(num_prompt_tokens=5)), workers) == "b"
