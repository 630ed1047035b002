"""Chat messages into what templates read."""

from __future__ import annotations

import json
from typing import Any

import pytest

from services.common.errors import InvalidRequestError
from services.gateway.openai.messages import chat_messages


def test_text_parts_are_joined_and_the_developer_is_the_system() -> None:
    (message,) = chat_messages(
        [
            {
                "role": "developer",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            }
        ]
    )
    assert (message.role, message.content, message.extra_json) == ("system", "ab", "")


def test_null_members_of_a_text_part_are_absent() -> None:
    part = {"type": "text", "text": "a", "cache_control": None}
    (message,) = chat_messages([{"role": "user", "content": [part]}])
    assert message.content == "a"
    with pytest.raises(InvalidRequestError):
        chat_messages([{"role": "user", "content": [{**part, "cache_control": {}}]}])


def test_an_answer_may_come_back_with_its_empty_members() -> None:
    (message,) = chat_messages(
        [
            {
                "role": "assistant",
                "content": "Hi",
                "refusal": None,
                "annotations": [],
                "audio": None,
                "function_call": None,
                "tool_calls": None,
            }
        ]
    )
    assert (message.content, message.extra_json) == ("Hi", "")


def test_tool_calls_reach_the_template_with_their_arguments_as_objects() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    message, result = chat_messages(
        [
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "2"},
        ]
    )
    extra = json.loads(message.extra_json)
    assert extra["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert json.loads(result.extra_json) == {"tool_call_id": "c1"}


def test_arguments_that_are_no_json_stay_text() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": "{broken"}}
    (message,) = chat_messages([{"role": "assistant", "tool_calls": [call]}])
    extra = json.loads(message.extra_json)
    assert extra["tool_calls"][0]["function"]["arguments"] == "{broken"


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({}, "messages[0].role"),
        ({"role": 5, "content": "x"}, "messages[0].role"),
        ({"role": [], "content": "x"}, "messages[0].role"),
        ({"role": "user", "content": None}, "messages[0].content"),
        ({"role": "user", "content": 5}, "messages[0].content"),
        ({"role": "user", "content": ["x"]}, "messages[0].content[0]"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0]"),
        ({"role": "user", "content": [{"type": "audio"}]}, "messages[0].content[0].type"),
        ({"role": "user", "content": "x", "mood": "good"}, "messages[0].mood"),
        ({"role": "user", "content": "x", "name": 5}, "messages[0].name"),
        ({"role": "assistant", "refusal": "no"}, "messages[0].refusal"),
        ({"role": "assistant", "tool_calls": {}}, "messages[0].tool_calls"),
        ({"role": "assistant", "tool_calls": [{}]}, "messages[0].tool_calls[0]"),
    ],
)
def test_what_is_wrong_is_named(message: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        chat_messages([message])
    assert caught.value.param == param
