"""Ranges of sampling parameters, and what the services are told."""

from __future__ import annotations

import math
from typing import Any

import pytest

from services.common.errors import InvalidRequestError
from services.gateway.sampling import (
    ParamNames,
    SamplingInput,
    check_choices,
    sampling_params,
    text_options,
)

NAMES = ParamNames("max_tokens", "min_tokens", "seed")


def given(**values: Any) -> SamplingInput:
    return SamplingInput(names=NAMES, **values)


def test_absent_parameters_stay_unset() -> None:
    assert sampling_params(given()).ByteSize() == 0
    assert text_options(None).ByteSize() == 0


@pytest.mark.parametrize(
    ("param", "inside", "outside"),
    [
        ("temperature", [0, 1, 100], [-1e-9, 100.1, math.inf, math.nan]),
        ("top_p", [1e-6, 1], [0, 1.1, -1]),
        ("top_k", [-1, 0, 1, 2**31 - 1], [-2, 2**31]),
        ("min_p", [0, 1], [-0.1, 1.1]),
        ("repetition_penalty", [0.01, 2], [0, 2.1]),
        ("frequency_penalty", [-2, 2], [-2.1, 2.1]),
        ("presence_penalty", [-2, 2], [-2.1, 2.1]),
        ("seed", [-(2**63), 2**64 - 1], [2**64, -(2**63) - 1, 10**5000]),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(
    param: str, inside: list[float], outside: list[float]
) -> None:
    for value in inside:
        sampling_params(given(**{param: value}))
    for value in outside:
        with pytest.raises(InvalidRequestError) as caught:
            sampling_params(given(**{param: value}))
        assert caught.value.param == param
        assert param in caught.value.message
        assert len(caught.value.message) < 200


def test_errors_use_the_names_of_the_api() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        sampling_params(given(max_new_tokens=-1))
    assert caught.value.param == "max_tokens"
    with pytest.raises(InvalidRequestError) as caught:
        sampling_params(given(max_new_tokens=1, min_new_tokens=2))
    assert caught.value.param == "min_tokens"


def test_a_tiny_temperature_is_greedy() -> None:
    assert sampling_params(given(temperature=1e-7)).temperature == 0
    assert sampling_params(given(temperature=1e-5)).temperature > 0


def test_a_negative_seed_is_its_unsigned_twin() -> None:
    assert sampling_params(given(seed=-1)).seed == 2**64 - 1


@pytest.mark.parametrize("key", ["", "a", "-1", "1.5", "0x1", "\u0663", "9" * 30])
def test_logit_bias_keys_are_token_ids(key: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        sampling_params(given(logit_bias={key: 1.0}))
    assert caught.value.param == "logit_bias"


@pytest.mark.parametrize("ids", [[-1], [2**31], [1] * 2000])
def test_stop_token_ids_could_be_ids_and_are_not_too_many(ids: list[int]) -> None:
    with pytest.raises(InvalidRequestError):
        sampling_params(given(stop_token_ids=ids))


@pytest.mark.parametrize("stop", ["", ["a", ""], ["a"] * 65, "a" * 5000])
def test_stop_strings_have_limits(stop: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        text_options(stop)
    assert caught.value.param == "stop"


def test_choices_are_1_to_128() -> None:
    assert check_choices("n", None) == 1
    assert check_choices("n", 128) == 128
    for bad in (0, 129, -1):
        with pytest.raises(InvalidRequestError):
            check_choices("n", bad)
