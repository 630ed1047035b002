"""The built-in model in FP8 answers as it does in float32, and its log-probabilities stay near."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch
from transformers import AutoTokenizer

from services.common.model_files import builtin_model_path
from services.worker.engine.loop import build_loop
from services.worker.engine.messages import LogprobSpec, Request, SamplingParams
from services.worker.engine.options import EngineOptions
from services.worker.engine.runner.build import build_runner
from tests.fakes.engine_driver import ListInbox, ListOutbox

MODEL = builtin_model_path()
KINDS = ("capitals", "sums and differences", "JSON objects", "memory of a name", "colours")
NUM_TOKENS = 24
# Of a sampled token's log-probability, in float32 and in FP8.
BOUND = 0.05


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    """Two held-back questions of each kind."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    lines = (MODEL / "heldback.jsonl").read_text().splitlines()
    cases = [json.loads(line) for line in lines]
    chosen = [case for kind in KINDS for case in [c for c in cases if c["kind"] == kind][:2]]
    return [
        Request(
            key=key,
            request_id=str(key),
            token_ids=(ids := _prompt(tokenizer, case)),
            prompt_len=len(ids),
            sampling=SamplingParams(temperature=0.0, max_new_tokens=NUM_TOKENS),
            logprobs=LogprobSpec(output=True),
        )
        for key, case in enumerate(chosen, start=1)
    ]


def _prompt(tokenizer, case) -> list[int]:
    text = tokenizer.apply_chat_template(
        case["messages"], tokenize=False, add_generation_prompt=True
    )
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def answers(requests: list[Request], **options: str) -> dict[int, tuple[list[int], list[float]]]:
    """By key: output ids and their log-probabilities."""
    runner, plan = build_runner(
        EngineOptions(
            model_path=MODEL, tokenizer_path=MODEL, device="cpu", num_pages=400, **options
        ),
        lambda *_: None,
    )
    inbox, outbox = ListInbox(), ListOutbox()
    loop = build_loop(runner, plan, inbox, outbox)
    inbox.messages += requests
    told: dict[int, tuple[list[int], list[float]]] = {each.key: ([], []) for each in requests}
    num_open = len(requests)
    while num_open:
        loop.step()
        for output in outbox.outputs:
            start = 0
            for key, number in zip(output.keys, output.num_tokens, strict=True):
                told[key][0].extend(output.token_ids[start : start + number])
                start += number
            for key, rows in output.logprobs:
                told[key][1].extend(rows.logprobs)
            num_open -= len(output.finishes)
            assert not output.errors
        outbox.outputs.clear()
    runner.close()
    return told


@pytest.fixture(scope="module")
def expected(requests: list[Request]) -> dict[int, tuple[list[int], list[float]]]:
    return answers(requests)


@pytest.mark.parametrize(
    "options",
    [
        {"quantization": "fp8"},
        {"kv_cache_dtype": "fp8_e4m3"},
        {"kv_cache_dtype": "fp8_e5m2"},
        {"quantization": "fp8", "kv_cache_dtype": "fp8_e4m3"},
        {"quantization": "fp8", "dtype": "bfloat16", "kv_cache_dtype": "fp8_e4m3"},
    ],
)
def test_answers_are_those_of_float32(
    requests: list[Request],
    expected: dict[int, tuple[list[int], list[float]]],
    options: dict[str, str],
) -> None:
    told = answers(requests, **options)
    for key, (token_ids, logprobs) in expected.items():
        assert told[key][0] == token_ids
        assert told[key][1] == pytest.approx(logprobs, abs=BOUND)
