"""The batch scheduler under the real loop, over a device that checks what it is told."""

import math

import pytest

from services.worker.engine.batch import LAST_SAMPLED
from services.worker.engine.messages import LogprobRows, LogprobSpec, Request, SamplingParams
from tests.fakes.engine_driver import EngineDriver, make_request, no_foresight
from tests.fakes.fake_runner import fake_logprob, prefix_digests

PROMPT = list(range(20, 40))


@pytest.fixture(params=[1, 2], ids=["one step in flight", "two steps in flight"])
def num_in_flight(request) -> int:
    return request.param


@pytest.fixture
def engine(num_in_flight) -> EngineDriver:
    return EngineDriver(num_in_flight=num_in_flight)


def logprob_of(token_ids: list[int], position: int) -> float:
    return fake_logprob(prefix_digests(token_ids)[position - 1], token_ids[position])


def joined(pieces: list[LogprobRows]) -> tuple[list[int], list[int], list[float]]:
    """Positions, ids and log-probabilities of all pieces."""
    positions = [
        rows.start_position + index for rows in pieces for index in range(len(rows.token_ids))
    ]
    token_ids = [token_id for rows in pieces for token_id in rows.token_ids]
    return positions, token_ids, [value for rows in pieces for value in rows.logprobs]


# Lengths and stops


def test_a_sequence_ends_after_its_last_token(engine):
    request = make_request(1, PROMPT, max_new_tokens=7, reservation_id=99)
    engine.send(request)
    engine.run()
    record = engine.records[1]
    assert (record.token_ids, "length") == engine.expected(request)
    assert record.finish.reason == "length"
    assert record.finish.num_output_tokens == 7
    assert record.finish.reservation_id == 99


def test_a_reservation_arrives_with_the_first_load_that_counts_it(num_in_flight):
    engine = EngineDriver(max_running_sequences=2, num_in_flight=num_in_flight)
    arrived, ended, num_checked = set(), set(), 0
    for key in range(1, 10):
        engine.send(make_request(key, PROMPT, max_new_tokens=4, reservation_id=100 + key))
        engine.step()
    engine.run()
    for output in engine.outbox.outputs:
        assert arrived.isdisjoint(output.accepted_reservation_ids)
        arrived |= set(output.accepted_reservation_ids)
        ended |= {finish.reservation_id for finish in output.finishes}
        assert len(arrived - ended) == output.load.num_running + output.load.num_waiting
        num_checked += bool(output.load.num_waiting)
    assert num_checked
    assert arrived == ended == {100 + key for key in range(1, 10)}


def test_no_row_is_planned_beyond_the_last_token(engine):
    engine.send(make_request(1, PROMPT, max_new_tokens=7))
    engine.run()
    assert engine.runner.num_tokens_computed == len(PROMPT) + 6


def test_a_stop_id_is_the_last_output_id(engine):
    unstopped = make_request(1, PROMPT, max_new_tokens=20)
    tokens, _ = engine.expected(unstopped)
    stop_id = tokens[4]
    request = make_request(1, PROMPT, max_new_tokens=20, stop_token_ids=(stop_id,))
    engine.send(request)
    engine.run()
    record = engine.records[1]
    assert record.token_ids == tokens[: tokens.index(stop_id) + 1]
    assert record.finish.reason == "stop"
    assert record.finish.matched_token_id == stop_id


def test_end_of_sequence_ids_stop_unless_ignored(num_in_flight):
    tokens, _ = EngineDriver().expected(make_request(1, PROMPT, max_new_tokens=12))
    engine = EngineDriver(num_in_flight=num_in_flight, eos_token_ids=(tokens[3],))
    engine.send(make_request(1, PROMPT, max_new_tokens=12))
    engine.send(make_request(2, PROMPT, max_new_tokens=12, ignore_eos=True))
    engine.run()
    assert engine.records[1].finish.matched_token_id == tokens[3]
    assert engine.records[2].token_ids == tokens
    assert engine.records[2].finish.reason == "length"


def test_a_stop_id_as_last_allowed_token_counts_as_stop(engine):
    tokens, _ = engine.expected(make_request(1, PROMPT, max_new_tokens=1))
    engine.send(make_request(1, PROMPT, max_new_tokens=1, stop_token_ids=(tokens[0],)))
    engine.run()
    assert engine.records[1].finish.reason == "stop"


