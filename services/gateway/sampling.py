"""Sampling parameters from any of the APIs: checked, then as the services speak of them.

Each API has its own names and defaults; the ranges are the same. `ParamNames` says what to call a
parameter in an error.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from rhizome.common.v1.sampling_params_pb2 import SamplingParams
from rhizome.common.v1.text_options_pb2 import TextOptions
from services.common.errors import InvalidRequestError
from services.common.limits import MAX_STOP_CHARS, MAX_STOP_STRINGS
from services.gateway.generation import MAX_CHOICES

MAX_TOP_LOGPROBS = 20
# What workers report at a position: the most likely tokens, and tokens asked for by id.
MAX_WORKER_LOGPROBS = 64
MAX_STOP_TOKEN_IDS = 1024
MAX_LOGIT_BIASES = 1024
_MAX_INT32 = 2**31 - 1
_MAX_TEMPERATURE = 100.0
# Below this a temperature is greedy, as in SGLang.
_GREEDY_TEMPERATURE = 1e-6


@dataclass(frozen=True, slots=True)
class ParamNames:
    """What an API calls the parameters whose names differ."""

    max_new_tokens: str
    min_new_tokens: str
    seed: str


@dataclass(slots=True, kw_only=True)
class SamplingInput:
    """A request's sampling parameters as given; None means absent."""

    names: ParamNames
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool | None = None
    logit_bias: Mapping[str, float] | None = None
    seed: int | None = None


def sampling_params(given: SamplingInput) -> SamplingParams:
    """Check every value's range. Raises InvalidRequestError naming the parameter."""
    check_range("temperature", given.temperature, 0, _MAX_TEMPERATURE)
    check_range("top_p", given.top_p, 0, 1, above_low=True)
    check_range("top_k", given.top_k, -1, _MAX_INT32)
    check_range("min_p", given.min_p, 0, 1)
    check_range("repetition_penalty", given.repetition_penalty, 0, 2, above_low=True)
    check_range("frequency_penalty", given.frequency_penalty, -2, 2)
    check_range("presence_penalty", given.presence_penalty, -2, 2)
    check_range(given.names.max_new_tokens, given.max_new_tokens, 0, _MAX_INT32)
    check_range(given.names.min_new_tokens, given.min_new_tokens, 0, _MAX_INT32)
    check_range(given.names.seed, given.seed, -(2**63), 2**64 - 1)
    if (
        given.min_new_tokens is not None
        and given.max_new_tokens is not None
        and given.min_new_tokens > given.max_new_tokens
    ):
        raise InvalidRequestError(
            f"{given.names.min_new_tokens} ({given.min_new_tokens}) exceeds "
            f"{given.names.max_new_tokens} ({given.max_new_tokens})",
            given.names.min_new_tokens,
        )
    check_token_ids("stop_token_ids", given.stop_token_ids or (), MAX_STOP_TOKEN_IDS)
    bias = _logit_bias(given.logit_bias or {})
    temperature = given.temperature
    if temperature is not None and temperature < _GREEDY_TEMPERATURE:
        temperature = 0.0
    return SamplingParams(
        temperature=temperature,
        top_p=given.top_p,
        top_k=given.top_k,
        min_p=given.min_p,
        repetition_penalty=given.repetition_penalty,
        frequency_penalty=given.frequency_penalty,
        presence_penalty=given.presence_penalty,
        max_new_tokens=given.max_new_tokens,
        min_new_tokens=given.min_new_tokens,
        stop_token_ids=given.stop_token_ids or (),
        ignore_eos=given.ignore_eos,
        logit_bias_ids=list(bias),
        logit_bias_values=list(bias.values()),
        seed=None if given.seed is None else given.seed % 2**64,
    )


def text_options(
    stop: str | Sequence[str] | None,
    *,
    no_stop_trim: bool | None = None,
    skip_special_tokens: bool | None = None,
    spaces_between_special_tokens: bool | None = None,
) -> TextOptions:
    """Stop strings and how ids become text. Raises InvalidRequestError."""
    strings = [stop] if isinstance(stop, str) else list(stop or ())
    if len(strings) > MAX_STOP_STRINGS:
        raise InvalidRequestError(
            f"stop has {len(strings)} strings; at most {MAX_STOP_STRINGS} are allowed", "stop"
        )
    if not all(strings):
        raise InvalidRequestError("stop must not hold an empty string", "stop")
    if (num_chars := sum(map(len, strings))) > MAX_STOP_CHARS:
        raise InvalidRequestError(
            f"stop has {num_chars} characters in all; at most {MAX_STOP_CHARS} are allowed", "stop"
        )
    return TextOptions(
        stop=strings,
        no_stop_trim=no_stop_trim,
        skip_special_tokens=skip_special_tokens,
        spaces_between_special_tokens=spaces_between_special_tokens,
    )


def check_range(
    param: str, value: float | None, low: float, high: float, *, above_low: bool = False
) -> None:
    """Raises InvalidRequestError unless `value` is absent or in [low, high] (or (low, high])."""
    if value is None:
        return
    if low <= value <= high and not (above_low and value == low):
        return
    bracket = "(" if above_low else "["
    raise InvalidRequestError(
        f"{param} must be in {bracket}{low}, {high}], got {_short(value)}", param
    )


def check_choices(param: str, value: int | None) -> int:
    """The number of choices a request asks for; 1 when absent."""
    check_range(param, value, 1, MAX_CHOICES)
    return 1 if value is None else value


def check_token_ids(param: str, ids: Collection[object], limit: int) -> None:
    """Raises InvalidRequestError unless all are integers that could be token ids."""
    if len(ids) > limit:
        raise InvalidRequestError(f"{param} has {len(ids)} ids; at most {limit} are allowed", param)
    for token_id in ids:
        if type(token_id) is not int:
            raise InvalidRequestError(
                f"{param} must hold integers, got {type(token_id).__name__}", param
            )
        if not 0 <= token_id <= _MAX_INT32:
            raise InvalidRequestError(
                f"{param}: {_short(token_id)} is not a token id of the vocabulary", param
            )


def _logit_bias(given: Mapping[str, float]) -> dict[int, float]:
    if len(given) > MAX_LOGIT_BIASES:
        raise InvalidRequestError(
            f"logit_bias has {len(given)} entries; at most {MAX_LOGIT_BIASES} are allowed",
            "logit_bias",
        )
    bias: dict[int, float] = {}
    for key, value in given.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise InvalidRequestError(
                f"logit_bias keys must be token ids, got {key[:40]!r}", "logit_bias"
            )
        if not -100 <= value <= 100:
            raise InvalidRequestError(
                f"logit_bias values must be in [-100, 100], got {_short(value)}", "logit_bias"
            )
        bias[int(key)] = value
    check_token_ids("logit_bias", bias, MAX_LOGIT_BIASES)
    return bias


def _short(value: float) -> str:
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    return repr(value)
