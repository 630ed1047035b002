"""A mock worker's multiplexed sessions: what a gateway has running here, and its frames.

A frame is made when it can be written, from what each sequence has produced since the last one:
a slow reader gets several steps in one frame, and nothing is ever queued for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from rhizome.worker.v1 import worker_service_pb2 as pb
from services.common.errors import (
    OverloadedError,
    PreconditionError,
    RhizomeError,
    SessionBrokenError,
)
from services.common.rpc import MAX_PROTOCOL_REVISION, MIN_PROTOCOL_REVISION
from tests.fakes.mock_engine import CANCELLED, MockEngine, MockSequence, handle_error
from tests.fakes.mock_logprobs import bytes_a_position, first_position, logprob_block

# Room of one frame, and what its parts take at most.
_FRAME_BYTES = 200 * 1024
_ROW_BYTES = 160
_ID_BYTES = 5


class Call:
    """One Connect call's end of a session."""

    def __init__(self) -> None:
        self.wake = asyncio.Event()
        self.failed: asyncio.Future[RhizomeError] = asyncio.get_running_loop().create_future()
        self.heartbeat_due = False
        self.half_closed = False
        # When the write under way began, by the event loop's clock.
        self.write_began: float | None = None

    def fail(self, error: RhizomeError) -> None:
        """End the call with this status. The first reason counts."""
        if not self.failed.done():
            self.failed.set_result(error)


