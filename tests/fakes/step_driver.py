"""Drives a Runner with hand-made step plans: what batching does, without policy."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count

import numpy as np

from services.worker.engine.batch import (
    LAST_SAMPLED,
    PromptLogprobRequest,
    Runner,
    SlotAssignment,
    StepPlan,
    StepResult,
)
from services.worker.engine.messages import LogprobSpec, SamplingParams

GREEDY = SamplingParams(temperature=0.0)


@dataclass(eq=False)
class DrivenSequence:
    """One sequence: its ids, the pages it uses and how much of it is computed."""

    slot: int
    token_ids: list[int]
    prompt_len: int
    assignment: SlotAssignment
    pages: list[int] = field(default_factory=list)
    num_computed: int = 0
    is_assigned: bool = False
    # Pages the device's table has been told of.
    num_told_pages: int = 0

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[self.prompt_len :]


class StepDriver:
    """Gives out slots and pages in order and never takes them back."""

    def __init__(self, runner: Runner, *, page_size: int, first_page: int = 0) -> None:
        self._runner = runner
        self._page_size = page_size
        self._pages = count(first_page)
        self._slots = count()
        self._steps = count(1)
        # When set, ids sampled by the device are named as such instead of by value.
        self.names_last_sampled = False

    def start(
        self,
        token_ids: list[int],
        sampling: SamplingParams = GREEDY,
        *,
        logprobs: LogprobSpec | None = None,
        choice_index: int = 0,
        prompt_len: int | None = None,
        shared: DrivenSequence | None = None,
        num_shared_pages: int = 0,
    ) -> DrivenSequence:
        """A sequence; with `shared`, its first pages are the other's and count as computed."""
        prompt_len = len(token_ids) if prompt_len is None else prompt_len
        slot = next(self._slots)
        assignment = SlotAssignment(
            slot=slot,
            sampling=sampling,
            logprobs=logprobs or LogprobSpec(),
            choice_index=choice_index,
            prompt_len=prompt_len,
            token_ids=list(token_ids),
        )
        sequence = DrivenSequence(slot, list(token_ids), prompt_len, assignment)
        if shared is not None:
            sequence.pages = shared.pages[:num_shared_pages]
            sequence.num_computed = num_shared_pages * self._page_size
        return sequence

    def step(
        self,
        work: list[tuple[DrivenSequence, int]],
        prompt_logprobs: list[PromptLogprobRequest] | None = None,
    ) -> StepResult:
        """Compute that many tokens of each sequence; those that reach their end sample one."""
        plan = self.plan(work)
        plan.prompt_logprobs = prompt_logprobs or []
        self._runner.forward(plan)
        self._runner.sample()
        result = self._runner.result()
        assert result.step_number == plan.step_number
        for row, token_id in zip(plan.sample_rows.tolist(), result.token_ids.tolist(), strict=True):
            work[row][0].token_ids.append(token_id)
        return result

    def generate(
        self, sequences: list[DrivenSequence], num_tokens: int, *, chunk: int = 1 << 30
    ) -> list[list[int]]:
        """Run all together, in chunks of at most `chunk` tokens, to `num_tokens` new ids each."""
        ends = {id(each): len(each.token_ids) + num_tokens for each in sequences}
        while pending := [each for each in sequences if len(each.token_ids) < ends[id(each)]]:
            self.step(
                [(each, min(chunk, len(each.token_ids) - each.num_computed)) for each in pending]
            )
        return [each.output_ids[-num_tokens:] for each in sequences]

    def plan(self, work: list[tuple[DrivenSequence, int]]) -> StepPlan:
        """The plan for a step; the sequences count its tokens as computed from here on."""
        token_ids: list[int] = []
        sample_rows: list[int] = []
        changes: list[tuple[int, int, int]] = []
        assignments: list[SlotAssignment] = []
        starts = [sequence.num_computed for sequence, _ in work]
        for row, (sequence, num_tokens) in enumerate(work):
            start, stop = sequence.num_computed, sequence.num_computed + num_tokens
            ids = sequence.token_ids[start:stop]
            if self.names_last_sampled and start >= sequence.prompt_len:
                ids = [LAST_SAMPLED] * len(ids)
            token_ids += ids
            while len(sequence.pages) * self._page_size < stop:
                sequence.pages.append(next(self._pages))
            for index in range(sequence.num_told_pages, len(sequence.pages)):
                changes.append((sequence.slot, index, sequence.pages[index]))
            sequence.num_told_pages = len(sequence.pages)
            if not sequence.is_assigned:
                assignments.append(sequence.assignment)
                sequence.is_assigned = True
            sequence.num_computed = stop
            if stop == len(sequence.token_ids):
                sample_rows.append(row)
        slots, indices, pages = zip(*changes, strict=True) if changes else ((), (), ())
        return StepPlan(
            step_number=next(self._steps),
            slots=_int32([sequence.slot for sequence, _ in work]),
            num_tokens=_int32([num_tokens for _, num_tokens in work]),
            start_positions=_int32(starts),
            token_ids=_int32(token_ids),
            sample_rows=_int32(sample_rows),
            page_slots=_int32(slots),
            page_indices=_int32(indices),
            page_ids=_int32(pages),
            assignments=assignments,
        )


def _int32(values: list[int] | tuple[int, ...]) -> np.ndarray:
    return np.array(values, dtype=np.int32)
