"""Deadlines and priorities: who comes first, who is late at its present pace, and who cannot make it at all.

An answer counts as long as it may become, max_new_tokens; that it may end sooner is not counted on. Times are those of
time.perf_counter().
"""

from __future__ import annotations

import math

from runtime.errors import DeadlineError
from runtime.lookahead.sequence import Sequence
from runtime.request import Request

FEW = 4
"""Tokens of an answer before its own pace is believed."""


def due_s(request: Request) -> float:
    """When the answer has to be whole; infinity: whenever."""
    return math.inf if request.deadline_s is None else request.arrival_s + request.deadline_s


def order(request: Request) -> tuple[int, float]:
    """Sorts requests: the highest priority first, then the earliest deadline. Those that are equal keep their order."""
    return -request.priority, due_s(request)


class Pace:
    """How fast the engine is, as its steps have shown. What was not seen yet is taken to cost nothing, so nobody is
    refused for it."""

    RATE = 0.1
    """Weight of one step."""

    def __init__(self) -> None:
        self.token_s = 0.0
        """Of one token of an answer that is alone."""
        self.row_s = 0.0
        """Of one token of a prompt."""

    def observe(self, seconds: float, num_tokens: int, num_sequences: int, alone: float) -> None:
        """A step in which nobody read a prompt has given so many tokens; with one sequence's rows it would have taken
        the share `alone` of its time."""
        if num_tokens:
            self.token_s = self._drawn(self.token_s, seconds * alone * num_sequences / num_tokens)

    def observe_reading(self, seconds: float, num_rows: int) -> None:
        """A step has run so many rows, most of them of prompts."""
        self.row_s = self._drawn(self.row_s, seconds / num_rows)

    def _drawn(self, before: float, now: float) -> float:
        return before + self.RATE * (now - before) if before else now

    def at_best_s(self, num_unread: int, num_missing: int) -> float:
        """Seconds for an answer with so many tokens to read and to give, if it had the engine to itself."""
        return num_unread * self.row_s + num_missing * self.token_s

    def is_late(self, sequence: Sequence, now_s: float) -> bool:
        """Whether a running answer would miss its deadline at its present pace."""
        due = due_s(sequence.request)
        if due == math.inf:
            return False
        usage = sequence.usage
        token_s, num_own = self.token_s, usage.num_new_tokens - usage.num_resumed_tokens
        if num_own >= FEW:
            token_s = (usage.latency_s - usage.ttft_s) / (num_own - 1)
        missing = sequence.request.sampling.max_new_tokens - usage.num_new_tokens
        return now_s + (sequence.num_uncached - 1) * self.row_s + missing * token_s > due

    def refusal(self, request: Request, now_s: float) -> DeadlineError | None:
        """Why a request that waits cannot make it any more; None: it still may."""
        due = due_s(request)
        if due == math.inf:
            return None
        num_given = len(request.resume_from)
        best_s = self.at_best_s(len(request.prompt_ids) + num_given, request.sampling.max_new_tokens - num_given)
        if now_s + best_s <= due:
            return None
        left = f"{max(due - now_s, 0.0):.2f} s of its {request.deadline_s:g} s are left"
        problem = f"the answer takes {best_s:.2f} s at best, and {left}"
        return DeadlineError(problem, "Allow more time, lower sampling.max_new_tokens, or ask when less is running.")
