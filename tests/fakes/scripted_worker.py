"""A worker that says what a test tells it to: real WorkerService, real registration, no model.

Every sequence's output is a function of its prompt alone, so a continuation elsewhere goes on with
the same ids. Faults are methods: drop the streams, lose the sequences, fail handles.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from grpc import aio

from rhizome.common.v1.finish_reason_pb2 import (
    FINISH_REASON_CANCELLED,
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
)
from rhizome.common.v1.logprobs_pb2 import LogprobBlock
from rhizome.common.v1.pool_identity_pb2 import PoolIdentity, ProtocolRange
from rhizome.common.v1.worker_role_pb2 import WORKER_ROLE_MIXED
from rhizome.scheduler.v1.scheduler_service_pb2 import (
    LoadReport,
    RegisterWorkerRequest,
    WorkerDescription,
)
from rhizome.scheduler.v1.scheduler_service_pb2_grpc import SchedulerServiceStub
from rhizome.worker.v1 import worker_service_pb2 as pb
from rhizome.worker.v1.worker_service_pb2_grpc import (
    WorkerServiceServicer,
    add_WorkerServiceServicer_to_server,
)
from services.common.rpc import open_channel, running_server

CONTEXT_LENGTH = 512
PAGE_SIZE = 16


@dataclass
class RunningSequence:
    submit: pb.Submit
    prompt: list[int]
    output: list[int]
    answer: list[int]
    admitted: bool = False
    cancelled: bool = False
    terminal: pb.StepFrame | None = None


@dataclass
class Session:
    sequences: dict[int, RunningSequence] = field(default_factory=dict)
    fragments: dict[int, list[int]] = field(default_factory=dict)
    # Output ids the gateway has been sent, by handle.
    sent: dict[int, int] = field(default_factory=dict)


class ScriptedWorker(WorkerServiceServicer):
    """`answer` maps a prompt's ids to output ids, end-of-sequence id included."""

    def __init__(
        self,
        worker_id: str,
        identity: PoolIdentity,
        answer: Callable[[Sequence[int]], list[int]],
        eos_ids: Sequence[int],
        vocab_size: int,
        *,
        step_s: float = 0.002,
    ) -> None:
        self.worker_id = worker_id
        self.identity = identity
        self.answer = answer
        self.eos_ids = set(eos_ids)
        self.vocab_size = vocab_size
        self.step_s = step_s
        self.epoch = secrets.randbits(63) | 1
        self.address = ""
        self.sessions: dict[str, Session] = {}
        self.submits: list[pb.Submit] = []
        self.num_cancels = 0
        self.num_flushes = 0
        self.cached_tokens = 0
        # Sequences it claims to run beside the real ones.
        self.num_claimed = 0
        # Fail each sequence with (code, message) once it has this many output ids.
        self.fail_at: tuple[int, int, str] | None = None
        # Break every stream once any sequence has this many output ids.
        self.break_at: int | None = None
        # Send one frame whose arrays do not fit together at that point instead.
        self.garble_at: int | None = None
        # Crash once a sequence whose prompt has this id has this many output ids.
        self.poison: tuple[int, int] | None = None
        self.num_crashes = 0
        # Make no steps, behind a live front.
        self.hangs = False
        # Say nothing more on a stream once any sequence has this many output ids.
        self.mute_at: int | None = None
        # Say nothing on any stream, not even on new ones.
        self.stands_still = False
        self.forget_on_break = False
        self.paused = False
        self._broken = asyncio.Event()

    @property
    def num_live(self) -> int:
        """Sequences the gateway has not closed."""
        return sum(len(session.sequences) for session in self.sessions.values())

    def crash(self) -> None:
        """End as a process does, and be back under a new epoch at once."""
        self.num_crashes += 1
        self.epoch = secrets.randbits(63) | 1
        self.sessions.clear()
        self.break_streams()

    def break_streams(self) -> None:
        if self.forget_on_break:
            self.sessions.clear()
        self._broken.set()
        self._broken = asyncio.Event()

    async def Connect(self, request_iterator: Any, context: aio.ServicerContext[Any, Any]) -> None:
        while self.stands_still:
            await asyncio.sleep(self.step_s)
        first = await context.read()
        opened = first.open
        if opened.epoch not in (0, self.epoch):
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "another epoch")
        known = opened.session_id in self.sessions
        session = self.sessions.setdefault(opened.session_id, Session())
        lost = []
        if opened.resume:
            wanted = dict(zip(opened.resume_handles, opened.resume_offsets, strict=True))
            for handle, offset in wanted.items():
                if handle in session.sequences:
                    session.sent[handle] = offset
                else:
                    lost.append(handle)
            for handle in set(session.sequences) - set(wanted):
                session.sequences[handle].cancelled = True
        await context.write(
            pb.ConnectResponse(
                opened=pb.SessionOpened(
                    epoch=self.epoch,
                    protocol_revision=1,
                    resumed=opened.resume and known,
                    lost_handles=lost,
                )
            )
        )
        self._take(session, first)
        tasks = [
            asyncio.create_task(self._step_for_ever(session, context)),
            asyncio.create_task(self._read_for_ever(session, context)),
            asyncio.create_task(self._broken.wait()),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await context.abort(grpc.StatusCode.UNAVAILABLE, "the stream broke")

    async def _read_for_ever(
        self, session: Session, context: aio.ServicerContext[Any, Any]
    ) -> None:
        while (request := await context.read()) is not aio.EOF:
            self._take(session, request)

    def _take(self, session: Session, request: pb.ConnectRequest) -> None:
        for submit in request.submits:
            self.submits.append(submit)
            ids = list(submit.token_ids)
            session.fragments[submit.handle] = ids
            self._start(session, submit)
        for fragment in request.id_fragments:
            ids = session.fragments[fragment.handle]
            assert fragment.offset == len(ids), "fragments come without a gap"
            ids.extend(fragment.token_ids)
            submit = next(s for s in reversed(self.submits) if s.handle == fragment.handle)
            self._start(session, submit)
        for handle in request.cancels:
            self.num_cancels += 1
            if handle in session.sequences:
                session.sequences[handle].cancelled = True
        for handle in request.closes:
            session.sequences.pop(handle, None)
            session.sent.pop(handle, None)

    def _start(self, session: Session, submit: pb.Submit) -> None:
        ids = session.fragments[submit.handle]
        if len(ids) < submit.num_token_ids:
            return
        del session.fragments[submit.handle]
        prompt, output = ids[: submit.prompt_len], ids[submit.prompt_len :]
        session.sequences[submit.handle] = RunningSequence(
            submit, prompt, output, self.answer(prompt)
        )
        session.sent[submit.handle] = len(output)

    async def _step_for_ever(
        self, session: Session, context: aio.ServicerContext[Any, Any]
    ) -> None:
        step = 0
        while True:
            await asyncio.sleep(self.step_s)
            if self.stands_still:
                continue
            step += not self.hangs
            if not self.paused and not self.hangs:
                frame = self._step(session, step)
                longest = max((len(s.output) for s in session.sequences.values()), default=0)
                if self.garble_at is not None and longest >= self.garble_at:
                    self.garble_at = None
                    del frame.num_tokens[:]
                if frame.ByteSize() > 4:
                    await context.write(pb.ConnectResponse(frame=frame))
                if self._is_poisoned(session):
                    self.crash()
                    return
                if self.mute_at is not None and longest >= self.mute_at:
                    self.mute_at = None
                    await asyncio.Event().wait()
                if self.break_at is not None and longest >= self.break_at:
                    self.break_at = None
                    self.break_streams()
            if step % 20 == 0 or self.hangs:
                beat = pb.Heartbeat(engine_step_number=step, engine_busy=not self.paused)
                await context.write(pb.ConnectResponse(heartbeat=beat))

    def _is_poisoned(self, session: Session) -> bool:
        if self.poison is None:
            return False
        poison_id, num_output = self.poison
        return any(
            poison_id in sequence.prompt and len(sequence.output) >= num_output
            for sequence in session.sequences.values()
        )

    def _step(self, session: Session, step: int) -> pb.StepFrame:
        frame = pb.StepFrame(step_number=step)
        for handle, sequence in session.sequences.items():
            if sequence.terminal is None:
                self._advance(handle, sequence)
            sent = session.sent[handle]
            new = sequence.output[sent:]
            if not sequence.admitted:
                sequence.admitted = True
                frame.admissions.add(handle=handle, cached_tokens=self.cached_tokens, queue_ns=1000)
                frame.logprobs.extend(_prompt_logprobs(handle, sequence))
            if new:
                frame.handles.append(handle)
                frame.token_offsets.append(sent)
                frame.num_tokens.append(len(new))
                frame.token_ids.extend(new)
                session.sent[handle] = sent + len(new)
                frame.logprobs.extend(_output_logprobs(handle, sequence, sent, new))
            if sequence.terminal is not None:
                frame.MergeFrom(sequence.terminal)
        return frame

    def _advance(self, handle: int, sequence: RunningSequence) -> None:
        sampling, done = sequence.submit.sampling, len(sequence.output)
        end: dict[str, Any] | None = None
        if self.fail_at is not None and done >= self.fail_at[0]:
            sequence.terminal = pb.StepFrame()
            sequence.terminal.errors.add(
                handle=handle, code=self.fail_at[1], message=self.fail_at[2]
            )
            return
        if sequence.cancelled:
            end = {"reason": FINISH_REASON_CANCELLED}
        elif done >= sampling.max_new_tokens:
            end = {"reason": FINISH_REASON_LENGTH}
        else:
            token = sequence.answer[done % len(sequence.answer)]
            sequence.output.append(token)
            stops = set(sampling.stop_token_ids)
            if not sampling.ignore_eos:
                stops |= self.eos_ids
            if token in stops and done >= sampling.min_new_tokens:
                end = {"reason": FINISH_REASON_STOP, "matched_token_id": token}
            elif done + 1 >= sampling.max_new_tokens:
                end = {"reason": FINISH_REASON_LENGTH}
        if end is not None:
            sequence.terminal = pb.StepFrame()
            sequence.terminal.finishes.add(
                handle=handle,
                num_output_tokens=len(sequence.output),
                cached_tokens=self.cached_tokens,
                **end,
            )

    async def GetWorkerInfo(
        self, request: pb.GetWorkerInfoRequest, context: Any
    ) -> pb.GetWorkerInfoResponse:
        return pb.GetWorkerInfoResponse(
            worker_id=self.worker_id,
            epoch=self.epoch,
            identity=self.identity,
            model_path="/models/scripted",
            context_length=CONTEXT_LENGTH,
            vocab_size=self.vocab_size,
            num_pages=1000,
            max_running_sequences=256,
            tp_size=1,
        )

    async def FlushCache(
        self, request: pb.FlushCacheRequest, context: Any
    ) -> pb.FlushCacheResponse:
        self.num_flushes += 1
        return pb.FlushCacheResponse(num_freed_pages=7)

    async def _unused(self, request: Any, context: Any) -> Any:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "not scripted")

    Generate = Embed = WatchCacheEvents = _unused  # type: ignore[assignment]
    StartProfile = StopProfile = TransferPages = _unused  # type: ignore[assignment]