def test_no_new_tokens_means_prefill_only(engine):
    engine.send(make_request(1, PROMPT, max_new_tokens=0))
    engine.run()
    record = engine.records[1]
    assert record.token_ids == []
    assert record.finish.reason == "length"
    assert record.finish.num_output_tokens == 0
    assert engine.runner.num_tokens_computed == len(PROMPT)


def test_the_context_length_ends_a_sequence(num_in_flight):
    engine = EngineDriver(context_length=30, num_in_flight=num_in_flight)
    engine.send(make_request(1, PROMPT, max_new_tokens=1000))
    engine.run()
    assert engine.records[1].finish.reason == "length"
    assert len(engine.records[1].token_ids) == 10


def test_the_pool_ends_a_sequence_that_fills_it_alone(num_in_flight):
    engine = EngineDriver(num_pages=6, num_in_flight=num_in_flight)
    engine.send(make_request(1, PROMPT, max_new_tokens=1000))
    engine.run()
    assert engine.records[1].finish.reason == "length"
    assert len(engine.records[1].token_ids) == 6 * 4 + 1 - len(PROMPT)


# Refusals


@pytest.mark.parametrize(
    ("token_ids", "prompt_len", "message"),
    [
        pytest.param([], 0, "prompt_len must be 1 to 0", id="no ids"),
        pytest.param([1, 2], 3, "prompt_len must be 1 to 2", id="a prompt beyond the ids"),
        pytest.param([1] * 128, 128, "the model's context length is 128", id="the whole context"),
        pytest.param([1] * 100, 100, "its cache holds 80 tokens", id="more than the pool"),
        pytest.param([1, 50], 2, "token id 50 is outside the vocabulary of 50", id="unknown id"),
        pytest.param([-1], 1, "token id -1 is outside", id="negative id"),
    ],
)
def test_what_can_never_run_is_refused_with_the_reason(token_ids, prompt_len, message):
    engine = EngineDriver(num_pages=20)
    engine.send(make_request(1, token_ids, prompt_len=prompt_len, reservation_id=5))
    engine.run()
    error = engine.records[1].error
    assert error.code == 3
    assert message in error.message
    assert error.reservation_id == 5


def test_a_refusal_leaves_others_alone(engine):
    good = make_request(2, PROMPT)
    engine.send(make_request(1, [1] * 128), good)
    engine.run()
    assert engine.records[2].token_ids == engine.expected(good)[0]


# Chunks and sharing


def test_a_long_prompt_is_computed_in_chunks_beside_decodes(num_in_flight):
    engine = EngineDriver(max_step_tokens=16, num_in_flight=num_in_flight)
    decoding = make_request(1, [1, 2, 3], max_new_tokens=30)
    engine.send(decoding)
    engine.step(3)
    long = make_request(2, list(range(50)) * 2, max_new_tokens=5)
    engine.send(long)
    before = len(engine.records[1].token_ids)
    engine.step(6)
    assert len(engine.records[1].token_ids) == before + 6
    assert engine.records[2].token_ids == []
    engine.run()
    assert engine.runner.peak_step_tokens <= 16
    assert engine.records[1].token_ids == engine.expected(decoding)[0]
    assert engine.records[2].token_ids == engine.expected(long)[0]


def test_a_second_sequence_reuses_the_first_ones_prompt_and_output(engine):
    first = make_request(1, PROMPT, max_new_tokens=13)
    engine.send(first)
    engine.run()
    conversation = [*PROMPT, *engine.records[1].token_ids, 1, 2, 3]
    engine.send(make_request(2, conversation))
    engine.run()
    # 32 of the first one's 33 tokens were computed.
    assert engine.records[2].admission.cached_tokens == 32
    assert engine.records[2].finish.cached_tokens == 32


def test_the_last_prompt_token_is_always_computed(engine):
    for key in (1, 2):
        engine.send(make_request(key, PROMPT))
        engine.run()
    assert len(PROMPT) % 4 == 0
    assert engine.records[2].admission.cached_tokens == 16


