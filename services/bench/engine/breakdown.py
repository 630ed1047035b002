"""Where a decode step's time goes: the device's work, the host's by part, and waiting.

The real loop runs: scheduler, runner, the output's encoding. Host times come from steps without a
profiler; how long the device is busy comes from profiled steps after them, since recording slows
the host but not the kernels.
"""

from __future__ import annotations

import gc
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from services.bench.engine.session import EncodingOutbox, ListInbox, make_request
from services.bench.engine.startup import BuiltEngine
from services.bench.figures import number
from services.bench.workloads import Turn
from services.worker.engine.batch import Runner, StepPlan, StepResult
from services.worker.engine.loop import EngineLoop, build_loop

_WARMUP_STEPS = 20
_MEASURED_STEPS = 100
_PROFILED_STEPS = 20
_NS_PER_MS = 1e6
_US_PER_MS = 1e3


@dataclass(slots=True)
class HostTimes:
    """Nanoseconds of one turn of the loop."""

    turn_ns: int = 0
    forward_ns: int = 0
    sample_ns: int = 0
    # Reading a result that has arrived.
    result_ns: int = 0
    # Until a result arrived, or until it was time to issue the next step.
    wait_ns: int = 0

    @property
    def host_ns(self) -> int:
        """All that is not waiting."""
        return self.turn_ns - self.wait_ns


class TimedRunner:
    """Passes everything on to `runner` and takes the times of each call in `times`."""

    def __init__(self, runner: Runner, device: str) -> None:
        self.num_in_flight = runner.num_in_flight
        self.times = HostTimes()
        self._runner = runner
        self._is_gpu = device == "cuda"
        self._events: list[torch.cuda.Event] = []

    def forward(self, plan: StepPlan) -> None:
        """Issue the step's forward pass."""
        started_ns = time.perf_counter_ns()
        self._runner.forward(plan)
        self.times.forward_ns += time.perf_counter_ns() - started_ns

    def sample(self) -> None:
        """Issue sampling; an event after it says when the result is there."""
        started_ns = time.perf_counter_ns()
        self._runner.sample()
        self.times.sample_ns += time.perf_counter_ns() - started_ns
        if self._is_gpu:
            event: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._events.append(event)

    def result(self) -> StepResult:
        """Wait for the oldest step's end, then read its result."""
        started_ns = time.perf_counter_ns()
        if self._events:
            self._events.pop(0).synchronize()
        arrived_ns = time.perf_counter_ns()
        result = self._runner.result()
        self.times.wait_ns += arrived_ns - started_ns
        self.times.result_ns += time.perf_counter_ns() - arrived_ns
        return result

    def check(self) -> None:
        """As `runner` does."""
        self._runner.check()

    def close(self) -> None:
        """Nothing: the runner belongs to who made it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Breakdown:
    """Means of a decode step in milliseconds, but for the medians that say so."""

    batch_size: int
    context_len: int
    step_ms: float
    step_ms_p50: float
    host_ms: float
    host_ms_p50: float
    forward_ms: float
    sample_ms: float
    result_ms: float
    # Scheduling, applying results, encoding the output.
    loop_ms: float
    wait_ms: float
    # Time in which at least one kernel ran; None without a GPU.
    device_busy_ms: float | None
    device_busy_percent: float | None

    def as_json(self) -> dict[str, Any]:
        """Every figure, rounded."""
        return {
            name: round(value, 4) if isinstance(value, float) else value
            for name, value in asdict(self).items()
        }

    def as_text(self) -> str:
        """Two lines."""
        busy = (
            f"device busy {number(self.device_busy_ms)} ms ({number(self.device_busy_percent)} %)"
            if self.device_busy_ms is not None
            else "no GPU"
        )
        return (
            f"Step.    {number(self.step_ms)} ms at context {self.context_len}: {busy}, "
            f"host {number(self.host_ms)} ms, waiting {number(self.wait_ms)} ms\n"
            f"Host.    forward {number(self.forward_ms)}, sample {number(self.sample_ms)}, "
            f"result {number(self.result_ms)}, loop {number(self.loop_ms)} ms"
        )


def measure_breakdown(
    engine: BuiltEngine, batch_size: int, input_len: int, temperature: float
) -> Breakdown:
    """Decode `batch_size` sequences through the loop. Raises ValueError where they do not fit."""
    output_len = _WARMUP_STEPS + _MEASURED_STEPS + _PROFILED_STEPS + 8
    _check_fits(engine, batch_size, input_len + output_len)
    runner = TimedRunner(engine.runner, engine.plan.device)
    inbox, outbox = ListInbox(), EncodingOutbox()
    loop = build_loop(runner, engine.plan, inbox, outbox)
    source = np.random.default_rng(batch_size)
    prompts = source.integers(0, engine.plan.vocab_size, (batch_size, input_len))
    inbox.put(
        make_request(row + 1, Turn(prompt.tolist(), output_len), temperature)
        for row, prompt in enumerate(prompts)
    )
    _start_all(loop, outbox, batch_size)
    gc.collect()
    gc.disable()
    try:
        for _ in range(_WARMUP_STEPS):
            loop.step()
        steps = [_timed_step(loop, runner, inbox) for _ in range(_MEASURED_STEPS)]
        # The steps that follow are not the last measured one's.
        runner.times = HostTimes()
        busy_ms = _busy_ms_a_step(loop) if engine.plan.device == "cuda" else None
    finally:
        gc.enable()
    _finish_all(loop, outbox, batch_size)
    return _summarize(steps, batch_size, input_len, busy_ms)


def _check_fits(engine: BuiltEngine, batch_size: int, length: int) -> None:
    plan = engine.plan
    pages = batch_size * (-(-length // plan.page_size) + 1)
    if length > plan.context_length or pages > plan.num_pages:
        raise ValueError(
            f"--breakdown decodes {batch_size} sequences up to {length} tokens, more than the "
            "context length or the key/value cache takes: lower --batch-size or --input-len"
        )


def _start_all(loop: EngineLoop, outbox: EncodingOutbox, batch_size: int) -> None:
    """Run until every sequence has a token."""
    started: set[int] = set()
    while len(started) < batch_size:
        loop.step()
        for output in outbox.take():
            started.update(output.keys)


def _finish_all(loop: EngineLoop, outbox: EncodingOutbox, batch_size: int) -> None:
    """Leave no step in flight in the runner."""
    num_finished = sum(len(output.finishes) for output in outbox.take())
    while num_finished < batch_size:
        loop.step()
        num_finished += sum(len(output.finishes) for output in outbox.take())


def _timed_step(loop: EngineLoop, runner: TimedRunner, inbox: ListInbox) -> HostTimes:
    runner.times = times = HostTimes()
    waited_ns = inbox.waited_ns
    started_ns = time.perf_counter_ns()
    loop.step()
    times.turn_ns = time.perf_counter_ns() - started_ns
    times.wait_ns += inbox.waited_ns - waited_ns
    return times


def _busy_ms_a_step(loop: EngineLoop) -> float:
    """Milliseconds of a step in which at least one kernel or copy runs on the device."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(_PROFILED_STEPS):
            loop.step()
        torch.cuda.synchronize()
    ranges = [
        (event.time_range.start, event.time_range.end)
        for event in profile.events() or ()
        if event.device_type.name == "CUDA"
    ]
    return covered(ranges) / _US_PER_MS / _PROFILED_STEPS


