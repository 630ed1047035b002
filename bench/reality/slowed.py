"""An engine whose steps last at least a given time, so that a few cores carry many workers.

Each step of the real model is followed by a pause, in which other workers' steps have the core. A
worker then has the timing of one with a slower processor of its own, whatever the others do, as
long as its steps are done in time.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from services.worker.engine import process
from services.worker.engine.batch import Runner, StepPlan, StepResult


@dataclass(frozen=True, kw_only=True, slots=True)
class Slowing:
    """A step lasts at least `floor_ms`, and `token_ms` more for each token that it computes.

    `log` is a directory for the times of steps.
    """

    floor_ms: float
    token_ms: float
    log: Path

    def least_ns(self, num_tokens: int) -> float:
        """How long a step of so many tokens lasts at least."""
        return (self.floor_ms + self.token_ms * num_tokens) * 1e6

    def arguments(self) -> tuple[str, ...]:
        return str(self.floor_ms), str(self.token_ms), str(self.log)

    @classmethod
    def parse(cls, arguments: list[str]) -> Slowing:
        floor_ms, token_ms, log = arguments
        return cls(floor_ms=float(floor_ms), token_ms=float(token_ms), log=Path(log))


NUM_ARGUMENTS = 3


class SlowedRunner:
    """Wraps a runner that makes one step at a time. Owns the log of its steps.

    A line of the log: when the step began, was computed and ended (monotonic ns), then decode rows,
    their context, prefilled tokens, and pairs of those with what stands before them.
    """

    def __init__(self, runner: Runner, slowing: Slowing, log: TextIO) -> None:
        assert runner.num_in_flight == 1, "steps that overlap cannot be drawn out one by one"
        self.num_in_flight = 1
        self._runner = runner
        self._slowing = slowing
        self._log = log
        self._began_ns = 0
        self._work = (0, 0, 0, 0)

    def forward(self, plan: StepPlan) -> None:
        self._began_ns = time.monotonic_ns()
        self._work = _work_of(plan)
        self._runner.forward(plan)

    def sample(self) -> None:
        self._runner.sample()

    def result(self) -> StepResult:
        result = self._runner.result()
        computed_ns = time.monotonic_ns()
        num_decodes, _, num_prefilled, _ = self._work
        ends_ns = self._began_ns + self._slowing.least_ns(num_decodes + num_prefilled)
        if ends_ns > computed_ns:
            time.sleep((ends_ns - computed_ns) / 1e9)
        line = (self._began_ns, computed_ns, time.monotonic_ns(), *self._work)
        self._log.write(" ".join(map(str, line)) + "\n")
        return result

    def check(self) -> None:
        self._runner.check()

    def close(self) -> None:
        self._log.close()
        self._runner.close()


def _work_of(plan: StepPlan) -> tuple[int, int, int, int]:
    decodes = plan.num_tokens == 1
    lengths = plan.num_tokens[~decodes].astype(int)
    pairs = (lengths * (plan.start_positions[~decodes] + lengths / 2)).sum()
    context = plan.start_positions[decodes].sum()
    return int(decodes.sum()), int(context), int(lengths.sum()), int(pairs)


def main() -> None:
    """Run one engine; the arguments are those of Slowing, then the spec of the engine."""
    slowing = Slowing.parse(sys.argv[1 : 1 + NUM_ARGUMENTS])
    del sys.argv[1 : 1 + NUM_ARGUMENTS]

    def wrap(runner: Runner) -> Runner:
        log = (slowing.log / f"steps-{time.monotonic_ns()}.txt").open("w", buffering=1)
        return SlowedRunner(runner, slowing, log)

    process.main(wrap)


if __name__ == "__main__":
    main()
