"""The OpenAI-compatible API through the openai client: real services, scripted workers."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI, NotFoundError

from tests.fakes.gateway_stack import (
    ANSWER,
    GatewayStack,
    answer_ids,
    gateway_stack,
    reference_tokenizer,
    until,
)
from tests.fakes.scripted_worker import logprob_of

CHAT: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
async def stack() -> AsyncIterator[GatewayStack]:
    async with gateway_stack() as running:
        yield running


@pytest.fixture
async def client(stack: GatewayStack) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(
        base_url=f"{stack.url}/v1",
        api_key="none",
        max_retries=0,
        _strict_response_validation=True,
    ) as openai:
        yield openai


@pytest.fixture
async def lenient(stack: GatewayStack) -> AsyncIterator[AsyncOpenAI]:
    """The client's model of text completions refuses the nulls that OpenAI itself sends: an
    unfinished chunk's finish_reason and the first token's log-probability.
    """
    async with AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0) as openai:
        yield openai


async def test_a_chat_is_answered_whole(client: AsyncOpenAI, stack: GatewayStack) -> None:
    stack.workers[0].cached_tokens = 3
    reply = await client.chat.completions.create(model="default", messages=CHAT)
    assert reply.choices[0].message.content == ANSWER
    assert reply.choices[0].finish_reason == "stop"
    assert reply.model == "scripted"
    assert reply.usage is not None
    assert reply.usage.completion_tokens == len(answer_ids())
    assert reply.usage.prompt_tokens == len(stack.workers[0].submits[0].token_ids)
    assert reply.usage.prompt_tokens_details is not None
    assert reply.usage.prompt_tokens_details.cached_tokens == 3


async def test_a_chat_streams_the_same_text(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="scripted",
        messages=CHAT,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == ANSWER
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(answer_ids())
    assert all(chunk.usage is None for chunk in chunks[:-1])


async def test_pain_20_s_usage_is_counted_always_and_shown_to_those_who_asked(
    client: AsyncOpenAI, stack: GatewayStack
) -> None:
    assert stack.scheduler is not None
    stack.workers[0].cached_tokens = 3
    reported = stack.scheduler.metrics.value
    counted = stack.pipeline.metrics.registry.get_sample_value
    for number, options in enumerate(({}, {"stream_options": {"include_usage": True}}), 1):
        stream = await client.chat.completions.create(
            model="default", messages=CHAT, stream=True, **options
        )
        chunks = [chunk async for chunk in stream]
        prompt_tokens = len(stack.workers[0].submits[-1].token_ids)
        if options:
            assert chunks[-1].choices == []
            assert chunks[-1].usage is not None
            assert chunks[-1].usage.prompt_tokens == prompt_tokens
            assert chunks[-1].usage.prompt_tokens_details is not None
            assert chunks[-1].usage.prompt_tokens_details.cached_tokens == 3
        else:
            assert all(chunk.usage is None and chunk.choices for chunk in chunks)
        await until(lambda n=number: reported("actual_cached_tokens_total") == 3 * n)  # type: ignore[misc]
        assert reported("reported_prompt_tokens_total") == number * prompt_tokens
        output = counted(
            "rhizome_gateway_output_tokens_total", {"model": "scripted", "tenant": "none"}
        )
        assert output == number * len(answer_ids())


async def test_choices_are_multiplexed_in_one_stream(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="default", messages=CHAT, stream=True, n=3, max_tokens=5
    )
    texts = ["", "", ""]
    finishes = {}
    async for chunk in stream:
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        if choice.finish_reason:
            finishes[choice.index] = choice.finish_reason
    expected = reference_tokenizer().decode(answer_ids()[:5])
    assert texts == [expected] * 3
    assert finishes == {0: "length", 1: "length", 2: "length"}


async def test_a_stop_string_ends_the_text_before_it_and_cancels_the_sequence(
    client: AsyncOpenAI, stack: GatewayStack
) -> None:
    reply = await client.chat.completions.create(
        model="default", messages=CHAT, stop=["\n\n", "river"]
    )
    assert reply.choices[0].message.content == ANSWER.split("river")[0]
    assert reply.choices[0].finish_reason == "stop"
    assert reply.choices[0].model_extra == {"matched_stop": "river"}
    assert reply.usage is not None
    assert reply.usage.completion_tokens < len(answer_ids())
    kept = await client.chat.completions.create(
        model="default",
        messages=CHAT,
        stop="river",
        extra_body={"include_stop_str_in_output": True},
    )
    assert kept.choices[0].message.content == ANSWER.split("river")[0] + "river"


async def test_a_stop_token_id_is_left_out_of_the_text_unless_it_is_wanted(
    client: AsyncOpenAI,
) -> None:
    ids = answer_ids()
    stop_id = next(i for i in ids[4:] if i not in ids[:4])
    before = reference_tokenizer().decode(ids[: ids.index(stop_id)])
    reply = await client.chat.completions.create(
        model="default", messages=CHAT, extra_body={"stop_token_ids": [stop_id]}
    )
    assert reply.choices[0].message.content == before
    assert reply.choices[0].model_extra == {"matched_stop": stop_id}
    kept = await client.chat.completions.create(
        model="default",
        messages=CHAT,
        extra_body={"stop_token_ids": [stop_id], "no_stop_trim": True},
    )
    assert kept.choices[0].message.content == before + reference_tokenizer().decode([stop_id])


@pytest.mark.parametrize("stream", [False, True])
async def test_chat_logprobs_name_each_token_and_its_rivals(
    client: AsyncOpenAI, stream: bool
) -> None:
    arguments: dict[str, Any] = {
        "model": "default",
        "messages": CHAT,
        "logprobs": True,
        "top_logprobs": 2,
        "max_tokens": 6,
    }
    entries: list[Any] = []
    text = ""
    if stream:
        async for chunk in await client.chat.completions.create(stream=True, **arguments):
            text += chunk.choices[0].delta.content or ""
            if (logprobs := chunk.choices[0].logprobs) is not None:
                entries += logprobs.content or []
    else:
        reply = await client.chat.completions.create(**arguments)
        text = reply.choices[0].message.content or ""
        assert reply.choices[0].logprobs is not None
        entries = reply.choices[0].logprobs.content or []
    ids = answer_ids()[:6]
    assert [entry.logprob for entry in entries] == [logprob_of(i) for i in ids]
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == text
    assert [len(entry.top_logprobs) for entry in entries] == [2] * 6


async def test_completions_take_texts_and_token_ids_one_or_many(client: AsyncOpenAI) -> None:
    ids = reference_tokenizer().encode("The capital").ids
    prompts: list[Any] = ["The capital", ["The capital", "A river"], ids, [ids, ids[:2]]]
    for prompt in prompts:
        reply = await client.completions.create(model="default", prompt=prompt, max_tokens=4)
        expected = reference_tokenizer().decode(answer_ids()[:4])
        count = 2 if isinstance(prompt[0], (list, str)) and isinstance(prompt, list) else 1
        assert [choice.text for choice in reply.choices] == [expected] * count
        assert [choice.index for choice in reply.choices] == list(range(count))


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_with_logprobs_covers_the_prompt(lenient: AsyncOpenAI, stream: bool) -> None:
    prompt = "The capital of France"
    ids = reference_tokenizer().encode(prompt).ids
    arguments: dict[str, Any] = {
        "model": "default",
        "prompt": prompt,
        "echo": True,
        "logprobs": 1,
        "max_tokens": 3,
    }
    text = ""
    tokens: list[str] = []
    offsets: list[int] = []
    logprobs: list[float | None] = []
    if stream:
        async for chunk in await lenient.completions.create(stream=True, **arguments):
            text += chunk.choices[0].text
            if chunk.choices[0].logprobs is not None:
                tokens += chunk.choices[0].logprobs.tokens or []
                offsets += chunk.choices[0].logprobs.text_offset or []
                logprobs += chunk.choices[0].logprobs.token_logprobs or []
    else:
        reply = await lenient.completions.create(**arguments)
        choice: Any = reply.choices[0]
        text = choice.text
        tokens, offsets = choice.logprobs.tokens, choice.logprobs.text_offset
        logprobs = choice.logprobs.token_logprobs
    output = answer_ids()[:3]
    assert text == prompt + reference_tokenizer().decode(output)
    assert logprobs == [None, *(logprob_of(i) for i in [*ids[1:], *output])]
    # The prompt's first token is special and takes no room in the text.
    assert "".join(tokens[1:]) == text
    assert offsets[:2] == [0, 0]
    for token, offset in zip(tokens[1:], offsets[1:], strict=True):
        assert text.startswith(token, offset)


async def test_a_streamed_echo_begins_with_the_prompt(lenient: AsyncOpenAI) -> None:
    ids = reference_tokenizer().encode("The capital").ids
    stream = await lenient.completions.create(
        model="default", prompt=ids, echo=True, stream=True, max_tokens=3
    )
    text = "".join([chunk.choices[0].text async for chunk in stream if chunk.choices])
    assert text == "The capital" + reference_tokenizer().decode(answer_ids()[:3])


async def test_models_are_listed_and_found(client: AsyncOpenAI) -> None:
    models = [model async for model in client.models.list()]
    assert [model.id for model in models] == ["scripted"]
    assert (await client.models.retrieve("scripted")).owned_by == "rhizome"
    with pytest.raises(NotFoundError) as caught:
        await client.models.retrieve("another")
    assert caught.value.code == "model_not_found"


async def test_an_answer_may_be_sent_back_as_it_is(client: AsyncOpenAI) -> None:
    reply = await client.chat.completions.create(model="default", messages=CHAT)
    back = reply.choices[0].message.model_dump()
    assert {"refusal", "tool_calls", "function_call", "audio"} <= set(back)
    again = await client.chat.completions.create(
        model="default", messages=[*CHAT, back, {"role": "user", "content": "And of Italy?"}]
    )
    assert again.choices[0].message.content == ANSWER


async def test_every_sampling_parameter_reaches_the_worker(
    client: AsyncOpenAI, stack: GatewayStack
) -> None:
    await client.chat.completions.create(
        model="default",
        messages=CHAT,
        temperature=0.5,
        top_p=0.25,
        frequency_penalty=0.5,
        presence_penalty=-1,
        seed=-2,
        max_completion_tokens=7,
        logit_bias={"5": -100, "6": 1},
        extra_body={
            "top_k": 4,
            "min_p": 0.125,
            "repetition_penalty": 1.5,
            "min_tokens": 2,
            "ignore_eos": True,
            "stop_token_ids": [9],
            "priority": 3,
            "cache_salt": "mine",
        },
    )
    submit = stack.workers[0].submits[-1]
    sampling = submit.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.25, 4)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.125, 1.5)
    assert (sampling.frequency_penalty, sampling.presence_penalty) == (0.5, -1)
    assert (sampling.max_new_tokens, sampling.min_new_tokens) == (7, 2)
    assert sampling.ignore_eos
    assert list(sampling.stop_token_ids) == [9]
    assert dict(zip(sampling.logit_bias_ids, sampling.logit_bias_values, strict=True)) == {
        5: -100,
        6: 1,
    }
    assert sampling.seed == 2**64 - 2
    assert submit.priority == 3
    assert submit.namespace.endswith("/mine")


async def test_without_a_seed_the_gateway_draws_one_and_the_output_may_fill_the_context(
    client: AsyncOpenAI, stack: GatewayStack
) -> None:
    for _ in range(2):
        await client.chat.completions.create(model="default", messages=CHAT)
    first, second = stack.workers[0].submits
    assert first.sampling.HasField("seed")
    assert first.sampling.seed != second.sampling.seed
    assert first.sampling.max_new_tokens == 512 - first.prompt_len


async def test_parameters_that_carry_nothing_are_accepted(client: AsyncOpenAI) -> None:
    reply = await client.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": [{"type": "text", "text": "Hello"}]}],
        max_tokens=2,
        store=False,
        user="someone",
        metadata={"team": "blue"},
        response_format={"type": "text"},
        tool_choice="none",
        extra_body={"functions": None, "reasoning_effort": None, "tools": None},
    )
    assert reply.choices[0].finish_reason == "length"


async def test_the_request_id_is_echoed_and_the_way_is_told_when_asked(
    stack: GatewayStack,
) -> None:
    async with httpx.AsyncClient(base_url=stack.url) as http:
        body = {"model": "default", "messages": CHAT, "stream": True}
        headers = {"x-request-id": "mine-7", "x-rhizome-trace": "1"}
        streamed = await http.post("/v1/chat/completions", json=body, headers=headers)
        assert streamed.headers["x-request-id"] == "mine-7"
        events = [line[6:] for line in streamed.text.split("\n") if line.startswith("data: ")]
        assert events[-1] == "[DONE]"
        trace = json.loads(events[-2])["rhizome"]
        assert trace["worker_ids"] == ["w0"]
        assert 0 < trace["tokenize_ms"] < trace["first_token_ms"] <= trace["total_ms"]
        body["stream"] = False
        whole = await http.post("/v1/chat/completions", json=body, headers=headers)
        assert whole.json()["rhizome"]["output_tokens"] == len(answer_ids())
        plain = await http.post("/v1/chat/completions", json=body)
        assert "rhizome" not in plain.json()
        assert plain.headers["x-request-id"]


async def test_health_and_metrics_tell_the_state(stack: GatewayStack) -> None:
    async with httpx.AsyncClient(base_url=stack.url) as http:
        assert (await http.get("/health")).status_code == 200
        assert (await http.get("/health_generate")).status_code == 200
        assert stack.workers[0].submits[-1].sampling.max_new_tokens == 1
        await http.post("/v1/chat/completions", json={"messages": CHAT})
        metrics = (await http.get("/metrics")).text
    assert 'requests_total{endpoint="/v1/chat/completions",status="200"} 1.0' in metrics
    assert 'time_to_first_token_seconds_count{model="scripted",tenant="none"} 2.0' in metrics
    assert "inflight_prompts 0.0" in metrics


async def test_nothing_is_left_when_requests_are_over(
    client: AsyncOpenAI, stack: GatewayStack
) -> None:
    await client.chat.completions.create(model="default", messages=CHAT, n=2)
    await until(lambda: stack.workers[0].num_live == 0)
    assert stack.pipeline.inflight.num_prompts == 0
