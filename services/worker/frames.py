"""The airlock, outward: what the engine did becomes frames of less than 256 KiB.

Sizes are upper bounds of the protobuf encoding, added up while a frame fills, so that no frame
need ever be encoded to learn that it is too large.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Protocol

from rhizome.common.v1 import finish_reason_pb2, logprobs_pb2
from rhizome.worker.v1 import worker_service_pb2 as pb
from services.common.rpc import MAX_FRAME_BYTES
from services.worker.engine.messages import Admission, Finish, LogprobRows, SequenceError

# Leaves room for the message around the frame and for one entry beyond what was reckoned.
FRAME_BYTES = MAX_FRAME_BYTES - 8 * 1024

COLUMN_BYTES = 20
ID_BYTES = 5
ADMISSION_BYTES = 40
END_BYTES = 96
BLOCK_BYTES = 64
_MAX_ERROR_BYTES = 2048

_REASONS = {
    "stop": finish_reason_pb2.FINISH_REASON_STOP,
    "length": finish_reason_pb2.FINISH_REASON_LENGTH,
    "cancelled": finish_reason_pb2.FINISH_REASON_CANCELLED,
}


class Rows(Protocol):
    """Log-probabilities of consecutive positions: `LogprobRows` or `PackedRows`."""

    @property
    def start_position(self) -> int: ...
    @property
    def num_top(self) -> int: ...
    @property
    def token_ids(self) -> Sequence[int]: ...
    @property
    def logprobs(self) -> Sequence[float]: ...
    @property
    def top_token_ids(self) -> Sequence[int]: ...
    @property
    def top_logprobs(self) -> Sequence[float]: ...
    @property
    def requested_logprobs(self) -> Sequence[float]: ...


class PackedRows:
    """Log-probabilities of consecutive positions of one sequence, kept in few bytes.

    Grows at its end; holds at least one row.
    """

    __slots__ = (
        "logprobs",
        "num_top",
        "requested_logprobs",
        "start_position",
        "token_ids",
        "top_logprobs",
        "top_token_ids",
    )

    def __init__(self, rows: LogprobRows) -> None:
        self.start_position = rows.start_position
        self.num_top = rows.num_top
        self.token_ids = array("I", rows.token_ids)
        self.logprobs = array("f", rows.logprobs)
        self.top_token_ids = array("I", rows.top_token_ids)
        self.top_logprobs = array("f", rows.top_logprobs)
        self.requested_logprobs = array("f", rows.requested_logprobs)

    @property
    def stop_position(self) -> int:
        """The position after the last row."""
        return self.start_position + len(self.token_ids)

    def extend(self, rows: LogprobRows) -> bool:
        """Take rows that go on exactly here; False leaves both as they are."""
        if rows.start_position != self.stop_position or rows.num_top != self.num_top:
            return False
        self.token_ids.extend(rows.token_ids)
        self.logprobs.extend(rows.logprobs)
        self.top_token_ids.extend(rows.top_token_ids)
        self.top_logprobs.extend(rows.top_logprobs)
        self.requested_logprobs.extend(rows.requested_logprobs)
        return True


def row_bytes(rows: Rows) -> int:
    """Most bytes that one row takes in a frame."""
    num_requested = len(rows.requested_logprobs) // max(1, len(rows.token_ids))
    return ID_BYTES + 4 + (ID_BYTES + 4) * rows.num_top + 4 * num_requested


def block_bytes(rows: Rows) -> int:
    """Most bytes that all rows take in a frame."""
    return BLOCK_BYTES + row_bytes(rows) * len(rows.token_ids)


class FrameBuilder:
    """One step frame being filled. `num_bytes` bounds what it takes on the wire."""

    __slots__ = ("frame", "num_bytes", "response")

    def __init__(self, step_number: int) -> None:
        self.response = pb.ConnectResponse()
        self.frame = self.response.frame
        self.frame.step_number = step_number
        self.num_bytes = 0

    @property
    def room(self) -> int:
        """Bytes left."""
        return FRAME_BYTES - self.num_bytes

    def add_columns(
        self,
        handles: Sequence[int],
        offsets: Sequence[int],
        counts: Sequence[int],
        token_ids: Sequence[int],
    ) -> None:
        """New ids of many handles."""
        frame = self.frame
        frame.handles.extend(handles)
        frame.token_offsets.extend(offsets)
        frame.num_tokens.extend(counts)
        frame.token_ids.extend(token_ids)
        self.num_bytes += COLUMN_BYTES * len(handles) + ID_BYTES * len(token_ids)

    def add_ids(self, handle: int, offset: int, token_ids: Sequence[int]) -> None:
        """New ids of one handle."""
        frame = self.frame
        frame.handles.append(handle)
        frame.token_offsets.append(offset)
        frame.num_tokens.append(len(token_ids))
        frame.token_ids.extend(token_ids)
        self.num_bytes += COLUMN_BYTES + ID_BYTES * len(token_ids)

    def add_admission(self, handle: int, admission: Admission) -> None:
        """A sequence began to run."""
        self.frame.admissions.append(admission_message(handle, admission))
        self.num_bytes += ADMISSION_BYTES

    def add_logprobs(self, handle: int, rows: Rows, start: int, stop: int) -> None:
        """Rows `start` to `stop` - 1 of one handle."""
        entry = self.frame.logprobs.add()
        entry.handle = handle
        fill_logprobs(entry.block, rows, start, stop)
        self.num_bytes += BLOCK_BYTES + row_bytes(rows) * (stop - start)

    def add_end(self, handle: int, end: Finish | SequenceError) -> None:
        """The handle's one terminal entry."""
        if isinstance(end, Finish):
            self.frame.finishes.append(finish_message(handle, end))
            self.num_bytes += END_BYTES
        else:
            error = self.frame.errors.add()
            error.handle = handle
            error.code = end.code
            error.message = _cut(end.message)
            self.num_bytes += END_BYTES + _MAX_ERROR_BYTES


