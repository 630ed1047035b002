"""A step on its way: being assembled into a plan, and issued but not yet answered."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from services.worker.engine.batch import (
    Int32Array,
    PromptLogprobRequest,
    SlotAssignment,
    StepPlan,
)
from services.worker.engine.batching.sequence import Sequence
from services.worker.engine.messages import CacheEvent, StepWork


@dataclass(slots=True, kw_only=True)
class PrefillChunk:
    """A row of known tokens, and what its result will mean."""

    sequence: Sequence
    slot: int
    epoch: int
    # It computes the last known token, so its sequence decodes from here or is done.
    is_last: bool
    samples: bool
    # First prompt position that the chunk does not report; None: it reports none.
    logprobs_stop: int | None


@dataclass(slots=True, kw_only=True)
class IssuedStep:
    """What `apply` must remember of a plan. Rows of slots that changed hands are void."""

    step_number: int
    issued_ns: int
    # [R] parallel to StepPlan.sample_rows.
    sample_slots: npt.NDArray[np.intp]
    sample_epochs: npt.NDArray[np.int64]
    chunks: list[PrefillChunk]
    # Everything that happened to the cache up to the end of planning this step.
    events: list[CacheEvent]
    prefill_tokens: int
    prefill_context_products: int
    decode_sequences: int
    decode_context_tokens: int

    def work(self, step_ns: int) -> StepWork:
        """What it computed, in `step_ns`."""
        return StepWork(
            step_ns=step_ns,
            prefill_tokens=self.prefill_tokens,
            prefill_context_products=self.prefill_context_products,
            decode_sequences=self.decode_sequences,
            decode_context_tokens=self.decode_context_tokens,
            prefill_sequences=len(self.chunks),
        )


@dataclass(slots=True, kw_only=True)
class PlanBuilder:
    """A plan in the making: decode rows first, as arrays, then prefill rows one by one."""

    step_number: int
    decode_slots: Int32Array = field(default_factory=lambda: np.empty(0, np.int32))
    decode_positions: Int32Array = field(default_factory=lambda: np.empty(0, np.int32))
    decode_ids: Int32Array = field(default_factory=lambda: np.empty(0, np.int32))
    chunks: list[PrefillChunk] = field(default_factory=list)
    chunk_starts: list[int] = field(default_factory=list)
    chunk_lens: list[int] = field(default_factory=list)
    chunk_ids: list[int] = field(default_factory=list)
    page_slots: list[int] = field(default_factory=list)
    page_indices: list[int] = field(default_factory=list)
    page_ids: list[int] = field(default_factory=list)
    assignments: list[SlotAssignment] = field(default_factory=list)
    prompt_logprobs: list[PromptLogprobRequest] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        """Rows so far."""
        return len(self.decode_slots) + len(self.chunks)

    def add_pages(self, slot: int, first_index: int, pages: list[int]) -> None:
        """A slot's page table holds `pages` from `first_index` on."""
        self.page_slots += [slot] * len(pages)
        self.page_indices += range(first_index, first_index + len(pages))
        self.page_ids += pages

    def add_chunk(self, chunk: PrefillChunk, start: int, token_ids: list[int]) -> None:
        """A row that computes `token_ids` from position `start` on."""
        self.chunks.append(chunk)
        self.chunk_starts.append(start)
        self.chunk_lens.append(len(token_ids))
        self.chunk_ids += token_ids

    def add_prompt_logprobs(self, sequence: Sequence, start: int, stop: int) -> int | None:
        """Ask for the prompt positions whose logits the next row, `start` to `stop` - 1, computes.

        Returns the first position beyond them; None where there are none. The logits at
        position p - 1 give the log-probability of the token at p.
        """
        if sequence.next_prompt_logprob is None:
            return None
        first = max(start + 1, sequence.next_prompt_logprob)
        last = min(stop + 1, sequence.request.prompt_len)
        if first >= last:
            return None
        self.prompt_logprobs.append(
            PromptLogprobRequest(
                row=self.num_rows,
                start=first,
                stop=last,
                token_ids=sequence.token_ids[first:last],
                spec=sequence.request.logprobs,
            )
        )
        return last

    def build(self) -> StepPlan:
        """The plan."""
        num_decodes = len(self.decode_slots)
        return StepPlan(
            step_number=self.step_number,
            slots=_join(self.decode_slots, [chunk.slot for chunk in self.chunks]),
            num_tokens=_join(np.ones(num_decodes, np.int32), self.chunk_lens),
            start_positions=_join(self.decode_positions, self.chunk_starts),
            token_ids=_join(self.decode_ids, self.chunk_ids),
            sample_rows=_join(
                np.arange(num_decodes, dtype=np.int32),
                [row for row, chunk in enumerate(self.chunks, num_decodes) if chunk.samples],
            ),
            page_slots=np.array(self.page_slots, np.int32),
            page_indices=np.array(self.page_indices, np.int32),
            page_ids=np.array(self.page_ids, np.int32),
            assignments=self.assignments,
            prompt_logprobs=self.prompt_logprobs,
        )

    def issued(
        self,
        plan: StepPlan,
        epochs: npt.NDArray[np.int64],
        issued_ns: int,
        events: list[CacheEvent],
    ) -> IssuedStep:
        """The record of `plan`, which this built."""
        # Indexing is much faster with NumPy's own index type.
        sample_slots = plan.slots[plan.sample_rows].astype(np.intp)
        return IssuedStep(
            step_number=self.step_number,
            issued_ns=issued_ns,
            sample_slots=sample_slots,
            sample_epochs=epochs[sample_slots],
            chunks=self.chunks,
            events=events,
            prefill_tokens=len(self.chunk_ids),
            prefill_context_products=sum(
                length * start + length * (length - 1) // 2
                for start, length in zip(self.chunk_starts, self.chunk_lens, strict=True)
            ),
            decode_sequences=len(self.decode_slots),
            decode_context_tokens=int(self.decode_positions.sum(dtype=np.int64)),
        )


def _join(array: Int32Array, rest: list[int]) -> Int32Array:
    if not rest:
        return array
    return np.concatenate((array, np.array(rest, np.int32)))
