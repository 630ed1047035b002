"""The simulated system: the real placement and index between simulated workers and callers.

What gateway, gRPC and the followers of the index do is played by delayed calls; what decides
(`Placer` and its tables, `PrefixIndex`) is the services' own code.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from bench.simulator.clock import VirtualClock
from bench.simulator.records import Delays, Loss, Served, reported_load
from bench.simulator.worker import SAMPLED_ID, VOCAB_SIZE, Report, SimulatedWorker, WorkerShape
from bench.simulator.workloads import Conversation, Turn, Workload
from services.cache_index.holders import GPU, Holder
from services.cache_index.index import PrefixIndex
from services.common.policies import PolicyName
from services.common.prefix_hash import prefix_hashes
from services.scheduler.accounting import Outcome
from services.scheduler.endpoints import Registration, WorkerTable
from services.scheduler.index_client import WorkerMatch
from services.scheduler.metrics import SchedulerMetrics
from services.scheduler.overlay import PredictionOverlay
from services.scheduler.placement import Placer
from services.scheduler.policies import make_policy
from services.scheduler.policy import PlacementRequest, Policy
from services.scheduler.pools import PoolIdentity, PoolSet
from services.scheduler.queue import Ticket
from services.scheduler.reservations import ReservationBook
from services.scheduler.views import Worker, WorkerRole
from services.worker.engine.messages import (
    CacheEvent,
    PagesRemoved,
    PagesStored,
    Request,
    SamplingParams,
    StepOutput,
)

_MODEL = "simulated"
_SWEEP_NS = 50_000_000
# As `services/scheduler/servicer.py` asks the index again for requests near the head.
_FIRST_REFRESH_NS = 50_000_000
_REFRESH_NS = 500_000_000
_REFRESH_POSITIONS = 64
_MAX_PREFIXES = 10_000_000
_LEASE_S = 3.0


@dataclass(slots=True, eq=False)
class _Job:
    """A request on its way."""

    conversation: Conversation
    turn_index: int
    session: int
    arrived_ns: int
    token_ids: list[int]
    hashes: list[int]
    attempt: int = 0
    num_output: int = 0
    ticket: Ticket | None = None
    key: int = 0
    cached_tokens: int = 0
    predicted_tokens: int = 0
    queued_s: float = 0.0
    first_token_ns: int | None = None

    @property
    def turn(self) -> Turn:
        return self.conversation.turns[self.turn_index]


@dataclass(slots=True, eq=False)
class _Seat:
    """One worker's place in the system through its lives."""

    name: str
    worker: SimulatedWorker
    # One with each scheduler.
    registrations: list[Registration]
    holder: Holder
    jobs: dict[int, _Job] = field(default_factory=dict)


