"""What becomes of a request when it arrives: refused, ended at once, or a sequence."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from services.worker.engine.batching.cache import SequenceCache
from services.worker.engine.batching.sequence import Sequence
from services.worker.engine.messages import Request


@dataclass(frozen=True, slots=True)
class ImmediateEnd:
    """An earlier attempt had produced all there is to produce."""

    reason: str
    matched_id: int | None


def reason_to_refuse(
    request: Request, *, context_length: int, max_cached_tokens: int, vocab_size: int
) -> str | None:
    """Why the request can never run; None if it can."""
    num_tokens = len(request.token_ids)
    if not 1 <= request.prompt_len <= num_tokens:
        return f"prompt_len must be 1 to {num_tokens}, the number of ids, got {request.prompt_len}"
    # Output of an earlier attempt may have filled the context: then it only ends here.
    if request.prompt_len >= context_length or num_tokens > context_length:
        return (
            f"{num_tokens} tokens leave no room for output: the model's context length is "
            f"{context_length} tokens"
        )
    if num_tokens > max_cached_tokens:
        return (
            f"{num_tokens} tokens do not fit the worker's memory: its cache holds "
            f"{max_cached_tokens} tokens"
        )
    lowest, highest = min(request.token_ids), max(request.token_ids)
    if lowest < 0 or highest >= vocab_size:
        wrong = lowest if lowest < 0 else highest
        return f"token id {wrong} is outside the vocabulary of {vocab_size} ids"
    return None


def make_sequence(
    request: Request,
    cache: SequenceCache,
    eos_token_ids: frozenset[int],
    *,
    max_len: int,
    now: int,
) -> Sequence:
    """The waiting sequence of a request that is not refused."""
    sampling = request.sampling
    stop_ids: Iterable[int] = sampling.stop_token_ids
    prompt_start = request.logprobs.prompt_start
    first_logprob = None if prompt_start is None else max(1, prompt_start)
    if first_logprob is not None and first_logprob >= request.prompt_len:
        first_logprob = None
    token_ids = list(request.token_ids)
    return Sequence(
        request=request,
        token_ids=token_ids,
        keys=cache.keys(request.namespace, token_ids),
        end_len=min(request.prompt_len + sampling.max_new_tokens, max_len),
        stop_ids=frozenset(stop_ids) | (frozenset() if sampling.ignore_eos else eos_token_ids),
        arrival_ns=request.arrival_ns or now,
        tail=cache.tree.root,
        next_prompt_logprob=first_logprob,
    )


def finish_on_arrival(sequence: Sequence) -> ImmediateEnd | None:
    """How a sequence resumed after its last token ends; None if it is to run."""
    num_output, sampling = sequence.num_output_tokens, sequence.request.sampling
    if num_output == 0:
        return None
    last = sequence.token_ids[-1]
    if last in sequence.stop_ids and num_output >= sampling.min_new_tokens:
        return ImmediateEnd("stop", last)
    if len(sequence.token_ids) >= sequence.end_len:
        return ImmediateEnd("length", None)
    return None
