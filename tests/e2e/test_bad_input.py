"""Requests at and beyond what a small system holds, through HTTP: a clear 400, never a 5xx."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.e2e.system import running_system

# The pool: less than the model's context, so it is what bounds a request.
NUM_TOKENS = 96
VOCAB_SIZE = 1536


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    with (
        running_system("--max-total-tokens", str(NUM_TOKENS)) as system,
        httpx.Client(base_url=system.url, timeout=60) as client,
    ):
        yield client


def complete(http: httpx.Client, **members: Any) -> httpx.Response:
    body = {"model": "default", "prompt": [300] * 5, "max_tokens": 1, **members}
    return http.post("/v1/completions", json=body)


def test_a_prompt_that_leaves_room_for_one_token_is_served(http: httpx.Client) -> None:
    response = complete(http, prompt=[300] * (NUM_TOKENS - 1), max_tokens=50)
    assert response.status_code == 200
    assert response.json()["usage"]["total_tokens"] == NUM_TOKENS


@pytest.mark.parametrize(("length", "reason"), [(96, "leaves no room for output"), (97, "97")])
def test_a_prompt_beyond_the_pool_is_refused_with_the_limit(
    http: httpx.Client, length: int, reason: str
) -> None:
    for response in (
        complete(http, prompt=[300] * length),
        complete(http, prompt=[300] * length, stream=True),
        http.post("/generate", json={"input_ids": [300] * length}),
    ):
        assert response.status_code == 400
        message = response.json()["error"]["message"]
        assert f"maximum context length is {NUM_TOKENS}" in message
        assert reason in message


def test_the_limit_is_what_the_model_list_says(http: httpx.Client) -> None:
    assert http.get("/v1/models").json()["data"][0]["max_model_len"] == NUM_TOKENS


def test_output_ends_where_the_pool_does(http: httpx.Client) -> None:
    response = complete(http, prompt=[300] * 90, max_tokens=1000, ignore_eos=True)
    assert response.status_code == 200
    assert response.json()["usage"]["completion_tokens"] == NUM_TOKENS - 90
    assert response.json()["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("top_k", [2**31, 10**30, -2])
def test_an_absurd_top_k_is_refused(http: httpx.Client, top_k: int) -> None:
    response = complete(http, top_k=top_k, temperature=1)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "top_k"


@pytest.mark.parametrize("top_k", [2**31 - 1, VOCAB_SIZE, VOCAB_SIZE + 1, 0, -1])
def test_a_top_k_beyond_the_vocabulary_filters_nothing(http: httpx.Client, top_k: int) -> None:
    plain = complete(http, temperature=1, seed=1, max_tokens=8).json()["choices"][0]["text"]
    response = complete(http, top_k=top_k, temperature=1, seed=1, max_tokens=8)
    assert response.json()["choices"][0]["text"] == plain


@pytest.mark.parametrize("token_id", ["-1", "4294967296", "99999999", "x", "1.5"])
def test_a_logit_bias_outside_the_vocabulary_is_refused(http: httpx.Client, token_id: str) -> None:
    response = complete(http, logit_bias={token_id: 1})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "logit_bias"


def test_the_last_id_of_the_vocabulary_can_be_biased_and_the_next_cannot(
    http: httpx.Client,
) -> None:
    assert complete(http, logit_bias={str(VOCAB_SIZE - 1): 100}).status_code == 200
    assert complete(http, logit_bias={str(VOCAB_SIZE): 100}).status_code == 400
