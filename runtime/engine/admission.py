"""Which requests and conversations are there, and whether one more may come."""

from __future__ import annotations

from runtime.config import SchedulerConfig
from runtime.errors import DuplicateRequestError, InvalidRequestError, ResourceExhaustedError
from runtime.request import Request


class Admission:
    """Ids in use, and the limits on them. Not thread-safe: whoever owns it guards it."""

    def __init__(self, limits: SchedulerConfig) -> None:
        self._limits = limits
        self._requests: dict[str, str | None] = {}  # each with the conversation whose turn it is
        self._sessions: set[str] = set()

    def admit(self, request: Request) -> None:
        """Take a request in, until `end`. Raises DuplicateRequestError where its id is in use, ResourceExhaustedError
        where the queue is full, InvalidRequestError where its conversation cannot take a turn."""
        if request.sampling.n > 1:
            problem, remedy = "is more than one request", "Add what runtime.request.forks makes of it."
            raise InvalidRequestError("sampling.n", request.sampling.n, problem, remedy)
        if request.request_id in self._requests:
            problem, remedy = "is the id of a request that is still running", "Give each request its own id."
            raise DuplicateRequestError("request_id", request.request_id, problem, remedy)
        if len(self._requests) >= self._limits.num_slots + self._limits.max_waiting:
            problem = "every slot is taken and the waiting queue is full"
            raise ResourceExhaustedError("scheduler.max_waiting", self._limits.max_waiting, problem, "Try again later.")
        if request.session_id is not None:
            if request.session_id not in self._sessions:
                problem, remedy = "is not open", "Open the conversation first."
                raise InvalidRequestError("session_id", request.session_id, problem, remedy)
            if request.session_id in self._requests.values():
                problem, remedy = "has a turn that has not ended", "Wait for it, or cancel it."
                raise InvalidRequestError("session_id", request.session_id, problem, remedy)
        self._requests[request.request_id] = request.session_id

    def holds(self, request_id: str) -> bool:
        """Whether the request has been taken in and is not over."""
        return request_id in self._requests

    def end(self, request_id: str) -> None:
        """The request is over; its id may be used again."""
        self._requests.pop(request_id, None)

    def open(self, session_id: str) -> None:
        """Take a conversation in, until `close`. Raises DuplicateRequestError where its id is in use,
        ResourceExhaustedError where as many as may be are open."""
        if session_id in self._sessions:
            problem, remedy = "is the id of a conversation that is open", "Give each conversation its own id."
            raise DuplicateRequestError("session_id", session_id, problem, remedy)
        limit = self._limits.session_limit
        if len(self._sessions) >= limit:
            problem = "as many conversations are open as may hold a slot"
            remedy = "Try again later, or raise it together with scheduler.max_sequences."
            raise ResourceExhaustedError("scheduler.max_sessions", limit, problem, remedy)
        self._sessions.add(session_id)

    def has_session(self, session_id: str) -> bool:
        """Whether the conversation is open."""
        return session_id in self._sessions

    def close(self, session_id: str) -> None:
        """The conversation is over."""
        self._sessions.discard(session_id)

    @property
    def num_sessions(self) -> int:
        return len(self._sessions)
