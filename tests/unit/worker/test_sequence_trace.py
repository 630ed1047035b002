"""A sequence's spans from what the engine says at its end."""

from __future__ import annotations

import time

from services.common.spans import NO_TRACER, RecordedSpan, Tracer
from services.common.trace_context import NOT_SAMPLED
from services.worker.engine.messages import (
    Admission,
    Finish,
    Request,
    SamplingParams,
    SequenceError,
)
from services.worker.spans import begin_sequence

MS = 1_000_000
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def spans_of(
    end: Finish | SequenceError, admission: Admission | None = None, *, num_resumed: int = 0
) -> dict[str, RecordedSpan]:
    """By name, of a sequence that came 100 ms ago."""
    ended: list[RecordedSpan] = []
    request = Request(
        key=1,
        request_id="r",
        token_ids=[1] * (5 + num_resumed),
        prompt_len=5,
        sampling=SamplingParams(),
        arrival_ns=time.monotonic_ns() - 100 * MS,
    )
    trace = begin_sequence(Tracer(ended.append, 0.0), PARENT, request)
    assert trace is not None
    trace.end(end, admission)
    assert len({span.trace_number for span in ended}) == 1
    return {span.name.rpartition("/")[2]: span for span in ended}


def finish(
    queue_ms: int, prefill_ms: int, decode_ms: int, preempted_ns: list[int] | None = None
) -> Finish:
    return Finish(
        key=1,
        reason="stop",
        matched_token_id=None,
        num_output_tokens=3,
        cached_tokens=4,
        queue_ns=queue_ms * MS,
        prefill_ns=prefill_ms * MS,
        decode_ns=decode_ms * MS,
        num_preemptions=len(preempted_ns or ()),
        reservation_id=0,
        preempted_ns=preempted_ns or [],
    )


def milliseconds(span: RecordedSpan) -> int:
    return round((span.end_ns - span.start_ns) / MS)


def test_phases_follow_each_other_from_its_arrival() -> None:
    spans = spans_of(finish(10, 20, 60))
    assert set(spans) == {"Generate", "queue", "prefill", "decode"}
    lengths = [milliseconds(spans[name]) for name in ("queue", "prefill", "decode")]
    assert lengths == [10, 20, 60]
    assert spans["Generate"].start_ns == spans["queue"].start_ns
    assert spans["queue"].end_ns == spans["prefill"].start_ns
    assert spans["prefill"].end_ns == spans["decode"].start_ns
    assert milliseconds(spans["Generate"]) >= 100
    (event,) = spans["prefill"].events
    assert (event.name, event.time_ns) == ("first_token", spans["prefill"].end_ns)


def test_preemptions_are_events_of_the_phase_they_fell_into() -> None:
    arrival_ns = time.monotonic_ns() - 100 * MS
    spans = spans_of(finish(10, 20, 60, [arrival_ns + 15 * MS, arrival_ns + 50 * MS]))
    assert [event.name for event in spans["prefill"].events] == ["preempted", "first_token"]
    (event,) = spans["decode"].events
    assert event.name == "preempted"
    assert spans["decode"].start_ns < event.time_ns < spans["decode"].end_ns
    assert spans["Generate"].attributes["rhizome.num_preemptions"] == 2


def test_what_was_cancelled_in_the_queue_has_no_phase_after_it() -> None:
    spans = spans_of(finish(90, 0, 0))
    assert set(spans) == {"Generate", "queue"}
    assert not spans["Generate"].error_type


def test_an_answer_of_one_token_ends_with_its_prefill() -> None:
    spans = spans_of(finish(10, 20, 0))
    assert set(spans) == {"Generate", "queue", "prefill"}


def test_an_error_ends_it_as_far_as_it_came() -> None:
    waiting = spans_of(SequenceError(1, 4, "the deadline passed", 0))
    assert set(waiting) == {"Generate", "queue"}
    assert waiting["queue"].end_ns == waiting["Generate"].end_ns
    assert waiting["Generate"].attributes["error.type"] == "DEADLINE_EXCEEDED"
    running = spans_of(SequenceError(1, 10, "the engine failed", 0), Admission(1, 0, 30 * MS))
    assert milliseconds(running["queue"]) == 30
    assert running["Generate"].failure == "the engine failed"
    assert running["Generate"].attributes["error.type"] == "ABORTED"


def test_output_of_earlier_attempts_is_told() -> None:
    attributes = spans_of(finish(1, 1, 1), num_resumed=7)["Generate"].attributes
    assert attributes["rhizome.num_resumed_tokens"] == 7
    assert "rhizome.num_resumed_tokens" not in spans_of(finish(1, 1, 1))["Generate"].attributes


def test_what_is_not_recorded_has_no_trace() -> None:
    request = Request(
        key=1, request_id="r", token_ids=[1], prompt_len=1, sampling=SamplingParams(), arrival_ns=1
    )
    assert begin_sequence(NO_TRACER, PARENT, request) is None
    assert begin_sequence(Tracer(print, 1.0), NOT_SAMPLED, request) is None
