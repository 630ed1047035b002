"""The airlock, inward: protobuf comes in, the engine's dataclasses go out.

Every default is applied and every limit checked here, naming the field that is wrong, so the
engine never sees a request it cannot run.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from rhizome.common.v1 import logprobs_pb2, pool_identity_pb2, sampling_params_pb2
from rhizome.worker.v1 import worker_service_pb2 as pb
from services.common.errors import DeadlineError, InvalidRequestError, PreconditionError
from services.common.rpc import MAX_PROTOCOL_REVISION, MIN_PROTOCOL_REVISION
from services.worker.engine.messages import EngineReady, LogprobSpec, Request, SamplingParams

# Wire revisions that this release speaks.
PROTOCOL = pool_identity_pb2.ProtocolRange(
    min_revision=MIN_PROTOCOL_REVISION, max_revision=MAX_PROTOCOL_REVISION
)

# Largest num_top, and number of token_ids, of LogprobOptions.
MAX_TOP_LOGPROBS = 64
_MAX_STOP_TOKEN_IDS = 1024
_MAX_NAMESPACE_BYTES = 512
_MAX_SEED = 2**64 - 1
# A longer time is taken for this one (a year), so that deadlines stay 64-bit numbers.
_MAX_REMAINING_S = 365 * 86_400


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a request must respect on this worker."""

    context_length: int
    vocab_size: int
    # Namespace of requests that give none.
    default_namespace: str

    @classmethod
    def of(cls, ready: EngineReady, default_namespace: str) -> Limits:
        """The limits of an engine that is ready."""
        return cls(
            context_length=ready.context_length,
            vocab_size=ready.vocab_size,
            default_namespace=default_namespace,
        )


def check_lengths(submit: pb.Submit, limits: Limits) -> None:
    """Refuse a submit by its declared lengths, before its ids have all come."""
    if submit.prompt_len < 1:
        raise InvalidRequestError("prompt_len must be >= 1", "prompt_len")
    if submit.prompt_len >= limits.context_length:
        raise InvalidRequestError(
            f"the prompt has {submit.prompt_len} tokens; with the context length of "
            f"{limits.context_length} it must be shorter than that",
            "prompt_len",
        )
    if submit.num_token_ids < submit.prompt_len:
        raise InvalidRequestError(
            f"num_token_ids ({submit.num_token_ids}) is less than prompt_len ({submit.prompt_len})",
            "num_token_ids",
        )
    if submit.num_token_ids > limits.context_length:
        raise InvalidRequestError(
            f"{submit.num_token_ids} tokens exceed the context length of {limits.context_length}",
            "num_token_ids",
        )
    if len(submit.token_ids) > submit.num_token_ids:
        raise InvalidRequestError(
            f"{len(submit.token_ids)} ids came where num_token_ids is {submit.num_token_ids}",
            "token_ids",
        )


def request_from_submit(
    submit: pb.Submit, token_ids: list[int], *, key: int, limits: Limits, now_ns: int
) -> Request:
    """The engine's request, with all of its ids. Raises the leaf that says what is wrong."""
    check_lengths(submit, limits)
    if len(token_ids) != submit.num_token_ids:
        raise InvalidRequestError(
            f"{len(token_ids)} ids came where num_token_ids is {submit.num_token_ids}", "token_ids"
        )
    _check_ids(token_ids, limits.vocab_size, "token_ids")
    if len(submit.namespace) > _MAX_NAMESPACE_BYTES:
        raise InvalidRequestError(
            f"namespace is longer than {_MAX_NAMESPACE_BYTES} characters", "namespace"
        )
    return Request(
        key=key,
        request_id=submit.request_id,
        token_ids=token_ids,
        prompt_len=submit.prompt_len,
        sampling=sampling_params(
            submit.sampling, limits.vocab_size, limits.context_length - submit.prompt_len
        ),
        logprobs=logprob_spec(submit.logprobs, limits.vocab_size, submit.prompt_len),
        choice_index=submit.choice_index,
        namespace=submit.namespace or limits.default_namespace,
        reservation_id=submit.reservation_id,
        deadline_ns=_deadline_ns(submit, now_ns),
        arrival_ns=now_ns,
        priority=submit.priority,
    )


