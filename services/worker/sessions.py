"""Gateways' multiplexed sessions: handles, merging for slow readers, resume.

A session outlives its calls by the hold time, so that a gateway whose connection broke can go on.
The engine's output goes into each handle's log at once and from there, in frames of less than
256 KiB, to the call that is attached: a step's columns straight into one frame while the reader
keeps up, otherwise merged by handle, so memory is bounded by what the sequences produced.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from rhizome.worker.v1 import worker_service_pb2 as pb
from services.common.errors import InvalidRequestError, RhizomeError, SessionBrokenError
from services.worker.engine.messages import Finish, SequenceError
from services.worker.frames import FRAME_BYTES, FrameBuilder
from services.worker.outputs import Delivery, OutputLog, Sink

# Least room a handle gets in a frame; more than its largest indivisible piece.
_MIN_SHARE = 4096


class Sequences(Protocol):
    """What a session needs of the replica."""

    def check_lengths(self, submit: pb.Submit) -> None:
        """Refuse a submit that cannot be taken, before all of its ids came."""

    def submit(self, submit: pb.Submit, token_ids: list[int], handle: int, sink: Sink) -> OutputLog:
        """Send one sequence to the engine."""

    def cancel(self, logs: list[OutputLog]) -> None:
        """Stop sequences; their terminal entries follow."""

    def abandon(self, logs: list[OutputLog]) -> None:
        """Stop sequences whose output nobody wants any more."""


@dataclass(slots=True)
class _Partial:
    """A submit whose ids have not all come."""

    submit: pb.Submit
    token_ids: array[int]


class Call:
    """The state of one Connect call's writer. `failed` resolves with why the call must end."""

    def __init__(self, opened: pb.SessionOpened) -> None:
        self.wake = asyncio.Event()
        self.wake.set()
        self.failed: asyncio.Future[RhizomeError] = asyncio.Future()
        # Written before anything else.
        self.opened: pb.SessionOpened | None = opened
        # A step's frame made straight from its columns.
        self.frame: FrameBuilder | None = None
        self.heartbeat_due = False
        # No more requests will come; the call ends with its last handle.
        self.half_closed = False
        # When the write under way began.
        self.write_began: float | None = None

    def fail(self, error: RhizomeError) -> None:
        """End the call with this status. The first reason counts."""
        if not self.failed.done():
            self.failed.set_result(error)


