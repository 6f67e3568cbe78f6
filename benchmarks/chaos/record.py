"""What is known of every answer under load: what it should be, what came, and when."""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Asked:
    """One kind of request of the load."""

    prompt: Tokens
    sampling: Mapping[str, Any]


@dataclass
class Stream:
    """One answer as it comes."""

    kind: int
    """Its index in the load."""
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    """time.monotonic() when it was asked for, and when each piece came."""
    error: str | None = None
    is_over: bool = False

    def take(self, tokens: Sequence[int]) -> None:
        self.tokens += tokens
        self.times.append(time.monotonic())


@dataclass(frozen=True)
class Fault:
    kind: str
    """"kill": SIGKILL of a worker, "stop": SIGSTOP of one, "server": SIGKILL of the server."""
    mesh: str
    at: float
    """time.monotonic()"""


@dataclass
class Verdict:
    """How the answers compare with the expected ones; each should be 0."""

    lost: int = 0
    """Tokens that never came."""
    repeated: int = 0
    """Tokens that came once more."""
    changed: int = 0
    """Tokens that are others."""
    errors: int = 0
    """Answers that ended with an error."""

    def judge(self, stream: Stream, expected: Tokens) -> None:
        found = tuple(stream.tokens)
        if stream.error is not None:
            self.errors += 1
        if found == expected:
            return
        same = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), None)
        if same is None:
            self.lost += max(len(expected) - len(found), 0)
            self.repeated += max(len(found) - len(expected), 0)
        elif found[same:] == expected[same - (len(found) - len(expected)) :] and len(found) > len(expected):
            self.repeated += len(found) - len(expected)
        else:
            self.changed += len(expected) - same


@dataclass
class Report:
    """All of a run."""

    faults: list[Fault] = field(default_factory=list)
    streams: list[Stream] = field(default_factory=list)
    verdict: Verdict = field(default_factory=Verdict)

    def pause(self, fault: Fault) -> float:
        """The longest time without a piece of any answer, between a fault and the next one, seconds."""
        until = min((other.at for other in self.faults if other.at > fault.at), default=math.inf)
        times = sorted(at for stream in self.streams for at in stream.times)
        within = [fault.at, *(at for at in times if fault.at < at < until)]
        return max((after - before for before, after in itertools.pairwise(within)), default=0.0)

    def rows(self) -> list[tuple[str, str, int, float, float]]:
        """Mesh, kind of fault, how many, median and longest pause of all answers, seconds."""
        kinds = Counter((fault.mesh, fault.kind) for fault in self.faults)
        rows = []
        for (mesh, kind), count in kinds.items():
            pauses = [self.pause(fault) for fault in self.faults if (fault.mesh, fault.kind) == (mesh, kind)]
            rows.append((mesh, kind, count, median(pauses), max(pauses)))
        return rows
