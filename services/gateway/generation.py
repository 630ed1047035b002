"""What one prompt asks for, and the state of each of its choices. Talks to nobody."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from google.protobuf.duration_pb2 import Duration

from rhizome.common.v1.finish_reason_pb2 import FINISH_REASON_LENGTH, FinishReason
from rhizome.common.v1.logprobs_pb2 import LogprobBlock, LogprobOptions
from rhizome.common.v1.sampling_params_pb2 import SamplingParams
from rhizome.common.v1.text_options_pb2 import TextOptions
from rhizome.tokenizer.v1.tokenizer_service_pb2 import TokenizeInput
from services.common.errors import RhizomeError
from services.common.spans import NO_SPAN, Span

# Choices a request may ask for.
MAX_CHOICES = 128
# OpenAI's stand-in for minus infinity, which JSON cannot carry.
MIN_LOGPROB = -9999.0


@dataclass(slots=True, kw_only=True)
class GenerationSpec:
    """One prompt, validated as far as possible without a tokenizer."""

    # The caller's name for it; `schedule_id` is ours and unique.
    request_id: str
    schedule_id: str
    # Text or chat, or None when the caller gave token ids.
    input: TokenizeInput | None
    token_ids: Sequence[int] = ()
    sampling: SamplingParams
    text_options: TextOptions
    logprobs: LogprobOptions | None = None
    num_choices: int = 1
    # Whose request it is; empty where nobody said.
    tenant: str = ""
    priority: int = 0
    cache_salt: str = ""
    session_id: str = ""
    # Name of the prompt's parameter, for errors.
    input_param: str = "prompt"
    # Likewise of the least number of output tokens.
    min_tokens_param: str = "min_tokens"
    # Monotonic; None waits for ever.
    deadline: float | None = None
    # Of the client's request, which may have several prompts.
    span: Span = NO_SPAN


@dataclass(slots=True, kw_only=True)
class Prompt:
    """A spec after tokenization: its ids and where they may be cached."""

    spec: GenerationSpec
    token_ids: Sequence[int]
    prefix_hashes: Sequence[int]
    namespace: str
    model: str


@dataclass(slots=True)
class Hops:
    """Where a prompt's time went, in seconds, and who served it."""

    tokenize_s: float = 0.0
    schedule_s: float = 0.0
    # In schedulers' queues; only of requests that are recorded.
    queue_s: float = 0.0
    worker_ids: list[str] = field(default_factory=list)
    policy: str = ""
    predicted_cached_tokens: int = 0


class LogprobRows:
    """Log-probabilities of consecutive positions, gathered from blocks that may overlap."""

    __slots__ = (
        "logprobs",
        "num_requested",
        "num_top",
        "requested_logprobs",
        "start_position",
        "token_ids",
        "top_logprobs",
        "top_token_ids",
    )

    def __init__(self, start_position: int, num_requested: int) -> None:
        self.start_position = start_position
        self.num_requested = num_requested
        self.num_top = 0
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.top_token_ids: list[int] = []
        self.top_logprobs: list[float] = []
        self.requested_logprobs: list[float] = []

    def __len__(self) -> int:
        return len(self.token_ids)

    def extend(self, block: LogprobBlock) -> None:
        """Append the rows of `block` that are new; rows sent again are dropped."""
        seen = self.start_position + len(self.token_ids) - block.start_position
        seen = max(0, seen)
        self.num_top = block.num_top
        self.token_ids.extend(block.token_ids[seen:])
        self.logprobs.extend(block.logprobs[seen:])
        self.top_token_ids.extend(block.top_token_ids[seen * block.num_top :])
        self.top_logprobs.extend(block.top_logprobs[seen * block.num_top :])
        self.requested_logprobs.extend(block.requested_logprobs[seen * self.num_requested :])

    def top(self, row: int) -> list[tuple[int, float]]:
        """(id, log-probability) of the most likely tokens at `row`, most likely first."""
        cut = slice(row * self.num_top, (row + 1) * self.num_top)
        return list(zip(self.top_token_ids[cut], self.top_logprobs[cut], strict=True))

    def requested(self, row: int) -> list[float]:
        return self.requested_logprobs[row * self.num_requested : (row + 1) * self.num_requested]


def prompt_rows(options: LogprobOptions | None, choice_index: int) -> LogprobRows | None:
    """Where a choice gathers the prompt's, if it does."""
    if options is None or not options.HasField("prompt_start") or choice_index > 0:
        return None
    return LogprobRows(options.prompt_start, len(options.token_ids))


