"""An engine that takes as long as a GPU and computes nothing: every id it samples is the same.

Batching, cache, messages and all that is around them are the real ones, so what a client sees is
what the services make of such a device. Requests for log-probabilities end the engine.
"""

from __future__ import annotations

import time
from collections import deque

import numpy as np

from bench.simulator.device import StepTimes
from services.worker.engine import process
from services.worker.engine.batch import StepPlan, StepResult

# An 8-billion-parameter model on one H100, from bench/results/h100_8b_services.md: steps of 1 to
# 256 rows with 512 tokens each. (The simulator has those of an earlier engine, as its charts do.)
STEP_TIMES = StepTimes(prefill_base_ns=5.3e6, decode_base_ns=5.3e6, decode_sequence_ns=12e3)

# A word of the built-in model's vocabulary.
_SAMPLED_ID = 300


class ClockedRunner:
    """Owns the device's clock: a step begins when it is issued and the one before has ended."""

    num_in_flight = 2

    def __init__(self, step_times: StepTimes) -> None:
        self._step_times = step_times
        self._ends_ns = 0
        # When each step ends, what it took, and how many ids it samples.
        self._steps: deque[tuple[int, int, StepPlan]] = deque()

    def forward(self, plan: StepPlan) -> None:
        device_ns = self._step_times.of(plan)
        self._ends_ns = max(time.monotonic_ns(), self._ends_ns) + device_ns
        self._steps.append((self._ends_ns, device_ns, plan))

    def sample(self) -> None:
        """The step's time has it."""

    def result(self) -> StepResult:
        ends_ns, device_ns, plan = self._steps.popleft()
        left_ns = ends_ns - time.monotonic_ns()
        if left_ns > 0:
            time.sleep(left_ns / 1e9)
        return StepResult(
            step_number=plan.step_number,
            token_ids=np.full(len(plan.sample_rows), _SAMPLED_ID, np.int32),
            device_ns=device_ns,
        )

    def check(self) -> None:
        """A clock does not fail."""

    def close(self) -> None:
        self._steps.clear()


def main() -> None:
    """Run one engine; the argument is its spec. The model is loaded for its plan alone."""
    process.main(lambda _: ClockedRunner(STEP_TIMES))


if __name__ == "__main__":
    main()
