"""The real engine with the built-in model gives the same tokens however it is made to work.

In fp32, greedy and seeded: alone or in a crowd, cold or cached, whole or chunked prompts, one rank
or two, preempted or not, one step in flight or two, begun here or resumed from elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from msgspec.structs import replace
from tokenizers import Tokenizer

from services.common.model_files import builtin_model_path
from services.worker.engine.batching.budget import GrowthEstimate
from services.worker.engine.batching.scheduler import BatchScheduler
from services.worker.engine.loop import EngineLoop, build_loop
from services.worker.engine.messages import (
    FlushCache,
    LogprobSpec,
    Request,
    SamplingParams,
    StepOutput,
)
from services.worker.engine.options import EngineOptions, EnginePlan
from services.worker.engine.runner.build import build_runner
from tests.fakes.engine_driver import ListInbox, ListOutbox

MODEL = builtin_model_path()
NUM_TOKENS = 40
PROMPTS = (
    "What is the capital of France?",
    "What is 3 plus 4?",
    "Count from 3 to 20.",
    "Give me a small red cup as JSON.",
    "My name is Emma. " * 12 + "What is my name?",
    "Tell me a story.",
)


@dataclass(slots=True)
class Told:
    """What became of one sequence."""

    token_ids: list[int]
    logprobs: list[float]
    num_preemptions: int


class RealEngine:
    """The real loop, scheduler, runner and model; no process and no socket."""

    def __init__(
        self,
        *,
        in_flight: int = 1,
        tp_size: int = 1,
        num_pages: int = 400,
        chunk: int = 2048,
        reckless: bool = False,
    ) -> None:
        options = EngineOptions(
            model_path=MODEL,
            tokenizer_path=MODEL,
            device="cpu",
            dtype="float32",
            num_pages=num_pages,
            max_running_sequences=32,
            chunked_prefill_size=chunk,
            tp_size=tp_size,
        )
        self.runner, plan = build_runner(options, lambda *_: None)
        self.runner.num_in_flight = in_flight
        self.inbox, self.outbox = ListInbox(), ListOutbox()
        self.loop = build_loop(self.runner, plan, self.inbox, self.outbox)
        if reckless:
            self.loop = EngineLoop(
                runner=self.runner,
                scheduler=_reckless_scheduler(plan),
                inbox=self.inbox,
                outbox=self.outbox,
            )

    def run(self, requests: list[Request]) -> dict[int, Told]:
        """Start all at once; returns when every one has ended."""
        self.inbox.messages += requests
        self.outbox.outputs.clear()
        open_keys = {request.key for request in requests}
        told = {key: Told([], [], 0) for key in open_keys}
        while open_keys:
            self.loop.step()
            for output in self.outbox.outputs:
                _sort(output, told)
                open_keys -= {finish.key for finish in output.finishes}
                assert not output.errors
            self.outbox.outputs.clear()
        return told

    def flush(self) -> None:
        self.inbox.messages.append(FlushCache())
        self.loop.step()


def _reckless_scheduler(plan: EnginePlan) -> BatchScheduler:
    """Admits as if nothing ever grew, so that it must preempt."""
    return BatchScheduler(
        num_pages=plan.num_pages,
        page_size=plan.page_size,
        context_length=plan.context_length,
        vocab_size=plan.vocab_size,
        eos_token_ids=plan.eos_token_ids,
        max_running_sequences=plan.max_running_sequences,
        max_step_tokens=plan.max_step_tokens,
        growth=GrowthEstimate(initial=0.0, minimum=0.0),
    )


def _sort(output: StepOutput, told: dict[int, Told]) -> None:
    start = 0
    for key, number in zip(output.keys, output.num_tokens, strict=True):
        told[key].token_ids += output.token_ids[start : start + number]
        start += number
    for key, rows in output.logprobs:
        told[key].logprobs += rows.logprobs
    for finish in output.finishes:
        told[finish.key].num_preemptions = finish.num_preemptions


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    """Greedy ones, and for each prompt three seeded choices with every kind of penalty."""
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    greedy = SamplingParams(temperature=0.0, max_new_tokens=NUM_TOKENS, ignore_eos=True)
    seeded = SamplingParams(
        temperature=4.0,
        top_p=0.95,
        top_k=50,
        min_p=0.001,
        repetition_penalty=1.1,
        frequency_penalty=0.3,
        presence_penalty=0.2,
        logit_bias=((100, 2.0),),
        min_new_tokens=20,
        max_new_tokens=NUM_TOKENS,
        seed=2**40 + 7,
    )
    requests: list[Request] = []
    for prompt in PROMPTS:
        text = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer.encode(text).ids
        for choice, sampling in enumerate((greedy, seeded, seeded, seeded)):
            requests.append(
                Request(
                    key=len(requests) + 1,
                    request_id=f"r{len(requests)}",
                    token_ids=ids,
                    prompt_len=len(ids),
                    sampling=sampling,
                    choice_index=choice,
                    logprobs=LogprobSpec(output=True),
                )
            )
    return requests


@pytest.fixture(scope="module")
def engine() -> Iterator[RealEngine]:
    engine = RealEngine()
    yield engine
    engine.runner.close()


@pytest.fixture(scope="module")
def alone(engine: RealEngine, requests: list[Request]) -> dict[int, Told]:
    """Each by itself, from a cold cache."""
    told: dict[int, Told] = {}
    for request in requests:
        engine.flush()
        told |= engine.run([request])
    return told


def renamed(requests: list[Request]) -> list[Request]:
    """The same under new keys, which an engine never sees twice."""
    return [replace(request, key=request.key + 1000) for request in requests]


def assert_equal(told: dict[int, Told], expected: dict[int, Told]) -> None:
    assert len(told) == len(expected)
    for key, one in told.items():
        other = expected[key % 1000]
        assert one.token_ids == other.token_ids
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_choices_of_one_seed_differ(alone: dict[int, Told]) -> None:
    sampled = [tuple(alone[key].token_ids) for key in alone if (key - 1) % 4]
    assert len(set(sampled)) == len(sampled)


def test_a_crowd_changes_nothing_nor_does_a_warm_cache(
    engine: RealEngine, requests: list[Request], alone: dict[int, Told]
) -> None:
    engine.flush()
    assert_equal(engine.run(requests), alone)
    assert_equal(engine.run(renamed(requests)), alone)


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(lambda: RealEngine(chunk=33), id="chunked"),
        pytest.param(lambda: RealEngine(in_flight=2), id="two steps in flight"),
        pytest.param(lambda: RealEngine(tp_size=2), id="two ranks"),
    ],
)
def test_another_way_of_working_changes_nothing(
    build: Callable[[], RealEngine], requests: list[Request], alone: dict[int, Told]
) -> None:
    other = build()
    try:
        assert_equal(other.run(requests), alone)
    finally:
        other.runner.close()


def test_preemption_changes_nothing(requests: list[Request], alone: dict[int, Told]) -> None:
    small = RealEngine(num_pages=36, reckless=True)
    try:
        told = small.run(requests)
        assert sum(one.num_preemptions for one in told.values()) > 0
        assert_equal(told, alone)
    finally:
        small.runner.close()


@pytest.mark.parametrize("num_done", [1, 19, 33])
def test_resuming_elsewhere_changes_nothing(
    engine: RealEngine, requests: list[Request], alone: dict[int, Told], num_done: int
) -> None:
    engine.flush()
    resumed = [
        replace(
            request,
            key=request.key + 1000,
            token_ids=request.token_ids + alone[request.key].token_ids[:num_done],
        )
        for request in requests
        if len(alone[request.key].token_ids) > num_done
    ]
    told = engine.run(resumed)
    for key, one in told.items():
        before = alone[key % 1000]
        assert one.token_ids == before.token_ids[num_done:]
        assert one.logprobs == pytest.approx(before.logprobs[num_done:], abs=1e-4)
