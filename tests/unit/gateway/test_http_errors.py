"""Errors as HTTP statuses in OpenAI's shape."""

from __future__ import annotations

import json

import pytest

from services.common.errors import (
    DeadlineError,
    InternalError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    UnavailableError,
    UnimplementedError,
)
from services.gateway.http_errors import HttpError, error_reply


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (InvalidRequestError("bad", "top_p"), 400, "invalid_request_error"),
        (NotFoundError("none"), 404, "invalid_request_error"),
        (HttpError(413, "large"), 413, "invalid_request_error"),
        (OverloadedError("full", 2.4), 429, "rate_limit_error"),
        (UnavailableError("nobody"), 503, "server_error"),
        (UnimplementedError("later"), 501, "server_error"),
        (DeadlineError("late"), 504, "server_error"),
        (InternalError("lost"), 500, "server_error"),
        (RuntimeError("secret"), 500, "server_error"),
    ],
)
def test_each_error_has_its_status_and_type(error: Exception, status: int, kind: str) -> None:
    reply = error_reply(error)
    body = json.loads(reply.body)["error"]
    assert (reply.status, body["type"]) == (status, kind)
    assert set(body) == {"message", "type", "param", "code"}
    assert "secret" not in body["message"]


def test_the_parameter_and_the_retry_hint_are_passed_on() -> None:
    assert json.loads(error_reply(InvalidRequestError("x", "n")).body)["error"]["param"] == "n"
    assert (b"retry-after", b"3") in error_reply(OverloadedError("full", 2.4)).headers
