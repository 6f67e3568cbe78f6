"""Errors as OpenAI's clients read them: a status, and {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field

from cluster.serving import logs
from cluster.serving.http.reading import UnknownModelError
from cluster.serving.limits import LimitError
from cluster.wire.statuses import UnauthenticatedError, told
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

log = logging.getLogger(__name__)

RETRY_AFTER_S = 1
"""When to ask again of a server that is full or not ready."""


class HttpError(OutriderError):
    """What only HTTP knows: a path, a method, a body that is none."""

    def __init__(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        self.status, self.code, self.headers = status, code, headers or {}
        super().__init__(message)


@dataclass(frozen=True)
class Refusal:
    """What a client is told."""

    status: int
    message: str
    kind: str
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, dict[str, str | None]]:
        """As JSON."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def refusal_of(error: Exception) -> Refusal:
    """What a client is told of an error. A defect is logged."""
    later = {"retry-after": str(RETRY_AFTER_S)}
    match error:
        case HttpError():
            kind = "invalid_request_error" if error.status < 500 else "server_error"
            return Refusal(error.status, told(error), kind, None, error.code, error.headers)
        case UnauthenticatedError():
            wanted = {"www-authenticate": 'Bearer, Basic realm="outrider"'}
            return Refusal(401, told(error), "invalid_request_error", None, "invalid_api_key", wanted)
        case UnknownModelError():
            return Refusal(404, told(error), "invalid_request_error", "model", "model_not_found")
        case DuplicateRequestError():
            return Refusal(409, told(error), "invalid_request_error", param_of(error), "conflict")
        case ResourceExhaustedError():
            if isinstance(error, LimitError):
                later = {"retry-after": str(max(1, math.ceil(error.retry_after_s)))}
            return Refusal(429, told(error), "rate_limit_error", param_of(error), "rate_limit_exceeded", later)
        case FieldError():
            return Refusal(400, told(error), "invalid_request_error", param_of(error), "invalid_value")
        case DeadlineError():
            return Refusal(504, told(error), "server_error", "deadline_s", "deadline_exceeded")
        case HarmfulRequestError():
            return Refusal(500, told(error), "server_error", None, "harmful_request")
        case NumericsError():
            return Refusal(500, told(error), "server_error", None, "model_failed")
        case WorkerError():
            return Refusal(503, told(error), "server_error", None, "unavailable", later)
    logs.defect(log, error)
    message = f"internal error ({type(error).__name__}); the server's log says where"
    return Refusal(500, message, "server_error", None, "internal_error")


def param_of(error: FieldError) -> str:
    """The field, as the body calls it."""
    return error.field.removeprefix("sampling.")
