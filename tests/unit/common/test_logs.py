"""JSON log lines: one object each, the message's pairs as fields with their types."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

import pytest

from services.common.logs import JsonFormatter, configure_logging
from services.common.spans import NO_SPAN, Tracer


def line(message: str, *args: object, **extra: object) -> dict[str, Any]:
    record = logging.LogRecord("some.logger", logging.INFO, __file__, 1, message, args, None)
    record.__dict__.update(extra)
    text = JsonFormatter("gateway").format(record)
    assert "\n" not in text
    fields: dict[str, Any] = json.loads(text)
    return fields


def test_a_line_says_when_who_and_what() -> None:
    fields = line("event=ready port=%d", 30000)
    assert fields.pop("ts").endswith("+00:00")
    assert fields == {
        "level": "info",
        "service": "gateway",
        "logger": "some.logger",
        "event": "ready",
        "port": 30000,
        "message": "event=ready port=30000",
    }


@pytest.mark.parametrize(
    ("message", "args", "expected"),
    [
        ("total_ms=%.1f", (12.345,), {"total_ms": 12.3}),
        ("epoch=%x", (255,), {"epoch": "ff"}),
        ("permanent=%s", (False,), {"permanent": False}),
        ("status=%s", (3,), {"status": 3}),
        ("user=%.200r", ("a b",), {"user": "a b"}),
        ("user=%.200r", (None,), {"user": "None"}),
        ("error=%.5s", ("two words",), {"error": "two w"}),
        ("error=%s next=%d", ("a key=value pair", 1), {"error": "a key=value pair", "next": 1}),
        ("http=%s:%d port=%s", ("localhost", 80, 81), {"http": "localhost:80", "port": 81}),
        ("event=%s a=%d", ("ready", 1), {"event": "ready", "a": 1}),
        ("event=mismatch %s b=%d", ("free text", 2), {"event": "mismatch", "b": 2}),
        ("share=100%% of=%d", (2,), {"share": "100%", "of": 2}),
        ("rate=%f", (float("nan"),), {"rate": None}),
    ],
)
def test_pairs_become_fields_of_their_type(
    message: str, args: tuple[object, ...], expected: dict[str, object]
) -> None:
    fields = line(message, *args)
    assert {key: fields.get(key, "missing") for key in expected} == expected


def test_what_a_client_wrote_makes_no_fields() -> None:
    fields = line("event=refused error=%s", 'x level=error service=y"}\n{"a": 1')
    assert (fields["level"], fields["service"]) == ("info", "gateway")
    assert "a" not in fields


def test_a_pair_named_as_a_field_of_every_line_keeps_both() -> None:
    fields = line("event=service_died service=%s", "worker-0")
    assert (fields["service"], fields["service_"]) == ("gateway", "worker-0")


def test_messages_of_others_are_lines_too() -> None:
    assert line("Uvicorn running on %s", "http://x")["message"] == "Uvicorn running on http://x"
    assert line("%(a)s", {"a": 1})["message"] == "1"
    assert line("no arguments: 100%")["message"] == "no arguments: 100%"


def test_an_exception_has_its_traceback() -> None:
    try:
        raise KeyError("key")
    except KeyError:
        record = logging.LogRecord("l", logging.ERROR, __file__, 1, "m", (), sys.exc_info())
    assert "KeyError: 'key'" in json.loads(JsonFormatter("gateway").format(record))["exception"]


def test_a_recorded_request_names_its_trace() -> None:
    span = Tracer(lambda span: None, 1.0).begin("chat")
    fields = line("event=request_done", **(span.log_fields or {}))
    assert span.traceparent == f"00-{fields['trace_id']}-{fields['span_id']}-01"
    assert NO_SPAN.log_fields is None


def test_the_form_is_chosen_for_the_whole_process(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        configure_logging("tokenizer", "info", "json")
        logging.getLogger("uvicorn.error").info("event=one n=%d", 1)
        configure_logging("tokenizer", "info", "text")
        logging.getLogger("any").info("event=two")
    finally:
        root.handlers[:], _ = handlers, root.setLevel(level)
    first, second = capsys.readouterr().err.splitlines()
    assert json.loads(first)["n"] == 1
    assert second.endswith("I tokenizer any: event=two")
