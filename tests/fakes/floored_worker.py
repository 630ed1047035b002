"""A worker whose steps last at least a given time; everything else is the real one.

`python -m tests.fakes.floored_worker FLOOR_MS [flags of a worker]`. Its speed is then that of the
floor, not of what else the machine does, as long as a step is computed within it.
"""

from __future__ import annotations

import sys
import time

from services.common.config import parse_config
from services.common.logs import configure_logging
from services.common.process import die_with_parent, run
from services.worker.config import WorkerConfig
from services.worker.engine import process
from services.worker.engine.batch import Runner, StepPlan, StepResult
from services.worker.lifetime import serve

# The engine is this module too, with this word before the floor.
_ENGINE = "engine"


class FlooredRunner:
    """Wraps a runner that makes one step at a time, and sleeps out the rest of each step."""

    num_in_flight = 1

    def __init__(self, runner: Runner, floor_ms: float) -> None:
        assert runner.num_in_flight == 1, "steps that overlap cannot be drawn out one by one"
        self._runner = runner
        self._floor_ns = floor_ms * 1e6
        self._ends_ns = 0.0

    def forward(self, plan: StepPlan) -> None:
        now_ns = time.monotonic_ns()
        # What comes without a pause is counted from the end of the step before, so that the work
        # between steps is part of the floor.
        began_ns = self._ends_ns if now_ns - self._ends_ns < self._floor_ns / 4 else now_ns
        self._ends_ns = began_ns + self._floor_ns
        self._runner.forward(plan)

    def sample(self) -> None:
        self._runner.sample()

    def result(self) -> StepResult:
        result = self._runner.result()
        left_ns = self._ends_ns - time.monotonic_ns()
        if left_ns > 0:
            time.sleep(left_ns / 1e9)
        return result

    def check(self) -> None:
        self._runner.check()

    def close(self) -> None:
        self._runner.close()


def _run_engine(floor_ms: float) -> None:
    process.main(lambda runner: FlooredRunner(runner, floor_ms))


def _run_worker(floor_ms: str, flags: list[str]) -> None:
    config = parse_config(WorkerConfig, "worker", flags)
    configure_logging("worker", config.log_level)
    if config.parent_pid is not None:
        die_with_parent(config.parent_pid)
    run(serve(config, (sys.executable, "-m", "tests.fakes.floored_worker", _ENGINE, floor_ms)))


def main() -> None:
    """Run the worker until SIGTERM, or its engine."""
    if sys.argv[1] == _ENGINE:
        floor_ms = float(sys.argv[2])
        # The engine finds its spec where it always is.
        del sys.argv[1:3]
        _run_engine(floor_ms)
    else:
        _run_worker(sys.argv[1], sys.argv[2:])


if __name__ == "__main__":
    main()