def test_sequences_of_one_step_share_their_prompt(engine):
    requests = [make_request(key, PROMPT, choice_index=key, max_new_tokens=9) for key in range(3)]
    engine.send(*requests)
    engine.run()
    assert [engine.records[key].admission.cached_tokens for key in range(3)] == [0, 16, 16]
    assert len({tuple(engine.records[key].token_ids) for key in range(3)}) == 3
    for request in requests:
        assert engine.records[request.key].token_ids == engine.expected(request)[0]


def test_followers_of_a_chunked_prompt_wait_for_its_pages(num_in_flight):
    engine = EngineDriver(max_step_tokens=17, num_in_flight=num_in_flight)
    prompt = [token_id % 50 for token_id in range(70)]
    requests = [make_request(key, prompt, choice_index=key) for key in range(3)]
    engine.send(*requests)
    engine.run()
    assert [engine.records[key].admission.cached_tokens for key in range(3)] == [0, 68, 68]
    for request in requests:
        assert engine.records[request.key].token_ids == engine.expected(request)[0]


def test_a_follower_that_parts_early_does_not_wait_for_the_rest(num_in_flight):
    engine = EngineDriver(max_step_tokens=17, num_in_flight=num_in_flight)
    prompt = [token_id % 50 for token_id in range(100)]
    engine.send(make_request(1, prompt), make_request(2, [*prompt[:16], 49, 48, 47]))
    engine.step(3)
    assert engine.records[1].token_ids == []
    assert engine.records[2].admission.cached_tokens == 16


def test_a_follower_goes_on_alone_when_the_first_is_cancelled(num_in_flight):
    engine = EngineDriver(max_step_tokens=16, num_in_flight=num_in_flight)
    prompt = [token_id % 50 for token_id in range(70)]
    follower = make_request(2, prompt)
    engine.send(make_request(1, prompt), follower)
    engine.step(2)
    engine.cancel(1)
    engine.run()
    assert engine.records[1].finish.reason == "cancelled"
    assert engine.records[2].admission.cached_tokens == 32
    assert engine.records[2].token_ids == engine.expected(follower)[0]


def test_other_namespaces_share_nothing(engine):
    engine.send(make_request(1, PROMPT, namespace="a"))
    engine.run()
    engine.send(make_request(2, PROMPT, namespace="b"))
    engine.run()
    assert engine.records[2].admission.cached_tokens == 0


def test_equal_generated_pages_become_one(engine):
    twins = [make_request(key, PROMPT, max_new_tokens=16) for key in (1, 2)]
    engine.send(*twins)
    engine.step(20)
    engine.run()
    last = engine.outbox.outputs[-1].load
    num_shared_pages = (len(PROMPT) + 15) // 4
    assert last.num_evictable_pages == num_shared_pages
    assert last.num_free_pages == 64 - num_shared_pages


# Cancelling, deadlines, preemption


def test_cancelling_frees_pages_and_slot_at_once(engine):
    engine.send(make_request(1, PROMPT, max_new_tokens=100))
    engine.step(4)
    received = list(engine.records[1].token_ids)
    engine.cancel(1)
    engine.step()
    assert engine.records[1].finish.reason == "cancelled"
    assert engine.records[1].finish.num_output_tokens == len(received)
    load = engine.outbox.outputs[-1].load
    assert load.num_running == 0
    assert load.num_free_pages + load.num_evictable_pages == 64
    engine.run()
    assert engine.records[1].token_ids == received


def test_cancelling_twice_or_the_unknown_is_ignored(engine):
    engine.send(make_request(1, PROMPT))
    engine.cancel(1, 1, 77)
    engine.run()
    assert engine.records[1].finish.reason == "cancelled"


@pytest.mark.parametrize("is_running", [False, True], ids=["waiting", "running"])
def test_a_sequence_past_its_deadline_fails(num_in_flight, is_running):
    engine = EngineDriver(max_running_sequences=1, num_in_flight=num_in_flight)
    first, second = (
        make_request(key, PROMPT, max_new_tokens=90, deadline_ns=deadline_ns)
        for key, deadline_ns in ((1, 8_000 if is_running else None), (2, 9_000))
    )
    engine.send(first, second)
    engine.step(20)
    error = engine.records[1 if is_running else 2].error
    assert error.code == 4
    assert ("running" if is_running else "waiting") in error.message
    engine.run()


