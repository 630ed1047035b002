"""The engine loop over a GPU runner with two steps in flight, cached, chunked and preempted."""

import pytest
import torch

from services.common.model_files import builtin_model_path
from services.worker.engine.batch import Runner
from services.worker.engine.loop import build_loop
from services.worker.engine.messages import LogprobSpec, Request, SamplingParams
from services.worker.engine.options import EngineOptions, EnginePlan
from services.worker.engine.runner.build import build_runner
from tests.fakes.engine_driver import ListInbox, ListOutbox, run_to_end
from tests.fakes.step_driver import GREEDY, StepDriver

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

SYSTEM = list(range(300, 350))
NUM_TOKENS = 40
# Twice how far bf16 may be off in one of the built-in model's logits.
CHOICE_BOUND = 0.7


def build(**changes: object) -> tuple[Runner, EnginePlan]:
    path = builtin_model_path()
    options = {"model_path": path, "tokenizer_path": path, "device": "cuda", **changes}
    return build_runner(EngineOptions(**options), lambda fraction, what: None)  # type: ignore[arg-type]


def serve(requests: list[Request], **changes: object) -> dict[int, list[int]]:
    """Each request's tokens, from an engine whose pool is too small for all of them."""
    runner, plan = build(num_pages=24, chunked_prefill_size=48, max_running_sequences=16, **changes)
    inbox, outbox = ListInbox(), ListOutbox()
    loop = build_loop(runner, plan, inbox, outbox)
    tokens = run_to_end(loop, inbox, outbox, requests)
    runner.close()
    assert runner.num_in_flight == 2
    assert outbox.outputs[-1].load.num_preemptions > 0
    assert outbox.outputs[-1].load.num_cached_tokens > 0
    return tokens


def make_requests(temperature: float) -> list[Request]:
    return [
        Request(
            key=key,
            request_id=str(key),
            token_ids=[*SYSTEM, *range(400 + key, 410 + 2 * key)],
            prompt_len=len(SYSTEM) + 10 + key,
            sampling=SamplingParams(
                temperature=temperature if key % 2 else 0.0,
                seed=key,
                max_new_tokens=NUM_TOKENS,
                ignore_eos=True,
            ),
        )
        for key in range(12)
    ]


def test_tokens_in_float32_are_those_that_each_request_gets_alone() -> None:
    requests = make_requests(0.8)
    tokens = serve(requests, dtype="float32")
    runner, plan = build(dtype="float32", num_pages=512)
    driver = StepDriver(runner, page_size=plan.page_size)
    for request in requests:
        sequence = driver.start(request.token_ids, request.sampling)
        assert tokens[request.key] == driver.generate([sequence], NUM_TOKENS)[0]
    runner.close()


def test_greedy_tokens_in_bf16_are_as_good_as_the_best_in_float32() -> None:
    pytest.importorskip("flashinfer")
    requests = make_requests(0.0)
    tokens = serve(requests, dtype="bfloat16", attention_backend="flashinfer")
    runner, plan = build(dtype="float32", num_pages=64)
    for request in requests:
        forced = tokens[request.key]
        assert len(forced) == NUM_TOKENS
        for step, token_id in enumerate(forced):
            spec = LogprobSpec(output=True, num_top=1, token_ids=(token_id,))
            driver = StepDriver(runner, page_size=plan.page_size)
            row = driver.start([*request.token_ids, *forced[:step]], GREEDY, logprobs=spec)
            rows = driver.step([(row, len(row.token_ids))]).output_logprobs[0]
            assert rows.requested_logprobs[0] > rows.top_logprobs[0] - CHOICE_BOUND
    runner.close()
