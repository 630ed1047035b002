"""What crosses between the gRPC front and the engine process: msgpack over ZeroMQ.

A sequence is named by its `key`, an integer that the front draws and never reuses. Times are
CLOCK_MONOTONIC nanoseconds, which processes of one host share.
"""

from __future__ import annotations

import msgspec


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How tokens are chosen and when a sequence ends; every default already applied."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    # Output tokens in all, those of earlier attempts included.
    max_new_tokens: int = 128
    min_new_tokens: int = 0
    # Without the model's own end-of-sequence ids.
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0


class LogprobSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Which log-probabilities a sequence wants (common.v1.LogprobOptions)."""

    output: bool = False
    num_top: int = 0
    # First prompt position to report; None reports none.
    prompt_start: int | None = None
    token_ids: tuple[int, ...] = ()


class Request(msgspec.Struct, frozen=True, kw_only=True, tag="request"):
    """One sequence to run, from the start or from where another worker stopped."""

    key: int
    request_id: str
    # Prompt, then output of earlier attempts.
    token_ids: list[int]
    prompt_len: int
    sampling: SamplingParams
    logprobs: LogprobSpec = LogprobSpec()
    choice_index: int = 0
    namespace: str = ""
    reservation_id: int = 0
    # None waits for ever.
    deadline_ns: int | None = None
    arrival_ns: int = 0
    priority: int = 0


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """Stop these sequences; each still gets its finish. Unknown keys are ignored."""

    keys: list[int]


class FlushCache(msgspec.Struct, frozen=True, tag="flush"):
    """Drop every page that no sequence uses; answered by `StepOutput.flushed_pages`."""


class StartProfile(msgspec.Struct, frozen=True, kw_only=True, tag="start_profile"):
    """Record a trace of the following steps; answered by a ProfileState."""

    # 0 records until StopProfile.
    num_steps: int = 0
    with_stack: bool = True
    record_shapes: bool = False


class StopProfile(msgspec.Struct, frozen=True, tag="stop_profile"):
    """End the recording and write its trace; answered by a ProfileState."""


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """End the engine process after failing what is live with a retryable status."""


EngineInput = Request | Cancel | FlushCache | StartProfile | StopProfile | Stop


class LogprobRows(msgspec.Struct, frozen=True, kw_only=True):
    """Log-probabilities of N consecutive positions (common.v1.LogprobBlock)."""

    start_position: int
    token_ids: list[int]
    logprobs: list[float]
    num_top: int = 0
    # [N * num_top], most likely first.
    top_token_ids: list[int] = []
    top_logprobs: list[float] = []
    # [N * len(LogprobSpec.token_ids)]
    requested_logprobs: list[float] = []


class Admission(msgspec.Struct, frozen=True, array_like=True):
    """A sequence began to run for the first time."""

    key: int
    cached_tokens: int
    queue_ns: int


class Finish(msgspec.Struct, frozen=True, array_like=True):
    """The one terminal entry of a sequence that ended well or was cancelled."""

    key: int
    # "stop", "length" or "cancelled".
    reason: str
    matched_token_id: int | None
    num_output_tokens: int
    cached_tokens: int
    queue_ns: int
    prefill_ns: int
    decode_ns: int
    num_preemptions: int
    reservation_id: int
    # When it gave way to others.
    preempted_ns: list[int] = []


class SequenceError(msgspec.Struct, frozen=True, array_like=True):
    """The one terminal entry of a sequence that failed; `code` is a google.rpc.Code."""

    key: int
    code: int
    message: str
    reservation_id: int


class PagesStored(msgspec.Struct, frozen=True, array_like=True, tag="stored"):
    """A run of pages, each the child of the one before; the first one's parent is held."""

    parent_hash: int
    prefix_hashes: list[int]


class PagesRemoved(msgspec.Struct, frozen=True, array_like=True, tag="removed"):
    """Pages that are gone, children first."""

    prefix_hashes: list[int]


class CacheCleared(msgspec.Struct, frozen=True, array_like=True, tag="cleared"):
    """No page is held any more."""


CacheEvent = PagesStored | PagesRemoved | CacheCleared


class EngineLoad(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot of an engine's queues and pages."""

    num_running: int = 0
    num_waiting: int = 0
    num_waiting_uncached_tokens: int = 0
    num_running_context_tokens: int = 0
    num_free_pages: int = 0
    num_evictable_pages: int = 0
    predicted_step_ns: int = 0
    num_preemptions: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    # Cached pages that gave way to others since the start.
    num_evicted_pages: int = 0


class EvictionWork(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """What it takes to compute the next 2^k pages to be evicted again, times the share of
    requests that use them; entry k sums them up.
    """

    tokens: list[float] = []
    # Pairs of a token with one in place before it.
    pairs: list[float] = []


class StepWork(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """What one step computed and how long it took: the cost model's observations.

    A row that computes more than one token, or its prompt's last, is a prefill row.
    """

    # As the device measured it; where it has no clock, from the result before (or from issuing it,
    # after an idle time) to this one's result.
    step_ns: int
    prefill_tokens: int = 0
    # Pairs of a token that a prefill row computes and one before it in its sequence.
    prefill_context_products: int = 0
    decode_sequences: int = 0
    # Tokens in place before, over all decode rows.
    decode_context_tokens: int = 0
    prefill_sequences: int = 0


class StepOutput(msgspec.Struct, kw_only=True, tag="step"):
    """Everything that one engine step did. Arrays over `keys` are columnar."""

    step_number: int
    keys: list[int] = []
    num_tokens: list[int] = []
    token_ids: list[int] = []
    admissions: list[Admission] = []
    # Reservations of sequences that `load` counts, waiting or running, and did not before.
    accepted_reservation_ids: list[int] = []
    # (key, rows); rows whose start_position is inside the prompt are prompt log-probabilities.
    logprobs: list[tuple[int, LogprobRows]] = []
    finishes: list[Finish] = []
    errors: list[SequenceError] = []
    cache_events: list[CacheEvent] = []
    # Set in answer to FlushCache.
    flushed_pages: int | None = None
    load: EngineLoad = EngineLoad()
    # Now and then, when the tree may have changed.
    eviction: EvictionWork | None = None
    # None where nothing was computed, or it cannot be told.
    work: StepWork | None = None


class ProfileState(msgspec.Struct, frozen=True, kw_only=True, tag="profile"):
    """The answer to one StartProfile or StopProfile, in the order they were sent."""

    # After StopProfile: where the trace is, on the engine's host.
    trace_path: str = ""
    # Why it was refused or failed; empty where it was done.
    error: str = ""
    # Whether asking differently may succeed, rather than the engine being at fault.
    is_refusal: bool = False


class LoadProgress(msgspec.Struct, frozen=True, tag="progress"):
    """How far loading is, 0 to 1."""

    fraction: float
    what: str


class EngineReady(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """All ranks are loaded and have answered a collective: an `EnginePlan`'s fields."""

    device: str
    dtype: str
    attention_backend: str
    page_size: int
    num_pages: int
    context_length: int
    vocab_size: int
    eos_token_ids: list[int]
    max_running_sequences: int
    max_step_tokens: int
    # Arithmetic of attention to one earlier token over that of one token's linear layers.
    pair_work: float
    tp_size: int


class EngineFailed(msgspec.Struct, frozen=True, tag="failed"):
    """The engine cannot start or cannot go on; its process ends after this."""

    reason: str
    # True when starting it again cannot help (a model that does not load).
    permanent: bool


EngineOutput = StepOutput | ProfileState | LoadProgress | EngineReady | EngineFailed
