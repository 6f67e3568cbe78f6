"""The engine's own thread: others hand it requests and get each step's tokens in a callback."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from runtime.engine.admission import Admission
from runtime.engine.session import Session
from runtime.errors import (
    InvalidRequestError,
    ResourceExhaustedError,
    WorkerError,
)
from runtime.request import FinishReason, Past, Request, StepOutput, Usage

if TYPE_CHECKING:
    from runtime.engine.engine import Engine

log = logging.getLogger(__name__)

OnOutput = Callable[[StepOutput], None]


@dataclass(frozen=True)
class LoopStats:
    """What the loop has done since it started, and what it is doing."""

    num_running: int
    num_waiting: int
    outcomes: dict[FinishReason, int]
    """Requests that have ended, by how."""
    uptime_s: float
    num_sessions: int = 0
    """Conversations that are open."""


@dataclass
class _Live:
    """A request whose last output has not been delivered."""

    on_output: OnOutput
    usage: Usage
    reachable: bool = True
    """False once its callback has raised: nobody gets the rest."""


class EngineLoop:
    """Runs `engine.step()` in a thread while there is work; every method may be called from any thread.

    Every request that `submit` takes gets outputs until one has a finish reason, whatever happens: if a step
    raises, every live request ends with ERROR and later ones are refused with WorkerError. Callbacks run on the loop's
    thread between two steps, so they must be short; one that raises costs its own request only.
    The engine stays the caller's to close, after the loop.
    """

    def __init__(
        self,
        engine: Engine,
        on_failure: Callable[[Exception], object] | None = None,
        heartbeat_s: float = 5.0,
    ) -> None:
        self.engine = engine
        self._on_failure = on_failure
        self._heartbeat_s = heartbeat_s
        self._started = time.monotonic()
        # Guarded by _wake; the loop's thread alone takes away from the first two.
        self._wake = threading.Condition()
        self._admission = Admission(engine.config.scheduler)
        self._live: dict[str, _Live] = {}
        self._commands: deque[tuple[Callable[..., None], Request | Session | str]] = deque()
        self._sessions: dict[str, Session] = {}
        self._outcomes: Counter[FinishReason] = Counter()
        self._failed: Exception | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="outrider-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, on_output: OnOutput) -> None:
        """Queue a request; returns without waiting for the step that is running.

        Raises InvalidRequestError (DuplicateRequestError where the id is in use), ResourceExhaustedError where the
        waiting queue is full, WorkerError after a failure or `close`. After an error `on_output` is never called.
        """
        self.engine.validate(request)
        with self._wake:
            self._check_serving()
            self._admission.admit(request)
            self._live[request.request_id] = _Live(on_output, Usage(num_prompt_tokens=len(request.prompt_ids)))
            self._commands.append((self._add, request))
            self._wake.notify()

    def cancel(self, request_id: str) -> None:
        """Free the request's slot before the next step; its last output says CANCELLED, unless it ended by itself
        meanwhile. Unknown ids are ignored."""
        with self._wake:
            if request_id in self._live:
                self._commands.append((self._abort, request_id))
                self._wake.notify()

    def open_session(self, session_id: str | None = None, past: Past | None = None) -> Session:
        """Start a conversation, or go on with one that had this past. Its turns are requests made with it; it holds a
        slot from the first of them on.

        Raises DuplicateRequestError where the id is in use, ResourceExhaustedError where too many conversations are
        open, WorkerError after a failure or `close`.
        """
        session = Session.with_past(session_id if session_id is not None else f"session-{uuid.uuid4()}", past)
        with self._wake:
            self._check_serving()
            self._admission.open(session.session_id)
            self._sessions[session.session_id] = session
            self._commands.append((partial(self._open_session, past), session))
            self._wake.notify()
        return session

    def close_session(self, session: Session) -> None:
        """End a conversation and free its slot before the next step. A running turn's last output says CANCELLED.
        Idempotent."""
        with self._wake:
            if self._sessions.get(session.session_id) is session:
                del self._sessions[session.session_id]
                self._admission.close(session.session_id)
                self._commands.append((self.engine.close_session, session))
                self._wake.notify()

    @property
    def failed(self) -> Exception | None:
        """What ended the loop, if something did: a WorkerError, or whatever else a step raised."""
        return self._failed

    @property
    def stats(self) -> LoopStats:
        with self._wake:
            running = self.engine.num_running if self._failed is None else 0
            waiting = max(len(self._live) - running, 0)
            uptime_s = time.monotonic() - self._started
            return LoopStats(running, waiting, dict(self._outcomes), uptime_s, len(self._sessions))

    def close(self) -> None:
        """Cancel what is live and end the thread, after the step that is running. Idempotent."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _check_serving(self) -> None:
        if self._failed is not None:
            raise WorkerError(f"the engine has failed: {self._failed}") from self._failed
        if self._closing:
            raise WorkerError("the engine is shutting down")

    # All below runs on the loop's thread.

    def _run(self) -> None:
        try:
            while self._obey():
                if self.engine.can_step:
                    for output in self.engine.step():
                        self._deliver(output)
            self._end_all(FinishReason.CANCELLED, None)
        except Exception as error:
            log.exception("the engine failed; its requests end with an error")
            with self._wake:
                self._failed = error
            self._end_all(FinishReason.ERROR, error)
            if self._on_failure is not None:
                self._on_failure(error)

    def _obey(self) -> bool:
        """Wait for something to do, then carry out the commands in their order. False: leave the loop."""
        wait_s = self._heartbeat_s
        while True:
            with self._wake:
                awake = self._wake.wait_for(self._is_busy, timeout=wait_s)
                commands, self._commands = self._commands, deque()
                closing = self._closing
            if closing:
                for request_id in list(self._live):
                    self.engine.abort(request_id)
                return False
            for command, argument in commands:
                command(argument)
            if awake:
                return True
            measuring = self.engine.measure_aside()
            wait_s = 0.0 if measuring else self._heartbeat_s
            if not measuring:
                self.engine.heartbeat()

    def _is_busy(self) -> bool:
        return bool(self._commands) or self._closing or self.engine.can_step

    def _add(self, request: Request) -> None:
        try:
            self.engine.add_request(request)
        except (InvalidRequestError, ResourceExhaustedError) as error:
            # submit has checked all of this, so this is a defect; still, the request must not hang.
            log.exception("the engine refused a request that had been accepted")
            usage = self._live[request.request_id].usage
            self._deliver(StepOutput(request.request_id, (), usage, FinishReason.ERROR, RuntimeError(str(error))))

    def _open_session(self, past: Past | None, session: Session) -> None:
        self.engine.open_session(session.session_id, past)

    def _abort(self, request_id: str) -> None:
        if request_id in self._live:  # else it ended while the command was waiting
            self.engine.abort(request_id)

    def _deliver(self, output: StepOutput) -> None:
        live = self._live[output.request_id]
        live.usage = output.usage
        if output.finish_reason is not None:
            # Before the callback, so that whoever has seen the end can reuse the id.
            with self._wake:
                del self._live[output.request_id]
                self._admission.end(output.request_id)
                self._outcomes[output.finish_reason] += 1
        if not live.reachable:
            return
        try:
            live.on_output(output)
        except Exception:
            log.exception("the callback of request %r failed; the request is withdrawn", output.request_id)
            live.reachable = False
            self.cancel(output.request_id)

    def _end_all(self, reason: FinishReason, error: Exception | None) -> None:
        # No request can join: submit refuses once _closing or _failed is set.
        for request_id, live in list(self._live.items()):
            self._deliver(StepOutput(request_id, (), live.usage, reason, error))
