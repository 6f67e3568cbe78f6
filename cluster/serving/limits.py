"""How much a caller may ask: requests, answers at a time, tokens. One account for each token."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cluster.serving.access import Caller
from runtime.config import LimitsConfig
from runtime.errors import ResourceExhaustedError


class LimitError(ResourceExhaustedError):
    """The caller has used what its token may (RESOURCE_EXHAUSTED, 429)."""

    def __init__(self, field: str, limit: float, problem: str, retry_after_s: float) -> None:
        self.retry_after_s = retry_after_s
        remedy = f"Try again in {max(retry_after_s, 1):.0f} s."
        super().__init__(f"server.limits.{field}", limit, problem, remedy)


class Bucket:
    """Fills steadily; what is taken may leave it in debt, and then it gives nothing."""

    def __init__(self, per_minute: float, now: Callable[[], float]) -> None:
        self._size, self._rate, self._now = max(per_minute, 1.0), per_minute / 60, now
        self._level, self._then = self._size, now()

    def wait_s(self, least: float) -> float:
        """Seconds until so much is in it; 0: it is."""
        moment = self._now()
        self._level = min(self._size, self._level + (moment - self._then) * self._rate)
        self._then = moment
        return max(0.0, (least - self._level) / self._rate)

    def take(self, amount: float) -> None:
        """Whether or not it is there."""
        self._level -= amount


class Account:
    """What one token has used."""

    def __init__(self, limits: LimitsConfig, now: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._num_running = 0
        requests, tokens = limits.requests_per_minute, limits.tokens_per_minute
        self._requests = Bucket(requests, now) if requests is not None else None
        self._tokens = Bucket(tokens, now) if tokens is not None else None

    @contextmanager
    def request(self, num_answers: int = 1) -> Iterator[None]:
        """A request runs, for so many answers. Raises LimitError if it may not."""
        limits, most = self._limits, self._limits.concurrent_requests
        if most is not None and self._num_running + num_answers > most:
            problem = f"{self._num_running} answers of this token are running, and {num_answers} more are too many"
            raise LimitError("concurrent_requests", most, problem, 1.0)
        if self._requests is not None and (wait_s := self._requests.wait_s(1.0)):
            assert limits.requests_per_minute is not None
            raise LimitError("requests_per_minute", limits.requests_per_minute, "is used up", wait_s)
        if self._tokens is not None and (wait_s := self._tokens.wait_s(1.0)):
            assert limits.tokens_per_minute is not None
            raise LimitError("tokens_per_minute", limits.tokens_per_minute, "is used up", wait_s)
        if self._requests is not None:
            self._requests.take(1.0)
        self._num_running += num_answers
        try:
            yield
        finally:
            self._num_running -= num_answers

    def spend(self, num_tokens: int) -> None:
        """Tokens of a prompt or an answer have been taken in or given."""
        if self._tokens is not None:
            self._tokens.take(num_tokens)


class Accounts:
    """One for each token; one for all, where nobody needs a token."""

    def __init__(self, defaults: LimitsConfig) -> None:
        self._defaults = defaults
        self._accounts: dict[str, Account] = {}

    def of(self, caller: Caller | None) -> Account:
        """The caller's."""
        name, limits = (caller.name, caller.limits) if caller is not None else ("", self._defaults)
        if name not in self._accounts:
            self._accounts[name] = Account(limits)
        return self._accounts[name]
