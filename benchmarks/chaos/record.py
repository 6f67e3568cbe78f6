"""What is known of every answer under load: what it should be, what came, and when."""

from __future__ import annotations

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

    def pauses(self, fault: Fault) -> list[float]:
        """Seconds from a fault to the next piece of each answer that was running."""
        found = []
        for stream in self.streams:
            before = [at for at in stream.times if at <= fault.at]
            after = [at for at in stream.times if at > fault.at]
            if before and after:
                found.append(after[0] - fault.at)
        return found

    def rows(self) -> list[tuple[str, str, int, float, float]]:
        """Mesh, kind of fault, how many, median and longest pause until the first answer goes on."""
        kinds = Counter((fault.mesh, fault.kind) for fault in self.faults)
        rows = []
        for (mesh, kind), count in kinds.items():
            first = [min(self.pauses(f), default=0.0) for f in self.faults if (f.mesh, f.kind) == (mesh, kind)]
            rows.append((mesh, kind, count, median(first), max(first)))
        return rows
