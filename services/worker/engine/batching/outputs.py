"""What has happened to sequences since the last message to the front."""

from __future__ import annotations

from math import nan

from services.worker.engine.batching.sequence import Sequence
from services.worker.engine.messages import (
    Admission,
    CacheEvent,
    EngineLoad,
    EvictionWork,
    Finish,
    LogprobRows,
    SequenceError,
    StepOutput,
    StepWork,
)

# Weight of the newest step in the predicted step time.
_STEP_TIME_WEIGHT = 0.1


class OutputCollector:
    """Owns the StepOutput in the making, and the counters that load reports carry."""

    def __init__(self) -> None:
        self._output = StepOutput(step_number=0)
        # Nothing happened that the front must hear of.
        self.is_empty = True
        self._step_number = 0
        self._predicted_step_ns = 0.0
        self._num_preemptions = 0
        self._num_prompt_tokens = 0
        self._num_cached_tokens = 0
        self._num_output_tokens = 0

    def admit(self, sequence: Sequence, now: int) -> None:
        """A sequence runs for the first time."""
        request = sequence.request
        self._num_prompt_tokens += request.prompt_len
        self._num_cached_tokens += sequence.cached_tokens
        self.is_empty = False
        self._output.admissions.append(
            Admission(
                key=sequence.key,
                cached_tokens=sequence.cached_tokens,
                queue_ns=now - sequence.arrival_ns,
            )
        )
        if request.logprobs.prompt_start == 0:
            self.add_logprobs(sequence.key, _first_position(sequence))

    def preempt(self) -> None:
        """A sequence gave way."""
        self._num_preemptions += 1

    def add_tokens(self, keys: list[int], token_ids: list[int]) -> None:
        """One id for each of these sequences."""
        self._output.keys += keys
        self._output.num_tokens += [1] * len(keys)
        self._output.token_ids += token_ids
        self._num_output_tokens += len(keys)

    def add_logprobs(self, key: int, rows: LogprobRows) -> None:
        """A sequence's next log-probabilities."""
        self.is_empty = False
        self._output.logprobs.append((key, rows))

    def finish(self, sequence: Sequence, reason: str, matched_id: int | None, now: int) -> None:
        """A sequence ended well or was cancelled."""
        admitted_ns = now if sequence.admitted_ns is None else sequence.admitted_ns
        prefilled_ns = now if sequence.prefilled_ns is None else sequence.prefilled_ns
        self.is_empty = False
        self._output.finishes.append(
            Finish(
                key=sequence.key,
                reason=reason,
                matched_token_id=matched_id,
                num_output_tokens=sequence.num_output_tokens,
                cached_tokens=sequence.cached_tokens,
                queue_ns=admitted_ns - sequence.arrival_ns,
                prefill_ns=prefilled_ns - admitted_ns,
                decode_ns=now - prefilled_ns,
                num_preemptions=sequence.num_preemptions,
                reservation_id=sequence.request.reservation_id,
                preempted_ns=sequence.preempted_ns,
            )
        )

    def accept(self, reservation_id: int) -> None:
        """A sequence is live: the next output's load counts it. That alone makes no output."""
        if reservation_id:
            self._output.accepted_reservation_ids.append(reservation_id)

    def price_eviction(self, work: EvictionWork) -> None:
        """What the next evictions would cost."""
        self._output.eviction = work

    def fail(self, key: int, code: int, message: str, reservation_id: int) -> None:
        """A sequence failed."""
        self.is_empty = False
        self._output.errors.append(SequenceError(key, code, message, reservation_id))

    def flushed(self, num_pages: int) -> None:
        """The cache was flushed."""
        self.is_empty = False
        self._output.flushed_pages = (self._output.flushed_pages or 0) + num_pages

    def add_events(self, events: list[CacheEvent]) -> None:
        """Changes of the cache, in order."""
        if events:
            self.is_empty = False
            self._output.cache_events += events

    def end_step(self, step_number: int, work: StepWork) -> None:
        """A step's result was applied."""
        self.is_empty = False
        self._step_number = step_number
        self._output.work = work
        if self._predicted_step_ns:
            self._predicted_step_ns += _STEP_TIME_WEIGHT * (work.step_ns - self._predicted_step_ns)
        else:
            self._predicted_step_ns = float(work.step_ns)

    def take(
        self,
        *,
        num_running: int,
        num_waiting: int,
        num_waiting_uncached_tokens: int,
        num_running_context_tokens: int,
        num_free_pages: int,
        num_evictable_pages: int,
        num_evicted_pages: int,
    ) -> StepOutput:
        """What there is to send, with these queues and pages as its load."""
        output = self._output
        output.step_number = self._step_number
        output.load = EngineLoad(
            num_running=num_running,
            num_waiting=num_waiting,
            num_waiting_uncached_tokens=num_waiting_uncached_tokens,
            num_running_context_tokens=num_running_context_tokens,
            num_free_pages=num_free_pages,
            num_evictable_pages=num_evictable_pages,
            predicted_step_ns=int(self._predicted_step_ns),
            num_preemptions=self._num_preemptions,
            num_prompt_tokens=self._num_prompt_tokens,
            num_cached_tokens=self._num_cached_tokens,
            num_output_tokens=self._num_output_tokens,
            num_evicted_pages=num_evicted_pages,
        )
        self._output = StepOutput(step_number=0)
        self.is_empty = True
        return output


def _first_position(sequence: Sequence) -> LogprobRows:
    """Position 0 has no log-probability: nothing comes before it."""
    spec = sequence.request.logprobs
    return LogprobRows(
        start_position=0,
        token_ids=[sequence.token_ids[0]],
        logprobs=[nan],
        num_top=spec.num_top,
        top_token_ids=[0] * spec.num_top,
        top_logprobs=[nan] * spec.num_top,
        requested_logprobs=[nan] * len(spec.token_ids),
    )
