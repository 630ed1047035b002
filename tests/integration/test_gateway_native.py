"""SGLang's native API as its own frontend language uses it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tests.fakes.gateway_stack import (
    ANSWER,
    GatewayStack,
    answer_ids,
    gateway_stack,
    reference_tokenizer,
)
from tests.fakes.scripted_worker import CONTEXT_LENGTH, PAGE_SIZE, logprob_of

PROMPT = "The capital of France is"


@pytest.fixture
async def stack() -> AsyncIterator[GatewayStack]:
    async with gateway_stack() as running:
        yield running


@pytest.fixture
async def http(stack: GatewayStack) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=stack.url) as client:
        yield client


def prompt_ids() -> list[int]:
    return list(reference_tokenizer().encode(PROMPT).ids)


async def post(http: httpx.AsyncClient, **body: Any) -> Any:
    reply = await http.post("/generate", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def events_of(text: str) -> list[Any]:
    lines = [line[6:] for line in text.split("\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


async def test_a_text_is_answered_with_its_meta_info(http: httpx.AsyncClient) -> None:
    reply = await post(http, text=PROMPT, rid="mine")
    assert reply["text"] == ANSWER
    assert reply["output_ids"] == answer_ids()
    meta = reply["meta_info"]
    assert meta["id"] == "mine"
    assert meta["finish_reason"] == {"type": "stop", "matched": answer_ids()[-1]}
    assert meta["prompt_tokens"] == len(prompt_ids())
    assert meta["completion_tokens"] == len(answer_ids())
    assert meta["cached_tokens"] == 0
    assert meta["e2e_latency"] > 0
    assert "input_token_logprobs" not in meta


async def test_the_default_limit_is_128_tokens(
    http: httpx.AsyncClient, stack: GatewayStack
) -> None:
    await post(http, text=PROMPT)
    assert stack.workers[0].submits[0].sampling.max_new_tokens == 128
    reply = await post(http, text=PROMPT, sampling_params={"ignore_eos": True})
    assert reply["meta_info"]["finish_reason"] == {"type": "length", "length": 128}


async def test_a_stop_string_is_named(http: httpx.AsyncClient) -> None:
    reply = await post(http, text=PROMPT, sampling_params={"stop": ["river"]})
    assert reply["text"] == ANSWER.split("river")[0]
    assert reply["meta_info"]["finish_reason"] == {"type": "stop", "matched": "river"}


async def test_a_batch_is_answered_with_a_list_in_order(
    http: httpx.AsyncClient, stack: GatewayStack
) -> None:
    replies = await post(
        http,
        text=["One", "Two"],
        sampling_params=[{"max_new_tokens": 1}, {"max_new_tokens": 2}],
        rid=["a", "b"],
    )
    assert [reply["meta_info"]["id"] for reply in replies] == ["a", "b"]
    assert [reply["meta_info"]["completion_tokens"] for reply in replies] == [1, 2]
    ids = await post(http, input_ids=[[5, 6], [7]], sampling_params={"max_new_tokens": 1})
    assert [reply["meta_info"]["prompt_tokens"] for reply in ids] == [2, 1]
    single = await post(http, input_ids=[5, 6], sampling_params={"max_new_tokens": 1})
    assert single["meta_info"]["prompt_tokens"] == 2


async def test_several_choices_of_one_prompt_are_a_list(http: httpx.AsyncClient) -> None:
    replies = await post(http, text=PROMPT, sampling_params={"n": 2, "max_new_tokens": 3})
    assert [reply["text"] for reply in replies] == [
        reference_tokenizer().decode(answer_ids()[:3])
    ] * 2


async def test_log_probabilities_are_tuples_of_value_id_and_text(http: httpx.AsyncClient) -> None:
    reply = await post(
        http,
        text=PROMPT,
        sampling_params={"max_new_tokens": 3},
        return_logprob=True,
        logprob_start_len=0,
        top_logprobs_num=2,
        token_ids_logprob=[7],
        return_text_in_logprobs=True,
    )
    meta = reply["meta_info"]
    ids, output = prompt_ids(), answer_ids()[:3]
    inputs = meta["input_token_logprobs"]
    assert [entry[1] for entry in inputs] == ids
    assert [entry[0] for entry in inputs] == [None, *map(logprob_of, ids[1:])]
    assert "".join(entry[2] for entry in inputs[1:]) == PROMPT
    assert meta["input_top_logprobs"][0] is None
    assert [entry[1] for entry in meta["input_top_logprobs"][1]] == [ids[1], ids[1] + 1]
    assert meta["input_token_ids_logprobs"][1] == [
        [logprob_of(7), 7, meta["input_token_ids_logprobs"][1][0][2]]
    ]
    assert [entry[:2] for entry in meta["output_token_logprobs"]] == [
        [logprob_of(i), i] for i in output
    ]
    assert len(meta["output_top_logprobs"]) == 3
    assert meta["output_token_logprobs_length"] == 3


async def test_without_return_text_the_third_member_is_null(http: httpx.AsyncClient) -> None:
    reply = await post(
        http, text=PROMPT, sampling_params={"max_new_tokens": 2}, return_logprob=True
    )
    assert reply["meta_info"]["input_token_logprobs"] == []
    assert [entry[2] for entry in reply["meta_info"]["output_token_logprobs"]] == [None, None]


async def test_prompt_log_probabilities_start_where_asked(http: httpx.AsyncClient) -> None:
    start = len(prompt_ids()) - 2
    reply = await post(
        http,
        text=PROMPT,
        sampling_params={"max_new_tokens": 0},
        return_logprob=True,
        logprob_start_len=start,
    )
    meta = reply["meta_info"]
    assert [entry[1] for entry in meta["input_token_logprobs"]] == prompt_ids()[start:]
    assert all(entry[0] is not None for entry in meta["input_token_logprobs"])
    assert (reply["text"], meta["completion_tokens"]) == ("", 0)
    assert meta["finish_reason"] == {"type": "length", "length": 0}


async def test_a_prompt_alone_reports_all_its_log_probabilities(http: httpx.AsyncClient) -> None:
    reply = await post(
        http,
        input_ids=[[5, 6, 7]],
        sampling_params={"max_new_tokens": 0},
        return_logprob=True,
    )
    values = [entry[0] for entry in reply[0]["meta_info"]["input_token_logprobs"]]
    assert values == [None, logprob_of(6), logprob_of(7)]


async def test_a_stream_carries_the_growing_text(http: httpx.AsyncClient) -> None:
    reply = await http.post("/generate", json={"text": PROMPT, "stream": True})
    events = events_of(reply.text)
    assert len(events) > 3
    for before, after in zip(events, events[1:], strict=False):
        assert after["text"].startswith(before["text"])
    counts = [event["meta_info"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert [event["meta_info"]["finish_reason"] for event in events[:-1]] == [None] * (
        len(events) - 1
    )
    assert events[-1]["text"] == ANSWER
    assert events[-1]["output_ids"] == answer_ids()
    assert events[-1]["meta_info"]["finish_reason"]["type"] == "stop"


async def test_a_streamed_batch_names_the_prompt_of_each_event(http: httpx.AsyncClient) -> None:
    body = {
        "text": ["One", "Two"],
        "stream": True,
        "return_logprob": [False, True],
        "return_text_in_logprobs": True,
        "sampling_params": {"max_new_tokens": 3},
    }
    events = events_of((await http.post("/generate", json=body)).text)
    last = {event["index"]: event for event in events}
    assert sorted(last) == [0, 1]
    assert "output_token_logprobs" not in last[0]["meta_info"]
    pieces = [entry[2] for entry in last[1]["meta_info"]["output_token_logprobs"]]
    assert "".join(pieces) == last[1]["text"]


async def test_the_server_describes_itself(http: httpx.AsyncClient, stack: GatewayStack) -> None:
    for path in ("/get_model_info", "/model_info"):
        info = (await http.get(path)).json()
        assert info["model_path"] == "/models/scripted"
        assert info["is_generation"] is True
        assert info["tokenizer_path"]
    for path in ("/get_server_info", "/server_info"):
        info = (await http.get(path)).json()
        assert info["context_length"] == CONTEXT_LENGTH
        assert info["max_total_num_tokens"] == 1000 * PAGE_SIZE
        assert info["internal_states"][0]["worker_id"] == "w0"
    for method in ("GET", "POST"):
        assert (await http.request(method, "/flush_cache")).status_code == 200
    assert stack.workers[0].num_flushes == 2


async def test_the_frontend_languages_defaults_are_accepted(http: httpx.AsyncClient) -> None:
    reply = await post(
        http,
        text=PROMPT,
        sampling_params={
            "skip_special_tokens": True,
            "spaces_between_special_tokens": True,
            "max_new_tokens": 4,
            "min_new_tokens": 0,
            "n": 1,
            "stop": [],
            "stop_token_ids": [],
            "stop_regex": [],
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            "ignore_eos": False,
            "regex": None,
            "json_schema": None,
        },
        image_data=None,
    )
    assert reply["meta_info"]["completion_tokens"] == 4
