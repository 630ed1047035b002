"""How an error looks over HTTP: its status and OpenAI's error object."""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec

from services.common.errors import (
    DeadlineError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    PermissionDeniedError,
    RhizomeError,
    UnauthenticatedError,
    UnavailableError,
    UnimplementedError,
)

_encode = msgspec.json.Encoder().encode


class HttpError(Exception):
    """An error of HTTP itself: wrong path or method, a body too large, malformed JSON."""

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers: list[tuple[bytes, bytes]] = []


@dataclass(frozen=True, slots=True)
class ErrorReply:
    status: int
    body: bytes
    headers: list[tuple[bytes, bytes]]


def error_reply(error: Exception) -> ErrorReply:
    """What a client sees; anything unknown is a 500 without detail."""
    if isinstance(error, HttpError):
        body = _error_body(error.status, error.message, error.param, error.code)
        return ErrorReply(error.status, body, error.headers)
    status, code, param, headers = 500, None, None, []
    message = error.message if isinstance(error, RhizomeError) else "internal error"
    match error:
        case InvalidRequestError():
            status, param = 400, error.param
        case UnauthenticatedError():
            status, code = 401, "invalid_api_key"
            headers.append((b"www-authenticate", b"Bearer"))
        case PermissionDeniedError():
            status, code = 403, "permission_denied"
        case NotFoundError():
            status, code, param = 404, "model_not_found", "model"
        case OverloadedError():
            status, code = 429, "overloaded"
            seconds = max(1, math.ceil(error.retry_after_s))
            headers.append((b"retry-after", str(seconds).encode()))
        case DeadlineError():
            status, code = 504, "timeout"
        case UnavailableError():
            status, code = 503, "unavailable"
            headers.append((b"retry-after", b"1"))
        case UnimplementedError():
            status, code = 501, "unimplemented"
    return ErrorReply(status, _error_body(status, message, param, code), headers)


def _error_body(status: int, message: str, param: str | None, code: str | None) -> bytes:
    return _encode(
        {
            "error": {
                "message": message,
                "type": _error_type(status),
                "param": param,
                "code": code,
            }
        }
    )


def _error_type(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"
