"""What a load test's timings come to. docs/load.md defines each figure; there is no clock and no network here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from runtime.errors import ConfigError

METRICS = ("ttft", "tpot", "itl", "e2el")
GOALS = ("ttft", "tpot", "e2el")
"""What one request has one value of."""


@dataclass
class Timed:
    """One request as its client saw it. Times are seconds since the request was due."""

    arrivals_s: list[float] = field(default_factory=list)
    """Of each chunk that brought tokens."""
    ended_s: float = 0.0
    """When the answer was whole, or had failed."""
    num_prompt_tokens: int = 0
    num_new_tokens: int = 0
    error: str | None = None
    """Its kind; None: the answer is whole."""
    message: str = ""
    """What the error said."""

    @property
    def ttft_s(self) -> float:
        """Time to first token."""
        return self.arrivals_s[0]

    @property
    def e2el_s(self) -> float:
        """End-to-end latency."""
        return self.ended_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token behind the first; None of an answer of one token."""
        if self.num_new_tokens < 2:
            return None
        return (self.e2el_s - self.ttft_s) / (self.num_new_tokens - 1)

    @property
    def itl_s(self) -> list[float]:
        """Inter-token latencies: the gaps between chunks, which is what a reader waits."""
        return np.diff(self.arrivals_s).tolist()

    def meets(self, goals: dict[str, float]) -> bool:
        """Whether every goal, in milliseconds, is met. What an answer has no value of is no miss."""
        values = {"ttft": self.ttft_s, "tpot": self.tpot_s, "e2el": self.e2el_s}
        return all(value is None or 1e3 * value <= goals[name] for name, value in values.items() if name in goals)


@dataclass(frozen=True)
class Spread:
    """Of many values, in milliseconds."""

    mean: float
    median: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread | None:
        """None where there are no values. Between two values a percentile is interpolated."""
        if not len(seconds):
            return None
        found = 1e3 * np.asarray(seconds, float)
        return cls(float(found.mean()), float(np.median(found)), float(np.percentile(found, 99)))


@dataclass(frozen=True)
class Figures:
    """One load, summed up."""

    load: str
    """How requests came, for people."""
    pace: float
    """Streams at a time, or requests per second: a plot's axis."""
    seconds: float
    """From the first request to the last answer's end."""
    num_requests: int
    errors: dict[str, int]
    """By kind."""
    first_error: str
    num_prompt_tokens: int
    """Of the answered requests, as the server counts them."""
    num_new_tokens: int
    num_chunks: int
    num_good: int | None
    """Answers that met the goals; None: there were none."""
    ttft: Spread | None
    tpot: Spread | None
    itl: Spread | None
    e2el: Spread | None

    @property
    def num_answered(self) -> int:
        return self.num_requests - sum(self.errors.values())

    @property
    def requests_per_s(self) -> float:
        return self.num_answered / self.seconds

    @property
    def tokens_per_s(self) -> float:
        """New tokens of the answered requests."""
        return self.num_new_tokens / self.seconds

    @property
    def total_tokens_per_s(self) -> float:
        """Prompts included."""
        return (self.num_new_tokens + self.num_prompt_tokens) / self.seconds

    @property
    def good_per_s(self) -> float | None:
        """Goodput: answers per second that met the goals."""
        return None if self.num_good is None else self.num_good / self.seconds

    @property
    def tokens_per_chunk(self) -> float:
        """S, as the client sees it."""
        return self.num_new_tokens / self.num_chunks if self.num_chunks else 0.0

    def record(self) -> dict[str, Any]:
        """For JSON; times in milliseconds."""
        derived = (
            "num_answered",
            "requests_per_s",
            "tokens_per_s",
            "total_tokens_per_s",
            "good_per_s",
            "tokens_per_chunk",
        )
        plain = {name: value for name, value in vars(self).items() if name not in METRICS}
        spreads = {f"{name}_ms": spread and vars(spread) for name in METRICS for spread in [getattr(self, name)]}
        return plain | {name: getattr(self, name) for name in derived} | spreads


def summed(load: str, pace: float, seconds: float, timed: Sequence[Timed], goals: dict[str, float]) -> Figures:
    """The figures of one load. Requests that failed count as errors, and in nothing else."""
    done = [each for each in timed if each.error is None]
    failed = [each for each in timed if each.error is not None]
    return Figures(
        load=load,
        pace=pace,
        seconds=max(seconds, 1e-9),
        num_requests=len(timed),
        errors=dict(Counter(str(each.error) for each in failed)),
        first_error=failed[0].message if failed else "",
        num_prompt_tokens=sum(each.num_prompt_tokens for each in done),
        num_new_tokens=sum(each.num_new_tokens for each in done),
        num_chunks=sum(len(each.arrivals_s) for each in done),
        num_good=sum(each.meets(goals) for each in done) if goals else None,
        ttft=Spread.of([each.ttft_s for each in done]),
        tpot=Spread.of([each.tpot_s for each in done if each.tpot_s is not None]),
        itl=Spread.of([gap for each in done for gap in each.itl_s]),
        e2el=Spread.of([each.e2el_s for each in done]),
    )


def read_goals(text: str | None) -> dict[str, float]:
    """The milliseconds of `ttft:500,tpot:20`. Raises ConfigError."""
    goals: dict[str, float] = {}
    for pair in (text or "").replace(" ", ",").split(","):
        if not pair:
            continue
        name, _, value = pair.partition(":")
        try:
            goals[name] = float(value)
            if name not in GOALS or not 0 < goals[name] < float("inf"):
                raise ValueError
        except ValueError:
            problem = "is no goal"
            raise ConfigError("--goodput", pair, problem, f"Write {', '.join(f'{g}:MS' for g in GOALS)}.") from None
    return goals