def test_far_deadlines_of_ended_sequences_are_forgotten(engine):
    engine.send(make_request(1, PROMPT, max_new_tokens=90, deadline_ns=3_000_000))
    for key in range(2, 5_000):
        engine.send(make_request(key, [1], deadline_ns=10**18 + key))
        engine.cancel(key)
    engine.step()
    assert len(engine.scheduler._live._deadlines) < 1_500
    engine.clock.now = 3_000_000
    engine.run()
    assert engine.records[1].error.code == 4


def test_the_newest_gives_way_and_comes_back_unchanged(num_in_flight):
    engine = EngineDriver(num_pages=16, num_in_flight=num_in_flight, growth=no_foresight())
    requests = [make_request(key, [key] * 9, max_new_tokens=40) for key in (1, 2)]
    engine.send(*requests)
    for _ in range(200):
        engine.step()
        if engine.outbox.outputs[-1].load.num_preemptions:
            break
    engine.run()
    assert engine.records[1].finish.num_preemptions == 0
    assert engine.records[2].finish.num_preemptions >= 1
    for request in requests:
        assert engine.records[request.key].token_ids == engine.expected(request)[0]


def test_a_lower_priority_gives_way_before_a_newer_one(num_in_flight):
    engine = EngineDriver(num_pages=16, num_in_flight=num_in_flight, growth=no_foresight())
    low = make_request(1, [1] * 9, max_new_tokens=40, priority=0)
    high = make_request(2, [2] * 9, max_new_tokens=40, priority=1)
    engine.send(low)
    engine.step()
    engine.send(high)
    engine.run()
    assert engine.records[2].finish.num_preemptions == 0
    assert engine.records[1].finish.num_preemptions >= 1


def test_a_preempted_sequence_finds_its_pages_again(num_in_flight):
    engine = EngineDriver(num_pages=16, num_in_flight=num_in_flight, growth=no_foresight())
    engine.send(*(make_request(key, [key] * 9, max_new_tokens=40) for key in (1, 2)))
    engine.run()
    # Had nothing been found, the second would have been computed twice as a whole.
    computed_alone = 2 * (9 + 40 - 1)
    finish = engine.records[2].finish
    assert finish.num_preemptions == len(finish.preempted_ns) == 1
    assert engine.runner.num_tokens_computed < computed_alone + 9 + 20


# Resuming an earlier attempt


@pytest.mark.parametrize("num_done", [1, 3, 7])
def test_a_resumed_sequence_goes_on_where_it_stopped(engine, num_done):
    whole = make_request(1, PROMPT, max_new_tokens=8, seed=5)
    tokens, _ = engine.expected(whole)
    resumed = make_request(
        2, [*PROMPT, *tokens[:num_done]], prompt_len=len(PROMPT), max_new_tokens=8, seed=5
    )
    engine.send(resumed)
    engine.run()
    assert engine.records[2].token_ids == tokens[num_done:]
    assert engine.records[2].finish.num_output_tokens == 8


def test_a_sequence_resumed_after_its_last_token_ends_at_once(engine):
    resumed = make_request(1, [*PROMPT, 1, 2], prompt_len=len(PROMPT), max_new_tokens=2)
    stopped = make_request(2, [*PROMPT, 7], prompt_len=len(PROMPT), stop_token_ids=(7,))
    engine.send(resumed, stopped)
    engine.run()
    assert engine.records[1].finish.reason == "length"
    assert engine.records[1].finish.num_output_tokens == 2
    assert engine.records[2].finish.reason == "stop"
    assert engine.records[2].finish.matched_token_id == 7
    assert engine.runner.num_steps == 0


def test_a_sequence_resumed_with_its_context_full_ends_at_once(num_in_flight):
    engine = EngineDriver(context_length=30, num_in_flight=num_in_flight)
    engine.send(make_request(1, [1] * 30, prompt_len=20, max_new_tokens=10))
    engine.run()
    assert engine.records[1].finish.reason == "length"
    assert engine.records[1].finish.num_output_tokens == 10
    assert engine.runner.num_steps == 0


