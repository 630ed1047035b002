"""Which waiting sequence is admitted first, and what that saves."""

import random

import pytest

from services.worker.engine.batching.policy import MAX_WAIT_NS
from tests.fakes.engine_driver import EngineDriver, make_request
from tests.fakes.simulation import Arrival, simulate

SETTINGS = {
    "num_pages": 450_000 // 16,
    "page_size": 16,
    "context_length": 8192,
    "max_running_sequences": 256,
    "max_step_tokens": 8192,
}


def admitted(engine: EngineDriver) -> list[int]:
    outputs = engine.outbox.outputs
    return [admission.key for output in outputs for admission in output.admissions]


def busy_engine(policy: str) -> EngineDriver:
    """One row at a time; the cache knows the prompt of ones."""
    engine = EngineDriver(max_running_sequences=1, policy=policy)
    engine.send(make_request(1, [1] * 20, max_new_tokens=1))
    engine.run()
    engine.send(make_request(2, [9] * 8, max_new_tokens=6))
    engine.step()
    return engine


@pytest.mark.parametrize(("policy", "order"), [("lpm", [1, 2, 4, 3]), ("fcfs", [1, 2, 3, 4])])
def test_the_longest_cached_prefix_goes_first_where_asked_for(
    policy: str, order: list[int]
) -> None:
    engine = busy_engine(policy)
    engine.send(make_request(3, [2] * 20), make_request(4, [1] * 20))
    engine.run()
    assert admitted(engine) == order


def test_among_equal_prefixes_arrival_decides() -> None:
    engine = busy_engine("lpm")
    engine.send(*(make_request(key, [1] * 18 + [key]) for key in (5, 4, 3)))
    engine.run()
    assert admitted(engine) == [1, 2, 5, 4, 3]


def test_priority_comes_before_prefixes() -> None:
    engine = busy_engine("lpm")
    engine.send(make_request(3, [1] * 20), make_request(4, [2] * 20, priority=1))
    engine.run()
    assert admitted(engine) == [1, 2, 4, 3]


def test_who_has_waited_for_long_goes_before_the_longest_prefix() -> None:
    engine = busy_engine("lpm")
    engine.send(make_request(3, [2] * 20))
    engine.step()
    engine.clock.now += MAX_WAIT_NS
    engine.send(make_request(4, [1] * 20))
    engine.run()
    assert admitted(engine) == [1, 2, 3, 4]


def interleaved_prefixes() -> list[Arrival]:
    """48 groups in turn, whose common prefixes do not fit a small pool together."""
    return [Arrival(0, 2048 + 64, 16, 2048, group) for _ in range(8) for group in range(48)]


def test_prefixes_that_do_not_all_fit_are_computed_once_with_lpm() -> None:
    small = SETTINGS | {"num_pages": 50_000 // 16}
    first = simulate(interleaved_prefixes(), policy="fcfs", **small)
    longest = simulate(interleaved_prefixes(), policy="lpm", **small)
    unique = 48 * 2048 + 8 * 48 * 64
    assert longest.prefilled < 1.2 * unique
    assert first.prefilled > 4 * unique
    assert longest.seconds < first.seconds / 2


def test_lpm_starves_nobody() -> None:
    """A stream of hits that fills the device does not keep a miss waiting beyond the limit."""
    rng = random.Random(0)
    hits = [Arrival(int(rng.random() * 40e9), 1024 + 16, 64, 1024, group=1) for _ in range(40 * 70)]
    missed = Arrival(int(5e9), 1024, 64)
    outcome = simulate([missed, *hits], policy="lpm", **SETTINGS | {"max_running_sequences": 16})
    assert outcome.first_token[0] < 2 * MAX_WAIT_NS / 1e9
    assert outcome.percentile(50) > MAX_WAIT_NS / 1e9, "the device was not full"


def batch512() -> list[Arrival]:
    return [Arrival(0, 1024, 128) for _ in range(512)]


def batch256() -> list[Arrival]:
    rng = random.Random(2)
    return [Arrival(0, rng.randint(100, 1024), rng.randint(100, 1024)) for _ in range(256)]


def poisson16() -> list[Arrival]:
    rng = random.Random(3)
    at = 0.0
    arrivals = []
    for _ in range(240):
        at += rng.expovariate(16)
        arrivals.append(Arrival(int(at * 1e9), 512, 128))
    return arrivals


def test_more_keys_and_values_than_the_pool_holds_do_not_thrash() -> None:
    """590 k tokens of them against 450 k: little is computed twice."""
    outcome = simulate(batch512(), policy="lpm", **SETTINGS)
    assert outcome.num_preemptions == 0
    # 13.0 s of products, 3.4 of decode attention, 0.4 of prefill attention.
    assert outcome.seconds < 1.03 * 16.8
    crowded = simulate(batch512(), policy="lpm", **SETTINGS | {"max_running_sequences": 512})
    assert crowded.recomputed < 0.02 * 512 * 1024
    assert crowded.num_preemptions < 16


def test_mixed_lengths_are_served_without_preemption() -> None:
    outcome = simulate(batch256(), policy="lpm", **SETTINGS)
    assert outcome.num_preemptions == 0
    assert outcome.recomputed <= 0


def test_at_a_low_rate_a_request_waits_for_about_a_step_and_its_own() -> None:
    outcome = simulate(poisson16(), policy="lpm", **SETTINGS)
    # A prefill of 512 tokens takes 11 ms; a decode step 5 to 7.
    assert outcome.percentile(50) < 30
    assert outcome.percentile(99) < 70
