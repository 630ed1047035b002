"""Recording: who decides, what a recorded span holds, and that the rest costs nothing."""

from __future__ import annotations

import time

import pytest

from services.common.errors import OverloadedError
from services.common.spans import NO_SPAN, NO_TRACER, RecordedSpan, SpanKind, Tracer, unix_ns
from services.common.trace_context import NOT_SAMPLED, parse_traceparent

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331"


def tracer(ratio: float) -> tuple[Tracer, list[RecordedSpan]]:
    ended: list[RecordedSpan] = []
    return Tracer(ended.append, ratio), ended


def test_without_an_endpoint_nothing_is_recorded_and_the_context_is_passed_on() -> None:
    assert NO_TRACER.begin("chat") is NO_SPAN
    assert NO_TRACER.begin("chat", f"{PARENT}-01").traceparent == f"{PARENT}-01"
    assert NO_TRACER.begin("chat", "nonsense") is NO_SPAN


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_a_callers_decision_stands(ratio: float) -> None:
    ours, _ = tracer(ratio)
    recorded = ours.begin("chat", f"{PARENT}-01")
    assert isinstance(recorded, RecordedSpan)
    assert recorded.trace_id == "0af7651916cd43dd8448eb211c80319c"
    assert f"{recorded.parent_number:016x}" == "b7ad6b7169203331"
    left = ours.begin("chat", f"{PARENT}-00")
    assert not left.is_recording
    assert left.traceparent == NOT_SAMPLED


def test_without_a_decision_the_ratio_decides() -> None:
    ours, _ = tracer(0.25)
    kept = sum(ours.begin("chat").is_recording for _ in range(4000))
    assert 800 < kept < 1200
    assert not tracer(0.0)[0].begin("chat").is_recording
    assert tracer(1.0)[0].begin("chat", "nonsense").is_recording


def test_the_next_service_is_told_the_span() -> None:
    ours, ended = tracer(1.0)
    span = ours.begin("chat")
    child = span.child("tokenize", SpanKind.CLIENT)
    parent = parse_traceparent(child.traceparent)
    assert parent is not None
    theirs = ours.begin("Tokenize", child.traceparent)
    for one in (theirs, child, span):
        one.end()
    ids = {one.name: (one.parent_number, one.span_number) for one in ended}
    assert ids["chat"][0] == 0
    assert ids["tokenize"][0] == ids["chat"][1]
    assert ids["Tokenize"][0] == ids["tokenize"][1] == parent.span_id
    assert len({one.trace_id for one in ended}) == 1


def test_a_span_tells_what_it_was_told_once() -> None:
    ours, ended = tracer(1.0)
    span = ours.begin("chat")
    span.set(worker_id="w0", policy=None)
    span.set_standard({"gen_ai.request.model": "m"})
    span.add_event("queued", position=3)
    with pytest.raises(OverloadedError), span:
        raise OverloadedError("the queue is full")
    span.end()
    (one,) = ended
    assert one.attributes == {
        "rhizome.worker_id": "w0",
        "gen_ai.request.model": "m",
        "error.type": "RESOURCE_EXHAUSTED",
    }
    assert [(event.name, event.attributes) for event in one.events] == [
        ("queued", {"rhizome.position": 3})
    ]
    assert one.failure == "the queue is full"
    assert one.start_ns <= one.events[0].time_ns <= one.end_ns


def test_spans_that_are_not_recorded_take_everything_and_keep_nothing() -> None:
    with NO_SPAN.child("a", SpanKind.CLIENT) as span:
        span.set(a=1)
        span.set_standard({"a": 1})
        span.add_event("b")
        span.fail(ValueError())
    assert span is NO_SPAN
    assert (span.trace_id, span.exemplar, span.log_fields) == ("", None, None)


def test_moments_of_the_monotonic_clock_have_a_unix_time() -> None:
    before = time.time_ns()
    assert abs(unix_ns(time.monotonic() - 1.0) - before + 1_000_000_000) < 500_000_000
