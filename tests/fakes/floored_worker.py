"""A worker whose steps last at least a given time; everything else is the real one.

`python -m tests.fakes.floored_worker FLOOR_MS LOG [flags of a worker]`. Its speed is then that of
the floor, not of what else the machine does, as long as a step is computed within it. LOG is a file
that gets a line a step: when it began and ended, in monotonic seconds.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TextIO

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
    """Wraps a runner that makes one step at a time, and sleeps out the rest of each step.

    Owns the log.
    """

    num_in_flight = 1

    def __init__(self, runner: Runner, floor_ms: float, log: TextIO) -> None:
        assert runner.num_in_flight == 1, "steps that overlap cannot be drawn out one by one"
        self._runner = runner
        self._floor_s = floor_ms / 1e3
        self._log = log
        self._began_s = self._ended_s = 0.0

    def forward(self, plan: StepPlan) -> None:
        # What comes without a pause is counted from the end of the step before, so that the work
        # between steps is part of the floor.
        now_s = time.monotonic()
        is_next = now_s - self._ended_s < self._floor_s / 4
        self._began_s = self._ended_s if is_next else now_s
        self._runner.forward(plan)

    def sample(self) -> None:
        self._runner.sample()

    def result(self) -> StepResult:
        result = self._runner.result()
        time.sleep(max(0.0, self._began_s + self._floor_s - time.monotonic()))
        self._ended_s = time.monotonic()
        self._log.write(f"{self._began_s} {self._ended_s}\n")
        return result

    def check(self) -> None:
        self._runner.check()

    def close(self) -> None:
        self._log.close()
        self._runner.close()


def _run_engine(floor_ms: float, log: Path) -> None:
    # An engine that takes the place of a lost one goes on in the same file.
    process.main(lambda runner: FlooredRunner(runner, floor_ms, log.open("a", buffering=1)))


def _run_worker(floor_ms: str, log: str, flags: list[str]) -> None:
    config = parse_config(WorkerConfig, "worker", flags)
    configure_logging("worker", config.log_level)
    if config.parent_pid is not None:
        die_with_parent(config.parent_pid)
    engine = (sys.executable, "-m", "tests.fakes.floored_worker", _ENGINE, floor_ms, log)
    run(serve(config, engine))


def main() -> None:
    """Run the worker until SIGTERM, or its engine."""
    if sys.argv[1] == _ENGINE:
        _, _, floor_ms, log, _ = sys.argv
        # The engine finds its spec where it always is.
        del sys.argv[1:4]
        _run_engine(float(floor_ms), Path(log))
    else:
        _run_worker(sys.argv[1], sys.argv[2], sys.argv[3:])


if __name__ == "__main__":
    main()
