"""The engine loop of rank 0: messages in, steps through the runner, one output a step.

Nothing here awaits. With two steps in flight, the device works on one while this process plans
the next and handles the result of the one before (after the overlapped loop of mini-sglang).
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable
from typing import Protocol

from services.worker.engine.batch import Runner, StepPlan
from services.worker.engine.batching.scheduler import BatchScheduler
from services.worker.engine.messages import (
    Cancel,
    EngineInput,
    FlushCache,
    ProfileState,
    Request,
    StartProfile,
    StepOutput,
    Stop,
    StopProfile,
)
from services.worker.engine.options import EnginePlan
from services.worker.engine.pace import StepPace

logger = logging.getLogger(__name__)

# Of google.rpc.Code, which this package may not import. Both mean to try again elsewhere; ABORTED
# also that the request may be what the engine died of.
_ABORTED = 10
_UNAVAILABLE = 14

# The inbox waits in whole milliseconds.
_SHORTEST_WAIT_S = 0.001

_NO_RECORDER = ProfileState(
    error="profiling is off: start the worker with --profile-dir DIRECTORY", is_refusal=True
)

# An engine that is idle for this long looks after itself, and its runner, before it sleeps on.
_UPKEEP_AFTER_S = 1.0


class Inbox(Protocol):
    """Where messages from the front arrive."""

    def receive(self, block: bool, timeout_s: float | None = None) -> list[EngineInput]:
        """All messages that have come; with `block`, waits for one, at most `timeout_s`."""


class Outbox(Protocol):
    """Where outputs go. It takes them at once: the engine never waits for a reader."""

    def send(self, message: StepOutput | ProfileState) -> None:
        """Send one output."""


class StepRecorder(Protocol):
    """Records a trace of steps when asked to."""

    def start(self, message: StartProfile) -> ProfileState:
        """Record the steps that follow."""

    def begin_step(self, plan: StepPlan) -> None:
        """A step is about to be issued."""

    def end_turn(self) -> None:
        """The loop's turn is over; a recording that has its steps ends here."""

    def stop(self) -> ProfileState:
        """End the recording, or find it ended, and say where it is."""


class EngineLoop:
    """Sequences the scheduler and the runner, and owns neither.

    Garbage collection is off while it runs; it collects, and checks the scheduler's invariants,
    once in each idle time. While idle it asks the runner now and then whether it still could.
    """

    def __init__(
        self,
        *,
        runner: Runner,
        scheduler: BatchScheduler,
        inbox: Inbox,
        outbox: Outbox,
        upkeep_after_s: float = _UPKEEP_AFTER_S,
        clock: Callable[[], int] = time.monotonic_ns,
        recorder: StepRecorder | None = None,
    ) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._inbox = inbox
        self._outbox = outbox
        self._upkeep_after_s = upkeep_after_s
        self._clock = clock
        self._recorder = recorder
        self._pace = StepPace()
        self._was_upkept = False
        self._is_stopping = False

    def run(self) -> None:
        """Serve until a Stop message. An exception fails what is live and is raised again."""
        gc.disable()
        try:
            while not self._is_stopping:
                self.step()
            self._fail_live(_UNAVAILABLE, "the worker is stopping")
        except Exception:
            logger.exception("event=engine_step_failed live=%s", self._scheduler.num_live)
            self._fail_live(_ABORTED, "the engine failed and is starting again")
            raise
        finally:
            gc.enable()

    def step(self) -> None:
        """One turn: messages, the next step out, the previous step's result in, the output."""
        self._take_messages()
        self._await_turn()
        began_ns = self._clock()
        plan = self._scheduler.schedule()
        if plan is not None:
            if self._recorder is not None:
                self._recorder.begin_step(plan)
            self._runner.forward(plan)
            self._runner.sample()
            self._pace.issued(len(plan.token_ids), len(plan.slots), began_ns, self._clock())
        num_to_leave = 0 if plan is None else self._runner.num_in_flight - 1
        if self._scheduler.num_issued > num_to_leave:
            asked_ns = self._clock()
            result = self._runner.result()
            self._pace.ended(asked_ns, self._clock())
            self._scheduler.apply(result)
        self._publish()
        if self._recorder is not None:
            self._recorder.end_turn()

    def _await_turn(self) -> None:
        """Take messages until the running step is about to end."""
        if self._scheduler.num_issued == 0:
            self._pace.idle()
            return
        while not self._is_stopping:
            wait_s = self._pace.wait_ns(self._clock()) / 1e9
            if wait_s < _SHORTEST_WAIT_S:
                return
            for message in self._inbox.receive(block=True, timeout_s=wait_s):
                self._handle(message)

    def _take_messages(self) -> None:
        idle = self._scheduler.num_live == 0 and self._scheduler.num_issued == 0
        messages = self._inbox.receive(block=idle, timeout_s=self._upkeep_after_s if idle else 0.0)
        if idle and not messages:
            self._runner.check()
        if messages:
            self._was_upkept = False
        elif idle and not self._was_upkept:
            self._scheduler.check()
            gc.collect()
            self._was_upkept = True
        for message in messages:
            self._handle(message)

    def _handle(self, message: EngineInput) -> None:
        match message:
            case Request():
                self._scheduler.add(message)
            case Cancel(keys=keys):
                for key in keys:
                    self._scheduler.cancel(key)
            case FlushCache():
                self._scheduler.flush_cache()
            case StartProfile():
                self._outbox.send(
                    _NO_RECORDER if self._recorder is None else self._recorder.start(message)
                )
            case StopProfile():
                self._outbox.send(_NO_RECORDER if self._recorder is None else self._recorder.stop())
            case Stop():
                self._is_stopping = True

    def _fail_live(self, code: int, message: str) -> None:
        self._scheduler.fail_all(code, message)
        self._publish()

    def _publish(self) -> None:
        output = self._scheduler.take_output()
        if output is not None:
            self._outbox.send(output)


def build_loop(
    runner: Runner,
    plan: EnginePlan,
    inbox: Inbox,
    outbox: Outbox,
    clock: Callable[[], int] = time.monotonic_ns,
    recorder: StepRecorder | None = None,
) -> EngineLoop:
    """The loop of an engine that was set up as `plan` says."""
    scheduler = BatchScheduler(
        num_pages=plan.num_pages,
        page_size=plan.page_size,
        context_length=plan.context_length,
        vocab_size=plan.vocab_size,
        eos_token_ids=plan.eos_token_ids,
        max_running_sequences=plan.max_running_sequences,
        max_step_tokens=plan.max_step_tokens,
        policy=plan.schedule_policy,
        num_in_flight=runner.num_in_flight,
        clock=clock,
    )
    return EngineLoop(
        runner=runner,
        scheduler=scheduler,
        inbox=inbox,
        outbox=outbox,
        clock=clock,
        recorder=recorder,
    )
