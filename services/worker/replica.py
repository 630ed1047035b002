"""One model replica as its front knows it: the engine's state, its sequences, its readiness."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from dataclasses import dataclass, field
from itertools import count

from rhizome.common.v1 import pool_identity_pb2, worker_role_pb2
from rhizome.worker.v1 import worker_service_pb2 as pb
from services.common.errors import (
    InternalError,
    OverloadedError,
    PreconditionError,
    RhizomeError,
    SessionBrokenError,
    UnavailableError,
)
from services.common.prefix_hash import cache_namespace
from services.common.spans import NO_TRACER, Tracer
from services.worker import wire
from services.worker.cache_events import CacheEventLog
from services.worker.cost_model import CostModel
from services.worker.engine.messages import (
    Cancel,
    EngineFailed,
    EngineLoad,
    EngineOutput,
    EngineReady,
    EvictionWork,
    FlushCache,
    LoadProgress,
    ProfileState,
    StartProfile,
    StepOutput,
    StopProfile,
)
from services.worker.engine_link import EngineLink
from services.worker.outputs import NOBODY, OutputLog, OutputRouter, Sink
from services.worker.reservations import ReservationBook
from services.worker.spans import begin_sequence
from services.worker.step_totals import StepTotals

logger = logging.getLogger(__name__)

# Loading is logged when it is further by this much.
_PROGRESS_STEP = 0.1
# Of an engine's failure, callers are told so many characters: a status message travels as
# metadata, which has to stay under 8 KiB however it is escaped.
_MAX_REASON_CHARS = 512
# A prefill step, before any was seen: the first ones warm things up.
_FIRST_STEPS_NS = 2_000_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerIdentity:
    """Who this worker is, for as long as its process lives."""

    worker_id: str
    # Random number that tells this life of the worker from others; never 0.
    epoch: int
    pool: pool_identity_pb2.PoolIdentity
    role: worker_role_pb2.WorkerRole.ValueType
    model_path: str
    labels: dict[str, str] = field(default_factory=dict)


class ReplicaFailedError(Exception):
    """The engine is gone; `permanent` when starting it again cannot help."""

    def __init__(self, reason: str, permanent: bool) -> None:
        super().__init__(reason)
        self.reason = reason
        self.permanent = permanent


class Replica:
    """Takes the engine's outputs apart and passes submits, cancels and flushes on to it.

    Every sequence that goes to the engine is in `router` until its one terminal entry came.
    """

    def __init__(
        self,
        identity: WorkerIdentity,
        link: EngineLink,
        *,
        max_queued_requests: int = 4096,
        tracer: Tracer = NO_TRACER,
    ) -> None:
        self.identity = identity
        self.ready: EngineReady | None = None
        self.load = EngineLoad()
        self.eviction = EvictionWork()
        self.step_number = 0
        self.draining = False
        self.router = OutputRouter()
        self.reservations = ReservationBook()
        self.cache_events = CacheEventLog(identity.epoch)
        # Its engine says what bounds it when it is ready.
        self.cost_model = CostModel(0.0)
        self.totals = StepTotals()
        # Why schedulers refused this worker, by address; and those that accepted it.
        self.refusals: dict[str, str] = {}
        self.acceptances: set[str] = set()
        # Resolves with the failure that ends this worker.
        self.failed: asyncio.Future[ReplicaFailedError] = asyncio.Future()
        self._link = link
        self._max_queued_requests = max_queued_requests
        self._tracer = tracer
        self._limits: wire.Limits | None = None
        self._keys = count(1)
        self._progress = LoadProgress(0.0, "")
        self._flush: asyncio.Future[int] | None = None
        # Calls about profiles; the engine answers in order.
        self._profiles: deque[asyncio.Future[ProfileState]] = deque()
        self._watchers: set[asyncio.Event] = set()
        self._state_watchers: set[asyncio.Event] = set()

    @property
    def busy(self) -> bool:
        """Whether the engine has something to do."""
        return bool(len(self.router) or self.load.num_running or self.load.num_waiting)

    @property
    def predicted_step_ns(self) -> int:
        """Time that the step under way may take.

        The engine's own prediction is a mean over its steps; while a prompt may be in the step, it
        is at least that of as much prefill as fits.
        """
        usual = self.load.predicted_step_ns
        if self.ready is None or not (prompts := self.router.unanswered_prompt_lens()):
            return usual
        fitted = self.cost_model.recent(time.monotonic())
        if fitted is None:
            return max(usual, _FIRST_STEPS_NS)
        num_tokens = min(sum(prompts), self.ready.max_step_tokens)
        return max(usual, int(fitted.prefill_ns(num_tokens, max(prompts))))

    @property
    def serving(self) -> bool:
        """Whether new requests may come."""
        refused = bool(self.refusals) and not self.acceptances
        alive = self.ready is not None and not self.failed.done()
        return alive and not self.draining and not refused

    def watch(self) -> asyncio.Event:
        """An event that every change of load or state sets."""
        event = asyncio.Event()
        self._watchers.add(event)
        return event

    def watch_state(self) -> asyncio.Event:
        """An event that changes of readiness, draining and standing set, but no step does."""
        event = asyncio.Event()
        self._state_watchers.add(event)
        return event

    def notify_state(self) -> None:
        """Something changed that `serving` depends on."""
        for event in self._state_watchers:
            event.set()
        self._notify_load()

    def check_lengths(self, submit: pb.Submit) -> None:
        """Refuse a submit that cannot be taken, before all of its ids came."""
        try:
            wire.check_lengths(submit, self._admitting())
        except RhizomeError:
            self._refuse(submit)
            raise

    def _refuse(self, submit: pb.Submit) -> None:
        """The submit never reaches the engine: its reservation need not wait for it."""
        self.reservations.open(submit.reservation_id)
        self.reservations.close(submit.reservation_id)

    def submit(self, submit: pb.Submit, token_ids: list[int], handle: int, sink: Sink) -> OutputLog:
        """Send one sequence to the engine. Raises the leaf that says why not."""
        self.reservations.open(submit.reservation_id)
        try:
            request = wire.request_from_submit(
                submit,
                token_ids,
                key=next(self._keys),
                limits=self._admitting(),
                now_ns=time.monotonic_ns(),
            )
        except RhizomeError:
            self.reservations.close(submit.reservation_id)
            raise
        log = OutputLog(handle, sink, request)
        self.router.add(log)
        log.trace = begin_sequence(self._tracer, submit.traceparent, request)
        self._link.send(request)
        return log

    def cancel(self, logs: list[OutputLog]) -> None:
        """Stop sequences; their terminal entries follow. Ended ones are left alone."""
        keys = [log.key for log in logs if log.end is None and log.key]
        if keys:
            self._link.send(Cancel(keys))

    def abandon(self, logs: list[OutputLog]) -> None:
        """Stop sequences whose output nobody wants any more."""
        for log in logs:
            log.sink = NOBODY
        self.cancel(logs)

    async def flush_cache(self) -> int:
        """Pages freed. Calls that overlap share one flush."""
        if self.ready is None or self.failed.done():
            raise UnavailableError("the engine is not up")
        if self._flush is None:
            self._flush = asyncio.get_running_loop().create_future()
            self._link.send(FlushCache())
        return await asyncio.shield(self._flush)

    async def profile(self, message: StartProfile | StopProfile) -> str:
        """Start or stop a recording; after a stop, where its trace is.

        Raises PreconditionError when the engine refuses, InternalError when it fails.
        """
        if self.ready is None or self.failed.done():
            raise UnavailableError("the engine is not up")
        answer: asyncio.Future[ProfileState] = asyncio.get_running_loop().create_future()
        self._profiles.append(answer)
        self._link.send(message)
        state = await answer
        if state.error:
            raise (PreconditionError if state.is_refusal else InternalError)(state.error)
        return state.trace_path

    def drain(self, reason: str) -> None:
        """Admit nothing more; what runs goes on."""
        if not self.draining:
            logger.info("event=draining reason=%s sequences=%s", reason, len(self.router))
            self.draining = True
            self.notify_state()

    def fail(self, reason: str, permanent: bool) -> None:
        """The engine is gone: every sequence ends with ABORTED. Idempotent."""
        if self.failed.done():
            return
        self.failed.set_result(ReplicaFailedError(reason, permanent))
        message = f"the engine failed: {reason[:_MAX_REASON_CHARS]}"
        for log in self.router.fail_all(self.step_number, SessionBrokenError().code, message):
            self._ended(log)
        if self._flush is not None and not self._flush.done():
            self._flush.set_exception(UnavailableError(message))
            self._flush = None
        while self._profiles:
            if not (answer := self._profiles.popleft()).done():
                answer.set_exception(UnavailableError(message))
        self.notify_state()

    def handle(self, output: EngineOutput) -> None:
        """Take one message of the engine."""
        if isinstance(output, StepOutput):
            self._handle_step(output)
        elif isinstance(output, ProfileState):
            # A caller may have gone away; the engine answers all the same.
            if not (answer := self._profiles.popleft()).done():
                answer.set_result(output)
        elif isinstance(output, LoadProgress):
            self._log_progress(output)
        elif isinstance(output, EngineReady):
            namespace = cache_namespace(self.identity.pool.model_revision)
            self._limits = wire.Limits.of(output, namespace)
            self.ready = output
            self.cost_model = CostModel(output.pair_work)
            self.load = EngineLoad(num_free_pages=output.num_pages)
            self.notify_state()
        elif isinstance(output, EngineFailed):
            self.fail(output.reason, output.permanent)

    def _log_progress(self, progress: LoadProgress) -> None:
        last = self._progress
        if progress.what != last.what or progress.fraction - last.fraction >= _PROGRESS_STEP:
            self._progress = progress
            logger.info("event=loading fraction=%.2f what=%s", progress.fraction, progress.what)

    def _handle_step(self, step: StepOutput) -> None:
        self.step_number = max(self.step_number, step.step_number)
        self.load = step.load
        self.totals.add(step)
        for reservation_id in step.accepted_reservation_ids:
            self.reservations.admit(reservation_id)
        for log in self.router.route(step):
            self._ended(log)
        self.cache_events.append(step.cache_events)
        if step.work is not None:
            self.cost_model.observe(step.work)
        if step.eviction is not None:
            self.eviction = step.eviction
        if step.flushed_pages is not None and self._flush is not None:
            self._flush.set_result(step.flushed_pages)
            self._flush = None
        self._notify_load()

    def _ended(self, log: OutputLog) -> None:
        self.reservations.close(log.reservation_id)
        if log.trace is not None and log.end is not None:
            log.trace.end(log.end, log.admission)

    def _notify_load(self) -> None:
        for event in self._watchers:
            event.set()

    def _admitting(self) -> wire.Limits:
        if self._limits is None:
            raise UnavailableError("the engine is still loading")
        if self.failed.done():
            raise UnavailableError("the engine failed")
        if self.draining:
            raise UnavailableError("the worker is draining")
        assert self.ready is not None, "limits come with readiness"
        if len(self.router) >= self.ready.max_running_sequences + self._max_queued_requests:
            raise OverloadedError(f"{len(self.router)} sequences are running or waiting")
        return self._limits


def worker_info(replica: Replica, num_sessions: int, num_handles: int) -> pb.GetWorkerInfoResponse:
    """What GetWorkerInfo answers; the engine's fields are empty until it is ready."""
    identity, ready = replica.identity, replica.ready
    info = pb.GetWorkerInfoResponse(
        worker_id=identity.worker_id,
        epoch=identity.epoch,
        identity=identity.pool,
        protocol=wire.PROTOCOL,
        role=identity.role,
        model_path=identity.model_path,
        max_top_logprobs=wire.MAX_TOP_LOGPROBS,
        load=worker_load(replica, num_sessions, num_handles),
        refusals=[f"{address}: {reason}" for address, reason in replica.refusals.items()],
    )
    if ready is not None:
        info.context_length = ready.context_length
        info.vocab_size = ready.vocab_size
        info.eos_token_ids.extend(ready.eos_token_ids)
        info.num_pages = ready.num_pages
        info.max_running_sequences = ready.max_running_sequences
        info.tp_size = ready.tp_size
        info.device = ready.device
        info.attention_backend = ready.attention_backend
        info.dtype = ready.dtype
    return info


def worker_load(replica: Replica, num_sessions: int, num_handles: int) -> pb.WorkerLoad:
    """The newest step's load, with the front's own counts."""
    load = replica.load
    return pb.WorkerLoad(
        num_running=load.num_running,
        num_waiting=load.num_waiting,
        num_free_pages=load.num_free_pages,
        num_evictable_pages=load.num_evictable_pages,
        engine_step_number=replica.step_number,
        num_preemptions=load.num_preemptions,
        num_prompt_tokens=load.num_prompt_tokens,
        num_cached_tokens=load.num_cached_tokens,
        num_output_tokens=load.num_output_tokens,
        num_sessions=num_sessions,
        num_handles=num_handles,
    )
