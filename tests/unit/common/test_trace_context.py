"""W3C Trace Context: what is continued, and what is ignored as the specification says."""

from __future__ import annotations

import pytest

from services.common.trace_context import (
    NOT_SAMPLED,
    check_tracestate,
    format_traceparent,
    parse_traceparent,
)

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def test_ids_and_the_decision_are_read() -> None:
    parent = parse_traceparent(f"00-{TRACE}-{SPAN}-01")
    assert parent is not None
    assert (f"{parent.trace_id:032x}", f"{parent.span_id:016x}") == (TRACE, SPAN)
    assert parent.sampled


@pytest.mark.parametrize(("flags", "sampled"), [("00", False), ("01", True), ("02", False)])
def test_only_the_lowest_flag_decides(flags: str, sampled: bool) -> None:
    parent = parse_traceparent(f"00-{TRACE}-{SPAN}-{flags}")
    assert parent is not None
    assert parent.sampled is sampled


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE}-{SPAN}-01-more",
        f"00-{TRACE}-{SPAN}-01,00-{TRACE}-{SPAN}-01",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE[1:]}-{SPAN}-01",
        f"01-{TRACE}-{SPAN}-01more",
        f"00-{TRACE}-{SPAN}-01\n",
    ],
)
def test_what_is_malformed_is_ignored(text: str) -> None:
    assert parse_traceparent(text) is None


def test_later_versions_may_say_more() -> None:
    assert parse_traceparent(f"01-{TRACE}-{SPAN}-01") is not None
    assert parse_traceparent(f"cc-{TRACE}-{SPAN}-01-what-comes-later") is not None


def test_what_we_write_is_read_back() -> None:
    assert parse_traceparent(format_traceparent(5, 6)) == (5, 6, True)
    unsampled = parse_traceparent(NOT_SAMPLED)
    assert unsampled is not None
    assert not unsampled.sampled


def test_a_tracestate_that_may_not_travel_does_not() -> None:
    assert check_tracestate("a=1,b=2") == "a=1,b=2"
    assert check_tracestate("a=" + "1" * 511) == ""
    assert check_tracestate("a=\n") == ""
