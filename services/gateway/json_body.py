"""Request bodies: strict JSON into typed structures, with errors that name the parameter."""

from __future__ import annotations

import re
from typing import Any, TypeVar, get_args

import msgspec

from services.gateway.http_errors import HttpError

T = TypeVar("T")

_UNKNOWN_FIELD = re.compile(r"Object contains unknown field `([^`]*)`(?: - at `\$\.?([^`]*)`)?")
_AT = re.compile(r"(.*) - at `\$\.?([^`]+)`")
_MISSING = re.compile(r"Object missing required field `([^`]+)`")
# Deeper JSON is refused before it can exhaust anybody's stack.
_MAX_DEPTH = 64
# Possessive: a repetition that could be taken back would keep a state for every character.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"')
_BRACES_TO_BRACKETS = bytes.maketrans(b"{}", b"[]")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def decode_body(decoder: msgspec.json.Decoder[T], body: bytes) -> T:
    """Raises HttpError 400 that says what is wrong with `body`."""
    try:
        decoded = _decode(decoder, body)
    except msgspec.ValidationError as error:
        raise _validation_error(str(error)) from None
    except RecursionError:
        raise HttpError(400, "The request body is nested too deeply") from None
    except UnicodeDecodeError:
        raise HttpError(400, "The request body is not valid UTF-8") from None
    except msgspec.DecodeError as error:
        message = f"The request body is not valid JSON: {error}"
        if _SURROGATE.search(body):
            message += " (a lone UTF-16 surrogate, \\ud800 to \\udfff, is not text)"
        raise HttpError(400, message) from None
    if _is_too_deep(body):
        raise HttpError(400, f"The request body is nested deeper than {_MAX_DEPTH} levels")
    return decoded


def convert_member(value: object, member_type: type[T], name: str) -> T:
    """A decoded member as its type. Raises HttpError 400 that says what is wrong with it."""
    try:
        return msgspec.convert(value, member_type)
    except msgspec.ValidationError as error:
        raise _validation_error(str(error), f"{name}.") from None


def without_nulls(members: dict[str, Any]) -> dict[str, Any]:
    """Null means absent."""
    return {name: value for name, value in members.items() if value is not None}


def _decode(decoder: msgspec.json.Decoder[T], body: bytes) -> T:
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        if "unknown field" not in str(error):
            raise
        # A parameter that is not supported but null is absent too.
        raw = msgspec.json.decode(body)
        if not isinstance(raw, dict):
            raise
        return decoder.decode(msgspec.json.encode(_without_absent(raw, decoder.type)))


def _without_absent(members: dict[str, Any], structure: Any) -> dict[str, Any]:
    """`members` without nulls, and so the members of a declared structure.

    Null inside anything else is left alone: there it is a value.
    """
    given = without_nulls(members)
    for field in msgspec.structs.fields(structure):
        inner, value = _structure_in(field.type), given.get(field.encode_name)
        if inner is not None and isinstance(value, dict):
            given[field.encode_name] = _without_absent(value, inner)
    return given


def _structure_in(annotation: Any) -> Any:
    """The structure that a member holds, perhaps beside None."""
    for option in (annotation, *get_args(annotation)):
        if isinstance(option, type) and issubclass(option, msgspec.Struct):
            return option
    return None


def _is_too_deep(body: bytes) -> bool:
    """Whether valid JSON is nested too deeply. One with few brackets cannot be."""
    if body.count(b"[") + body.count(b"{") <= _MAX_DEPTH:
        return False
    brackets = _STRING.sub(b"", body).translate(_BRACES_TO_BRACKETS, _NO_BRACKETS)
    for _ in range(_MAX_DEPTH):
        # Each turn takes away the innermost level.
        brackets = brackets.replace(b"[]", b"")
        if not brackets:
            return False
    return True


def _validation_error(message: str, prefix: str = "") -> HttpError:
    if match := _UNKNOWN_FIELD.match(message):
        name, where = match.groups()
        path = prefix + (f"{where}.{name}" if where else name)
        return HttpError(
            400, f"Unknown or unsupported parameter: `{path}`", "unknown_parameter", path
        )
    if match := _MISSING.match(message):
        name = prefix + match.group(1)
        return HttpError(
            400, f"Missing required parameter: `{name}`", "missing_required_parameter", name
        )
    if match := _AT.match(message):
        what, path = match.group(1), prefix + match.group(2)
        return HttpError(400, f"Invalid value for `{path}`: {what}", "invalid_type", path)
    return HttpError(400, f"Invalid request body: {message}", "invalid_type")
