"""A simulated worker: the real batching, radix tree and cost fit over a device that takes time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from bench.simulator.clock import VirtualClock
from bench.simulator.device import PageTable, StepTimes
from services.worker.cost_model import CostCoefficients, CostModel, eviction_cost_ns
from services.worker.engine.batch import StepPlan, StepResult
from services.worker.engine.batching.policy import SchedulePolicy
from services.worker.engine.batching.scheduler import BatchScheduler
from services.worker.engine.messages import (
    CacheEvent,
    EngineLoad,
    EvictionWork,
    Request,
    StepOutput,
)

# Every sampled id: an answer in the history of a later turn is made of these.
SAMPLED_ID = 7
VOCAB_SIZE = 2**31 - 1
_REPORT_MIN_NS = 20_000_000
_REPORT_MAX_NS = 500_000_000
_FIT_INTERVAL_NS = 1_000_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerShape:
    """What a simulated worker has room for."""

    num_pages: int = 12_400
    page_size: int = 16
    context_length: int = 131_072
    max_running_sequences: int = 256
    max_step_tokens: int = 8192
    schedule_policy: SchedulePolicy = "lpm"
    step_times: StepTimes = StepTimes()
    # An 8-billion-parameter model's, as services/worker/engine/models/config.py has it.
    pair_work: float = 3.8e-5


@dataclass(frozen=True, slots=True)
class Report:
    """One load report, as `services/worker/registration.py` sends it."""

    load: EngineLoad
    admitted_ids: Sequence[int]
    ended_ids: Sequence[int]
    coefficients: CostCoefficients | None
    eviction_cost_ns: Sequence[float]


class SimulatedWorker:
    """One engine of one replica; a step at a time, each as long as the device takes.

    `on_output`, `on_report` and `on_events` are called when the worker sends; how long it takes
    to arrive is the receiver's business.
    """

    def __init__(
        self,
        worker_id: str,
        epoch: int,
        shape: WorkerShape,
        clock: VirtualClock,
        *,
        on_output: Callable[[StepOutput], None],
        on_report: Callable[[Report], None],
        on_events: Callable[[list[CacheEvent]], None],
    ) -> None:
        self.worker_id = worker_id
        self.epoch = epoch
        self.alive = True
        self._shape = shape
        self._clock = clock
        self._on_output = on_output
        self._on_report = on_report
        self._on_events = on_events
        self._scheduler = BatchScheduler(
            num_pages=shape.num_pages,
            page_size=shape.page_size,
            context_length=shape.context_length,
            vocab_size=VOCAB_SIZE,
            eos_token_ids=(),
            max_running_sequences=shape.max_running_sequences,
            max_step_tokens=shape.max_step_tokens,
            policy=shape.schedule_policy,
            clock=lambda: clock.now_ns,
        )
        self._table = PageTable(
            shape.max_running_sequences,
            -(-shape.context_length // shape.page_size),
            shape.page_size,
        )
        self._cost_model = CostModel(shape.pair_work)
        self._coefficients: CostCoefficients | None = None
        self._fit_due_ns = 0
        self._eviction = EvictionWork()
        self._eviction_cost_ns: list[float] = []
        self._load = EngineLoad(num_free_pages=shape.num_pages)
        self._admitted: list[int] = []
        self._ended: list[int] = []
        self._stepping = False
        self._report_due = False
        self._reported_ns = -_REPORT_MAX_NS
        self._report_at_the_latest()

    def submit(self, request: Request) -> None:
        """Take a sequence; a dead worker takes none (its sender hears of its death)."""
        if self.alive:
            self._scheduler.add(request)
            if not self._stepping:
                self._step()

    def kill(self) -> None:
        """From now on nothing comes from it any more."""
        self.alive = False

    def check(self) -> None:
        """Raise AssertionError unless every page, lock and slot is accounted for."""
        self._scheduler.check()

    def _step(self) -> None:
        plan = self._scheduler.schedule()
        self._stepping = plan is not None
        if plan is None:
            self._send()
            return
        step_ns = self._shape.step_times.of(plan, self._table.shared_tokens(plan))
        self._clock.after(step_ns, lambda: self._end_step(plan))

    def _end_step(self, plan: StepPlan) -> None:
        if not self.alive:
            return
        ids = np.full(len(plan.sample_rows), SAMPLED_ID, np.int32)
        self._scheduler.apply(StepResult(step_number=plan.step_number, token_ids=ids))
        self._send()
        self._step()

    def _send(self) -> None:
        output = self._scheduler.take_output()
        if output is None:
            return
        self._load = output.load
        self._admitted += output.accepted_reservation_ids
        self._ended += [finish.reservation_id for finish in output.finishes]
        self._ended += [error.reservation_id for error in output.errors]
        if output.work is not None:
            self._cost_model.observe(output.work)
        if output.eviction is not None:
            self._eviction = output.eviction
        if output.cache_events:
            self._on_events(output.cache_events)
        self._on_output(output)
        self._want_report()

    def _want_report(self) -> None:
        if not self._report_due:
            self._report_due = True
            self._clock.at(self._reported_ns + _REPORT_MIN_NS, self._report)

    def _report_at_the_latest(self) -> None:
        if self.alive:
            if self._clock.now_ns - self._reported_ns >= _REPORT_MAX_NS:
                self._report()
            self._clock.at(self._reported_ns + _REPORT_MAX_NS, self._report_at_the_latest)

    def _report(self) -> None:
        self._report_due = False
        if not self.alive:
            return
        now_ns = self._reported_ns = self._clock.now_ns
        if now_ns >= self._fit_due_ns:
            self._fit_due_ns = now_ns + _FIT_INTERVAL_NS
            fitted = self._coefficients = self._cost_model.coefficients()
            if fitted is not None:
                self._eviction_cost_ns = eviction_cost_ns(self._eviction, fitted)
        admitted, self._admitted = self._admitted, []
        ended, self._ended = self._ended, []
        self._on_report(
            Report(self._load, admitted, ended, self._coefficients, self._eviction_cost_ns)
        )