class MockSession:
    """One gateway's sequences by handle, each kept until the gateway closes it.

    `_active` are those that may have something to send. At most one call is attached.
    """

    def __init__(self, engine: MockEngine) -> None:
        self.call: Call | None = None
        self.expiry: asyncio.TimerHandle | None = None
        self._engine = engine
        self._sequences: dict[int, MockSequence] = {}
        self._active: dict[int, MockSequence] = {}
        # Submits whose ids have not all come, and errors of handles that never ran.
        self._partials: dict[int, tuple[pb.Submit, list[int]]] = {}
        self._refusals: dict[int, pb.HandleError] = {}
        self._unsent_refusals: dict[int, None] = {}
        self._last_handle = 0

    def __len__(self) -> int:
        return len(self._sequences) + len(self._partials) + len(self._refusals)

    def wake(self) -> None:
        if self.call is not None:
            self.call.wake.set()

    @property
    def finished(self) -> bool:
        """Whether everything submitted has ended and been sent."""
        return not (self._active or self._partials or self._unsent_refusals)

    def take(self, request: pb.ConnectRequest) -> None:
        """Take one message. Raises SessionBrokenError for a gap."""
        for submit in request.submits:
            if submit.handle > self._last_handle:
                self._last_handle = submit.handle
                self._partials[submit.handle] = (submit, list(submit.token_ids))
                self._start_if_whole(submit.handle)
        for fragment in request.id_fragments:
            self._add_fragment(fragment)
        for handle in request.cancels:
            self._cancel(handle)
        for handle in request.closes:
            self._close(handle)

    def resume(self, handles: list[int], offsets: list[int]) -> list[int]:
        """Go on after what the gateway received; returns the handles that are not here.

        Handles that are not listed are cancelled and forgotten.
        """
        wanted = dict(zip(handles, offsets, strict=True))
        for handle in [*self._sequences, *self._refusals]:
            if handle not in wanted:
                self._close(handle)
        lost = []
        for handle, offset in wanted.items():
            seq = self._sequences.get(handle)
            if handle in self._refusals:
                self._unsent_refusals[handle] = None
            elif seq is None or not seq.first_output <= offset <= seq.num_output:
                lost.append(handle)
                self._close(handle)
            else:
                seq.num_sent = offset
                seq.logprobs_from = first_position(seq, offset)
                seq.admission_due = offset == seq.first_output and seq.start_ns > 0
                seq.terminal_due = seq.ended
                self._active[handle] = seq
        return lost

    def detach(self) -> None:
        """The call is over; sequences go on, submits that are not whole are refused."""
        self.call = None
        for handle in list(self._partials):
            self._refuse(handle, SessionBrokenError("the call broke before all of its ids came"))

    def abandon(self) -> None:
        """Stop and forget everything."""
        for handle in [*self._sequences, *self._partials, *self._refusals]:
            self._close(handle)

    def next_frame(self) -> pb.StepFrame | None:
        """What happened since the last frame; None when nothing did."""
        frame = pb.StepFrame(step_number=self._engine.step_number)
        room = _FRAME_BYTES
        handles: list[int] = []
        offsets: list[int] = []
        counts: list[int] = []
        ids: list[int] = []
        done: list[int] = []
        for handle, seq in self._active.items():
            if room < 2 * _ROW_BYTES:
                # The rest goes into the next frame.
                self.wake()
                break
            if seq.admission_due:
                seq.admission_due = False
                frame.admissions.append(_admission(seq))
                room -= _ROW_BYTES
            num_new = min(seq.num_output - seq.num_sent, (room - _ROW_BYTES) // _ID_BYTES)
            if num_new > 0:
                handles.append(handle)
                offsets.append(seq.num_sent)
                counts.append(num_new)
                ids += self._engine.cycle.output(seq.phase, seq.num_sent, seq.num_sent + num_new)
                seq.num_sent += num_new
                room -= _ROW_BYTES + _ID_BYTES * num_new
            if seq.logprobs_from is not None:
                room -= self._add_logprobs(frame, seq, room)
            if seq.terminal_due and self._add_terminal(frame, seq):
                room -= _ROW_BYTES + (0 if seq.error is None else len(seq.error.message))
                done.append(handle)
        for handle in done:
            del self._active[handle]
        for handle in self._unsent_refusals:
            frame.errors.append(self._refusals[handle])
        self._unsent_refusals.clear()
        frame.handles.extend(handles)
        frame.token_offsets.extend(offsets)
        frame.num_tokens.extend(counts)
        frame.token_ids.extend(ids)
        empty = not (handles or done or frame.admissions or frame.logprobs or frame.errors)
        return None if empty else frame

    def _add_logprobs(self, frame: pb.StepFrame, seq: MockSequence, room: int) -> int:
        """Append what fits of a sequence's log-probabilities; returns the bytes taken."""
        assert seq.logprobs_from is not None, "only sequences that report"
        start, each = seq.logprobs_from, bytes_a_position(seq)
        end = min(seq.logprobs_to, start + max(0, room - _ROW_BYTES) // each)
        if start < seq.prompt_len:
            end = min(end, seq.prompt_len)
        if end > start:
            block = logprob_block(seq, self._engine.cycle, self._engine.vocab_size, start, end)
            frame.logprobs.append(pb.HandleLogprobs(handle=seq.handle, block=block))
            seq.logprobs_from = end
        if seq.logprobs_from < seq.logprobs_to:
            self.wake()
        return max(0, end - start) * each

    def _add_terminal(self, frame: pb.StepFrame, seq: MockSequence) -> bool:
        """Append how a sequence ended, once everything before it was sent."""
        if seq.num_sent < seq.num_output:
            return False
        if seq.logprobs_from is not None and seq.logprobs_from < seq.logprobs_to:
            return False
        if seq.finish is not None:
            frame.finishes.append(seq.finish)
        elif seq.error is not None:
            frame.errors.append(seq.error)
        seq.terminal_due = False
        return True

    def _add_fragment(self, fragment: pb.IdFragment) -> None:
        if fragment.handle > self._last_handle:
            raise SessionBrokenError(f"ids of handle {fragment.handle} came before its submit")
        if fragment.handle not in self._partials:
            return
        _, ids = self._partials[fragment.handle]
        if fragment.offset > len(ids):
            raise SessionBrokenError(
                f"ids of handle {fragment.handle} go on at {fragment.offset}, expected {len(ids)}"
            )
        ids.extend(fragment.token_ids[len(ids) - fragment.offset :])
        self._start_if_whole(fragment.handle)

    def _start_if_whole(self, handle: int) -> None:
        submit, ids = self._partials[handle]
        if len(ids) < submit.num_token_ids:
            return
        del self._partials[handle]
        try:
            seq = self._engine.submit(submit, ids, handle, self)
        except RhizomeError as error:
            self._refuse(handle, error)
            return
        seq.logprobs_from = first_position(seq, seq.first_output)
        self._sequences[handle] = self._active[handle] = seq

    def _refuse(self, handle: int, error: RhizomeError) -> None:
        self._partials.pop(handle, None)
        self._refusals[handle] = handle_error(handle, error)
        self._unsent_refusals[handle] = None
        self.wake()

    def _cancel(self, handle: int) -> None:
        if handle in self._sequences:
            self._engine.cancel(self._sequences[handle])
        elif handle in self._partials:
            submit, _ = self._partials.pop(handle)
            seq = MockSequence(submit, handle, self)
            seq.finish = pb.SequenceFinish(
                handle=handle, reason=CANCELLED, num_output_tokens=seq.num_output
            )
            seq.terminal_due = True
            self._sequences[handle] = self._active[handle] = seq
            self.wake()

    def _close(self, handle: int) -> None:
        self._partials.pop(handle, None)
        self._refusals.pop(handle, None)
        self._unsent_refusals.pop(handle, None)
        self._active.pop(handle, None)
        seq = self._sequences.pop(handle, None)
        if seq is not None:
            self._engine.cancel(seq)


class MockSessions:
    """All sessions by (gateway, session id).

    One without a call lives for `hold_s` more; one whose reader made no progress for `stall_s`
    ends at once.
    """

    def __init__(
        self,
        engine: MockEngine,
        epoch: int,
        heartbeat: Callable[[], pb.Heartbeat],
        hold_s: float,
        stall_s: float,
    ) -> None:
        self._engine = engine
        self._epoch = epoch
        self.heartbeat = heartbeat
        self._hold_s = hold_s
        self._stall_s = stall_s
        self._sessions: dict[tuple[str, str], MockSession] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def num_handles(self) -> int:
        return sum(len(session) for session in self._sessions.values())

    @property
    def num_calls(self) -> int:
        return sum(session.call is not None for session in self._sessions.values())

    def open(self, opening: pb.OpenSession, call: Call) -> tuple[MockSession, pb.SessionOpened]:
        """Attach a call to its session, new or resumed. Raises PreconditionError."""
        if opening.epoch not in (0, self._epoch):
            raise PreconditionError(f"this worker's epoch is {self._epoch:#x}")
        low = max(MIN_PROTOCOL_REVISION, opening.protocol.min_revision)
        high = min(MAX_PROTOCOL_REVISION, opening.protocol.max_revision)
        if low > high:
            raise PreconditionError("no protocol revision in common")
        name = (opening.gateway_id, opening.session_id)
        session = self._sessions.get(name)
        opened = pb.SessionOpened(epoch=self._epoch, protocol_revision=high)
        if session is not None:
            if session.call is not None:
                session.call.fail(SessionBrokenError("another call took the session over"))
                session.detach()
            if session.expiry is not None:
                session.expiry.cancel()
        if session is not None and opening.resume:
            lost = session.resume(list(opening.resume_handles), list(opening.resume_offsets))
            opened.resumed = True
            opened.lost_handles.extend(lost)
        else:
            if session is not None:
                session.abandon()
            session = self._sessions[name] = MockSession(self._engine)
        session.call = call
        call.wake.set()
        return session, opened

    def leave(self, session: MockSession, call: Call) -> None:
        """The call is over; hold its session for a resume unless there is nothing to resume."""
        if session.call is not call:
            return
        session.detach()
        stalled = call.failed.done() and isinstance(call.failed.result(), OverloadedError)
        hold_s = 0.0 if stalled else self._hold_s
        session.expiry = asyncio.get_running_loop().call_later(hold_s, self._expire, session)

    def drop_connections(self, error: RhizomeError) -> None:
        """End every call, as a broken network would; sessions can be resumed."""
        for session in self._sessions.values():
            if session.call is not None:
                session.call.fail(error)

    def beat(self) -> None:
        """Send a heartbeat on every call; end those whose reader makes no progress."""
        now = asyncio.get_running_loop().time()
        for session in self._sessions.values():
            if (call := session.call) is None:
                continue
            if call.write_began is not None and now - call.write_began > self._stall_s:
                call.fail(OverloadedError("the reader made no progress"))
            call.heartbeat_due = True
            call.wake.set()

    def close(self) -> None:
        """Forget everything and cancel the timers."""
        for session in self._sessions.values():
            if session.expiry is not None:
                session.expiry.cancel()
            session.abandon()
        self._sessions.clear()

    def _expire(self, session: MockSession) -> None:
        session.abandon()
        self._sessions = {
            name: other for name, other in self._sessions.items() if other is not session
        }


def _admission(seq: MockSequence) -> pb.Admission:
    return pb.Admission(
        handle=seq.handle,
        cached_tokens=min(seq.cached_tokens, seq.prompt_len),
        queue_ns=seq.start_ns - seq.arrival_ns,
    )