def end_bytes(end: Finish | SequenceError) -> int:
    """Most bytes that a terminal entry takes in a frame."""
    return END_BYTES if isinstance(end, Finish) else END_BYTES + _MAX_ERROR_BYTES


def admission_message(handle: int, admission: Admission) -> pb.Admission:
    """The admission under its handle."""
    return pb.Admission(
        handle=handle, cached_tokens=admission.cached_tokens, queue_ns=admission.queue_ns
    )


def finish_message(handle: int, finish: Finish) -> pb.SequenceFinish:
    """The finish under its handle."""
    return pb.SequenceFinish(
        handle=handle,
        reason=_REASONS[finish.reason],
        matched_token_id=finish.matched_token_id,
        num_output_tokens=finish.num_output_tokens,
        cached_tokens=finish.cached_tokens,
        queue_ns=finish.queue_ns,
        prefill_ns=finish.prefill_ns,
        decode_ns=finish.decode_ns,
        num_preemptions=finish.num_preemptions,
    )


def fill_logprobs(block: logprobs_pb2.LogprobBlock, rows: Rows, start: int, stop: int) -> None:
    """Put rows `start` to `stop` - 1 into an empty block."""
    top = rows.num_top
    requested = len(rows.requested_logprobs) // max(1, len(rows.token_ids))
    block.start_position = rows.start_position + start
    block.num_top = top
    block.token_ids.extend(rows.token_ids[start:stop])
    block.logprobs.extend(rows.logprobs[start:stop])
    if top:
        block.top_token_ids.extend(rows.top_token_ids[start * top : stop * top])
        block.top_logprobs.extend(rows.top_logprobs[start * top : stop * top])
    if requested:
        block.requested_logprobs.extend(
            rows.requested_logprobs[start * requested : stop * requested]
        )


def _cut(message: str) -> str:
    encoded = message.encode(errors="replace")
    return encoded[:_MAX_ERROR_BYTES].decode(errors="ignore")
