"""Spans of a request's trace, as services record them; `telemetry` exports them.

Recording is our own because most requests are not recorded, and those must pay nothing: they have
a plain `Span`, whose methods do nothing. Times are Unix nanoseconds.
"""

from __future__ import annotations

import asyncio
import enum
import random
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NamedTuple

from services.common.errors import RhizomeError
from services.common.trace_context import (
    NOT_SAMPLED,
    TraceParent,
    check_tracestate,
    format_traceparent,
    from_metadata,
    parse_traceparent,
)

# What an attribute may hold.
AttributeValue = str | bool | int | float | Sequence[str] | Sequence[float]

_SAMPLED_BITS = 64
_SAMPLED_MASK = (1 << _SAMPLED_BITS) - 1


class SpanKind(enum.Enum):
    """Which side of a call a span is; INTERNAL is no call."""

    INTERNAL = "internal"
    SERVER = "server"
    CLIENT = "client"


class SpanEvent(NamedTuple):
    name: str
    time_ns: int
    attributes: dict[str, AttributeValue]


class Span:
    """A part of a request that nobody records. Children are this span again.

    As a context manager it ends with the block, and fails with it.
    """

    __slots__ = ("traceparent",)

    is_recording = False
    # In hexadecimal, as logs and exemplars have them; empty where nothing is recorded.
    trace_id = ""
    span_id = ""

    def __init__(self, traceparent: str) -> None:
        # What the next service is told.
        self.traceparent = traceparent

    @property
    def log_fields(self) -> dict[str, str] | None:
        """A log call's `extra`: JSON lines then name the trace."""
        return None

    @property
    def exemplar(self) -> dict[str, str] | None:
        """What a histogram keeps beside an observation, so that the trace is found from it."""
        return None

    def child(self, name: str, kind: SpanKind, start_ns: int | None = None) -> Span:
        """A part of this part; starts now where no time is given."""
        return self

    def set(self, **attributes: AttributeValue | None) -> None:
        """Add `rhizome.` attributes; None says nothing."""

    def set_standard(self, attributes: dict[str, AttributeValue]) -> None:
        """Add attributes under the names of OpenTelemetry's conventions."""

    def add_event(
        self, name: str, time_ns: int | None = None, **attributes: AttributeValue
    ) -> None:
        """Something happened, now where no time is given."""

    def fail(self, error: BaseException) -> None:
        """It ends badly."""

    def end(self, end_ns: int | None = None) -> None:
        """It is over and nothing more is said of it. Idempotent."""

    def __enter__(self) -> Span:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        return


NO_SPAN = Span("")
_NOT_SAMPLED_SPAN = Span(NOT_SAMPLED)


