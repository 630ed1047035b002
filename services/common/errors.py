"""Errors a service may raise, and the gRPC status each one becomes.

RhizomeError
  x InvalidRequestError     -> INVALID_ARGUMENT     the request can never succeed
  x UnauthenticatedError    -> UNAUTHENTICATED      who calls has not said who it is
  x PermissionDeniedError   -> PERMISSION_DENIED    who calls may not do that
  x NotFoundError           -> NOT_FOUND            no such model, worker or handle
  x OverloadedError         -> RESOURCE_EXHAUSTED   full; carries a retry hint
  x DeadlineError           -> DEADLINE_EXCEEDED    its time passed
  x RequestCancelledError   -> CANCELLED            its caller went away
  x UnavailableError        -> UNAVAILABLE          nobody can serve it now; retry elsewhere
  x PreconditionError       -> FAILED_PRECONDITION  another epoch or protocol; start afresh
  x SessionBrokenError      -> ABORTED              a multiplexed stream lost its place
  x OutOfRangeError         -> OUT_OF_RANGE         events no longer held; take a snapshot
  x UnimplementedError      -> UNIMPLEMENTED        a later release

Anything else is a bug and becomes INTERNAL without detail.
"""

from __future__ import annotations

from typing import ClassVar

import grpc


class RhizomeError(Exception):
    """Root of all errors that a caller may see."""

    status: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL

    def __init__(self, message: str = "") -> None:
        super().__init__(message)
        self.message = message

    @property
    def code(self) -> int:
        """The google.rpc.Code, as carried by per-handle entries."""
        return int(self.status.value[0])


class InvalidRequestError(RhizomeError):
    """The request can never succeed; `param` names the field that is wrong."""

    status = grpc.StatusCode.INVALID_ARGUMENT

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class UnauthenticatedError(RhizomeError):
    status = grpc.StatusCode.UNAUTHENTICATED


class PermissionDeniedError(RhizomeError):
    status = grpc.StatusCode.PERMISSION_DENIED


class NotFoundError(RhizomeError):
    status = grpc.StatusCode.NOT_FOUND


class OverloadedError(RhizomeError):
    """No room now; trying again after `retry_after_s` may succeed."""

    status = grpc.StatusCode.RESOURCE_EXHAUSTED

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineError(RhizomeError):
    status = grpc.StatusCode.DEADLINE_EXCEEDED


class RequestCancelledError(RhizomeError):
    status = grpc.StatusCode.CANCELLED


class UnavailableError(RhizomeError):
    status = grpc.StatusCode.UNAVAILABLE


class PreconditionError(RhizomeError):
    status = grpc.StatusCode.FAILED_PRECONDITION


class SessionBrokenError(RhizomeError):
    status = grpc.StatusCode.ABORTED


class OutOfRangeError(RhizomeError):
    status = grpc.StatusCode.OUT_OF_RANGE


class UnimplementedError(RhizomeError):
    status = grpc.StatusCode.UNIMPLEMENTED


class InternalError(RhizomeError):
    """A peer answered INTERNAL or something no leaf stands for."""


_LEAVES: dict[int, type[RhizomeError]] = {
    int(leaf.status.value[0]): leaf
    for leaf in (
        InvalidRequestError,
        UnauthenticatedError,
        PermissionDeniedError,
        NotFoundError,
        OverloadedError,
        DeadlineError,
        RequestCancelledError,
        UnavailableError,
        PreconditionError,
        SessionBrokenError,
        OutOfRangeError,
        UnimplementedError,
    )
}

# Trailing metadata that carries what a status has no field for.
PARAM_METADATA_KEY = "rhizome-param"
RETRY_AFTER_METADATA_KEY = "rhizome-retry-after-ms"


def error_from_code(code: int, message: str) -> RhizomeError:
    """The leaf that a google.rpc.Code stands for; `InternalError` where none does."""
    return _LEAVES.get(code, InternalError)(message)


def error_from_rpc(rpc_error: grpc.aio.AioRpcError) -> RhizomeError:
    """The error a peer's status stands for, with its parameter name or retry hint."""
    error = error_from_code(int(rpc_error.code().value[0]), rpc_error.details() or "")
    trailers = dict(rpc_error.trailing_metadata() or ())
    if isinstance(error, InvalidRequestError) and PARAM_METADATA_KEY in trailers:
        error.param = str(trailers[PARAM_METADATA_KEY])
    if isinstance(error, OverloadedError) and RETRY_AFTER_METADATA_KEY in trailers:
        error.retry_after_s = int(trailers[RETRY_AFTER_METADATA_KEY]) / 1000
    return error