def test_a_stop_id_before_the_minimum_does_not_end_a_resumed_sequence(engine):
    resumed = Request(
        key=1,
        request_id="resumed",
        token_ids=[*PROMPT, 7],
        prompt_len=len(PROMPT),
        sampling=SamplingParams(max_new_tokens=4, min_new_tokens=2, stop_token_ids=(7,)),
    )
    engine.send(resumed)
    engine.run()
    assert engine.records[1].finish.num_output_tokens >= 2


# Log-probabilities


def test_output_logprobs_come_with_their_ids(engine):
    spec = LogprobSpec(output=True, num_top=2, token_ids=(3,))
    engine.send(make_request(1, PROMPT, max_new_tokens=5, logprobs=spec), make_request(2, PROMPT))
    engine.run()
    record = engine.records[1]
    positions, token_ids, values = joined(record.logprobs)
    everything = [*PROMPT, *record.token_ids]
    assert positions == list(range(20, 25))
    assert token_ids == record.token_ids
    assert values == [logprob_of(everything, position) for position in positions]
    assert all(len(rows.top_token_ids) == 2 for rows in record.logprobs)
    assert engine.records[2].logprobs == []


@pytest.mark.parametrize("prompt_start", [0, 1, 6, 8, 19, 20])
@pytest.mark.parametrize("max_step_tokens", [7, 64], ids=["chunked", "whole"])
def test_prompt_logprobs_cover_every_position_asked_for(
    num_in_flight, prompt_start, max_step_tokens
):
    engine = EngineDriver(num_in_flight=num_in_flight, max_step_tokens=max_step_tokens)
    engine.send(make_request(1, PROMPT))
    engine.run()
    spec = LogprobSpec(prompt_start=prompt_start, num_top=1, token_ids=(5, 6))
    engine.send(make_request(2, PROMPT, logprobs=spec))
    engine.run()
    positions, token_ids, values = joined(engine.records[2].logprobs)
    assert positions == list(range(prompt_start, 20))
    assert token_ids == PROMPT[prompt_start:]
    if prompt_start == 0:
        assert math.isnan(values[0])
    reported = max(1, prompt_start)
    expected = [logprob_of(PROMPT, position) for position in range(reported, 20)]
    assert values[reported - prompt_start :] == expected
    cached = engine.records[2].admission.cached_tokens
    assert cached == max(0, min(19, prompt_start - 1)) // 4 * 4


def test_prompt_logprobs_are_reported_once_whatever_is_preempted(num_in_flight):
    engine = EngineDriver(
        num_pages=20, max_step_tokens=9, num_in_flight=num_in_flight, growth=no_foresight()
    )
    spec = LogprobSpec(prompt_start=0, output=True)
    requests = [make_request(key, [key] * 13, max_new_tokens=40, logprobs=spec) for key in range(3)]
    engine.send(*requests)
    engine.run()
    assert sum(engine.records[key].finish.num_preemptions for key in range(3)) > 0
    for request in requests:
        record = engine.records[request.key]
        positions, token_ids, _ = joined(record.logprobs)
        assert positions == list(range(13 + 40))
        assert token_ids == [*request.token_ids, *record.token_ids]


# Plans, load, times


def test_the_input_of_a_decode_is_named_only_where_it_is_known(num_in_flight):
    engine = EngineDriver(num_in_flight=num_in_flight)
    engine.send(make_request(1, PROMPT, max_new_tokens=4))
    engine.inbox.messages, messages = [], engine.inbox.messages
    scheduler = engine.scheduler
    scheduler.add(messages[0])
    first = scheduler.schedule()
    engine.runner.forward(first)
    engine.runner.sample()
    if num_in_flight == 1:
        result = engine.runner.result()
        scheduler.apply(result)
    second = scheduler.schedule()
    expected = LAST_SAMPLED if num_in_flight == 2 else int(result.token_ids[0])
    assert second.token_ids.tolist() == [expected]
    assert second.start_positions.tolist() == [len(PROMPT)]


def test_no_more_sequences_run_than_there_are_slots(num_in_flight):
    engine = EngineDriver(max_running_sequences=2, num_in_flight=num_in_flight)
    requests = [make_request(key, [key, key + 1]) for key in range(5)]
    engine.send(*requests)
    engine.step()
    load = engine.outbox.outputs[-1].load if engine.outbox.outputs else None
    engine.run()
    assert max(output.load.num_running for output in engine.outbox.outputs) == 2
    assert load is None or load.num_waiting == 3
    for request in requests:
        assert engine.records[request.key].token_ids == engine.expected(request)[0]


