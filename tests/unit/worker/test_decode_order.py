"""The order of decode rows: neighbours share, and nothing moves without need."""

import random

import numpy as np
import pytest

from services.worker.engine.batch import StepPlan
from services.worker.engine.batching.order import DecodeOrder
from services.worker.engine.messages import Request
from tests.fakes.engine_driver import EngineDriver, make_request

PAGE_SIZE = 4
MAX_PAGES = 32


class PlanRecorder:
    """Runs an engine step by step and keeps each step's decoding slots and their pages."""

    def __init__(self, engine: EngineDriver) -> None:
        self.engine = engine
        self.table = np.full((16, MAX_PAGES), -1, np.int32)
        self.prompt_lens = np.zeros(16, np.int32)
        # For each step, (slot, pages before the row's own token) of rows that decode.
        self.steps: list[list[tuple[int, list[int]]]] = []

    def run(self, requests: list[Request]) -> None:
        for request in requests:
            self.engine.scheduler.add(request)
        while self.engine.scheduler.num_live:
            plan = self.engine.scheduler.schedule()
            assert plan is not None
            self._record(plan)
            self.engine.runner.forward(plan)
            self.engine.runner.sample()
            self.engine.scheduler.apply(self.engine.runner.result())
            self.engine.scheduler.check()

    def _record(self, plan: StepPlan) -> None:
        self.table[plan.page_slots, plan.page_indices] = plan.page_ids
        for assignment in plan.assignments:
            self.prompt_lens[assignment.slot] = assignment.prompt_len
        decoding = plan.start_positions >= self.prompt_lens[plan.slots]
        decodes = int(decoding.sum())
        assert decoding[:decodes].all()
        self.steps.append(
            [
                (slot, self.table[slot, : start // PAGE_SIZE].tolist())
                for slot, start in zip(
                    plan.slots[:decodes].tolist(),
                    plan.start_positions[:decodes].tolist(),
                    strict=True,
                )
            ]
        )


def make_recorder() -> PlanRecorder:
    return PlanRecorder(
        EngineDriver(
            num_pages=256, page_size=PAGE_SIZE, max_running_sequences=16, max_step_tokens=64
        )
    )


def mixed_requests() -> list[Request]:
    """Three prefixes, one the beginning of another, and strangers, in random order."""
    random.seed(3)
    prefixes = [list(range(10, 26)), list(range(10, 34)), list(range(25, 41)), []]
    requests = []
    for key in range(15):
        prompt = [*prefixes[key % 4], *[random.randrange(50) for _ in range(9)]]
        requests.append(make_request(key + 1, prompt, max_new_tokens=12 + key % 5))
    random.shuffle(requests)
    return requests


def test_rows_with_a_common_prefix_are_adjacent() -> None:
    recorder = make_recorder()
    recorder.run(mixed_requests())
    sizes = []
    for rows in recorder.steps:
        for depth in (1, 4, 6):
            prefixes = [tuple(pages[:depth]) for _, pages in rows if len(pages) >= depth]
            runs = [
                prefix
                for index, prefix in enumerate(prefixes)
                if index == 0 or prefixes[index - 1] != prefix
            ]
            assert len(runs) == len(set(runs))
            sizes.append(len(prefixes) - len(runs))
    # The workload does share.
    assert max(sizes) > 8


def test_rows_that_stay_keep_their_order() -> None:
    recorder = make_recorder()
    recorder.run(mixed_requests())
    # Slots are reused by later sequences, but not within this workload of 15 for 16 slots.
    for before, after in zip(recorder.steps, recorder.steps[1:], strict=False):
        old, new = [slot for slot, _ in before], [slot for slot, _ in after]
        assert [slot for slot in new if slot in old] == [slot for slot in old if slot in new]
    assert any(
        [slot for slot, _ in rows] != sorted(slot for slot, _ in rows) for rows in recorder.steps
    )


def test_a_slot_that_left_may_join_elsewhere() -> None:
    order = DecodeOrder()
    order.join(5, [1, 2])
    order.join(3, [4, 2])
    order.join(7, [1, 2, 9])
    assert order.slots.tolist() == [5, 7, 3]
    order.leave(5)
    order.leave(11)
    order.join(5, [4, 2, 1])
    assert order.slots.tolist() == [7, 3, 5]
    order.leave(7)
    order.leave(3)
    order.leave(5)
    assert order.slots.tolist() == []


@pytest.mark.parametrize("seed", range(3))
def test_random_joins_and_leaves_keep_every_prefix_together(seed: int) -> None:
    random.seed(seed)
    order = DecodeOrder()
    # Paths through a tree of page ids far beyond one byte: a page's id is its path's.
    paths: dict[int, list[int]] = {}
    ids: dict[tuple[int, ...], int] = {}
    for _ in range(300):
        slot = random.randrange(40)
        if slot in paths:
            order.leave(slot)
            del paths[slot]
        else:
            turns = tuple(random.randrange(3) for _ in range(random.randrange(6)))
            prefixes = [turns[: depth + 1] for depth in range(len(turns))]
            for prefix in prefixes:
                ids.setdefault(prefix, random.randrange(1 << 20) * 400 + len(ids))
            paths[slot] = [ids[prefix] for prefix in prefixes]
            order.join(slot, paths[slot])
        assert sorted(order.slots.tolist()) == sorted(paths)
        for depth in range(1, 6):
            pages = [
                paths[slot][depth - 1] for slot in order.slots.tolist() if len(paths[slot]) >= depth
            ]
            runs = [
                page for index, page in enumerate(pages) if index == 0 or pages[index - 1] != page
            ]
            assert len(runs) == len(set(runs))
