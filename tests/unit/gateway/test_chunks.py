"""Streamed chunks: the prepared bytes equal the encoded object."""

from __future__ import annotations

import json

import pytest

from rhizome.common.v1.finish_reason_pb2 import FINISH_REASON_STOP
from services.gateway.generation import ChoiceFinish
from services.gateway.openai.chunks import ChunkFormat

HEAD = {"id": "x", "object": "y", "created": 1, "model": "m"}


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("include_usage", [True, False])
def test_the_fast_way_and_the_general_way_make_the_same_chunk(
    chat: bool, include_usage: bool
) -> None:
    form = ChunkFormat(HEAD, chat=chat, include_usage=include_usage)
    prefix, suffix = form.text_ends(3)
    text = 'a "quote"\n\u2028'
    fast = prefix + json.dumps(text).encode() + suffix
    general = form.text(3, text, None)
    assert fast.endswith(b"\n\n")
    assert json.loads(fast[6:]) == json.loads(general[6:])
    assert ("usage" in json.loads(fast[6:])) == include_usage


def test_the_last_chunks_say_why_and_how_much() -> None:
    form = ChunkFormat(HEAD, chat=True, include_usage=True)
    end = json.loads(form.end(0, ChoiceFinish(FINISH_REASON_STOP, matched_stop="x"))[6:])
    assert end["choices"][0]["finish_reason"] == "stop"
    assert end["choices"][0]["matched_stop"] == "x"
    closing = json.loads(form.closing({"usage": {"prompt_tokens": 1}})[6:])
    assert (closing["choices"], closing["usage"]) == ([], {"prompt_tokens": 1})