class Cluster:
    """Serves one workload once. Invariant: every request that arrived is served, or is in
    exactly one of: on its way to a scheduler, in its queue, on its way to a worker, on one.
    Several schedulers are asked in turn, as by gateways that prefer different ones.
    """

    def __init__(
        self,
        num_workers: int,
        policy: PolicyName,
        *,
        shape: WorkerShape,
        delays: Delays,
        seed: int,
        weights: dict[str, float] | None = None,
        num_schedulers: int = 1,
    ) -> None:
        self.clock = VirtualClock()
        self.served: list[Served] = []
        self._shape = shape
        self._delays = delays
        rng = random.Random(seed)
        self._epochs = random.Random(seed + 1)
        self._index = PrefixIndex(_MAX_PREFIXES)
        self._pools = [PoolSet() for _ in range(num_schedulers)]
        # One a scheduler.
        self.metrics = [SchedulerMetrics() for _ in range(num_schedulers)]
        self._placers = [
            self._placing(pools, make_policy(policy, rng, **(weights or {})), metrics, rng)
            for pools, metrics in zip(self._pools, self.metrics, strict=True)
        ]
        self._num_jobs = 0
        self._seats = [self._register(f"w{index:03d}") for index in range(num_workers)]
        self.clock.after(_SWEEP_NS, self._sweep)

    def serve(
        self, workload: Workload, arrivals_ns: list[int], losses: tuple[Loss, ...] = ()
    ) -> list[Served]:
        """Every request of `workload`, in the order in which they ended."""
        for session, (conversation, at_ns) in enumerate(
            zip(workload.conversations, arrivals_ns, strict=True)
        ):
            self.clock.at(at_ns, lambda c=conversation, s=session: self._arrive(c, 0, s))  # type: ignore[misc]
        for loss in losses:
            self.clock.at(int(loss.at_s * 1e9), lambda lost=loss: self._lose(lost))  # type: ignore[misc]
        self.clock.run(until=lambda: len(self.served) == workload.num_requests)
        for seat in self._seats:
            assert not seat.jobs, "a request ended, and its worker still has it"
            if seat.worker.alive:
                seat.worker.check()
        return self.served

    def _placing(
        self, pools: PoolSet, policy: Policy, metrics: SchedulerMetrics, rng: random.Random
    ) -> Placer:
        """One scheduler, with tables of its own."""
        table = WorkerTable(_LEASE_S)
        return Placer(
            table,
            pools,
            policy,
            ReservationBook(table, rng),
            PredictionOverlay(),
            metrics,
            lambda: self.clock.now_s,
            max_queued=1_000_000,
            worker_wait_s=1e6,
        )

    # A request's way

    def _arrive(self, conversation: Conversation, turn_index: int, session: int) -> None:
        token_ids = conversation.turns[turn_index].token_ids()
        hashes = prefix_hashes(token_ids, self._shape.page_size, "")
        job = _Job(conversation, turn_index, session, self.clock.now_ns, token_ids, hashes)
        self._schedule(job)

    def _schedule(self, job: _Job) -> None:
        delay = self._delays.schedule + self._delays.match
        self._num_jobs += 1
        job.key = self._num_jobs
        placer = self._placers[job.key % len(self._placers)]
        self.clock.after(delay, lambda: self._open(job, placer))

    def _open(self, job: _Job, placer: Placer) -> None:
        request = PlacementRequest(
            request_id=f"{job.session}/{job.turn_index}",
            attempt=job.attempt,
            model=_MODEL,
            prefix_hashes=job.hashes,
            num_prompt_tokens=len(job.token_ids),
            max_new_tokens=job.turn.output_len - job.num_output,
            session=("", str(job.session)) if len(job.conversation.turns) > 1 else None,
        )
        ticket, is_new = placer.open_ticket(request, None)
        assert is_new, "a simulated caller asks once"
        job.ticket = ticket
        ticket.listeners.append(lambda: self._placed(job))
        placer.enqueue(ticket, self._match(job))
        if not ticket.is_settled:
            self.clock.after(_FIRST_REFRESH_NS, lambda: self._refresh(job, placer, ticket))

    def _refresh(self, job: _Job, placer: Placer, ticket: Ticket) -> None:
        """What the servicer does for requests that wait near the head."""
        if ticket.is_settled:
            return
        if placer.position(ticket) < _REFRESH_POSITIONS:
            placer.enqueue(ticket, self._match(job))
        self.clock.after(_REFRESH_NS, lambda: self._refresh(job, placer, ticket))

    def _match(self, job: _Job) -> tuple[WorkerMatch, ...]:
        found = self._index.match(job.hashes)
        return tuple(map(WorkerMatch, found.worker_ids, found.epochs, found.host_pages))

    def _placed(self, job: _Job) -> None:
        ticket = job.ticket
        assert ticket is not None, "placed without having asked"
        assert ticket.reservation is not None, ticket.error
        reservation, ticket.is_delivered = ticket.reservation, True
        job.queued_s += reservation.queued_for_s
        job.predicted_tokens = reservation.predicted_cached_tokens
        delay = self._delays.schedule + self._delays.submit
        seat = next(s for s in self._seats if s.name == reservation.worker.worker_id)
        epoch, reservation_id = reservation.worker.epoch, reservation.reservation_id
        self.clock.after(delay, lambda: self._submit(job, seat, epoch, reservation_id))

    def _submit(self, job: _Job, seat: _Seat, epoch: int, reservation_id: int) -> None:
        if not seat.worker.alive or seat.worker.epoch != epoch:
            self._migrate(job)
            return
        seat.jobs[job.key] = job
        turn = job.turn
        seat.worker.submit(
            Request(
                key=job.key,
                request_id=str(job.key),
                token_ids=job.token_ids,
                prompt_len=turn.prompt_len,
                sampling=SamplingParams(max_new_tokens=turn.output_len, ignore_eos=True),
                reservation_id=reservation_id,
                arrival_ns=self.clock.now_ns,
            )
        )

    def _take_output(self, seat: _Seat, worker: SimulatedWorker, output: StepOutput) -> None:
        """A frame has come to the callers; what a dead worker had sent is lost."""
        if not worker.alive:
            return
        for key, count in zip(output.keys, output.num_tokens, strict=True):
            job = seat.jobs.get(key)
            if job is not None:
                job.num_output += count
                if job.first_token_ns is None:
                    job.first_token_ns = self.clock.now_ns
        assert not output.errors, output.errors
        for finish in output.finishes:
            job = seat.jobs.pop(finish.key, None)
            if job is not None:
                job.cached_tokens = finish.cached_tokens
                self._finish(job, seat, finish.reservation_id)

    def _finish(self, job: _Job, seat: _Seat, reservation_id: int) -> None:
        turn, now_ns = job.turn, self.clock.now_ns
        assert job.num_output == turn.output_len, "every token arrives, and no other"
        assert job.first_token_ns is not None
        self.served.append(
            Served(
                job.arrived_ns / 1e9,
                (job.first_token_ns - job.arrived_ns) / 1e9,
                (now_ns - job.arrived_ns) / 1e9,
                job.queued_s,
                turn.prompt_len,
                job.cached_tokens,
                job.predicted_tokens,
                turn.output_len,
                job.attempt + 1,
                seat.name,
            )
        )
        outcome = Outcome(reservation_id, turn.prompt_len, job.cached_tokens, turn.output_len, True)
        for placer in self._placers:
            self.clock.after(
                self._delays.outcome, lambda told=placer: told.report_outcomes([outcome])
            )
        if job.turn_index + 1 < len(job.conversation.turns):
            self.clock.after(
                job.conversation.think_s * 1e9,
                lambda: self._arrive(job.conversation, job.turn_index + 1, job.session),
            )

    def _migrate(self, job: _Job) -> None:
        """Its worker is gone: place it again, with its output so far."""
        job.attempt += 1
        job.token_ids = job.turn.token_ids() + [SAMPLED_ID] * job.num_output
        job.hashes = prefix_hashes(job.token_ids, self._shape.page_size, "")
        self._schedule(job)

    # Workers

    def _register(self, name: str) -> _Seat:
        epoch = self._epochs.getrandbits(63) | 1
        shape = self._shape
        record = Worker(
            worker_id=name,
            address=name,
            epoch=epoch,
            role=WorkerRole.MIXED,
            num_pages=shape.num_pages,
            max_running_sequences=shape.max_running_sequences,
            context_length=shape.context_length,
            vocab_size=VOCAB_SIZE,
            page_size=shape.page_size,
        )
        registrations = [
            Registration(record, pools.pools[0], lambda reason: None, lambda error: None)
            for pools in self._pools
        ]
        holder = self._index.add_holder(name, epoch)
        identity = PoolIdentity(
            served_model_name=_MODEL,
            model_revision="",
            tokenizer_digest="",
            template_digest="",
            page_size=shape.page_size,
            hash_version=1,
        )
        for placer, registration in zip(self._placers, registrations, strict=True):
            placer.register(registration, identity)
        delays, later = self._delays, self.clock.after
        seat: _Seat

        def on_report(report: Report) -> None:
            later(delays.report, lambda: self._take_report(seat, worker, report))

        def on_events(events: list[CacheEvent]) -> None:
            later(delays.events, lambda: self._take_events(holder, events))

        def on_output(output: StepOutput) -> None:
            later(delays.output, lambda: self._take_output(seat, worker, output))

        worker = SimulatedWorker(
            name,
            epoch,
            shape,
            self.clock,
            on_output=on_output,
            on_report=on_report,
            on_events=on_events,
        )
        seat = _Seat(name, worker, registrations, holder)
        return seat

    def _take_report(self, seat: _Seat, worker: SimulatedWorker, report: Report) -> None:
        if not worker.alive:
            return
        for placer, registration in zip(self._placers, seat.registrations, strict=True):
            placer.report_load(
                registration, reported_load(report), report.admitted_ids, report.ended_ids
            )

    def _take_events(self, holder: Holder, events: list[CacheEvent]) -> None:
        for event in events:
            if isinstance(event, PagesStored):
                self._index.store(holder, GPU, event.parent_hash, event.prefix_hashes)
            elif isinstance(event, PagesRemoved):
                self._index.remove(holder, GPU, event.prefix_hashes)

    def _lose(self, loss: Loss) -> None:
        seat = self._seats[loss.worker]
        seat.worker.kill()
        self.clock.after(self._delays.death, lambda: self._notice(seat, loss))

    def _notice(self, seat: _Seat, loss: Loss) -> None:
        for placer, registration in zip(self._placers, seat.registrations, strict=True):
            placer.unregister(registration)
        self._index.retire(seat.holder)
        jobs, seat.jobs = list(seat.jobs.values()), {}
        for job in jobs:
            self._migrate(job)
        if loss.back_after_s is not None:
            self.clock.after(loss.back_after_s * 1e9, lambda: self._come_back(loss.worker))

    def _come_back(self, index: int) -> None:
        self._seats[index] = self._register(self._seats[index].name)

    def _sweep(self) -> None:
        for placer in self._placers:
            placer.sweep()
        self._index.scrub()
        self.clock.after(_SWEEP_NS, self._sweep)
