"""What sequences produced, kept until their caller has it, and who it goes to.

The engine's step is handed out once: each sequence's `OutputLog` keeps what the step added, and
each sink (a session, or one Generate call) gets the step's columns for its own sequences.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Protocol

from services.worker.engine.messages import (
    Admission,
    Finish,
    LogprobRows,
    Request,
    SequenceError,
    StepOutput,
)
from services.worker.frames import (
    ADMISSION_BYTES,
    BLOCK_BYTES,
    COLUMN_BYTES,
    ID_BYTES,
    FrameBuilder,
    PackedRows,
    block_bytes,
    end_bytes,
    row_bytes,
)
from services.worker.spans import SequenceTrace


class OutputLog:
    """Everything one sequence produced, and how much of its tail is still unsent.

    Kept whole until the caller says that it has the terminal entry, because a resumed call may
    ask for any part again. Log-probabilities of a position never leave after the id at it.
    """

    __slots__ = (
        "admission",
        "admission_unsent",
        "end",
        "end_unsent",
        "handle",
        "ids",
        "key",
        "num_submitted",
        "prompt_len",
        "reservation_id",
        "rows",
        "sink",
        "trace",
        "unsent_ids",
        "unsent_rows",
    )

    def __init__(self, handle: int, sink: Sink, request: Request | None = None) -> None:
        self.handle = handle
        self.sink = sink
        # 0 for a sequence that never reached the engine.
        self.key = 0 if request is None else request.key
        self.prompt_len = 0 if request is None else request.prompt_len
        self.num_submitted = 0 if request is None else len(request.token_ids) - self.prompt_len
        self.reservation_id = 0 if request is None else request.reservation_id
        self.ids = array("I")
        self.rows: list[PackedRows] = []
        self.admission: Admission | None = None
        self.end: Finish | SequenceError | None = None
        # Of a sequence that is recorded.
        self.trace: SequenceTrace | None = None
        self.unsent_ids = 0
        self.unsent_rows = 0
        self.admission_unsent = False
        self.end_unsent = False

    @property
    def next_offset(self) -> int:
        """Output ids so far, submitted ones included."""
        return self.num_submitted + len(self.ids)

    def add_rows(self, rows: LogprobRows) -> None:
        """Keep log-probabilities."""
        if not (self.rows and self.rows[-1].extend(rows)):
            self.rows.append(PackedRows(rows))

    def rewind(self, offset: int) -> bool:
        """Make everything from output id `offset` on unsent; False where that is not ours."""
        if not self.key:
            self.end_unsent = self.end is not None
            return True
        if not self.num_submitted <= offset <= self.next_offset:
            return False
        from_start = offset == self.num_submitted
        position = 0 if from_start else self.prompt_len + offset
        self.unsent_ids = self.next_offset - offset
        self.unsent_rows = sum(
            max(0, rows.stop_position - max(position, rows.start_position)) for rows in self.rows
        )
        self.admission_unsent = from_start and self.admission is not None
        self.end_unsent = self.end is not None
        return True

    def move_into(self, frame: FrameBuilder, share: int) -> bool:
        """Put what is unsent into the frame, in about `share` bytes at most; True if all fits."""
        limit = frame.num_bytes + share
        if self.admission_unsent:
            assert self.admission is not None, "only an admission that came can be unsent"
            frame.add_admission(self.handle, self.admission)
            self.admission_unsent = False
        if self.unsent_rows and not self._move_rows(frame, limit):
            return False
        if self.unsent_ids:
            count = min(self.unsent_ids, (limit - frame.num_bytes - COLUMN_BYTES) // ID_BYTES)
            if count <= 0:
                return False
            start = len(self.ids) - self.unsent_ids
            frame.add_ids(self.handle, self.num_submitted + start, self.ids[start : start + count])
            self.unsent_ids -= count
            if self.unsent_ids:
                return False
        if self.end_unsent:
            assert self.end is not None, "only an end that came can be unsent"
            frame.add_end(self.handle, self.end)
            self.end_unsent = False
        return True

    def _move_rows(self, frame: FrameBuilder, limit: int) -> bool:
        for rows, start in self._unsent_pieces():
            num_rows = len(rows.token_ids) - start
            room = limit - frame.num_bytes - BLOCK_BYTES
            count = min(num_rows, room // row_bytes(rows))
            if count <= 0:
                return False
            frame.add_logprobs(self.handle, rows, start, start + count)
            self.unsent_rows -= count
            if count < num_rows:
                return False
        return True

    def _unsent_pieces(self) -> Iterator[tuple[PackedRows, int]]:
        sent = sum(len(rows.token_ids) for rows in self.rows) - self.unsent_rows
        for rows in self.rows:
            num_rows = len(rows.token_ids)
            if sent < num_rows:
                yield rows, sent
            sent = max(0, sent - num_rows)


class Delivery:
    """One step's additions to one sink's sequences. Columns over `logs` are parallel."""

    __slots__ = (
        "admissions",
        "counts",
        "ends",
        "handles",
        "logprobs",
        "logs",
        "num_extra_bytes",
        "offsets",
        "token_ids",
    )

    def __init__(self) -> None:
        self.logs: list[OutputLog] = []
        self.handles: list[int] = []
        self.offsets: list[int] = []
        self.counts: list[int] = []
        self.token_ids: list[int] = []
        self.admissions: list[OutputLog] = []
        self.logprobs: list[tuple[OutputLog, LogprobRows]] = []
        self.ends: list[OutputLog] = []
        # Bound of everything but the columns on the wire.
        self.num_extra_bytes = 0

    @property
    def num_bytes(self) -> int:
        """Bound of what all of it takes in a frame."""
        columns = COLUMN_BYTES * len(self.handles) + ID_BYTES * len(self.token_ids)
        return columns + self.num_extra_bytes

    def add_ids(self, log: OutputLog, token_ids: list[int]) -> None:
        """New ids of one sequence."""
        self.logs.append(log)
        self.handles.append(log.handle)
        self.offsets.append(log.next_offset)
        self.counts.append(len(token_ids))
        self.token_ids += token_ids
        log.ids.extend(token_ids)

    def add_one_each(self, logs: list[OutputLog], token_ids: list[int]) -> None:
        """One new id of each sequence: a plain decode step, all of it for one sink."""
        self.logs = logs
        self.handles = [log.handle for log in logs]
        self.offsets = [log.num_submitted + len(log.ids) for log in logs]
        self.counts = [1] * len(logs)
        self.token_ids = token_ids
        for log, token_id in zip(logs, token_ids, strict=True):
            log.ids.append(token_id)

    def to_frame(self, step_number: int) -> FrameBuilder:
        """All of it as one frame; the logs' unsent tails stay as they are."""
        frame = FrameBuilder(step_number)
        frame.add_columns(self.handles, self.offsets, self.counts, self.token_ids)
        for log in self.admissions:
            assert log.admission is not None, "listed because it came"
            frame.add_admission(log.handle, log.admission)
        for log, rows in self.logprobs:
            frame.add_logprobs(log.handle, rows, 0, len(rows.token_ids))
        for log in self.ends:
            assert log.end is not None, "listed because it came"
            frame.add_end(log.handle, log.end)
        return frame

    def mark_unsent(self) -> Iterator[OutputLog]:
        """Add all of it to its logs' unsent tails; yields each log at least once."""
        for log, count in zip(self.logs, self.counts, strict=True):
            log.unsent_ids += count
            yield log
        for log in self.admissions:
            log.admission_unsent = True
            yield log
        for log, rows in self.logprobs:
            log.unsent_rows += len(rows.token_ids)
            yield log
        for log in self.ends:
            log.end_unsent = True
            yield log


