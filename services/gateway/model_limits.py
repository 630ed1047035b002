"""A prompt and its parameters against the limits of the model: its vocabulary and its context."""

from __future__ import annotations

from collections.abc import Sequence

from services.common.errors import InvalidRequestError
from services.gateway.control_plane import ServedModel
from services.gateway.generation import GenerationSpec, Prompt

# Longest that workers take.
_MAX_NAMESPACE_CHARS = 512
# Schedulers remember sessions by their ids.
_MAX_SESSION_ID_CHARS = 256


def check_parameters(spec: GenerationSpec, model: ServedModel, namespace: str) -> None:
    """What can be said before the prompt is tokenized; `namespace` is that of its cached pages."""
    _check_vocabulary(spec, model)
    _check_names(spec, namespace)


def _check_vocabulary(spec: GenerationSpec, model: ServedModel) -> None:
    """Ids in parameters must name tokens."""
    limit = model.vocab_size
    if not limit:
        return
    named = (
        ("stop_token_ids", spec.sampling.stop_token_ids),
        ("logit_bias", spec.sampling.logit_bias_ids),
        ("token_ids_logprob", spec.logprobs.token_ids if spec.logprobs is not None else ()),
    )
    for param, ids in named:
        if ids and max(ids) >= limit:
            raise InvalidRequestError(
                f"{param}: token id {max(ids)} is not in the vocabulary of {limit} tokens", param
            )


def _check_names(spec: GenerationSpec, namespace: str) -> None:
    """Names that others keep have a limit; the client's part of the namespace is its salt."""
    if len(spec.session_id) > _MAX_SESSION_ID_CHARS:
        raise InvalidRequestError(
            f"session_id may have at most {_MAX_SESSION_ID_CHARS} characters", "session_id"
        )
    if (excess := len(namespace) - _MAX_NAMESPACE_CHARS) > 0:
        raise InvalidRequestError(f"cache_salt is {excess} characters too long", "cache_salt")


def check_token_ids(ids: Sequence[int], model: ServedModel, param: str) -> None:
    if len(ids) > model.context_length:
        # Before anything is computed over them.
        raise _too_long(len(ids), model, param)
    if ids and model.vocab_size and max(ids) >= model.vocab_size:
        raise InvalidRequestError(
            f"token id {max(ids)} is not in the vocabulary of {model.vocab_size} tokens", param
        )


def fit_context(prompt: Prompt, model: ServedModel) -> None:
    """The prompt must leave room for a token; the limit on output becomes what fits."""
    spec, length = prompt.spec, len(prompt.token_ids)
    if length == 0:
        raise InvalidRequestError("the prompt is empty: it has no tokens", spec.input_param)
    sampling = spec.sampling
    room = model.context_length - length
    if room < 1:
        raise _too_long(length, model, spec.input_param)
    if not sampling.HasField("max_new_tokens") or sampling.max_new_tokens > room:
        sampling.max_new_tokens = room
    if sampling.min_new_tokens > sampling.max_new_tokens:
        raise InvalidRequestError(
            f"the minimum of {sampling.min_new_tokens} new tokens exceeds the "
            f"{sampling.max_new_tokens} that may be produced",
            spec.min_tokens_param,
        )
    if spec.logprobs is not None and spec.logprobs.HasField("prompt_start"):
        if spec.logprobs.prompt_start > length:
            raise InvalidRequestError(
                f"logprob_start_len is {spec.logprobs.prompt_start}, but the prompt has "
                f"{length} tokens",
                "logprob_start_len",
            )
        if spec.logprobs.prompt_start == length:
            spec.logprobs.ClearField("prompt_start")


def _too_long(length: int, model: ServedModel, param: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"This model's maximum context length is {model.context_length} tokens, but the prompt "
        f"has {length} tokens"
        + (" and leaves no room for output" if length == model.context_length else ""),
        param,
    )