def sampling_params(
    params: sampling_params_pb2.SamplingParams, vocab_size: int, room: int
) -> SamplingParams:
    """Sampling with its defaults; `room` is the most output tokens the context leaves."""
    constraint = params.WhichOneof("constraint")
    if constraint is not None:
        raise InvalidRequestError(f"{constraint} is not supported yet", constraint)
    max_new_tokens = params.max_new_tokens if params.HasField("max_new_tokens") else room
    if params.min_new_tokens > max_new_tokens:
        raise InvalidRequestError(
            f"min_new_tokens ({params.min_new_tokens}) exceeds max_new_tokens ({max_new_tokens})",
            "min_new_tokens",
        )
    top_k = params.top_k if params.HasField("top_k") else -1
    if top_k < -1:
        raise InvalidRequestError(f"top_k must be >= -1, got {top_k}", "top_k")
    stop_token_ids = tuple(params.stop_token_ids)
    if len(stop_token_ids) > _MAX_STOP_TOKEN_IDS:
        raise InvalidRequestError(
            f"at most {_MAX_STOP_TOKEN_IDS} stop_token_ids, got {len(stop_token_ids)}",
            "stop_token_ids",
        )
    _check_ids(stop_token_ids, vocab_size, "stop_token_ids")
    return SamplingParams(
        temperature=_number(params, "temperature", 1.0, 0.0, math.inf),
        top_p=_number(params, "top_p", 1.0, 0.0, 1.0, open_low=True),
        top_k=top_k or -1,
        min_p=_number(params, "min_p", 0.0, 0.0, 1.0),
        repetition_penalty=_number(params, "repetition_penalty", 1.0, 0.0, 2.0, open_low=True),
        frequency_penalty=_number(params, "frequency_penalty", 0.0, -2.0, 2.0),
        presence_penalty=_number(params, "presence_penalty", 0.0, -2.0, 2.0),
        max_new_tokens=min(max_new_tokens, room),
        min_new_tokens=params.min_new_tokens,
        stop_token_ids=stop_token_ids,
        ignore_eos=params.ignore_eos,
        logit_bias=_logit_bias(params, vocab_size),
        seed=params.seed if params.HasField("seed") else secrets.randbelow(_MAX_SEED + 1),
    )


def logprob_spec(
    options: logprobs_pb2.LogprobOptions, vocab_size: int, prompt_len: int
) -> LogprobSpec:
    """Which log-probabilities are wanted."""
    if options.num_top > MAX_TOP_LOGPROBS:
        raise InvalidRequestError(
            f"at most {MAX_TOP_LOGPROBS} top log-probabilities a position, got {options.num_top}",
            "logprobs.num_top",
        )
    if len(options.token_ids) > MAX_TOP_LOGPROBS:
        raise InvalidRequestError(
            f"log-probabilities of at most {MAX_TOP_LOGPROBS} token ids, "
            f"got {len(options.token_ids)}",
            "logprobs.token_ids",
        )
    _check_ids(options.token_ids, vocab_size, "logprobs.token_ids")
    prompt_start = options.prompt_start if options.HasField("prompt_start") else None
    if prompt_start is not None and prompt_start > prompt_len:
        raise InvalidRequestError(
            f"prompt_start ({prompt_start}) lies behind the prompt's {prompt_len} tokens",
            "logprobs.prompt_start",
        )
    return LogprobSpec(
        output=options.output,
        num_top=options.num_top,
        prompt_start=prompt_start,
        token_ids=tuple(options.token_ids),
    )


def common_revision(theirs: pool_identity_pb2.ProtocolRange) -> int:
    """The highest wire revision both sides speak. Raises PreconditionError when there is none."""
    revision = min(theirs.max_revision, MAX_PROTOCOL_REVISION)
    if revision < max(theirs.min_revision, MIN_PROTOCOL_REVISION):
        raise PreconditionError(
            f"protocol revisions {theirs.min_revision} to {theirs.max_revision} do not overlap "
            f"with {MIN_PROTOCOL_REVISION} to {MAX_PROTOCOL_REVISION}"
        )
    return revision


def _deadline_ns(submit: pb.Submit, now_ns: int) -> int | None:
    if not submit.HasField("remaining"):
        return None
    seconds = min(submit.remaining.seconds, _MAX_REMAINING_S)
    remaining_ns = seconds * 1_000_000_000 + submit.remaining.nanos
    if remaining_ns <= 0:
        raise DeadlineError("its time had passed when it reached the worker")
    return now_ns + remaining_ns


def _number(
    params: sampling_params_pb2.SamplingParams,
    name: str,
    default: float,
    low: float,
    high: float,
    *,
    open_low: bool = False,
) -> float:
    value: float = getattr(params, name) if params.HasField(name) else default  # type: ignore[arg-type]
    above = value > low if open_low else value >= low
    if not (above and value <= high and math.isfinite(value)):
        left = "(" if open_low else "["
        right = "inf)" if high == math.inf else f"{high:g}]"
        raise InvalidRequestError(f"{name} must be in {left}{low:g}, {right}, got {value:g}", name)
    return value


def _logit_bias(
    params: sampling_params_pb2.SamplingParams, vocab_size: int
) -> tuple[tuple[int, float], ...]:
    ids, values = params.logit_bias_ids, params.logit_bias_values
    if len(ids) != len(values):
        raise InvalidRequestError(
            f"logit_bias has {len(ids)} ids and {len(values)} values", "logit_bias"
        )
    _check_ids(ids, vocab_size, "logit_bias")
    for value in values:
        if not -100.0 <= value <= 100.0:
            raise InvalidRequestError(
                f"logit_bias must be in [-100, 100], got {value:g}", "logit_bias"
            )
    return tuple(zip(ids, values, strict=True))


def _check_ids(token_ids: Sequence[int], vocab_size: int, name: str) -> None:
    if token_ids and max(token_ids) >= vocab_size:
        raise InvalidRequestError(
            f"{name} holds {max(token_ids)}; the vocabulary ends at {vocab_size - 1}", name
        )