class Session:
    """One gateway's sequences on this worker, by handle.

    Handles only increase. Each handle's log stays until the gateway closes it, and gets exactly
    one terminal entry. At most one call is attached; without one, output only gathers in the logs.
    """

    def __init__(
        self, name: tuple[str, str], sequences: Sequences, heartbeat: Callable[[], pb.Heartbeat]
    ) -> None:
        self.name = name
        self.call: Call | None = None
        self._sequences = sequences
        self._heartbeat = heartbeat
        self._logs: dict[int, OutputLog] = {}
        self._partials: dict[int, _Partial] = {}
        self._last_handle = -1
        # Handles with something unsent, in the order they are served.
        self._unsent: dict[int, OutputLog] = {}
        self._step_number = 0

    def __len__(self) -> int:
        return len(self._logs) + len(self._partials)

    @property
    def has_unsent(self) -> bool:
        """Whether the attached call still has output to write."""
        call = self.call
        if call is None:
            return False
        return bool(self._unsent) or call.frame is not None or call.write_began is not None

    def attach(self, call: Call) -> None:
        """Go on with this call."""
        assert self.call is None, "the earlier call was detached"
        self.call = call

    def take_over(self) -> None:
        """End the call that is attached, if there is one: its gateway has opened another."""
        if (call := self.call) is not None:
            self.detach(call)
            call.fail(SessionBrokenError("another call took the session over"))

    def detach(self, call: Call) -> bool:
        """The call is over; False when another one has taken the session over."""
        if self.call is not call:
            return False
        self.call = None
        for handle in list(self._partials):
            self._refuse(handle, SessionBrokenError("the call broke before all of its ids came"))
        self._unsent.clear()
        return True

    def abandon(self) -> None:
        """Free everything: the session is over."""
        self._sequences.abandon(list(self._logs.values()))
        self._logs.clear()
        self._partials.clear()
        self._unsent.clear()

    def resume(self, handles: list[int], offsets: list[int]) -> list[int]:
        """Make everything after the offsets unsent; returns the handles that are not here.

        Handles that are not listed are cancelled and forgotten.
        """
        lost = []
        kept: dict[int, OutputLog] = {}
        self._unsent.clear()
        for handle, offset in zip(handles, offsets, strict=True):
            log = self._logs.get(handle)
            if log is None or not log.rewind(offset):
                lost.append(handle)
                continue
            kept[handle] = log
            self._unsent[handle] = log
        unwanted = [log for handle, log in self._logs.items() if handle not in kept]
        self._sequences.abandon(unwanted)
        self._logs = kept
        return lost

    def handle(self, request: pb.ConnectRequest) -> None:
        """Take one message. Raises what ends the session."""
        for submit in request.submits:
            self._submit(submit)
        for fragment in request.id_fragments:
            self._add_fragment(fragment)
        if request.cancels:
            self._cancel(request.cancels)
        for handle in request.closes:
            self._close(handle)

    def deliver(self, step_number: int, delivery: Delivery) -> None:
        """Take one step's output of this session's sequences."""
        self._step_number = step_number
        call = self.call
        if call is None:
            return
        if call.frame is None and not self._unsent and delivery.num_bytes <= FRAME_BYTES:
            call.frame = delivery.to_frame(step_number)
        else:
            for log in delivery.mark_unsent():
                self._unsent[log.handle] = log
        call.wake.set()

    def next_message(self, call: Call) -> pb.ConnectResponse | None:
        """What to write now; None when there is nothing."""
        if self.call is not call:
            return None
        if call.opened is not None:
            response = pb.ConnectResponse(opened=call.opened)
            call.opened = None
            return response
        if call.heartbeat_due:
            call.heartbeat_due = False
            return pb.ConnectResponse(heartbeat=self._heartbeat())
        if call.frame is not None:
            frame, call.frame = call.frame, None
            return frame.response
        if self._unsent:
            return self._merged_frame()
        return None

    def finished(self, call: Call) -> bool:
        """Whether the gateway said all it will and got everything."""
        if not call.half_closed or self._unsent or self._partials or call.frame is not None:
            return False
        return all(log.end is not None for log in self._logs.values())

    def _merged_frame(self) -> pb.ConnectResponse:
        frame = FrameBuilder(self._step_number)
        share = max(_MIN_SHARE, frame.room // len(self._unsent))
        for handle in list(self._unsent):
            if frame.room < _MIN_SHARE:
                break
            log = self._unsent.pop(handle)
            if not log.move_into(frame, min(share, frame.room)):
                # Behind the others, so that one long answer delays nobody by more than a frame.
                self._unsent[handle] = log
        return frame.response

    def _submit(self, submit: pb.Submit) -> None:
        handle = submit.handle
        if handle <= self._last_handle:
            return
        self._last_handle = handle
        try:
            self._sequences.check_lengths(submit)
        except RhizomeError as error:
            self._refuse(handle, error)
            return
        partial = _Partial(submit, array("I", submit.token_ids))
        self._partials[handle] = partial
        self._start_if_whole(handle, partial)

    def _add_fragment(self, fragment: pb.IdFragment) -> None:
        partial = self._partials.get(fragment.handle)
        if partial is None:
            if fragment.handle > self._last_handle:
                raise SessionBrokenError(f"ids of handle {fragment.handle} came before its submit")
            return
        have = len(partial.token_ids)
        if fragment.offset > have:
            raise SessionBrokenError(
                f"ids of handle {fragment.handle} go on at {fragment.offset}, expected {have}"
            )
        partial.token_ids.extend(fragment.token_ids[have - fragment.offset :])
        self._start_if_whole(fragment.handle, partial)

    def _start_if_whole(self, handle: int, partial: _Partial) -> None:
        if len(partial.token_ids) < partial.submit.num_token_ids:
            return
        del self._partials[handle]
        try:
            self._logs[handle] = self._sequences.submit(
                partial.submit, partial.token_ids.tolist(), handle, self
            )
        except RhizomeError as error:
            self._refuse(handle, error)

    def _cancel(self, handles: Iterable[int]) -> None:
        logs = []
        for handle in handles:
            if (log := self._logs.get(handle)) is not None:
                logs.append(log)
            elif (partial := self._partials.get(handle)) is not None:
                submit = partial.submit
                self._end(handle, _cancelled(submit.num_token_ids - submit.prompt_len))
        self._sequences.cancel(logs)

    def _close(self, handle: int) -> None:
        self._partials.pop(handle, None)
        self._unsent.pop(handle, None)
        log = self._logs.pop(handle, None)
        if log is not None:
            self._sequences.abandon([log])

    def _refuse(self, handle: int, error: RhizomeError) -> None:
        self._end(handle, SequenceError(0, error.code, error.message, 0))

    def _end(self, handle: int, end: Finish | SequenceError) -> None:
        """End a handle that never reached the engine."""
        self._partials.pop(handle, None)
        log = OutputLog(handle, self)
        log.end = end
        log.end_unsent = True
        self._logs[handle] = log
        self._unsent[handle] = log
        if self.call is not None:
            self.call.wake.set()


def check_open(request: pb.ConnectRequest) -> pb.OpenSession:
    """The first message's `open`. Raises InvalidRequestError."""
    if not request.HasField("open"):
        raise InvalidRequestError("the first message of a session must carry `open`", "open")
    opening = request.open
    if not opening.session_id:
        raise InvalidRequestError("session_id must not be empty", "open.session_id")
    if len(opening.resume_handles) != len(opening.resume_offsets):
        raise InvalidRequestError(
            f"{len(opening.resume_handles)} resume_handles and "
            f"{len(opening.resume_offsets)} resume_offsets",
            "open.resume_offsets",
        )
    return opening


def _cancelled(num_output_tokens: int) -> Finish:
    return Finish(
        key=0,
        reason="cancelled",
        matched_token_id=None,
        num_output_tokens=num_output_tokens,
        cached_tokens=0,
        queue_ns=0,
        prefill_ns=0,
        decode_ns=0,
        num_preemptions=0,
        reservation_id=0,
    )