def test_load_says_what_waits_runs_and_was_done(num_in_flight):
    engine = EngineDriver(max_running_sequences=1, num_in_flight=num_in_flight)
    engine.send(make_request(1, PROMPT, max_new_tokens=6))
    engine.send(make_request(2, PROMPT, max_new_tokens=6))
    engine.step(3)
    load = engine.outbox.outputs[-1].load
    assert (load.num_running, load.num_waiting) == (1, 1)
    # Of the second one's 20 prompt tokens, 16 can be shared by now.
    assert load.num_waiting_uncached_tokens in (4, 20)
    assert load.num_running_context_tokens == len(PROMPT) + 2
    engine.run()
    load = engine.outbox.outputs[-1].load
    assert (load.num_running, load.num_waiting, load.num_waiting_uncached_tokens) == (0, 0, 0)
    assert (load.num_prompt_tokens, load.num_cached_tokens) == (40, 16)
    assert load.num_output_tokens == 12
    assert 1_000 <= load.predicted_step_ns < 1_200


def test_a_finish_says_where_the_time_went():
    engine = EngineDriver(max_running_sequences=1)
    for key in (1, 2):
        engine.send(make_request(key, PROMPT, max_new_tokens=4, arrival_ns=500))
    engine.run()
    first, second = engine.records[1].finish, engine.records[2].finish
    assert (first.queue_ns, first.prefill_ns, first.decode_ns) == (1_500, 0, 3_000)
    # The first one's four steps were at 2,000 to 5,000.
    assert second.queue_ns == 5_500
    assert engine.records[2].admission.queue_ns == 5_500


def test_a_steps_work_tells_prefill_from_decode(num_in_flight):
    engine = EngineDriver(max_step_tokens=16, num_in_flight=num_in_flight)
    engine.send(make_request(1, PROMPT, max_new_tokens=3))
    engine.run()
    works = [output.work for output in engine.outbox.outputs if output.work is not None]
    assert [
        (
            work.prefill_tokens,
            work.prefill_context_products,
            work.decode_sequences,
            work.decode_context_tokens,
        )
        for work in works[:4]
    ] == [(16, 120, 0, 0), (4, 70, 0, 0), (0, 0, 1, 20), (0, 0, 1, 21)]
    assert all(work.step_ns >= 1_000 or work is works[0] for work in works)


def test_page_events_come_with_the_result_of_their_step(num_in_flight):
    engine = EngineDriver(num_in_flight=num_in_flight)
    engine.send(make_request(1, PROMPT, max_new_tokens=3))
    engine.step(num_in_flight)
    outputs = engine.outbox.outputs
    with_events = [output for output in outputs if output.cache_events]
    assert len(with_events) == 1
    assert with_events[0].step_number == 1
    assert len(engine.held.parents) == len(PROMPT) // 4


def test_a_load_says_once_which_reservations_it_counts_from_now_on() -> None:
    engine = EngineDriver(max_running_sequences=1)
    engine.send(make_request(1, [1] * 4, max_new_tokens=3, reservation_id=11))
    engine.send(make_request(2, [2] * 4, max_new_tokens=3, reservation_id=12))
    engine.step()
    # The second one waits, and the load counts it.
    engine.run()
    accepted = [output.accepted_reservation_ids for output in engine.outbox.outputs]
    assert [ids for ids in accepted if ids] == [[11, 12]]
    first = next(output for output in engine.outbox.outputs if output.accepted_reservation_ids)
    assert (first.load.num_running, first.load.num_waiting) == (1, 1)


def test_the_rest_of_a_prefill_counts_as_waiting() -> None:
    engine = EngineDriver(max_step_tokens=8)
    engine.send(make_request(1, list(range(1, 25)), max_new_tokens=1))
    engine.run()
    loads = [output.load.num_waiting_uncached_tokens for output in engine.outbox.outputs]
    assert max(loads) == 16
    assert sorted(loads, reverse=True) == loads
    assert loads[-1] == 0
