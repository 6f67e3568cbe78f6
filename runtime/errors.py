"""Typed errors: each names the field, the value it had, and the remedy.

The gRPC edge maps each class to one status code; anything else is a bug and becomes INTERNAL.
"""

from __future__ import annotations

from typing import Any


class OutriderError(Exception):
    """Base of every error Outrider raises on purpose."""


class FieldError(OutriderError):
    """One field has a value that cannot be used."""

    def __init__(self, field: str, value: Any, problem: str, remedy: str) -> None:
        self.field, self.value, self.problem, self.remedy = field, value, problem, remedy
        shown = repr(value)
        shown = shown if len(shown) <= 80 else f"{shown[:38]}...{shown[-39:]}"  # of a path, the end says most
        super().__init__(f"{field} = {shown}: {problem}. {remedy}")


class ConfigError(FieldError):
    """The configuration cannot be run as it is."""


class InvalidRequestError(FieldError):
    """A request is malformed; sending it again will fail again (INVALID_ARGUMENT)."""


class DuplicateRequestError(InvalidRequestError):
    """Another request or conversation with this id has not ended yet (ALREADY_EXISTS)."""


class ResourceExhaustedError(FieldError):
    """The request is well formed, but there is no room for it now (RESOURCE_EXHAUSTED)."""


class DeadlineError(OutriderError):
    """An answer could not be whole by its deadline (DEADLINE_EXCEEDED)."""

    def __init__(self, problem: str, remedy: str) -> None:
        self.remedy = remedy
        super().__init__(f"deadline: {problem}. {remedy}")


class WorkerError(OutriderError):
    """The workers cannot be reached or have failed (UNAVAILABLE)."""


class PeerError(WorkerError):
    """Another rank has gone, or the mesh is being made anew without this one's doing: this rank itself is sound."""


class CachesLostError(WorkerError):
    """The workers are back, but what they had in their caches is not: sequences are to be read again."""


class HarmfulRequestError(OutriderError):
    """The request ends the workers whenever it runs, so it is not run again (ABORTED)."""


class NumericsError(OutriderError):
    """The model gave no next token, since its logits are NaN or infinite (DATA_LOSS); others live on."""
