"""How long simulated steps take: the H100's measurements, and rows that share a prefix."""

import numpy as np
import pytest

from bench.simulator.device import PageTable, SharedReads, StepTimes
from services.worker.engine.batch import SlotAssignment, StepPlan
from services.worker.engine.messages import LogprobSpec, SamplingParams

PAGE = 16


def plan(
    slots: list[int],
    starts: list[int],
    lengths: list[int] | None = None,
    pages: list[tuple[int, int, int]] | None = None,
    assigned: tuple[int, ...] = (),
) -> StepPlan:
    """`pages` are (slot, index, page)."""
    changed = np.array(pages or np.empty((0, 3)), np.int32).reshape(-1, 3)
    return StepPlan(
        step_number=1,
        slots=np.array(slots, np.int32),
        num_tokens=np.array(lengths or [1] * len(slots), np.int32),
        start_positions=np.array(starts, np.int32),
        token_ids=np.zeros(sum(lengths or [1] * len(slots)), np.int32),
        sample_rows=np.arange(len(slots), dtype=np.int32),
        page_slots=changed[:, 0],
        page_indices=changed[:, 1],
        page_ids=changed[:, 2],
        assignments=[
            SlotAssignment(
                slot=slot,
                sampling=SamplingParams(),
                logprobs=LogprobSpec(),
                choice_index=0,
                prompt_len=1,
                token_ids=[],
            )
            for slot in assigned
        ],
    )


@pytest.mark.parametrize(
    ("rows", "groups", "measured_us"),
    [(64, 4, 60.0), (256, 16, 168.0), (512, 32, 264.7)],
)
def test_reading_shared_prefixes_takes_what_was_measured(
    rows: int, groups: int, measured_us: float
) -> None:
    # bench/results/shared_prefix_gpu.md, cascade: prefixes of 2,048 tokens, 160 of each row's own.
    num_distinct = groups * 2048 + rows * 160
    layer_us = SharedReads().of(rows * 2208, num_distinct) / 32 / 1000
    assert layer_us == pytest.approx(measured_us, rel=0.2)


def test_rows_that_share_nothing_read_all_from_memory() -> None:
    reads = SharedReads()
    assert reads.of(100_000, 100_000) == reads.memory_ns * 100_000


@pytest.mark.parametrize(("rows", "measured_ms"), [(1, 6.39), (8, 6.62), (64, 7.9), (256, 12.65)])
def test_decode_steps_take_what_was_measured(rows: int, measured_ms: float) -> None:
    # bench/results/engine_gpu.md: context 256.
    step = plan(list(range(rows)), [256] * rows)
    assert StepTimes().of(step) / 1e6 == pytest.approx(measured_ms, rel=0.1)


def test_the_page_table_counts_what_rows_share() -> None:
    table = PageTable(4, 8, PAGE)
    first = [(0, 0, 10), (0, 1, 11), (0, 2, 12)]
    second = [(1, 0, 10), (1, 1, 11), (1, 2, 22)]
    assert table.shared_tokens(plan([0], [2 * PAGE + 3], pages=first, assigned=(0,))) == 0
    both = plan([0, 1], [2 * PAGE + 4, 2 * PAGE + 1], pages=second, assigned=(1,))
    assert table.shared_tokens(both) == 2 * PAGE
    assert table.shared_tokens(plan([0, 1], [2 * PAGE + 5, 2 * PAGE + 2])) == 2 * PAGE
    # Another sequence has slot 1 now, and shares nothing.
    taken = plan([0, 1], [2 * PAGE + 6, PAGE], pages=[(1, 0, 30)], assigned=(1,))
    assert table.shared_tokens(taken) == 0


def test_a_shared_prefix_shortens_a_step() -> None:
    step = plan(list(range(64)), [4096] * 64)
    assert StepTimes().of(step, num_shared=63 * 4096) < 0.55 * StepTimes().of(step)