def covered(ranges: list[tuple[float, float]]) -> float:
    """Length of the union of (start, end) ranges."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(ranges):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _summarize(
    steps: list[HostTimes], batch_size: int, context_len: int, busy_ms: float | None
) -> Breakdown:
    def mean(values: list[int]) -> float:
        return statistics.fmean(values) / _NS_PER_MS

    step_ms = mean([step.turn_ns for step in steps])
    forward_ms = mean([step.forward_ns for step in steps])
    sample_ms = mean([step.sample_ns for step in steps])
    result_ms = mean([step.result_ns for step in steps])
    host_ms = mean([step.host_ns for step in steps])
    return Breakdown(
        batch_size=batch_size,
        context_len=context_len,
        step_ms=step_ms,
        step_ms_p50=statistics.median(step.turn_ns for step in steps) / _NS_PER_MS,
        host_ms=host_ms,
        host_ms_p50=statistics.median(step.host_ns for step in steps) / _NS_PER_MS,
        forward_ms=forward_ms,
        sample_ms=sample_ms,
        result_ms=result_ms,
        loop_ms=host_ms - forward_ms - sample_ms - result_ms,
        wait_ms=mean([step.wait_ns for step in steps]),
        device_busy_ms=busy_ms,
        device_busy_percent=None if busy_ms is None else 100 * busy_ms / step_ms,
    )
