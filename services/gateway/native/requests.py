"""The body of SGLang's native POST /generate, single prompts and batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from rhizome.common.v1.logprobs_pb2 import LogprobOptions
from rhizome.tokenizer.v1.tokenizer_service_pb2 import TokenizeInput
from services.common.errors import InvalidRequestError
from services.common.spans import Span
from services.gateway.exchange import schedule_id, valid_request_id
from services.gateway.generation import GenerationSpec
from services.gateway.json_body import convert_member, without_nulls
from services.gateway.sampling import (
    MAX_WORKER_LOGPROBS,
    ParamNames,
    SamplingInput,
    check_choices,
    check_range,
    check_token_ids,
    sampling_params,
    text_options,
)

_DEFAULT_MAX_NEW_TOKENS = 128
_MAX_BATCH = 1024
_MAX_PROMPT_IDS = 10_000_000
_NAMES = ParamNames("max_new_tokens", "min_new_tokens", "sampling_seed")
_CONSTRAINTS = ("stop_regex", "json_schema", "regex", "ebnf", "structural_tag")


class NativeSampling(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`sampling_params`; the constraints are known so that their empty values are accepted."""

    max_new_tokens: int = _DEFAULT_MAX_NEW_TOKENS
    min_new_tokens: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    n: int | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    no_stop_trim: bool | None = None
    logit_bias: dict[str, float] | None = None
    sampling_seed: int | None = None
    stop_regex: str | list[str] | None = None
    json_schema: str | None = None
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: str | None = None

    def check_constraints(self) -> None:
        for name in _CONSTRAINTS:
            if getattr(self, name):
                raise InvalidRequestError(
                    f"sampling_params.{name} is not supported", f"sampling_params.{name}"
                )


class GenerateRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /generate. Most members are one value or a list with one for each prompt."""

    text: str | list[str] | None = None
    input_ids: Any = None
    sampling_params: Any = None
    rid: str | list[str] | None = None
    return_logprob: bool | list[bool] | None = None
    logprob_start_len: int | list[int] | None = None
    top_logprobs_num: int | list[int] | None = None
    token_ids_logprob: Any = None
    return_text_in_logprobs: bool | None = None
    stream: bool | None = None
    priority: int | None = None
    cache_salt: str | list[str] | None = None
    extra_key: str | list[str] | None = None
    session_id: str | None = None
    model: str | None = None


@dataclass(slots=True)
class NativeBatch:
    """A request taken apart: one spec a prompt. `single` requests get no list back."""

    specs: list[GenerationSpec]
    single: bool
    # By prompt: the name its reply carries in meta_info.
    rids: list[str]


def native_batch(
    request: GenerateRequest,
    request_id: str,
    deadline: float | None,
    span: Span,
    tenant: str = "",
) -> NativeBatch:
    """Raises InvalidRequestError naming the parameter that is wrong."""
    inputs, single, param = _inputs(request)
    count = len(inputs)
    samplings = _samplings(request.sampling_params, count)
    rids = _rids(request.rid, request_id, count, single)
    return_logprobs = _each("return_logprob", request.return_logprob, count)
    starts = _each("logprob_start_len", request.logprob_start_len, count)
    tops = _each("top_logprobs_num", request.top_logprobs_num, count)
    token_ids = _token_ids_logprob(request.token_ids_logprob, count)
    salts = _each("cache_salt", request.cache_salt, count)
    keys = _each("extra_key", request.extra_key, count)
    check_range("priority", request.priority, -(2**31), 2**31 - 1)
    specs = []
    for index, (one, sampling) in enumerate(zip(inputs, samplings, strict=True)):
        sampling.check_constraints()
        logprobs = None
        if return_logprobs[index]:
            logprobs = _logprob_options(starts[index], tops[index], token_ids[index], sampling)
        specs.append(
            GenerationSpec(
                request_id=rids[index],
                schedule_id=schedule_id(rids[index]),
                input=TokenizeInput(text=one) if isinstance(one, str) else None,
                token_ids=() if isinstance(one, str) else one,
                sampling=_sampling(sampling),
                text_options=text_options(
                    sampling.stop,
                    no_stop_trim=sampling.no_stop_trim,
                    skip_special_tokens=sampling.skip_special_tokens,
                    spaces_between_special_tokens=sampling.spaces_between_special_tokens,
                ),
                logprobs=logprobs,
                num_choices=check_choices("sampling_params.n", sampling.n),
                tenant=tenant,
                priority=request.priority or 0,
                cache_salt=_salt(salts[index], keys[index]),
                session_id=request.session_id or "",
                input_param=param,
                min_tokens_param=_NAMES.min_new_tokens,
                deadline=deadline,
                span=span,
            )
        )
    if len({spec.num_choices for spec in specs}) > 1:
        raise InvalidRequestError(
            "sampling_params.n must be the same for all prompts", "sampling_params.n"
        )
    return NativeBatch(specs, single and specs[0].num_choices == 1, rids)


def _inputs(request: GenerateRequest) -> tuple[Sequence[str | list[int]], bool, str]:
    if (request.text is None) == (request.input_ids is None):
        raise InvalidRequestError("give exactly one of text and input_ids", "text")
    if request.text is not None:
        single = isinstance(request.text, str)
        texts = [request.text] if isinstance(request.text, str) else request.text
        _check_batch("text", len(texts))
        if not all(texts):
            raise InvalidRequestError("text must not be empty", "text")
        return texts, single, "text"
    ids = request.input_ids
    if not isinstance(ids, list):
        raise InvalidRequestError("input_ids must be a list of ids or of lists", "input_ids")
    _check_batch("input_ids", len(ids) and 1)
    single = not isinstance(ids[0], list)
    batch = [ids] if single else ids
    _check_batch("input_ids", len(batch))
    for one in batch:
        if not isinstance(one, list) or not one:
            raise InvalidRequestError(
                "input_ids must be a non-empty list of ids, or a list of such lists", "input_ids"
            )
        check_token_ids("input_ids", one, _MAX_PROMPT_IDS)
    return batch, single, "input_ids"


def _check_batch(param: str, count: int) -> None:
    if not 1 <= count <= _MAX_BATCH:
        raise InvalidRequestError(f"{param} must hold 1 to {_MAX_BATCH} prompts", param)


def _samplings(given: Any, count: int) -> list[NativeSampling]:
    batch = given if isinstance(given, list) else [given or {}] * count
    if len(batch) != count:
        raise InvalidRequestError(
            f"sampling_params has {len(batch)} entries for {count} prompts", "sampling_params"
        )
    samplings = []
    for one in batch:
        if not isinstance(one, dict):
            raise InvalidRequestError(
                "sampling_params must be an object or a list of objects", "sampling_params"
            )
        samplings.append(convert_member(without_nulls(one), NativeSampling, "sampling_params"))
    return samplings


def _rids(given: str | list[str] | None, request_id: str, count: int, single: bool) -> list[str]:
    if isinstance(given, list):
        if len(given) != count or len(set(given)) != count:
            raise InvalidRequestError(
                f"rid must have {count} different entries, one for each prompt", "rid"
            )
        if not all(map(valid_request_id, given)):
            raise InvalidRequestError(
                "rid must hold short names of printable ASCII characters", "rid"
            )
        return given
    return [request_id] if single else [f"{request_id}_{i}" for i in range(count)]


def _each(param: str, value: Any, count: int) -> list[Any]:
    """One value for each prompt."""
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise InvalidRequestError(f"{param} has {len(value)} entries for {count} prompts", param)
    return value


def _token_ids_logprob(given: Any, count: int) -> list[list[int]]:
    """A list of ids for all prompts, or a list of such lists."""
    if given is None:
        return [[]] * count
    if not isinstance(given, list):
        raise InvalidRequestError("token_ids_logprob must be a list", "token_ids_logprob")
    nested = bool(given) and isinstance(given[0], list)
    batch = _each("token_ids_logprob", given, count) if nested else [given] * count
    for one in batch:
        if not isinstance(one, list):
            raise InvalidRequestError(
                "token_ids_logprob must hold ids, or a list of ids for each prompt",
                "token_ids_logprob",
            )
        check_token_ids("token_ids_logprob", one, MAX_WORKER_LOGPROBS)
    return batch


def _logprob_options(
    start: int | None, num_top: int | None, token_ids: list[int], sampling: NativeSampling
) -> LogprobOptions:
    """Without output tokens the prompt's are all there is to report, from its start."""
    check_range("logprob_start_len", start, -1, 2**31 - 1)
    check_range("top_logprobs_num", num_top, 0, MAX_WORKER_LOGPROBS)
    if start is None:
        start = 0 if sampling.max_new_tokens == 0 else -1
    return LogprobOptions(
        output=True,
        num_top=num_top or 0,
        prompt_start=None if start == -1 else start,
        token_ids=token_ids,
    )


def _sampling(given: NativeSampling) -> Any:
    return sampling_params(
        SamplingInput(
            names=_NAMES,
            temperature=given.temperature,
            top_p=given.top_p,
            top_k=given.top_k,
            min_p=given.min_p,
            repetition_penalty=given.repetition_penalty,
            frequency_penalty=given.frequency_penalty,
            presence_penalty=given.presence_penalty,
            max_new_tokens=given.max_new_tokens,
            min_new_tokens=given.min_new_tokens,
            stop_token_ids=given.stop_token_ids,
            ignore_eos=given.ignore_eos,
            logit_bias=given.logit_bias,
            seed=given.sampling_seed,
        )
    )


def _salt(cache_salt: str | None, extra_key: str | None) -> str:
    """Both keep prefixes apart; together they must not be mistaken for another pair."""
    if not extra_key:
        return cache_salt or ""
    return f"{len(extra_key)}:{extra_key}{cache_salt or ''}"