class RecordedSpan(Span):
    """A part that is exported when it ends."""

    __slots__ = (
        "attributes",
        "end_ns",
        "error_type",
        "events",
        "failure",
        "kind",
        "name",
        "parent_number",
        "sink",
        "span_number",
        "start_ns",
        "trace_number",
        "tracestate",
    )

    is_recording = True

    def __init__(
        self,
        sink: Callable[[RecordedSpan], None],
        name: str,
        kind: SpanKind,
        trace_number: int,
        parent_number: int,
        tracestate: str,
        start_ns: int | None,
    ) -> None:
        """`parent_number` is 0 for a trace's first span."""
        self.sink = sink
        self.name = name
        self.kind = kind
        self.trace_number = trace_number
        self.span_number = random.getrandbits(64) or 1
        self.parent_number = parent_number
        self.tracestate = tracestate
        self.start_ns = time.time_ns() if start_ns is None else start_ns
        # 0 before its end.
        self.end_ns = 0
        self.attributes: dict[str, AttributeValue] = {}
        self.events: list[SpanEvent] = []
        self.error_type = ""
        self.failure = ""
        super().__init__(format_traceparent(trace_number, self.span_number))

    @property
    def trace_id(self) -> str:  # type: ignore[override]
        return f"{self.trace_number:032x}"

    @property
    def span_id(self) -> str:  # type: ignore[override]
        return f"{self.span_number:016x}"

    @property
    def log_fields(self) -> dict[str, str]:
        return {"trace_id": self.trace_id, "span_id": self.span_id}

    @property
    def exemplar(self) -> dict[str, str]:
        return {"trace_id": self.trace_id}

    def child(self, name: str, kind: SpanKind, start_ns: int | None = None) -> RecordedSpan:
        return RecordedSpan(
            self.sink, name, kind, self.trace_number, self.span_number, self.tracestate, start_ns
        )

    def set(self, **attributes: AttributeValue | None) -> None:
        for name, value in attributes.items():
            if value is not None:
                self.attributes[f"rhizome.{name}"] = value

    def set_standard(self, attributes: dict[str, AttributeValue]) -> None:
        self.attributes.update(attributes)

    def add_event(
        self, name: str, time_ns: int | None = None, **attributes: AttributeValue
    ) -> None:
        at = time.time_ns() if time_ns is None else time_ns
        self.events.append(
            SpanEvent(name, at, {f"rhizome.{key}": value for key, value in attributes.items()})
        )

    def fail(self, error: BaseException) -> None:
        if isinstance(error, asyncio.CancelledError):
            self.error_type, self.failure = "CANCELLED", "nobody waits for it any more"
        elif isinstance(error, RhizomeError):
            self.error_type, self.failure = error.status.name, error.message
        else:
            self.error_type, self.failure = type(error).__name__, str(error)

    def end(self, end_ns: int | None = None) -> None:
        if self.end_ns:
            return
        self.end_ns = time.time_ns() if end_ns is None else end_ns
        if self.error_type:
            self.attributes["error.type"] = self.error_type
        self.sink(self)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            self.fail(error)
        self.end()


class Tracer:
    """Begins the spans of what reaches this service.

    A caller's decision to record stands; where there is none, the share `sample_ratio` of traces
    is recorded, chosen by trace id, so that services with the same share agree.
    """

    def __init__(self, sink: Callable[[RecordedSpan], None] | None, sample_ratio: float) -> None:
        """`sink` takes ended spans and never blocks; without one nothing is recorded."""
        self.is_on = sink is not None
        self._sink = sink
        self._bound = round(sample_ratio * (1 << _SAMPLED_BITS))

    def begin(
        self, name: str, traceparent: str = "", tracestate: str = "", start_ns: int | None = None
    ) -> Span:
        """The first span of a request here; the two texts are the caller's, empty for none."""
        if self._sink is None:
            # Not ours to judge: whoever comes next is told what the caller said.
            if not traceparent or parse_traceparent(traceparent) is None:
                return NO_SPAN
            return Span(traceparent)
        if traceparent == NOT_SAMPLED:
            return _NOT_SAMPLED_SPAN
        parent = parse_traceparent(traceparent) if traceparent else None
        if parent is None:
            trace_number = random.getrandbits(128) or 1
            if trace_number & _SAMPLED_MASK >= self._bound:
                return _NOT_SAMPLED_SPAN
            parent = TraceParent(trace_number, 0, True)
            tracestate = ""
        if not parent.sampled:
            return _NOT_SAMPLED_SPAN
        return RecordedSpan(
            self._sink,
            name,
            SpanKind.SERVER,
            parent.trace_id,
            parent.span_id,
            check_tracestate(tracestate),
            start_ns,
        )

    def begin_call(self, name: str, context: Any, traceparent: str = "") -> Span:
        """The same of a gRPC call: by what its request says, else by its metadata."""
        if self._sink is None:
            return NO_SPAN
        if traceparent:
            return self.begin(name, traceparent)
        return self.begin(name, *from_metadata(context.invocation_metadata()))

    def decline(self) -> Span:
        """Of a request that is not to be recorded by anybody."""
        return NO_SPAN if self._sink is None else _NOT_SAMPLED_SPAN


NO_TRACER = Tracer(None, 0.0)


def unix_ns(monotonic_s: float) -> int:
    """The Unix time of a moment on the monotonic clock, by both clocks as they are now."""
    return time.time_ns() - round((time.monotonic() - monotonic_s) * 1e9)
