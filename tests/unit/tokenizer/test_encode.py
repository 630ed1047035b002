"""Encoding: batches, prefix hashes, invalid text."""

from __future__ import annotations

import pytest

from services.common.errors import InvalidRequestError
from services.common.prefix_hash import prefix_hashes
from services.tokenizer.encode import Encoder, Text, sliced_prefix_hashes
from services.tokenizer.tokenizer_files import LoadedTokenizer
from tests.unit.tokenizer import vocabularies


@pytest.fixture
def encoder() -> Encoder:
    return Encoder(LoadedTokenizer(vocabularies.byte_level(), (0,), (1,), {}, 0))


def test_a_batch_has_each_texts_own_ids(encoder: Encoder) -> None:
    tokenizer = vocabularies.byte_level()
    texts = ["Grüße", "", "今日は<|eos|>", "x" * 50_000]
    batch = encoder.encode([Text(text, False) for text in texts])
    assert batch == [tokenizer.encode(text).ids for text in texts]
    assert encoder.encode([Text("a", True)]) == [[0, *tokenizer.encode("a").ids, 1]]
    assert encoder.encode([]) == []


def test_a_lone_surrogate_is_refused_by_place(encoder: Encoder) -> None:
    with pytest.raises(InvalidRequestError, match=r"input 1: .*character 2"):
        encoder.encode([Text("fine", False), Text("ab\ud800", False)])


@pytest.mark.parametrize("page_size", [1, 16, 24, 9000])
@pytest.mark.parametrize("length", [0, 15, 16, 8192, 20_001])
def test_hashes_of_long_prompts_equal_the_shared_functions(page_size: int, length: int) -> None:
    token_ids = list(range(length))
    expected = prefix_hashes(token_ids, page_size, "rev//salt")
    assert sliced_prefix_hashes(token_ids, page_size, "rev//salt") == expected