class Sink(Protocol):
    """Where a sequence's output goes. It takes what it is given and never blocks."""

    def deliver(self, step_number: int, delivery: Delivery) -> None:
        """Take one step's additions; the logs hold them already."""


class _Nobody:
    """The sink of sequences whose caller is gone."""

    def deliver(self, step_number: int, delivery: Delivery) -> None:
        """Drop it."""


NOBODY = _Nobody()


class OutputRouter:
    """The sequences that the engine has, by key, and their sinks.

    A sequence stays here until its one terminal entry came, whoever still wants it.
    """

    def __init__(self) -> None:
        self._live: dict[int, OutputLog] = {}

    def __len__(self) -> int:
        return len(self._live)

    def unanswered_prompt_lens(self) -> list[int]:
        """Of the sequences that have no output yet."""
        return [log.prompt_len + log.num_submitted for log in self._live.values() if not log.ids]

    def add(self, log: OutputLog) -> None:
        """A sequence goes to the engine."""
        self._live[log.key] = log

    def route(self, step: StepOutput) -> list[OutputLog]:
        """Hand the step's output to its sinks; returns the sequences that ended."""
        deliveries: dict[Sink, Delivery] = {}
        self._route_ids(step, deliveries)
        for admission in step.admissions:
            if (log := self._live.get(admission.key)) is not None:
                log.admission = admission
                delivery = _of(deliveries, log.sink)
                delivery.admissions.append(log)
                delivery.num_extra_bytes += ADMISSION_BYTES
        for key, rows in step.logprobs:
            if rows.token_ids and (log := self._live.get(key)) is not None:
                log.add_rows(rows)
                delivery = _of(deliveries, log.sink)
                delivery.logprobs.append((log, rows))
                delivery.num_extra_bytes += block_bytes(rows)
        ended = self._route_ends([*step.finishes, *step.errors], deliveries)
        for sink, delivery in deliveries.items():
            sink.deliver(step.step_number, delivery)
        return ended

    def fail_all(self, step_number: int, code: int, message: str) -> list[OutputLog]:
        """End every sequence with the same error; returns them."""
        deliveries: dict[Sink, Delivery] = {}
        ended = self._route_ends(
            [
                SequenceError(log.key, code, message, log.reservation_id)
                for log in self._live.values()
            ],
            deliveries,
        )
        for sink, delivery in deliveries.items():
            sink.deliver(step_number, delivery)
        return ended

    def _route_ids(self, step: StepOutput, deliveries: dict[Sink, Delivery]) -> None:
        logs = list(map(self._live.get, step.keys))
        known = [log for log in logs if log is not None]
        sinks = {log.sink for log in known}
        plain = len(known) == len(logs) == step.num_tokens.count(1)
        if plain and len(sinks) == 1:
            _of(deliveries, sinks.pop()).add_one_each(known, step.token_ids)
            return
        position = 0
        for log, count in zip(logs, step.num_tokens, strict=True):
            if log is not None:
                token_ids = step.token_ids[position : position + count]
                _of(deliveries, log.sink).add_ids(log, token_ids)
            position += count

    def _route_ends(
        self, ends: list[Finish | SequenceError], deliveries: dict[Sink, Delivery]
    ) -> list[OutputLog]:
        ended = []
        for end in ends:
            log = self._live.pop(end.key, None)
            if log is not None:
                log.end = end
                delivery = _of(deliveries, log.sink)
                delivery.ends.append(log)
                delivery.num_extra_bytes += end_bytes(end)
                ended.append(log)
        return ended


def _of(deliveries: dict[Sink, Delivery], sink: Sink) -> Delivery:
    delivery = deliveries.get(sink)
    if delivery is None:
        delivery = deliveries[sink] = Delivery()
    return delivery
