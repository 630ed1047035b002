from services.scheduler.costs import CostModel
from services.scheduler.scorers.eviction import eviction_time
from services.scheduler.scorers.load import load_time
from services.scheduler.scorers.prefix import prefill_time
from services.scheduler.scorers.session import away_from_home
from services.scheduler.scorers.stall import stall_time
from services.scheduler.views import Charge
from tests.unit.scheduler.build import make_query, make_request, make_view

COSTS = CostModel(
    prefill_base_ns=1000.0,
    prefill_token_ns=10.0,
    prefill_context_ns=0.5,
    decode_base_ns=100.0,
    decode_sequence_ns=7.0,
    decode_context_ns=3.0,
)


def test_prefill_time_is_that_of_the_uncached_tokens() -> None:
    workers = [make_view("a", cost_model=COSTS), make_view("b", cost_model=COSTS)]
    query = make_query(make_request(num_prompt_tokens=100), {"a": 80})
    assert prefill_time(query, workers) == [
        1000 + 20 * 10 + 0.5 * 20 * 90,
        1000 + 100 * 10 + 0.5 * 100 * 50,
    ]


def test_a_fully_cached_prompt_costs_nothing() -> None:
    assert COSTS.prefill_ns(0, 100) == 0


def test_load_time_is_the_queue_and_decoding_beside_others() -> None:
    worker = make_view(
        "a",
        cost_model=COSTS,
        num_running=3,
        num_waiting=1,
        num_waiting_uncached_tokens=50,
        num_running_context_tokens=400,
        charge=Charge(2, 0, 60, 900),
    )
    query = make_query(make_request(num_prompt_tokens=10, num_choices=2), num_output_tokens=5)
    queued = 50 * 10 + 900
    step = 100 + 7 * (3 + 1 + 2 + 2) + 3 * (400 + 50 + 60 + 10)
    assert load_time(query, [worker]) == [queued + 5 * step]


def test_a_prefix_that_others_read_there_is_not_read_again() -> None:
    worker = make_view("a", cost_model=COSTS, num_running=2)
    request = make_request(num_prompt_tokens=100)
    alone = make_query(request, {"a": 80}, num_output_tokens=5)
    shared = make_query(request, {"a": 80}, num_output_tokens=5, shared_tokens={"a": 80})
    saved = 5 * 80 * 3.0
    assert load_time(alone, [worker])[0] - load_time(shared, [worker])[0] == saved
    assert stall_time(alone, [worker])[0] - stall_time(shared, [worker])[0] == 2 * saved


def test_leaving_a_sessions_worker_costs_a_prefill() -> None:
    workers = [make_view("a", cost_model=COSTS), make_view("b", cost_model=COSTS)]
    request = make_request(num_prompt_tokens=100)
    full = COSTS.prefill_ns(100, 100)
    assert away_from_home(make_query(request, home_worker_id="b"), workers) == [full, 0.0]
    assert away_from_home(make_query(request), workers) is None


def test_stall_is_what_each_active_sequence_loses() -> None:
    workers = [
        make_view("a", cost_model=COSTS, num_running=2, charge=Charge(1)),
        make_view("idle", cost_model=COSTS),
    ]
    query = make_query(
        make_request(num_prompt_tokens=100, num_choices=2), {"a": 80}, num_output_tokens=5
    )
    prefill = 20 * (10 + 0.5 * 90)
    rows = 2 * 5 * (7 + 3 * 100)
    assert stall_time(query, workers) == [3 * (prefill + rows), 0.0]


def test_eviction_costs_what_lies_beyond_the_free_pages() -> None:
    curve = (10.0, 30.0, 100.0)
    query = make_query(make_request(num_prompt_tokens=64), {"cached": 32})
    workers = [
        make_view("free", num_free_pages=4, eviction_cost_ns=curve),
        make_view("one", num_free_pages=3, eviction_cost_ns=curve),
        make_view("promised", num_free_pages=3, charge=Charge(1, 2), eviction_cost_ns=curve),
        make_view("cached", num_free_pages=0, eviction_cost_ns=curve),
        make_view("all", num_free_pages=0, eviction_cost_ns=curve),
        make_view("beyond", num_free_pages=0, eviction_cost_ns=curve[:2]),
        make_view("unknown", num_free_pages=0),
    ]
    # Between two and four pages the curve is a line.
    assert eviction_time(query, workers) == [0.0, 10.0, 65.0, 30.0, 100.0, 60.0, 0.0]


def test_a_sessions_worker_has_no_advantage_for_what_is_known_to_be_cached() -> None:
    workers = [make_view("a", cost_model=COSTS), make_view("b", cost_model=COSTS)]
    query = make_query(make_request(num_prompt_tokens=100), {"a": 80}, home_worker_id="b")
    assert away_from_home(query, workers) == [COSTS.prefill_ns(20, 100), 0.0]
