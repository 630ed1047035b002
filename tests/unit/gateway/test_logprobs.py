"""Log-probabilities in OpenAI's two shapes."""

from __future__ import annotations

import math

from services.gateway.generation import LogprobRows
from services.gateway.openai.logprobs import CompletionLogprobs, chat_entries, join_blocks

PIECES = {1: b"<s>", 2: b"Caf", 3: b"\xc3", 4: b"\xa9", 5: b" x"}


def rows(ids: list[int], logprobs: list[float], num_top: int = 0) -> LogprobRows:
    made = LogprobRows(0, 0)
    made.token_ids, made.logprobs, made.num_top = ids, logprobs, num_top
    made.top_token_ids = [i for i in ids for _ in range(num_top)]
    made.top_logprobs = [value for value in logprobs for _ in range(num_top)]
    return made


def test_chat_entries_carry_exact_bytes_and_a_finite_number() -> None:
    entries = chat_entries(rows([2, 3], [-1.0, -math.inf], 1), 0, 2, PIECES)
    assert entries[0]["token"] == "Caf"
    assert entries[1]["bytes"] == [0xC3]
    assert entries[1]["logprob"] == -9999.0
    assert entries[0]["top_logprobs"][0]["token"] == "Caf"


def test_offsets_count_characters_of_the_text() -> None:
    form = CompletionLogprobs(0)
    made = rows([1, 2, 3, 4], [math.nan, -1.0, -1.0, -1.0])
    prompt = form.block(made, 0, 4, PIECES, "Caf\u00e9")
    output = form.block(rows([5, 2], [-1.0, -1.0]), 0, 2, PIECES)
    joined = join_blocks(prompt, output)
    assert joined["text_offset"] == [0, 0, 3, 4, 4, 6]
    assert joined["token_logprobs"][0] is None
    assert joined["tokens"][2] == "bytes:\\xc3"
    assert joined["top_logprobs"] is None


def test_the_chosen_token_is_always_among_the_top() -> None:
    made = rows([2], [-3.0], 1)
    made.top_token_ids, made.top_logprobs = [5], [-0.5]
    block = CompletionLogprobs(1).block(made, 0, 1, PIECES)
    assert block["top_logprobs"] == [{" x": -0.5, "Caf": -3.0}]
