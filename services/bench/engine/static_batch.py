"""A batch that a runner computes without a scheduler: equal prompts' lengths, all rows in step."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.worker.engine.batch import LAST_SAMPLED, Runner, SlotAssignment, StepPlan
from services.worker.engine.messages import LogprobSpec, SamplingParams

Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class BatchTimes:
    """Seconds: the whole prefill, each decode step from result to result, and all together."""

    prefill_s: float
    decode_s: list[float]
    total_s: float


class StaticBatch:
    """Sequences of one length in slots and pages from 0 on; nothing else may use the runner.

    Shapes: B sequences, L prompt tokens.
    """

    def __init__(
        self, runner: Runner, *, page_size: int, max_step_tokens: int, temperature: float
    ) -> None:
        self._runner = runner
        self._page_size = page_size
        self._max_step_tokens = max_step_tokens
        self._temperature = temperature
        self._num_issued = 0
        # Of the running batch: its sequences' first pages, and the position of their next token.
        self._first_pages = np.zeros(0, np.int32)
        self._position = 0

    def run(self, prompts: Int32Array, output_len: int) -> BatchTimes:
        """Prefill [B, L] prompts, then decode until each sequence has `output_len` tokens."""
        started_s = time.perf_counter()
        self.start(prompts, output_len)
        prefilled_s = time.perf_counter()
        ended_s = [prefilled_s]
        for _ in range(output_len - 1):
            self.issue()
            if self.read(self._runner.num_in_flight - 1):
                ended_s.append(time.perf_counter())
        while self._num_issued:
            self.read(self._num_issued - 1)
            ended_s.append(time.perf_counter())
        return BatchTimes(
            prefill_s=prefilled_s - started_s,
            decode_s=np.diff(np.array(ended_s)).tolist(),
            total_s=ended_s[-1] - started_s,
        )

    def start(self, prompts: Int32Array, output_len: int) -> None:
        """Compute [B, L] prompts, with room for `output_len` tokens after each."""
        size, length = prompts.shape
        pages = -(-(length + output_len) // self._page_size)
        self._first_pages = np.arange(size, dtype=np.int32) * np.int32(pages)
        self._prefill(prompts)
        self.read(0)
        self._position = length

    def issue(self) -> None:
        """One more token for each sequence."""
        size = len(self._first_pages)
        slots = np.arange(size, dtype=np.int32)
        index, offset = divmod(self._position, self._page_size)
        changed = slots if offset == 0 else slots[:0]
        self._issue(
            StepPlan(
                step_number=1,
                slots=slots,
                num_tokens=np.ones(size, np.int32),
                start_positions=np.full(size, self._position, np.int32),
                token_ids=np.full(size, LAST_SAMPLED, np.int32),
                sample_rows=slots,
                page_slots=changed,
                page_indices=np.full(len(changed), index, np.int32),
                page_ids=self._first_pages[changed] + np.int32(index),
            )
        )
        self._position += 1

    def read(self, num_to_leave: int) -> bool:
        """Read the oldest results until so many steps are in flight; whether any was read."""
        has_read = False
        while self._num_issued > num_to_leave:
            self._runner.result()
            self._num_issued -= 1
            has_read = True
        return has_read

    def _prefill(self, prompts: Int32Array) -> None:
        """Whole prompts side by side where they fit a step, else one in pieces."""
        size, length = prompts.shape
        rows_a_step = max(1, self._max_step_tokens // length)
        for first in range(0, size, rows_a_step):
            rows = np.arange(first, min(first + rows_a_step, size), dtype=np.int32)
            for start in range(0, length, self._max_step_tokens):
                stop = min(start + self._max_step_tokens, length)
                self.read(self._runner.num_in_flight - 1)
                self._issue_prompts(prompts[:, start:stop], rows, start, length)

    def _issue_prompts(self, part: Int32Array, rows: Int32Array, start: int, length: int) -> None:
        stop = start + part.shape[1]
        indices = np.arange(-(-start // self._page_size), -(-stop // self._page_size))
        tiled = np.tile(indices.astype(np.int32), len(rows))
        is_last = stop == length
        self._issue(
            StepPlan(
                step_number=0,
                slots=rows,
                num_tokens=np.full(len(rows), stop - start, np.int32),
                start_positions=np.full(len(rows), start, np.int32),
                token_ids=part[rows].ravel(),
                sample_rows=np.arange(len(rows) if is_last else 0, dtype=np.int32),
                page_slots=np.repeat(rows, len(indices)),
                page_indices=tiled,
                page_ids=np.repeat(self._first_pages[rows], len(indices)) + tiled,
                assignments=[]
                if start
                else [assignment(int(row), length, self._temperature) for row in rows],
            )
        )

    def _issue(self, plan: StepPlan) -> None:
        self._runner.forward(plan)
        self._runner.sample()
        self._num_issued += 1


def assignment(slot: int, prompt_len: int, temperature: float) -> SlotAssignment:
    """A sequence that stops for nothing; its slot seeds its noise."""
    return SlotAssignment(
        slot=slot,
        sampling=SamplingParams(temperature=temperature, seed=slot, ignore_eos=True),
        logprobs=LogprobSpec(),
        choice_index=0,
        prompt_len=prompt_len,
        token_ids=[],
    )
