"""A prompt and its parameters against the limits of the model: its vocabulary and its context."""

from __future__ import annotations

from collections.abc import Sequence

from services.common.errors import InvalidRequestError
from services.gateway.control_plane import ServedModel
from services.gateway.generation import GenerationSpec, Prompt


def check_vocabulary(spec: GenerationSpec, model: ServedModel) -> None:
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


def check_token_ids(ids: Sequence[int], model: ServedModel, param: str) -> None:
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
    wants_output = not sampling.HasField("max_new_tokens") or sampling.max_new_tokens > 0
    room = model.context_length - length
    if room < (1 if wants_output else 0):
        raise InvalidRequestError(
            f"This model's maximum context length is {model.context_length} tokens, but the "
            f"prompt has {length} tokens" + (" and leaves no room for output" if room == 0 else ""),
            spec.input_param,
        )
    if not sampling.HasField("max_new_tokens") or sampling.max_new_tokens > room:
        sampling.max_new_tokens = room
    if sampling.min_new_tokens > sampling.max_new_tokens:
        raise InvalidRequestError(
            f"the minimum of {sampling.min_new_tokens} new tokens exceeds the "
            f"{sampling.max_new_tokens} that may be produced",
            "min_tokens",
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
