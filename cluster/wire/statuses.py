"""gRPC statuses: which one an error of the engine becomes, and what a client makes of it."""

from __future__ import annotations

import re

import grpc

from runtime.errors import (
    DeadlineError,
    DuplicateRequestError,
    FieldError,
    HarmfulRequestError,
    NumericsError,
    OutriderError,
    ResourceExhaustedError,
    WorkerError,
)

TAKEN = "outrider-taken"
"""In a call's initial metadata: the server has taken the request, so if the connection breaks, it is worth resuming."""
KEPT = "outrider-session-bin"
"""In a conversation's initial metadata: its session's id, in UTF-8, where the session outlives the call."""

_MEANINGS = {
    grpc.StatusCode.INVALID_ARGUMENT: "the server refused the request",
    grpc.StatusCode.ALREADY_EXISTS: "the server refused the request",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "the server has no room for the request",
    grpc.StatusCode.DEADLINE_EXCEEDED: "the answer took longer than the time allowed",
    grpc.StatusCode.UNAVAILABLE: "the server cannot be reached, or cannot serve now",
    grpc.StatusCode.CANCELLED: "the call was cancelled",
    grpc.StatusCode.ABORTED: "the request ends the server's workers",
    grpc.StatusCode.DATA_LOSS: "the server's model failed",
    grpc.StatusCode.NOT_FOUND: "the conversation is lost",
    grpc.StatusCode.UNIMPLEMENTED: "there is another kind of server",
    grpc.StatusCode.UNAUTHENTICATED: "the server wants a token that it knows",
}


class CallError(OutriderError):
    """A call failed; `code` is its gRPC status."""

    def __init__(self, address: str, code: grpc.StatusCode, details: str) -> None:
        self.address, self.code, self.details = address, code, details
        meaning = _MEANINGS.get(code, "the call failed")
        super().__init__(f"{address}: {meaning} ({code.name}): {details}")


class LostSessionError(OutriderError):
    """A session that is asked for is not there, or not as far as its client has it (NOT_FOUND)."""


class UnauthenticatedError(OutriderError):
    """The call has no token, or one that is not known here (UNAUTHENTICATED)."""


class IdleError(OutriderError):
    """A conversation held its slot for too long without a turn (DEADLINE_EXCEEDED)."""


_CLIENTS_TEXT = re.compile(
    r"prompt|text|body|token_ids|messages(\[\d+\])?(\.content)?|sampling\.(json_schema|regex|choice|grammar|stop)"
)
"""Fields whose values are what a client has written."""


def told(error: Exception) -> str:
    """An error in words, as they are sent: without what of a prompt is in it, since they may come into others' logs."""
    if isinstance(error, FieldError) and _CLIENTS_TEXT.fullmatch(error.field):
        return f"{error.field}: {error.problem}. {error.remedy}"
    return str(error)


def status_of(error: Exception) -> grpc.StatusCode:
    """The status code of what went wrong; INTERNAL is a defect."""
    match error:
        case DuplicateRequestError():
            return grpc.StatusCode.ALREADY_EXISTS
        case ResourceExhaustedError():
            return grpc.StatusCode.RESOURCE_EXHAUSTED
        case FieldError():
            return grpc.StatusCode.INVALID_ARGUMENT
        case LostSessionError():
            return grpc.StatusCode.NOT_FOUND
        case IdleError() | DeadlineError():
            return grpc.StatusCode.DEADLINE_EXCEEDED
        case UnauthenticatedError():
            return grpc.StatusCode.UNAUTHENTICATED
        case NumericsError():
            return grpc.StatusCode.DATA_LOSS
        case HarmfulRequestError():
            return grpc.StatusCode.ABORTED
        case WorkerError():
            return grpc.StatusCode.UNAVAILABLE
    return grpc.StatusCode.INTERNAL


def call_error(error: grpc.RpcError, address: str) -> CallError:
    """What gRPC raised, readably."""
    return CallError(address, error.code(), error.details() or "no details")


def has_no_room_now(error: Exception) -> bool:
    """Whether the same request may be taken later. It will not be where it is itself too large: for a message, or for a
    cache."""
    match error:
        case ResourceExhaustedError():
            return error.field.startswith("scheduler.")
        case CallError(code=grpc.StatusCode.RESOURCE_EXHAUSTED):
            return "larger than max" not in error.details and not error.details.startswith("cache.")
    return False


def is_away(error: Exception) -> bool:
    """Whether nobody answers at the address now, as while a server is started again."""
    return isinstance(error, CallError) and error.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


def concerns_all(error: Exception) -> bool:
    """Whether every other request would fail in the same way."""
    if isinstance(error, CallError):
        return error.code in (
            grpc.StatusCode.UNIMPLEMENTED,
            grpc.StatusCode.UNAUTHENTICATED,
            grpc.StatusCode.PERMISSION_DENIED,
        )
    return isinstance(error, WorkerError)
