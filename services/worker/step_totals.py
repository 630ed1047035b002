"""What an engine's steps came to since it started: plain counts, for metrics."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Sequence
from itertools import accumulate

from services.worker.engine.messages import EngineLoad, StepOutput, StepWork

# Upper bounds of classes, in seconds, sequences and tokens; the last class has none.
STEP_BOUNDS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
TOKEN_BOUNDS_S = (0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0)
QUEUE_BOUNDS_S = (0.001, 0.005, 0.01, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
SEQUENCE_BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
STEP_TOKEN_BOUNDS = (1, 4, 16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384)

# What "now" means for rates that are shown as gauges.
RECENT_S = 10
# Weight of what was admitted before in the recent hit rate; about the last 50 turns with any count.
_KEEP = 0.98


class Distribution:
    """Counts by class of value, and their sum: a histogram that costs a step almost nothing."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        # Not cumulative.
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative counts by upper bound, as Prometheus writes them."""
        bounds = (*(str(float(bound)) for bound in self.bounds), "+Inf")
        # A copy: the event loop may add to them meanwhile.
        counts = accumulate(list(self.counts))
        return list(zip(bounds, map(float, counts), strict=True))

    def add(self, value: float, count: int = 1) -> None:
        """`count` observations of `value`."""
        self.counts[bisect_left(self.bounds, value)] += count
        self.total += value * count


class StepTotals:
    """Invariant: `step_seconds` has counted the steps that computed something.

    Written by the event loop and read by others: each count is right by itself, together they may
    be one step apart.
    """

    def __init__(self, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self.step_seconds = Distribution(STEP_BOUNDS_S)
        # From one step's outputs to the next, once for each sequence that decoded.
        self.token_seconds = Distribution(TOKEN_BOUNDS_S)
        # From a sequence's arrival at the engine until it began to run.
        self.queue_seconds = Distribution(QUEUE_BOUNDS_S)
        self.step_sequences = Distribution(SEQUENCE_BOUNDS)
        self.step_tokens = Distribution(STEP_TOKEN_BOUNDS)
        self.prefill_tokens = 0
        # Ended sequences by reason: "stop", "length", "cancelled", "error".
        self.num_ended: Counter[str] = Counter(stop=0, length=0, cancelled=0, error=0)
        self._clock = clock
        self._last_ns: int | None = None
        self._load = EngineLoad()
        # Of the last seconds that had any: (second, output tokens, preemptions).
        self._recent: deque[tuple[int, int, int]] = deque(maxlen=RECENT_S + 1)
        self._recent_prompt_tokens = 0.0
        self._recent_cached_tokens = 0.0

    def add(self, step: StepOutput) -> None:
        """Count one message of the engine."""
        now_ns = self._clock()
        if step.work is not None:
            self._add_work(step.work, now_ns)
        for admission in step.admissions:
            self.queue_seconds.add(admission.queue_ns / 1e9)
        for finish in step.finishes:
            self.num_ended[finish.reason] += 1
        self.num_ended["error"] += len(step.errors)
        self._add_load(step.load, now_ns)

    def output_rate(self) -> float:
        """Output tokens a second, of the last seconds."""
        return self._in_recent_seconds(1) / RECENT_S

    def num_recent_preemptions(self) -> int:
        """Preemptions of the last seconds."""
        return self._in_recent_seconds(2)

    def hit_rate(self) -> float:
        """Share of prompt tokens that the cache held, of what began to run lately."""
        asked = self._recent_prompt_tokens
        return self._recent_cached_tokens / asked if asked else 0.0

    def _add_work(self, work: StepWork, now_ns: int) -> None:
        self.step_seconds.add(work.step_ns / 1e9)
        self.step_sequences.add(work.decode_sequences + work.prefill_sequences)
        self.step_tokens.add(work.decode_sequences + work.prefill_tokens)
        self.prefill_tokens += work.prefill_tokens
        # What decodes had its token before in the step before.
        if work.decode_sequences and self._last_ns is not None:
            self.token_seconds.add((now_ns - self._last_ns) / 1e9, work.decode_sequences)
        self._last_ns = now_ns

    def _add_load(self, load: EngineLoad, now_ns: int) -> None:
        last, self._load = self._load, load
        if asked := load.num_prompt_tokens - last.num_prompt_tokens:
            cached = load.num_cached_tokens - last.num_cached_tokens
            self._recent_prompt_tokens = _KEEP * self._recent_prompt_tokens + asked
            self._recent_cached_tokens = _KEEP * self._recent_cached_tokens + cached
        tokens = load.num_output_tokens - last.num_output_tokens
        preemptions = load.num_preemptions - last.num_preemptions
        if tokens or preemptions:
            second = now_ns // 1_000_000_000
            if self._recent and self._recent[-1][0] == second:
                _, more_tokens, more_preemptions = self._recent.pop()
                tokens, preemptions = tokens + more_tokens, preemptions + more_preemptions
            self._recent.append((second, tokens, preemptions))

    def _in_recent_seconds(self, column: int) -> int:
        """Of the last whole seconds; the one under way is left out."""
        second = self._clock() // 1_000_000_000
        # A copy: the event loop may add to it meanwhile.
        recent = list(self._recent)
        return sum(row[column] for row in recent if second - RECENT_S <= row[0] < second)
