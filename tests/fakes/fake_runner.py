"""A runner without a model that keeps every promise of the Runner protocol, and checks them.

It simulates the device: a page table, what each place of each page holds, and the last id of
each slot. A place holds the digest of the whole prefix that wrote it, as the keys and values of
a real model depend on it. Each row reads its prefix back through the page table, so a page that
is shared wrongly, reused too early or missing from the table is found where it happens.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import xxhash

from services.worker.engine.batch import (
    LAST_SAMPLED,
    PromptLogprobRequest,
    SlotAssignment,
    StepPlan,
    StepResult,
)
from services.worker.engine.messages import LogprobRows, LogprobSpec, SamplingParams

_NO_PAGE = -1


def fake_token(digest: int, sampling: SamplingParams, choice_index: int, vocab_size: int) -> int:
    """The id that follows a prefix: a function of its ids, the seed and the choice."""
    key = f"{digest}/{sampling.seed}/{choice_index}"
    return int(xxhash.xxh3_64_intdigest(key.encode())) % vocab_size


def fake_logprob(digest: int, token_id: int) -> float:
    """The log-probability of an id after a prefix: between -8 and 0, exact in binary."""
    return -(int(xxhash.xxh3_64_intdigest(f"{digest}:{token_id}".encode())) % 1024) / 128


def prefix_digests(token_ids: list[int], start: int = 0, before: int = 1) -> list[int]:
    """Digests of all prefixes that end at `start` or later; `before` is the one just before."""
    digests = []
    for token_id in token_ids[start:]:
        before = int(xxhash.xxh3_64_intdigest(token_id.to_bytes(4, "little"), before)) or 1
        digests.append(before)
    return digests


def fake_logprob_rows(
    digests: list[int], token_ids: list[int], start: int, spec: LogprobSpec, vocab_size: int
) -> LogprobRows:
    """Rows for `token_ids` at positions from `start`; digests[p] is of the prefix ending at p."""
    rows = range(start, start + len(token_ids))
    tops = [
        [(position * 7 + rank) % vocab_size for rank in range(spec.num_top)] for position in rows
    ]
    return LogprobRows(
        start_position=start,
        token_ids=token_ids,
        logprobs=[
            fake_logprob(digests[position - 1], token_id)
            for position, token_id in zip(rows, token_ids, strict=True)
        ],
        num_top=spec.num_top,
        top_token_ids=[token_id for top in tops for token_id in top],
        top_logprobs=[
            fake_logprob(digests[position - 1], token_id)
            for position, top in zip(rows, tops, strict=True)
            for token_id in top
        ],
        requested_logprobs=[
            fake_logprob(digests[position - 1], token_id)
            for position in rows
            for token_id in spec.token_ids
        ],
    )


@dataclass(slots=True)
class _Slot:
    """What the sequence in a slot truly is, apart from anything read through pages."""

    assignment: SlotAssignment
    token_ids: list[int]
    digests: list[int]
    num_computed: int | None = None


@dataclass(slots=True)
class _Row:
    """A row of the newest forward pass, kept for sampling."""

    slot: int
    state: _Slot
    digest: int


@dataclass(slots=True)
class _Step:
    number: int
    rows: list[_Row]
    prompt_logprobs: list[LogprobRows]
    result: StepResult | None = field(default=None)


class FakeRunner:
    """Owns the simulated device. Work happens at once, in the order in which it is issued."""

    def __init__(
        self,
        *,
        num_slots: int,
        num_pages: int,
        page_size: int,
        context_length: int,
        vocab_size: int,
        max_step_tokens: int,
        num_in_flight: int = 1,
    ) -> None:
        self.num_in_flight = num_in_flight
        self.num_steps = 0
        self.is_closed = False
        self.num_checks = 0
        self.failure: Exception | None = None
        # Largest number of tokens that a step computed.
        self.peak_step_tokens = 0
        self.num_tokens_computed = 0
        self._page_size = page_size
        self._vocab_size = vocab_size
        self._max_step_tokens = max_step_tokens
        max_pages = -(-context_length // page_size)
        self._page_table = np.full((num_slots, max_pages), _NO_PAGE, np.int32)
        # Digest of the prefix whose last token wrote the place; 0 is never written.
        self._places: npt.NDArray[np.uint64] = np.zeros((num_pages, page_size), np.uint64)
        self._slots: list[_Slot | None] = [None] * num_slots
        self._unsampled: _Step | None = None
        self._sampled: deque[_Step] = deque()

    def forward(self, plan: StepPlan) -> None:
        """Write the rows' keys and values, then read each row's whole prefix back."""
        assert not self.is_closed, "a forward pass after close"
        assert self._unsampled is None, "two forward passes without sampling between them"
        assert len(self._sampled) < self.num_in_flight, "more steps in flight than allowed"
        self.num_steps += 1
        assert plan.step_number == self.num_steps, "steps are numbered from 1 without a gap"
        self._check_shapes(plan)
        self._assign(plan)
        self._page_table[plan.page_slots, plan.page_indices] = plan.page_ids
        bounds = self._write(plan)
        rows = [self._read(slot, stop) for slot, stop in bounds]
        sampled = [rows[row] for row in plan.sample_rows.tolist()]
        for row in sampled:
            known = len(row.state.token_ids)
            assert row.state.num_computed == known, "sampling before the last known token"
        prompt_logprobs = [self._prompt_rows(plan, request) for request in plan.prompt_logprobs]
        self._unsampled = _Step(plan.step_number, sampled, prompt_logprobs)

    def sample(self) -> None:
        """Choose the next id of each row that samples."""
        step = self._unsampled
        assert step is not None, "sampling without a forward pass"
        ids = []
        logprobs = {}
        for index, row in enumerate(step.rows):
            assignment, state = row.state.assignment, row.state
            token_id = fake_token(
                row.digest, assignment.sampling, assignment.choice_index, self._vocab_size
            )
            state.token_ids.append(token_id)
            state.digests += prefix_digests([token_id], before=row.digest)
            ids.append(token_id)
            if assignment.logprobs.output:
                logprobs[index] = fake_logprob_rows(
                    state.digests,
                    [token_id],
                    len(state.token_ids) - 1,
                    assignment.logprobs,
                    self._vocab_size,
                )
        step.result = StepResult(
            step_number=step.number,
            token_ids=np.array(ids, np.int32),
            output_logprobs=logprobs,
            prompt_logprobs=step.prompt_logprobs,
        )
        self._sampled.append(step)
        self._unsampled = None

    def result(self) -> StepResult:
        """The oldest sampled step's result."""
        assert self._sampled, "asked for a result that nobody sampled"
        result = self._sampled.popleft().result
        assert result is not None, "a sampled step has a result"
        return result

    def check(self) -> None:
        """Count the times that an idle loop asked; raise `failure` if one was set."""
        self.num_checks += 1
        if self.failure is not None:
            raise self.failure

    def close(self) -> None:
        """Refuse all further work."""
        self.is_closed = True

    def _check_shapes(self, plan: StepPlan) -> None:
        num_rows = len(plan.slots)
        assert num_rows > 0, "a step without rows"
        assert len(set(plan.slots.tolist())) == num_rows, "two rows of one slot"
        assert len(plan.num_tokens) == len(plan.start_positions) == num_rows
        assert plan.num_tokens.min() >= 1, "a row without tokens"
        assert plan.num_tokens.sum() == len(plan.token_ids), "ids that belong to no row"
        assert len(plan.token_ids) <= self._max_step_tokens, "more tokens than a step may have"
        assert len(plan.page_slots) == len(plan.page_indices) == len(plan.page_ids)
        entries = set(zip(plan.page_slots.tolist(), plan.page_indices.tolist(), strict=True))
        assert len(entries) == len(plan.page_ids), "two pages for one place of the page table"
        for array in (plan.slots, plan.num_tokens, plan.start_positions, plan.token_ids):
            assert array.dtype == np.int32
        self.peak_step_tokens = max(self.peak_step_tokens, len(plan.token_ids))
        self.num_tokens_computed += len(plan.token_ids)

    def _assign(self, plan: StepPlan) -> None:
        for assignment in plan.assignments:
            token_ids = list(assignment.token_ids)
            self._slots[assignment.slot] = _Slot(assignment, token_ids, prefix_digests(token_ids))
            self._page_table[assignment.slot] = _NO_PAGE

    def _write(self, plan: StepPlan) -> list[tuple[int, int]]:
        """Write all rows before any of them reads; returns each row's slot and length."""
        written: set[tuple[int, int]] = set()
        bounds = []
        first = 0
        for slot, start, count in zip(
            plan.slots.tolist(),
            plan.start_positions.tolist(),
            plan.num_tokens.tolist(),
            strict=True,
        ):
            state = self._slots[slot]
            assert state is not None, "a row in a slot that nobody has"
            assert state.num_computed in (None, start), "a row that skips or repeats tokens"
            self._check_ids(state, start, plan.token_ids[first : first + count].tolist())
            first += count
            for position in range(start, start + count):
                place = self._place(slot, position)
                assert place not in written, "two rows write one place"
                written.add(place)
                self._places[place] = state.digests[position]
            state.num_computed = start + count
            bounds.append((slot, start + count))
        return bounds

    def _check_ids(self, state: _Slot, start: int, token_ids: list[int]) -> None:
        if token_ids == [LAST_SAMPLED]:
            assert start == len(state.token_ids) - 1, "the last sampled id is not at this place"
            return
        assert token_ids == state.token_ids[start : start + len(token_ids)], "wrong input ids"

    def _read(self, slot: int, stop: int) -> _Row:
        state = self._slots[slot]
        assert state is not None, "a row in a slot that nobody has"
        num_pages = -(-stop // self._page_size)
        pages = self._page_table[slot, :num_pages]
        assert (pages != _NO_PAGE).all(), "a page that is missing from the table"
        held = self._places[pages].reshape(-1)[:stop]
        expected = np.array(state.digests[:stop], np.uint64)
        assert (held == expected).all(), "a row reads keys and values of another prefix"
        return _Row(slot, state, int(held[-1]))

    def _place(self, slot: int, position: int) -> tuple[int, int]:
        page = int(self._page_table[slot, position // self._page_size])
        assert page != _NO_PAGE, "a page that is missing from the table"
        return page, position % self._page_size

    def _prompt_rows(self, plan: StepPlan, request: PromptLogprobRequest) -> LogprobRows:
        slot = int(plan.slots[request.row])
        start, count = int(plan.start_positions[request.row]), int(plan.num_tokens[request.row])
        state = self._slots[slot]
        assert state is not None, "a row in a slot that nobody has"
        assert max(1, start + 1) <= request.start < request.stop <= start + count + 1
        assert request.stop <= state.assignment.prompt_len, "output is not prompt"
        assert request.token_ids == state.token_ids[request.start : request.stop]
        return fake_logprob_rows(
            state.digests, request.token_ids, request.start, request.spec, self._vocab_size
        )
