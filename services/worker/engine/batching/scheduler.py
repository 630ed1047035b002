"""Continuous batching: which sequences compute which tokens in each step, and what came of it.

A plan is tokens per sequence (after vLLM's v1 scheduler): a decode is a row of one token, a
prefill a row of as many as the step's budget allows, and one code path plans both.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

from services.worker.engine.batch import (
    LAST_SAMPLED,
    Int32Array,
    SlotAssignment,
    StepPlan,
    StepResult,
)
from services.worker.engine.batching.admission import (
    finish_on_arrival,
    make_sequence,
    reason_to_refuse,
)
from services.worker.engine.batching.budget import GrowthEstimate, TokenBudget
from services.worker.engine.batching.cache import SequenceCache
from services.worker.engine.batching.live import LiveSequences
from services.worker.engine.batching.outputs import OutputCollector
from services.worker.engine.batching.policy import SchedulePolicy, admission_order
from services.worker.engine.batching.running import RunningSequences
from services.worker.engine.batching.sequence import Sequence
from services.worker.engine.batching.steps import IssuedStep, PlanBuilder, PrefillChunk
from services.worker.engine.batching.waiting import WaitingQueue
from services.worker.engine.kv.eviction_cost import eviction_work
from services.worker.engine.messages import LogprobRows, Request, StepOutput

# google.rpc.Code, which this package may not import.
_INVALID_ARGUMENT = 3
_DEADLINE_EXCEEDED = 4

# How often the cost of evicting is worked out; it takes a few milliseconds.
_EVICTION_INTERVAL_NS = 1_000_000_000


class BatchScheduler:
    """Owns every live sequence: waiting, or running in a slot with all its known pages.

    `schedule` and `apply` alternate, with at most `num_in_flight` plans not applied. A result's
    row counts only if its slot is still the same sequence's; rows of sequences that ended,
    were cancelled or preempted meanwhile are void. Pages that such rows still write are free
    for later steps at once, because the device runs steps in order.
    """

    def __init__(
        self,
        *,
        num_pages: int,
        page_size: int,
        context_length: int,
        vocab_size: int,
        eos_token_ids: Iterable[int],
        max_running_sequences: int,
        max_step_tokens: int,
        num_in_flight: int = 1,
        growth: GrowthEstimate | None = None,
        policy: SchedulePolicy = "fcfs",
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._page_size = page_size
        # A sequence's last token is sampled but never computed: it needs no page.
        self._max_len = min(context_length, num_pages * page_size + 1)
        self._context_length = context_length
        self._vocab_size = vocab_size
        self._eos_token_ids = frozenset(eos_token_ids)
        self._max_step_tokens = max_step_tokens
        self._num_in_flight = num_in_flight
        self._clock = clock
        self._cache = SequenceCache(num_pages, page_size)
        self._running = RunningSequences(self._cache, min(max_running_sequences, max_step_tokens))
        self._slots = self._running.slots
        self._waiting, self._order = WaitingQueue(), admission_order(policy)
        self._live = LiveSequences()
        self._growth = GrowthEstimate() if growth is None else growth
        self._issued: deque[IssuedStep] = deque()
        self._outputs = OutputCollector()
        self._num_steps = 0
        self._eviction_due_ns = 0
        # When the last result came, while work has gone on since.
        self._last_result_ns: int | None = None

    @property
    def num_live(self) -> int:
        """Sequences without their terminal entry."""
        return len(self._live)

    @property
    def num_issued(self) -> int:
        """Plans whose results were not applied."""
        return len(self._issued)

    def add(self, request: Request) -> None:
        """Take a sequence; one that can never run is refused in the next output."""
        assert request.key not in self._live, "a key is never reused"
        reason = reason_to_refuse(
            request,
            context_length=self._context_length,
            max_cached_tokens=self._cache.num_pages * self._page_size,
            vocab_size=self._vocab_size,
        )
        if reason is not None:
            self._outputs.fail(request.key, _INVALID_ARGUMENT, reason, request.reservation_id)
            return
        now = self._clock()
        sequence = make_sequence(
            request, self._cache, self._eos_token_ids, max_len=self._max_len, now=now
        )
        self._live.add(sequence)
        self._outputs.accept(request.reservation_id)
        self._waiting.add(sequence, self._num_uncached(sequence))
        ended = finish_on_arrival(sequence)
        if ended is not None:
            self._finish(sequence, ended.reason, ended.matched_id, now)

    def cancel(self, key: int) -> None:
        """End a sequence now; an unknown key, or one that ended, is ignored."""
        sequence = self._live.get(key)
        if sequence is not None:
            self._finish(sequence, "cancelled", None, self._clock())

    def fail_all(self, code: int, message: str) -> None:
        """End every live sequence with an error."""
        for sequence in self._live:
            self._fail(sequence, code, message)

    def flush_cache(self) -> None:
        """Drop all pages that no sequence uses; the next output says how many."""
        self._outputs.flushed(self._cache.flush())

    def schedule(self) -> StepPlan | None:
        """Plan the next step; None when nothing can be computed now.

        Every plan handed out before must have been issued.
        """
        now = self._clock()
        self._expire(now)
        self._cache.free_retired()
        plan = PlanBuilder(step_number=self._num_steps + 1)
        budget = TokenBudget(self._max_step_tokens, self._page_size)
        self._plan_decodes(plan, budget)
        # Pages that turned out to be in the tree already.
        for swap in self._running.take_swaps():
            plan.add_pages(swap.slot, swap.index, [swap.page])
        self._continue_prefills(plan, budget)
        self._admit(plan, budget, now)
        if plan.num_rows == 0:
            assert self._issued or not self._live, "live sequences, and nothing to compute"
            return None
        self._num_steps += 1
        self._growth.on_step()
        built = plan.build()
        self._issued.append(plan.issued(built, self._slots.epochs, now, self._cache.events.take()))
        return built

    def apply(self, result: StepResult) -> None:
        """Take the result of the oldest plan not applied."""
        step = self._issued.popleft()
        assert result.step_number == step.step_number, "results come in the order of plans"
        now = self._clock()
        self._outputs.add_events(step.events)
        self._apply_chunks(step, result.prompt_logprobs, now)
        self._apply_samples(step, result, now)
        step_ns = result.device_ns
        if step_ns is None:
            since = step.issued_ns if self._last_result_ns is None else self._last_result_ns
            step_ns = now - since
        self._outputs.end_step(step.step_number, step.work(step_ns))
        self._last_result_ns = now if self._live else None

    def take_output(self) -> StepOutput | None:
        """Everything since the last call that the front must hear of; None for nothing."""
        if not self._issued:
            self._outputs.add_events(self._cache.events.take())
        if self._outputs.is_empty:
            return None
        now = self._clock()
        if now >= self._eviction_due_ns:
            self._eviction_due_ns = now + _EVICTION_INTERVAL_NS
            self._outputs.price_eviction(eviction_work(self._cache.tree, self._page_size))
        return self._outputs.take(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_waiting_uncached_tokens=self._waiting.num_uncached_tokens
            + self._running.num_unscheduled_tokens,
            num_running_context_tokens=int(self._slots.num_computed.sum(dtype=np.int64)),
            num_free_pages=self._cache.num_free,
            num_evictable_pages=self._cache.tree.num_evictable,
            num_evicted_pages=self._cache.num_evicted,
        )

    def check(self) -> None:
        """Raise AssertionError unless every page, lock and slot is accounted for."""
        self._running.check()
        assert len(self._running) + len(self._waiting) == len(self._live), "a sequence is lost"

    # Planning

    def _plan_decodes(self, plan: PlanBuilder, budget: TokenBudget) -> None:
        """One token for every sequence that decodes, once there is room for its page."""
        while True:
            slots = self._slots.decoding_slots()
            positions = self._slots.num_computed[slots]
            growing = np.flatnonzero(positions % self._page_size == 0)
            if len(growing) <= self._cache.num_available:
                break
            self._preempt_newest()
        if len(growing):
            self._grow(plan, slots[growing].tolist())
        plan.decode_slots = slots.astype(np.int32)
        plan.decode_positions = positions
        plan.decode_ids = self._decode_ids(slots)
        self._slots.num_computed[slots] += 1
        budget.take(len(slots))

    def _grow(self, plan: PlanBuilder, slots: list[int]) -> None:
        """One more page for each of these slots."""
        tables = [self._running.sequence_in(slot).pages for slot in slots]
        new = self._cache.allocate(len(slots))
        plan.page_slots += slots
        plan.page_indices += [len(pages) for pages in tables]
        plan.page_ids += new
        for pages, page in zip(tables, new, strict=True):
            pages.append(page)

    def _decode_ids(self, slots: npt.NDArray[np.intp]) -> Int32Array:
        if self._num_in_flight == 1:
            return self._slots.last_ids[slots]
        return np.full(len(slots), LAST_SAMPLED, np.int32)

    def _continue_prefills(self, plan: PlanBuilder, budget: TokenBudget) -> None:
        for sequence in self._running.prefilling:
            if budget.num_left == 0:
                return
            self._plan_chunk(sequence, plan, budget)

    def _admit(self, plan: PlanBuilder, budget: TokenBudget, now: int) -> None:
        """Start waiting sequences in order, as long as tokens, slots and pages last."""
        if budget.num_left == 0 or self._slots.num_free == 0:
            return
        for sequence in self._order(self._waiting, self._num_cached, now):
            if budget.num_left == 0 or self._slots.num_free == 0:
                return
            self._waiting.update(sequence, self._num_uncached(sequence))
            if self._running.is_coming(sequence):
                continue
            if not self._fits(sequence):
                return
            self._waiting.remove(sequence)
            self._start(sequence, plan, now)
            self._plan_chunk(sequence, plan, budget)

    def _num_cached(self, sequence: Sequence) -> int:
        return self._cache.match(sequence).depth * self._page_size

    def _num_uncached(self, sequence: Sequence) -> int:
        return len(sequence.token_ids) - self._num_cached(sequence)

    def _fits(self, sequence: Sequence) -> bool:
        """Whether its pages, and the expected growth of all, are to be had."""
        if not self._running:
            return True
        own = np.array([sequence.end_len - len(sequence.token_ids)], np.int32)
        remaining = np.concatenate((self._running.remaining_tokens(), own))
        growth = self._growth.expected_tokens(remaining)
        missing = self._cache.num_missing(sequence) + self._cache.pages_of(growth)
        return missing <= self._cache.num_available

    def _start(self, sequence: Sequence, plan: PlanBuilder, now: int) -> None:
        request = sequence.request
        num_cached = self._running.start(sequence)
        slot = _slot_of(sequence)
        plan.add_pages(slot, 0, sequence.pages)
        plan.assignments.append(
            SlotAssignment(
                slot=slot,
                sampling=request.sampling,
                logprobs=request.logprobs,
                choice_index=request.choice_index,
                prompt_len=request.prompt_len,
                token_ids=list(sequence.token_ids),
            )
        )
        if sequence.admitted_ns is None:
            sequence.admitted_ns = now
            sequence.cached_tokens = min(num_cached, request.prompt_len)
            self._outputs.admit(sequence, now)

    def _plan_chunk(self, sequence: Sequence, plan: PlanBuilder, budget: TokenBudget) -> None:
        """The next row of a prefill; its full pages enter the tree now."""
        slot, known = _slot_of(sequence), len(sequence.token_ids)
        start = int(self._slots.num_computed[slot])
        stop = start + budget.chunk_len(start, known)
        budget.take(stop - start)
        logprobs_stop = plan.add_prompt_logprobs(sequence, start, stop)
        chunk = PrefillChunk(
            sequence=sequence,
            slot=slot,
            epoch=int(self._slots.epochs[slot]),
            is_last=stop == known,
            samples=stop == known < sequence.end_len,
            logprobs_stop=logprobs_stop,
        )
        plan.add_chunk(chunk, start, sequence.token_ids[start:stop])
        self._running.advance_prefill(sequence, slot, stop)

    # Results

    def _apply_chunks(self, step: IssuedStep, prompt_logprobs: list[LogprobRows], now: int) -> None:
        rows = iter(prompt_logprobs)
        for chunk in step.chunks:
            sequence = chunk.sequence
            current = self._slots.is_current(chunk.slot, chunk.epoch)
            if chunk.logprobs_stop is not None:
                chunk_rows = next(rows)
                if current:
                    self._outputs.add_logprobs(sequence.key, chunk_rows)
                    reported_all = chunk.logprobs_stop >= sequence.request.prompt_len
                    sequence.next_prompt_logprob = None if reported_all else chunk.logprobs_stop
            if current and chunk.is_last:
                if sequence.prefilled_ns is None:
                    sequence.prefilled_ns = now
                if not chunk.samples:
                    self._finish(sequence, "length", None, now)

    def _apply_samples(self, step: IssuedStep, result: StepResult, now: int) -> None:
        """Append the sampled ids, store the pages they fill, end the sequences that they end."""
        table = self._slots
        slots, ids = step.sample_slots, result.token_ids
        current = table.epochs[slots] == step.sample_epochs
        for index, rows in result.output_logprobs.items():
            if current[index]:
                self._outputs.add_logprobs(table.keys[slots[index]], rows)
        if not current.all():
            slots, ids = slots[current], ids[current]
        table.last_ids[slots] = ids
        known = table.num_known[slots] + 1
        table.num_known[slots] = known
        slot_list, id_list = slots.tolist(), ids.tolist()
        token_ids, keys = table.token_ids, table.keys
        for slot, token_id in zip(slot_list, id_list, strict=True):
            token_ids[slot].append(token_id)
        self._outputs.add_tokens([keys[slot] for slot in slot_list], id_list)
        for index in np.flatnonzero((known - 1) % self._page_size == 0).tolist():
            self._running.store_generated(slot_list[index], int(known[index]) - 1)
        exhausted = slots[known >= table.end_len[slots]].tolist()
        for slot, token_id in table.stopped(slot_list, id_list):
            self._finish(self._running.sequence_in(slot), "stop", token_id, now)
        for slot in exhausted:
            if (sequence := table.sequences[slot]) is not None:
                self._finish(sequence, "length", None, now)

    # Endings

    def _expire(self, now: int) -> None:
        for sequence in self._live.pop_expired(now):
            state = "waiting" if sequence.admitted_ns is None else "running"
            self._fail(sequence, _DEADLINE_EXCEEDED, f"the deadline passed while it was {state}")

    def _preempt_newest(self) -> None:
        """The newest of the lowest priority waits again; its full pages stay for its return."""
        sequence = self._running.to_preempt()
        self._running.stop(sequence)
        sequence.preempted_ns.append(self._clock())
        self._waiting.add(sequence, self._num_uncached(sequence))
        self._outputs.preempt()
        self._growth.on_preemption()

    def _finish(self, sequence: Sequence, reason: str, matched_id: int | None, now: int) -> None:
        self._drop(sequence)
        self._outputs.finish(sequence, reason, matched_id, now)

    def _fail(self, sequence: Sequence, code: int, message: str) -> None:
        self._drop(sequence)
        self._outputs.fail(sequence.key, code, message, sequence.request.reservation_id)

    def _drop(self, sequence: Sequence) -> None:
        self._live.remove(sequence)
        if sequence.slot is None:
            self._waiting.remove(sequence)
        else:
            self._running.stop(sequence)


def _slot_of(sequence: Sequence) -> int:
    assert sequence.slot is not None, "only running sequences have a slot"
    return sequence.slot
