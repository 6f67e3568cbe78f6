"""What the server's doors have in common: the engine once it is there, the threads that read for it, and the calls
that run."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cluster.serving import logs
from cluster.serving.access import Tokens
from cluster.serving.limits import Accounts
from cluster.serving.metrics import Metrics
from cluster.serving.state import SessionStore
from cluster.serving.threads import RequestThreads
from cluster.serving.visits import Visit
from cluster.wire.statuses import IdleError, UnauthenticatedError
from runtime.config import Config
from runtime.engine.loop import EngineLoop
from runtime.errors import InvalidRequestError, OutriderError, WorkerError

if TYPE_CHECKING:
    from runtime.engine.engine import Engine  # which compiles when it is imported for the first time


class SlowReaderError(IdleError):
    """A client does not read what it asked for."""


class Desk:
    """Shared by all doors; lives on the event loop."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.threads = RequestThreads()
        self.tokens: Tokens | None = None
        """Who may call; None: whoever can."""
        self._accounts = Accounts(config.server.limits)
        self.num_refused = 0
        """Calls that were refused for what they asked."""
        self.metrics = Metrics(lambda: self._opened)
        self._opened: tuple[Engine, EngineLoop] | None = None
        self.store: SessionStore | None = None
        """Where conversations are kept that outlive their call."""
        self._draining = False
        self._live: set[asyncio.Task[object]] = set()

    def open(self, engine: Engine, loop: EngineLoop) -> None:
        """Take calls from now on."""
        self._opened = engine, loop

    @property
    def opened(self) -> tuple[Engine, EngineLoop]:
        """The engine and its loop. Raises WorkerError before there is one."""
        if self._opened is None:
            raise WorkerError("the model is still being loaded")
        return self._opened

    def check_taking(self) -> None:
        """Raise WorkerError if no new request can be taken."""
        if self._draining:
            raise WorkerError("the server is shutting down")
        _, loop = self.opened
        if loop.failed is not None:
            known = isinstance(loop.failed, OutriderError)  # else what it says may be a client's text
            raise WorkerError(f"the engine has failed: {loop.failed if known else type(loop.failed).__name__}")

    def refused(self, error: Exception) -> None:
        """A call is refused for what it asks."""
        self.num_refused += 1
        self.metrics.refuse(error)

    @property
    def has_failed(self) -> bool:
        """Whether nothing will be answered any more."""
        return self._opened is not None and self._opened[1].failed is not None

    @contextmanager
    def visit(self, door: str, method: str, authorization: str | None) -> Iterator[Visit]:
        """The current task is a call, which draining waits for. Raises UnauthenticatedError where a token is needed."""
        try:
            caller = self.tokens.caller(authorization) if self.tokens is not None else None
        except UnauthenticatedError as error:
            self.refused(error)
            raise
        visit = Visit(door, method, self._accounts.of(caller), self.metrics, caller)
        visit.texts = {} if self.config.server.log_prompts else None
        task = asyncio.current_task()
        assert task is not None
        self._live.add(task)
        try:
            yield visit
        finally:
            self._live.discard(task)
            logs.access(visit)
            self.metrics.end(door, method, visit.status)

    def check_length(self, num_tokens: int) -> None:
        """Raise InvalidRequestError if a prompt has more tokens than one may have."""
        most = self.config.server.max_prompt_tokens
        if num_tokens > most:
            problem = f"has more than server.max_prompt_tokens, {most}"
            raise InvalidRequestError("prompt", f"{num_tokens} tokens", problem, "Shorten it.")

    async def written(self, writing: Awaitable[None]) -> None:
        """Wait until a client has read enough for more to be written. Raises SlowReaderError if it does not."""
        try:
            async with asyncio.timeout(self.config.server.write_timeout_s):
                await writing
        except TimeoutError:
            limit_s = self.config.server.write_timeout_s
            raise SlowReaderError(f"the answer was not read for {limit_s:g} s (server.write_timeout_s)") from None

    async def drain(self, grace_s: float) -> None:
        """Refuse new requests, and wait, at most `grace_s` seconds, until the calls have ended."""
        self._draining = True
        if self._live:
            await asyncio.wait(self._live, timeout=grace_s)

    def close(self) -> None:
        """Nothing is read any more."""
        self.threads.close()
        if self.store is not None:
            self.store.close()
