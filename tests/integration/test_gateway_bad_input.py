"""Hostile and mistaken HTTP requests: the right 4xx with a message that helps, never a 5xx."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tests.fakes.gateway_stack import GatewayStack, gateway_stack
from tests.fakes.scripted_worker import CONTEXT_LENGTH

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
NATIVE = "/generate"
HELLO = [{"role": "user", "content": "Hello"}]
MAX_BODY = 200_000


@pytest.fixture
async def stack() -> AsyncIterator[GatewayStack]:
    async with gateway_stack(max_body_bytes=MAX_BODY) as running:
        yield running


@pytest.fixture
async def http(stack: GatewayStack) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=stack.url) as client:
        yield client


def chat(**members: Any) -> dict[str, Any]:
    return {"model": "default", "messages": HELLO, "max_tokens": 2, **members}


def text(**members: Any) -> dict[str, Any]:
    return {"model": "default", "prompt": "Hello", "max_tokens": 2, **members}


def native(sampling: dict[str, Any] | None = None, **members: Any) -> dict[str, Any]:
    return {"text": "Hello", "sampling_params": {"max_new_tokens": 2, **(sampling or {})}} | members


# (path, body, status, parameter named, part of the message)
BODIES: list[tuple[str, Any, int, str | None, str]] = [
    (CHAT, chat(colour="red"), 400, "colour", "colour"),
    (CHAT, chat(functions=[]), 400, "functions", "functions"),
    (CHAT, chat(temperature="hot"), 400, "temperature", "str"),
    (CHAT, chat(temperature=True), 400, "temperature", "bool"),
    (CHAT, chat(temperature=-0.1), 400, "temperature", "[0, 100"),
    (CHAT, chat(temperature=1e300), 400, "temperature", "[0, 100"),
    (CHAT, chat(top_p=0), 400, "top_p", "(0, 1]"),
    (CHAT, chat(top_p=1.01), 400, "top_p", "(0, 1]"),
    (CHAT, chat(top_k=-2), 400, "top_k", "top_k"),
    (CHAT, chat(top_k=1.5), 400, "top_k", "float"),
    (CHAT, chat(min_p=2), 400, "min_p", "min_p"),
    (CHAT, chat(repetition_penalty=0), 400, "repetition_penalty", "(0, 2]"),
    (CHAT, chat(presence_penalty=3), 400, "presence_penalty", "[-2, 2]"),
    (CHAT, chat(frequency_penalty=-3), 400, "frequency_penalty", "[-2, 2]"),
    (CHAT, chat(max_tokens=-1), 400, "max_tokens", "max_tokens"),
    (CHAT, chat(max_tokens=10**30), 400, "max_tokens", "max_tokens"),
    (CHAT, chat(max_tokens=3, max_completion_tokens=4), 400, "max_tokens", "contradict"),
    (CHAT, chat(min_tokens=5), 400, "min_tokens", "min_tokens"),
    (CHAT, chat(seed=2**70), 400, "seed", "seed"),
    (CHAT, chat(priority=10**4000), 400, "priority", "priority"),
    (CHAT, chat(min_p=10**400), 400, "min_p", "range"),
    (CHAT, chat(n=0), 400, "n", "[1, 128]"),
    (CHAT, chat(n=10000), 400, "n", "[1, 128]"),
    (CHAT, chat(stop=""), 400, "stop", "empty"),
    (CHAT, chat(stop=["a", ""]), 400, "stop", "empty"),
    (CHAT, chat(stop=["a"] * 100), 400, "stop", "64"),
    (CHAT, chat(stop=["a" * 1500, "b" * 1500]), 400, "stop", "2048"),
    (CHAT, chat(stop=5), 400, "stop", "stop"),
    (CHAT, chat(stop_token_ids=[-1]), 400, "stop_token_ids", "-1"),
    (CHAT, chat(stop_token_ids=[10**8]), 400, "stop_token_ids", "vocabulary"),
    (CHAT, chat(logit_bias={"x": 1}), 400, "logit_bias", "token ids"),
    (CHAT, chat(logit_bias={"1": 101}), 400, "logit_bias", "[-100, 100]"),
    (CHAT, chat(logit_bias={"99999999": 1}), 400, "logit_bias", "vocabulary"),
    (CHAT, chat(top_logprobs=3), 400, "top_logprobs", "logprobs=true"),
    (CHAT, chat(logprobs=True, top_logprobs=21), 400, "top_logprobs", "[0, 20]"),
    (CHAT, chat(stream_options={"include_usage": True}), 400, "stream_options", "stream=true"),
    (CHAT, chat(response_format={"type": "json_object"}), 400, "response_format", "text"),
    (
        CHAT,
        chat(response_format={"type": "text", "json_schema": {}}),
        400,
        "response_format.json_schema",
        "not supported",
    ),
    (CHAT, chat(response_format={"type": "text", "a": 1}), 400, "response_format.a", "`"),
    (CHAT, chat(tools=[{"type": "magic"}]), 400, "tools[0]", "function"),
    (CHAT, chat(tool_choice="required"), 400, "tool_choice", "tool_choice"),
    (CHAT, chat(parallel_tool_calls=True), 400, "parallel_tool_calls", "tools"),
    (CHAT, chat(store=True), 400, "store", "store"),
    (CHAT, chat(model="gpt-none"), 404, "model", "scripted"),
    (CHAT, chat(messages=[]), 400, "messages", "empty"),
    (CHAT, chat(messages="Hello"), 400, "messages", "array"),
    (CHAT, {"model": "default"}, 400, "messages", "messages"),
    (CHAT, chat(messages=[{"role": "king", "content": "x"}]), 400, "messages[0].role", "king"),
    (CHAT, chat(messages=[{"role": "user"}]), 400, "messages[0].content", "content"),
    (CHAT, chat(messages=[{**HELLO[0], "mood": 1}]), 400, "messages[0].mood", "mood"),
    (
        CHAT,
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
        400,
        "messages[0].content[0].type",
        "image_url",
    ),
    (CHAT, chat(continue_final_message=True), 400, "continue_final_message", "assistant"),
    (
        CHAT,
        chat(messages=[{"role": "user", "content": "far too long " * 1000}]),
        400,
        "messages",
        f"maximum context length is {CONTEXT_LENGTH}",
    ),
    (CHAT, [1, 2], 400, None, "object"),
    (TEXT, text(prompt=""), 400, "prompt", "empty"),
    (TEXT, text(prompt=[]), 400, "prompt", "empty"),
    (TEXT, text(prompt=[[]]), 400, "prompt", "prompt"),
    (TEXT, text(prompt=[1, "a"]), 400, "prompt", "integers"),
    (TEXT, text(prompt=["a", 1]), 400, "prompt", "prompt"),
    (TEXT, text(prompt=[True, False]), 400, "prompt", "prompt"),
    (TEXT, text(prompt={"a": 1}), 400, "prompt", "prompt"),
    (TEXT, text(prompt=[-1]), 400, "prompt", "-1"),
    (TEXT, text(prompt=[10**8]), 400, "prompt", "vocabulary"),
    (TEXT, text(prompt=[10**4000]), 400, "prompt", "vocabulary"),
    (TEXT, text(prompt=[1] * 600), 400, "prompt", "600 tokens"),
    (TEXT, text(suffix="end"), 400, "suffix", "suffix"),
    (TEXT, text(best_of=3), 400, "best_of", "best_of"),
    (TEXT, text(logprobs=21), 400, "logprobs", "[0, 20]"),
    (TEXT, text(min_tokens=400, max_tokens=None), 400, "min_tokens", "min_tokens"),
    (NATIVE, native(image_data="x"), 400, "image_data", "image_data"),
    (NATIVE, native({"colour": 1}), 400, "sampling_params.colour", "colour"),
    (NATIVE, native({"regex": "a+"}), 400, "sampling_params.regex", "regex"),
    (NATIVE, native({"max_new_tokens": -1}), 400, "max_new_tokens", "max_new_tokens"),
    (NATIVE, native({"n": 0}), 400, "sampling_params.n", "n"),
    (NATIVE, {"sampling_params": {}}, 400, "text", "input_ids"),
    (NATIVE, native(input_ids=[1]), 400, "text", "exactly one"),
    (NATIVE, native(text=[]), 400, "text", "prompts"),
    (NATIVE, native(text=["a", "b"], rid=["x", "x"]), 400, "rid", "different"),
    (NATIVE, native(logprob_start_len=-2, return_logprob=True), 400, "logprob_start_len", "-1"),
    (NATIVE, native(logprob_start_len=400, return_logprob=True), 400, "logprob_start_len", "400"),
    (
        NATIVE,
        native(top_logprobs_num=65, return_logprob=True),
        400,
        "top_logprobs_num",
        "[0, 64]",
    ),
    (
        NATIVE,
        native(token_ids_logprob=[1] * 65, return_logprob=True),
        400,
        "token_ids_logprob",
        "64",
    ),
    (
        NATIVE,
        native({"min_new_tokens": 600, "max_new_tokens": 700}),
        400,
        "min_new_tokens",
        "600",
    ),
    (
        NATIVE,
        native({"max_new_tokens": 0}, input_ids=[1] * CONTEXT_LENGTH, text=None),
        400,
        "input_ids",
        "no room",
    ),
    (CHAT, chat(cache_salt="x" * 600), 400, "cache_salt", "too long"),
    (NATIVE, native(extra_key="x" * 600), 400, "cache_salt", "too long"),
    (NATIVE, native(text=["a", "b"], rid=["x\n", "y"]), 400, "rid", "printable"),
    (CHAT, chat(session_id="x" * 300), 400, "session_id", "256"),
    (NATIVE, {"input_ids": [[1], []]}, 400, "input_ids", "input_ids"),
    (NATIVE, {"input_ids": [1.5]}, 400, "input_ids", "float"),
]


@pytest.fixture
async def answered(http: httpx.AsyncClient) -> AsyncIterator[httpx.AsyncClient]:
    """The client; afterwards an ordinary request must still be answered."""
    yield http
    reply = await http.post(CHAT, json=chat())
    assert reply.status_code == 200, reply.text


async def test_each_bad_body_is_refused_with_its_parameter_named(
    answered: httpx.AsyncClient,
) -> None:
    for path, body, status, param, message in BODIES:
        reply = await answered.post(path, json=body)
        case = f"{path} {json.dumps(body)[:200]} -> {reply.status_code} {reply.text}"
        assert reply.status_code == status, case
        error = reply.json()["error"]
        assert error["param"] == param, case
        assert message in error["message"], case
        assert error["type"] == "invalid_request_error", case


async def test_streaming_requests_are_refused_with_a_status_too(
    answered: httpx.AsyncClient,
) -> None:
    for path, body, status, _, _ in BODIES:
        if isinstance(body, dict) and "stream_options" not in body:
            reply = await answered.post(path, json={**body, "stream": True})
            assert reply.status_code == status, f"{path} {body} {reply.text}"


MALFORMED: list[tuple[bytes, str]] = [
    (b"", "not valid JSON"),
    (b"{", "not valid JSON"),
    (b'{"temperature": NaN}', "not valid JSON"),
    (b'{"temperature": Infinity}', "not valid JSON"),
    (b'{"stop": "\xff\xfe"}', "UTF-8"),
    (b'{"stop": "\\ud800"}', "surrogate"),
    (b'{"stop": "a\\udc00b"}', "surrogate"),
    (b'{"priority": 1e999}', "priority"),
    (b"[" * 100_000, "object"),
    (b"null", "object"),
    (b'"text"', "object"),
]


async def test_malformed_bodies_are_refused(answered: httpx.AsyncClient) -> None:
    for path in (CHAT, TEXT, NATIVE):
        for raw, message in MALFORMED:
            reply = await answered.post(path, content=raw)
            case = f"{path} {raw[:60]!r} -> {reply.status_code} {reply.text}"
            assert reply.status_code == 400, case
            assert message in reply.json()["error"]["message"], case
    for path, body in ((CHAT, chat()), (TEXT, text()), (NATIVE, native())):
        reply = await answered.post(path, content=json.dumps(body).encode() + b" x")
        assert reply.status_code == 400
        assert "not valid JSON" in reply.json()["error"]["message"]


async def test_deep_nesting_is_refused(answered: httpx.AsyncClient) -> None:
    deep = b"[" * 50_000 + b"]" * 50_000
    for path, name in ((CHAT, b"messages"), (TEXT, b"prompt"), (NATIVE, b"input_ids")):
        body = b'{"model": "default", "' + name + b'": ' + deep + b"}"
        if path == NATIVE:
            body = b'{"input_ids": ' + deep + b"}"
        reply = await answered.post(path, content=body)
        assert reply.status_code == 400, reply.text
    nested = b'{"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"a": '
    reply = await answered.post(CHAT, content=nested + deep + b"}}")
    assert reply.status_code == 400
    assert "nested" in reply.json()["error"]["message"]


async def test_a_huge_body_is_refused_declared_or_not(answered: httpx.AsyncClient) -> None:
    body = json.dumps(chat(user="x" * MAX_BODY)).encode()
    reply = await answered.post(CHAT, content=body)
    assert reply.status_code == 413
    assert str(MAX_BODY) in reply.json()["error"]["message"]

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 10_000):
            yield body[start : start + 10_000]

    reply = await answered.post(CHAT, content=chunks())
    assert reply.status_code == 413


async def test_wrong_paths_and_methods_are_answered_in_the_same_shape(
    answered: httpx.AsyncClient,
) -> None:
    missing = await answered.get("/v1/nothing")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    wrong = await answered.get(CHAT)
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")
    assert wrong.headers["allow"] == "POST"
    unknown = await answered.get("/v1/models/another%2fone")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")


async def test_a_request_id_that_cannot_be_sent_back_is_refused(
    answered: httpx.AsyncClient,
) -> None:
    reply = await answered.post(CHAT, json=chat(), headers={"x-request-id": "x" * 1000})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "x-request-id")
    reply = await answered.post(CHAT, json=chat(rid="a\nb"))
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "rid")
    reply = await answered.post(CHAT, json=chat(rid="mine"))
    assert reply.headers["x-request-id"] == "mine"
