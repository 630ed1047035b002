from services.scheduler.costs import CostModel
from services.scheduler.scorers.load import load_time
from services.scheduler.scorers.prefix import prefill_time
from services.scheduler.scorers.session import away_from_home
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
    step = 100 + 7 * (3 + 1 + 2 + 2) + 3 * (400 + 60 + 10)
    assert load_time(query, [worker]) == [queued + 5 * step]


def test_leaving_a_sessions_worker_costs_a_prefill() -> None:
    workers = [make_view("a", cost_model=COSTS), make_view("b", cost_model=COSTS)]
    request = make_request(num_prompt_tokens=100)
    full = COSTS.prefill_ns(100, 100)
    assert away_from_home(make_query(request, home_worker_id="b"), workers) == [full, 0.0]
    assert away_from_home(make_query(request), workers) is None