@contextlib.asynccontextmanager
async def running_worker(worker: ScriptedWorker, scheduler: str) -> AsyncIterator[ScriptedWorker]:
    """Serve on a free port, registered with `scheduler`."""
    async with running_server(
        lambda server: add_WorkerServiceServicer_to_server(worker, server),
        [pb.DESCRIPTOR.services_by_name["WorkerService"]],
        "localhost:0",
        grace_s=0.1,
    ) as server:
        worker.address = f"localhost:{server.port}"
        registration = asyncio.create_task(_stay_registered(worker, scheduler))
        try:
            yield worker
        finally:
            registration.cancel()
            await asyncio.gather(registration, return_exceptions=True)


async def _stay_registered(worker: ScriptedWorker, scheduler: str) -> None:
    async with open_channel(scheduler) as channel:
        while True:
            with contextlib.suppress(aio.AioRpcError, asyncio.InvalidStateError):
                await _register(worker, SchedulerServiceStub(channel).RegisterWorker())
            await asyncio.sleep(0.1)


async def _register(worker: ScriptedWorker, call: Any) -> None:
    await call.write(
        RegisterWorkerRequest(
            description=WorkerDescription(
                worker_id=worker.worker_id,
                address=worker.address,
                epoch=worker.epoch,
                identity=worker.identity,
                protocol=ProtocolRange(min_revision=1, max_revision=1),
                role=WORKER_ROLE_MIXED,
                num_pages=1000,
                max_running_sequences=256,
                context_length=CONTEXT_LENGTH,
                tp_size=1,
                vocab_size=worker.vocab_size,
            )
        )
    )
    answer = await call.read()
    assert answer.HasField("accepted"), answer
    number, step_number, epoch = 0, 0, worker.epoch
    while worker.epoch == epoch:
        number += 1
        step_number += not worker.hangs
        live = {
            sequence.submit.reservation_id
            for session in worker.sessions.values()
            for sequence in session.sequences.values()
        }
        seen = [submit.reservation_id for submit in worker.submits if submit.reservation_id]
        await call.write(
            RegisterWorkerRequest(
                load=LoadReport(
                    sequence_number=number,
                    num_running=worker.num_live + worker.num_claimed,
                    num_free_pages=1000,
                    engine_step_number=step_number,
                    engine_busy=worker.hangs or worker.num_live > 0,
                    admitted_reservation_ids=seen,
                    ended_reservation_ids=[each for each in seen if each not in live],
                )
            )
        )
        await asyncio.sleep(0.1)


