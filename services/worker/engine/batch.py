"""The engine's inner vocabulary: what a step computes and what came of it. Owns nothing.

A *slot* is a stable row of the device's tables (page table, last ids, penalty counts, sampling
parameters); a sequence holds one from admission to its end or preemption. A step's *rows* are the
sequences that compute tokens in it.

Shapes: S rows of the step, T tokens of the step, R rows that sample, P page-table changes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from services.worker.engine.messages import LogprobRows, LogprobSpec, SamplingParams

Int32Array = npt.NDArray[np.int32]

# Stands in StepPlan.token_ids for "the id this slot sampled last", which the device knows already.
LAST_SAMPLED = -1


@dataclass(slots=True, kw_only=True)
class SlotAssignment:
    """A sequence takes a slot: what the device must know to sample for it."""

    slot: int
    sampling: SamplingParams
    logprobs: LogprobSpec
    choice_index: int
    prompt_len: int
    # Prompt and output so far, for repetition, frequency and presence counts; a
    # runner needs them only when the sequence has such a penalty.
    token_ids: list[int]


@dataclass(slots=True, kw_only=True)
class PromptLogprobRequest:
    """Row `row` computes prompt tokens whose successors' log-probabilities are wanted.

    Covers positions `start` to `stop` - 1 (of the tokens reported, all >= 1): the logits at
    position p - 1 give the log-probability of the token at p.
    """

    row: int
    start: int
    stop: int
    # Ids at positions start to stop - 1.
    token_ids: list[int]
    spec: LogprobSpec


@dataclass(slots=True, kw_only=True)
class StepPlan:
    """One forward pass: tokens per sequence, no prefill or decode modes."""

    step_number: int
    # [S] slot of each row, in the order their tokens are laid out.
    slots: Int32Array
    # [S] tokens computed, and tokens whose keys and values are in place before.
    num_tokens: Int32Array
    start_positions: Int32Array
    # [T] input ids by row; LAST_SAMPLED where only the device knows.
    token_ids: Int32Array
    # [R] indices of rows that sample a token: those that compute their last known token.
    sample_rows: Int32Array
    # [P] changes of the page table: page_table[page_slots, page_indices] = page_ids.
    page_slots: Int32Array
    page_indices: Int32Array
    page_ids: Int32Array
    # Slots that changed hands; to be applied before the rows.
    assignments: list[SlotAssignment] = field(default_factory=list)
    prompt_logprobs: list[PromptLogprobRequest] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class StepResult:
    """What a step sampled."""

    step_number: int
    # [R] in the order of StepPlan.sample_rows.
    token_ids: Int32Array
    # From the device's beginning with the step to its end; None where the device has no clock.
    device_ns: int | None = None
    # By index into sample_rows; only rows whose LogprobSpec.output is set.
    output_logprobs: dict[int, LogprobRows] = field(default_factory=dict)
    # In the order of StepPlan.prompt_logprobs.
    prompt_logprobs: list[LogprobRows] = field(default_factory=list)


class Runner(Protocol):
    """The device side of an engine. Calls are made in the order forward, sample, result.

    With `num_in_flight` = 2, the forward of step k+1 is issued before the result of step k is
    read; with 1, each step is finished before the next is planned.
    """

    num_in_flight: int

    def forward(self, plan: StepPlan) -> None:
        """Issue the step's forward pass."""

    def sample(self) -> None:
        """Issue sampling for the newest forward pass."""

    def result(self) -> StepResult:
        """Wait for the oldest sampled step that was not read yet."""

    def check(self) -> None:
        """Raise when no step could be made any more; asked now and then while idle, so cheap."""

    def close(self) -> None:
        """Release the device and the other ranks."""
