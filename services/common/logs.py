"""Log lines: one event each, `key=value`, on standard error; as text or as JSON objects."""

from __future__ import annotations

import functools
import logging
import re
import sys
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple

import msgspec

LogFormat = Literal["text", "json"]

# A key and what follows it up to the next space, in a message before its values are filled in.
_FIELD = re.compile(r"(?:^|(?<= ))([a-z_][a-z0-9_]*)=(\S+)")
_PLACEHOLDER = re.compile(r"%[-#0 +]*\d*(?:\.\d+)?([a-zA-Z%])")
_INTEGERS, _REALS = "di", "feg"
# Given as a log call's `extra` (`Span.log_fields`).
_TRACE_FIELDS = ("trace_id", "span_id")
# What every line has; a field of the same name gets a trailing underscore.
_RESERVED = frozenset(("ts", "level", "service", "logger", "message", "exception", *_TRACE_FIELDS))


def configure_logging(service: str, level: str = "info", form: LogFormat = "text") -> None:
    """Send every logger of this process to standard error, marked with the service's name."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JsonFormatter(service)
        if form == "json"
        else logging.Formatter(f"%(asctime)s %(levelname).1s {service} %(name)s: %(message)s")
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())


class _Field(NamedTuple):
    """`key=value` of a message: the value before it is filled in, and which arguments it takes."""

    key: str
    template: str
    first: int
    stop: int


class JsonFormatter(logging.Formatter):
    """One JSON object a line; a message's `key=value` pairs become fields of their own type."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service
        self._encode = msgspec.json.Encoder(enc_hook=str).encode

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "service": self._service,
            "logger": record.name,
            **_fields(record),
            "message": record.getMessage(),
        }
        for name in _TRACE_FIELDS:
            if (value := getattr(record, name, None)) is not None:
                line[name] = value
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return self._encode(line).decode()


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """The pairs with their values; none where the arguments do not fit the message."""
    args = record.args or ()
    if not isinstance(record.msg, str) or not isinstance(args, tuple):
        return {}
    return {
        f"{field.key}_" if field.key in _RESERVED else field.key: _value(
            field.template, args[field.first : field.stop]
        )
        for field in _template_fields(record.msg)
        if field.stop <= len(args)
    }


@functools.lru_cache(maxsize=1024)
def _template_fields(message: str) -> tuple[_Field, ...]:
    """Messages are constants of the program, so each is taken apart once."""
    fields = []
    for match in _FIELD.finditer(message):
        first = _num_placeholders(message[: match.start(2)])
        stop = first + _num_placeholders(match[2])
        fields.append(_Field(match[1], match[2], first, stop))
    return tuple(fields)


def _num_placeholders(text: str) -> int:
    return sum(match[1] != "%" for match in _PLACEHOLDER.finditer(text))


def _value(template: str, args: tuple[Any, ...]) -> Any:
    """Numbers and truth values as such, a quoted string without its quotes, the rest as text."""
    if not args:
        return template.replace("%%", "%")
    whole = _PLACEHOLDER.fullmatch(template)
    if whole is None:
        return template % args
    (value,) = args
    kind = whole[1]
    if kind == "r" and isinstance(value, str):
        return (whole[0][:-1] + "s") % value
    if kind in _INTEGERS:
        return int(value)
    if kind in _REALS:
        return float(template % value)
    if template == "%s" and (value is None or isinstance(value, bool | int | float)):
        return value
    return template % value
