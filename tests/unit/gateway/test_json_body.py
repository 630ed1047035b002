"""Decoding request bodies: errors that name the parameter."""

from __future__ import annotations

import tracemalloc
from typing import Any

import msgspec
import pytest

from services.gateway.http_errors import HttpError
from services.gateway.json_body import convert_member, decode_body


class Options(msgspec.Struct, forbid_unknown_fields=True):
    size: int | None = None


class Body(msgspec.Struct, forbid_unknown_fields=True):
    count: int | None = None
    inner: Any = None
    options: Options | None = None


DECODER = msgspec.json.Decoder(Body)


def refused(body: bytes) -> HttpError:
    with pytest.raises(HttpError) as caught:
        decode_body(DECODER, body)
    assert caught.value.status == 400
    return caught.value


def test_null_means_absent_also_for_what_is_not_supported() -> None:
    assert decode_body(DECODER, b'{"count": null, "other": null}') == Body()
    assert refused(b'{"count": null, "other": 0}').param == "other"


def test_null_means_absent_in_the_members_of_members_too() -> None:
    body = b'{"options": {"size": 3, "other": null}, "more": null}'
    assert decode_body(DECODER, body) == Body(options=Options(size=3))
    assert refused(b'{"options": {"other": 0, "more": null}}').param == "options.other"


def test_null_is_a_value_where_no_member_is_declared() -> None:
    body = b'{"inner": {"const": null}, "other": null}'
    assert decode_body(DECODER, body) == Body(inner={"const": None})


def test_a_wrong_type_names_the_parameter() -> None:
    error = refused(b'{"count": "many"}')
    assert (error.param, error.code) == ("count", "invalid_type")
    assert "`count`" in error.message


def test_a_lone_surrogate_is_called_by_its_name() -> None:
    assert "surrogate" in refused(b'{"inner": "\\uDC00"}').message


def test_nesting_has_a_limit_and_brackets_in_strings_do_not_count() -> None:
    assert "nested" in refused(b'{"inner": ' + b"[" * 70 + b"]" * 70 + b"}").message
    decode_body(DECODER, b'{"inner": ' + b"[" * 60 + b"]" * 60 + b"}")
    decode_body(DECODER, b'{"inner": "' + b"[" * 500 + b'\\" {"}')
    decode_body(DECODER, b'{"inner": [' + b"[]," * 500 + b"[]]}")


def test_looking_for_depth_takes_no_more_memory_than_a_few_bodies() -> None:
    body = b'{"inner": "' + b"if (x) { y[0] } " * 60_000 + b'"}'
    tracemalloc.start()
    try:
        decode_body(DECODER, body)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 * len(body)


def test_members_of_members_are_named_with_their_path() -> None:
    with pytest.raises(HttpError) as caught:
        convert_member({"count": 1.5}, Body, "sampling_params")
    assert caught.value.param == "sampling_params.count"
    with pytest.raises(HttpError) as caught:
        convert_member({"colour": 1}, Body, "sampling_params")
    assert caught.value.param == "sampling_params.colour"
