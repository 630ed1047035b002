"""SGLang's /generate bodies taken apart."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from services.common.errors import InvalidRequestError
from services.gateway.native.requests import GenerateRequest, NativeBatch, native_batch


def batch(**members: Any) -> NativeBatch:
    return native_batch(msgspec.convert(members, GenerateRequest), "id", None, "")


def test_one_prompt_is_single_and_a_list_of_one_is_not() -> None:
    assert batch(text="a").single
    assert not batch(text=["a"]).single
    assert batch(input_ids=[1, 2]).single
    assert not batch(input_ids=[[1, 2]]).single
    assert not batch(text="a", sampling_params={"n": 2}).single


def test_values_are_for_all_prompts_or_one_each() -> None:
    made = batch(
        text=["a", "b"],
        return_logprob=[True, False],
        top_logprobs_num=3,
        token_ids_logprob=[[1], [2, 3]],
        sampling_params=[{"temperature": 0}, {"max_new_tokens": None}],
    )
    first, second = made.specs
    assert first.logprobs is not None
    assert (first.logprobs.num_top, list(first.logprobs.token_ids)) == (3, [1])
    assert second.logprobs is None
    assert [spec.sampling.max_new_tokens for spec in made.specs] == [128, 128]
    assert made.rids == ["id_0", "id_1"]


def test_prompt_rows_are_reported_from_where_asked_or_when_there_is_nothing_else() -> None:
    def start(**members: Any) -> int | None:
        options = batch(text="a", return_logprob=True, **members).specs[0].logprobs
        assert options is not None
        return options.prompt_start if options.HasField("prompt_start") else None

    assert start() is None
    assert start(logprob_start_len=-1) is None
    assert start(logprob_start_len=0) == 0
    assert start(sampling_params={"max_new_tokens": 0}) == 0
    assert start(sampling_params={"max_new_tokens": 0}, logprob_start_len=4) == 4


def test_salts_of_both_names_never_meet() -> None:
    pairs = [("a", "bc"), ("ab", "c"), (None, "abc"), ("abc", None), ("1:a", "b")]
    salts = [batch(text="x", cache_salt=s, extra_key=k).specs[0].cache_salt for s, k in pairs]
    assert len(set(salts)) == len(pairs)


@pytest.mark.parametrize(
    ("members", "param"),
    [
        ({}, "text"),
        ({"text": "a", "input_ids": [1]}, "text"),
        ({"text": ""}, "text"),
        ({"text": ["a", ""]}, "text"),
        ({"input_ids": []}, "input_ids"),
        ({"input_ids": "1"}, "input_ids"),
        ({"input_ids": [[1], 2]}, "input_ids"),
        ({"input_ids": [1, [2]]}, "input_ids"),
        ({"text": "a", "sampling_params": [{}, {}]}, "sampling_params"),
        ({"text": "a", "sampling_params": [1]}, "sampling_params"),
        ({"text": ["a", "b"], "sampling_params": [{"n": 1}, {"n": 2}]}, "sampling_params.n"),
        ({"text": ["a", "b"], "return_logprob": [True]}, "return_logprob"),
        ({"text": "a", "token_ids_logprob": [-1], "return_logprob": True}, "token_ids_logprob"),
        ({"text": "a", "token_ids_logprob": 5}, "token_ids_logprob"),
        ({"text": "a", "sampling_params": {"ebnf": "x"}}, "sampling_params.ebnf"),
    ],
)
def test_what_is_wrong_is_named(members: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        batch(**members)
    assert caught.value.param == param