def output_rows(options: LogprobOptions | None, prompt_len: int) -> LogprobRows | None:
    """Where a choice gathers its output's, if it does."""
    if options is None or not options.output:
        return None
    return LogprobRows(prompt_len, len(options.token_ids))


@dataclass(slots=True, frozen=True)
class ChoiceFinish:
    """Why a choice ended, and what the worker counted."""

    reason: FinishReason.ValueType = FINISH_REASON_LENGTH
    matched_token_id: int | None = None
    matched_stop: str | None = None


class ChoiceListener(Protocol):
    """Told about one choice, synchronously and in order; must not block or raise."""

    def on_text(self, choice: Choice, text: str) -> None:
        """New text, and all ids up to `choice.ids_consumed` are settled."""

    def on_end(self, choice: Choice) -> None:
        """The choice ended well; `choice.finish` is set."""


class ChoiceOwner(Protocol):
    """The generation a choice belongs to."""

    def choice_ended(self, choice: Choice) -> None:
        """Its last text was delivered."""

    def choice_failed(self, choice: Choice, error: RhizomeError) -> None:
        """It cannot go on anywhere."""

    def choice_lost(self, choice: Choice, error: RhizomeError) -> None:
        """Its worker is gone or refuses it; it may go on elsewhere."""


@dataclass(slots=True, kw_only=True, eq=False)
class Choice:
    """One sequence of a prompt, across the workers that run it.

    `output_ids` holds every id received; text covers the first `num_text_ids` of them (all but a
    stop id that is to be trimmed). `emitted_bytes` of UTF-8 text were delivered, decided by the
    first `ids_consumed` ids.
    """

    prompt: Prompt
    index: int
    owner: ChoiceOwner
    listener: ChoiceListener
    trim_stop_id: bool
    # The newest handle it runs under; 0 before it was submitted.
    handle: int = 0
    prompt_logprobs: LogprobRows | None = None
    output_logprobs: LogprobRows | None = None
    output_ids: list[int] = field(default_factory=list)
    num_trimmed: int = 0
    ids_consumed: int = 0
    emitted_bytes: int = 0
    cached_tokens: int = 0
    queue_ns: int = 0
    first_token_s: float = 0.0
    # Of the attempt under way, and what its worker said of the time that the model took.
    span: Span = NO_SPAN
    prefill_ns: int = 0
    decode_ns: int = 0
    # The worker's terminal entry, while text is still on its way.
    worker_finish: ChoiceFinish | None = None
    # Set once, when the choice has ended.
    finish: ChoiceFinish | None = None
    ended: bool = False

    @property
    def num_text_ids(self) -> int:
        return len(self.output_ids) - self.num_trimmed

    def text_arrived(self, text: str, ids_consumed: int) -> None:
        self.ids_consumed = ids_consumed
        if text:
            self.emitted_bytes += len(text) if text.isascii() else len(text.encode())
        self.listener.on_text(self, text)

    def end(self, finish: ChoiceFinish) -> None:
        self.ended = True
        self.finish = finish
        self.ids_consumed = len(self.output_ids)
        self.listener.on_end(self)
        self.owner.choice_ended(self)

    def stop_at(self, num_ids: int, stop: str, reason: FinishReason.ValueType) -> None:
        """End at a stop string; ids after the first `num_ids` never happened."""
        del self.output_ids[num_ids:]
        self.num_trimmed = 0
        self.end(ChoiceFinish(reason, matched_stop=stop))

    def fail(self, error: RhizomeError) -> None:
        self.ended = True
        self.owner.choice_failed(self, error)

    def logprobs_arrived(self, block: LogprobBlock) -> None:
        """Keep them, if they were asked for; they are of the prompt or of the output."""
        is_prompt = block.start_position < len(self.prompt.token_ids)
        rows = self.prompt_logprobs if is_prompt else self.output_logprobs
        if rows is not None:
            rows.extend(block)

    def tokens_arrived(self) -> None:
        """Note the time of the first token."""
        if not self.first_token_s:
            self.first_token_s = time.monotonic()


def remaining_time(deadline: float | None) -> Duration | None:
    """What is left until a monotonic time, as it travels between services."""
    if deadline is None:
        return None
    duration = Duration()
    duration.FromNanoseconds(max(0, round((deadline - time.monotonic()) * 1e9)))
    return duration


def time_limit(deadline: float | None) -> asyncio.Timeout:
    """Raises TimeoutError in its block once that time has come."""
    return asyncio.timeout(None if deadline is None else max(0.0, deadline - time.monotonic()))
