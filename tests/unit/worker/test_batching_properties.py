"""Random traffic: whatever else runs, each sequence produces what it produces alone."""

import random

import pytest

from services.worker.engine.messages import FlushCache, LogprobSpec, Request
from tests.fakes.engine_driver import EngineDriver, make_request, no_foresight


def random_requests(rng: random.Random, key: int, max_prompt_len: int) -> list[Request]:
    """One request's sequences, n of them; prompts of two ids so that many share pages."""
    prompt = [rng.randrange(2) for _ in range(rng.randint(1, max_prompt_len))]
    spec = LogprobSpec()
    if rng.random() < 0.2:
        spec = LogprobSpec(output=rng.random() < 0.5, prompt_start=rng.randint(0, len(prompt)))
    fields = {
        "max_new_tokens": rng.randint(0, 25),
        "seed": rng.randrange(2),
        "priority": rng.choice([0, 0, 0, 1]),
        "namespace": rng.choice(["", "", "other"]),
        "logprobs": spec,
    }
    return [
        make_request(key + choice, prompt, choice_index=choice, **fields)
        for choice in range(rng.choice([1, 1, 1, 4]))
    ]


def check_outputs(engine: EngineDriver, requests: list[Request], cancelled: set[int]) -> None:
    for request in requests:
        record = engine.records[request.key]
        tokens, reason = engine.expected(request)
        assert record.finish is not None, record.error
        if record.finish.reason == "cancelled":
            assert request.key in cancelled
            assert record.token_ids == tokens[: len(record.token_ids)]
            continue
        assert record.token_ids == tokens
        assert record.finish.reason == reason
        positions = [
            rows.start_position + index
            for rows in record.logprobs
            for index in range(len(rows.token_ids))
        ]
        start, num_prompt = request.logprobs.prompt_start, request.prompt_len
        wanted = [] if start is None else list(range(start, num_prompt))
        if request.logprobs.output:
            wanted += range(num_prompt, num_prompt + len(tokens))
        assert positions == wanted


@pytest.mark.parametrize("num_in_flight", [1, 2])
@pytest.mark.parametrize("seed", range(15))
def test_random_traffic_leaves_each_sequence_as_if_alone(seed, num_in_flight):
    rng = random.Random(seed)
    engine = EngineDriver(
        num_pages=rng.choice([12, 16, 40]),
        page_size=rng.choice([1, 4, 5]) if seed % 3 == 0 else 4,
        max_step_tokens=rng.choice([5, 11, 16, 40]),
        max_running_sequences=rng.choice([2, 5, 8]),
        num_in_flight=num_in_flight,
        growth=rng.choice([no_foresight(), None]),
        eos_token_ids=(3,),
        context_length=60,
    )
    max_prompt_len = min(30, engine.max_len - 1)
    requests: list[Request] = []
    cancelled: set[int] = set()
    for _ in range(70):
        if rng.random() < 0.4:
            new = random_requests(rng, 10 * len(requests), max_prompt_len)
            requests += new
            engine.send(*new)
        if requests and rng.random() < 0.15:
            key = rng.choice(requests).key
            cancelled.add(key)
            engine.cancel(key)
        if rng.random() < 0.03:
            engine.send(FlushCache())
        engine.step()
    engine.run()
    check_outputs(engine, requests, cancelled)
    engine.send(FlushCache())
    engine.step()
    load = engine.outbox.outputs[-1].load
    assert load.num_free_pages == engine.num_pages
    assert engine.held.parents == {}


@pytest.mark.parametrize("num_in_flight", [1, 2])
def test_a_pool_far_too_small_still_serves_everyone(num_in_flight):
    engine = EngineDriver(
        num_pages=12,
        max_step_tokens=16,
        num_in_flight=num_in_flight,
        context_length=49,
        growth=no_foresight(),
    )
    requests = [make_request(key, [key % 2] * 11, max_new_tokens=35, seed=key) for key in range(9)]
    engine.send(*requests)
    engine.run()
    assert engine.outbox.outputs[-1].load.num_preemptions > 3
    check_outputs(engine, requests, set())