def logprob_of(token_id: int) -> float:
    return -(token_id % 64) / 8


def _block(sequence: RunningSequence, start: int, ids: Sequence[int]) -> LogprobBlock:
    options = sequence.submit.logprobs
    block = LogprobBlock(start_position=start, token_ids=ids, num_top=options.num_top)
    for offset, token_id in enumerate(ids):
        known = start + offset > 0
        block.logprobs.append(logprob_of(token_id) if known else math.nan)
        for rank in range(options.num_top):
            block.top_token_ids.append(token_id + rank)
            block.top_logprobs.append(logprob_of(token_id) - rank if known else math.nan)
        for wanted in options.token_ids:
            block.requested_logprobs.append(logprob_of(wanted) if known else math.nan)
    return block


def _prompt_logprobs(handle: int, sequence: RunningSequence) -> list[pb.HandleLogprobs]:
    options = sequence.submit.logprobs
    if not options.HasField("prompt_start"):
        return []
    ids = sequence.prompt[options.prompt_start :]
    # In two pieces, as long ones are.
    half = len(ids) // 2
    parts = [(0, ids[:half]), (half, ids[half:])]
    return [
        pb.HandleLogprobs(
            handle=handle, block=_block(sequence, options.prompt_start + offset, part)
        )
        for offset, part in parts
        if part
    ]


def _output_logprobs(
    handle: int, sequence: RunningSequence, offset: int, ids: Sequence[int]
) -> list[pb.HandleLogprobs]:
    if not sequence.submit.logprobs.output:
        return []
    start = len(sequence.prompt) + offset
    return [pb.HandleLogprobs(handle=handle, block=_block(sequence, start, ids))]
