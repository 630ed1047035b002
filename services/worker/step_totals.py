"""What an engine's steps came to since it started: plain counts, for metrics."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter

from services.worker.engine.messages import StepOutput

# Upper bounds of the classes of step times, in seconds; the last class has none.
STEP_BOUNDS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_STEP_BOUNDS_NS = [int(bound * 1e9) for bound in STEP_BOUNDS_S]


class StepTotals:
    """Invariant: `num_steps_by_time` sums up to the steps that computed something.

    Written by the event loop and read by others: each count is right by itself, together they may
    be one step apart.
    """

    def __init__(self) -> None:
        # By class of STEP_BOUNDS_S, not cumulative.
        self.num_steps_by_time = [0] * (len(STEP_BOUNDS_S) + 1)
        self.step_ns = 0
        self.prefill_tokens = 0
        # Ended sequences by reason: "stop", "length", "cancelled", "error".
        self.num_ended: Counter[str] = Counter(stop=0, length=0, cancelled=0, error=0)

    def add(self, step: StepOutput) -> None:
        """Count one message of the engine."""
        if step.work is not None:
            self.num_steps_by_time[bisect_left(_STEP_BOUNDS_NS, step.work.step_ns)] += 1
            self.step_ns += step.work.step_ns
            self.prefill_tokens += step.work.prefill_tokens
        for finish in step.finishes:
            self.num_ended[finish.reason] += 1
        self.num_ended["error"] += len(step.errors)
