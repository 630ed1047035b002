"""W3C Trace Context, level 1: how a trace's identity travels in headers, metadata and messages."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

TRACEPARENT = "traceparent"
TRACESTATE = "tracestate"
# Says only that nobody records the request; its ids belong to no trace.
NOT_SAMPLED = f"00-{1:032x}-{1:016x}-00"

_SAMPLED_FLAG = 1
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
# Longer ones need not be passed on.
_MAX_TRACESTATE_LEN = 512


class TraceParent(NamedTuple):
    """The caller's span, and whether its trace is recorded."""

    trace_id: int
    span_id: int
    sampled: bool


def parse_traceparent(text: str) -> TraceParent | None:
    """None for what the specification says to ignore."""
    match = _TRACEPARENT.fullmatch(text)
    if match is None:
        return None
    version, trace_id, span_id, flags, rest = match.groups()
    # Versions after 00 may go on behind the flags; ff is no version.
    if version == "ff" or (version == "00" and rest):
        return None
    parent = TraceParent(int(trace_id, 16), int(span_id, 16), bool(int(flags, 16) & _SAMPLED_FLAG))
    return parent if parent.trace_id and parent.span_id else None


def from_metadata(metadata: Iterable[tuple[str, Any]] | None) -> tuple[str, str]:
    """The traceparent and tracestate of a gRPC call, empty where it has none."""
    found = {key: str(value) for key, value in metadata or () if key in (TRACEPARENT, TRACESTATE)}
    return found.get(TRACEPARENT, ""), found.get(TRACESTATE, "")


def format_traceparent(trace_id: int, span_id: int) -> str:
    """Of a span that is recorded."""
    return f"00-{trace_id:032x}-{span_id:016x}-01"


def check_tracestate(text: str) -> str:
    """The vendors' list as it may be passed on; empty where it may not."""
    short = len(text) <= _MAX_TRACESTATE_LEN
    return text if short and text.isascii() and text.isprintable() else ""
