"""StepPlan: what one step runs, and its wire layout, one int32 tensor of fixed length.

Rows of a step form a forest. A row attends to its slot's cached tokens, to itself and to its
ancestors in the step (the `parent` chain); its position is its parent's plus one. The prompt's
chunks, the lookahead window and the candidate tree are all such rows (see lookahead/).
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]


TOP_BITS = 8
"""Low bits of a packed likeliest token: its log-probability, in sixteenths of a nat below zero, at most 255 of them."""


MOST_TOP_K = 16
"""Likeliest tokens that a row can be asked for."""

NOT_A_NUMBER = -2
"""In a token's place: the row's largest logit is NaN or infinite, so the model has none to give."""


class Choose(IntEnum):
    """What a row's logits are for."""

    NOTHING = 0
    """Only its keys and values are wanted; it never reaches the LM head."""
    SAMPLE = 1
    """The token decoding would emit after it, by the sequence's sampling parameters."""
    ARGMAX = 2
    """The likeliest token: a Jacobi guess."""


class Row(IntEnum):
    """Columns of `StepPlan.rows`."""

    TOKEN = 0
    POSITION = 1
    PARENT = 2  # row index in this step, or -1: attends to the cache directly
    CHOOSE = 3
    SLOT = 4  # cache slot of its sequence; rows of one slot stand together
    OWNER = 5  # replica that computes its logits
    REPLICAS = 6  # bit r set: replica r runs the row (its owner, or an ancestor some replica needs)


class Seq(IntEnum):
    """Columns of `StepPlan.sequences`, one line per slot with rows in this step."""

    SLOT = 0
    ROPE_LENGTH = 1  # prompt length, which dynamic RoPE scales by
    TEMPERATURE = 2  # float32 bits
    TOP_K = 3
    TOP_P = 4  # float32 bits
    SEED_LOW = 5  # the seed's low 31 bits
    SEED_HIGH = 6  # the seed's high 32 bits
    NUM_COMING = 7  # tokens of a turn that begins, which eviction per turn makes room for; 0: none begins


class Commit(IntEnum):
    """Columns of `StepPlan.commits`: staged rows of the previous step that enter the cache, in order."""

    ROW = 0  # row index in the previous step
    SOURCE = 1  # replica whose keys and values the others copy; -1: every replica has run the row


def _no_commits() -> Int32:
    return np.empty((0, len(Commit)), np.int32)


def _no_slots() -> Int32:
    return np.empty(0, np.int32)


@dataclass
class StepPlan:
    """One step for every replica. A plan with no rows is a heartbeat."""

    rows: Int32  # [T, len(Row)]
    sequences: Int32  # [S, len(Seq)]
    commits: Int32 = field(default_factory=_no_commits)  # [C, len(Commit)]
    resets: Int32 = field(default_factory=_no_slots)  # [R] slots emptied before this step
    top_k: int = 0
    """Likeliest tokens wanted of every row that chooses a token, besides the chosen one."""
    stop: bool = False
    """The workers leave their loop."""

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    def most_local_rows(self, lp: int) -> int:
        """Rows of the replica that runs most."""
        if lp == 1:
            return self.num_rows
        return max(int((self.rows[:, Row.REPLICAS] >> replica & 1).sum()) for replica in range(lp))

    def local_rows(self, replica: int) -> NDArray[np.int64]:
        """Indices of the rows that `replica` runs, ascending."""
        return np.flatnonzero(self.rows[:, Row.REPLICAS] >> replica & 1)

    @classmethod
    def empty(cls, stop: bool = False) -> StepPlan:
        return cls(np.empty((0, len(Row)), np.int32), np.empty((0, len(Seq)), np.int32), stop=stop)


@dataclass
class StepResult:
    """What a step gave: one token per row that chose one, and where the time went."""

    tokens: Int32  # [T]; -1 for rows that chose none, NOT_A_NUMBER for those that could not
    top: Int32  # [T, top_k] likeliest tokens, packed (runtime.model.sampler.top_tokens); zeros for rows without a token
    seconds: dict[str, float]
    """broadcast, forward, gather: seconds of each part, as the coordinator saw them."""


@dataclass(frozen=True)
class WireLayout:
    """Where the parts of a plan stand in its buffer; the same on every rank, from the config alone."""

    max_rows: int
    max_sequences: int

    HEADER = 6  # rows, sequences, commits, resets, top_k, stop
    RESULT_HEADER = 1
    """Words before the rows in a replica's result: the step's microseconds on this worker."""

    @property
    def length(self) -> int:
        """int32 words of a plan's buffer."""
        start, room = self._regions[-1]
        return start + room

    @property
    def result_length(self) -> int:
        """int32 words of the longest result."""
        return self.RESULT_HEADER + self.max_rows * (1 + MOST_TOP_K)

    def result_words(self, plan: StepPlan, lp: int) -> int:
        """int32 words of a replica's result; as many on each, since a gather wants equal parts."""
        return self.RESULT_HEADER + plan.most_local_rows(lp) * (1 + plan.top_k)

    def encode(self, plan: StepPlan, buffer: Int32) -> None:
        """Write `plan` into `buffer` [length]. Asserts that it fits."""
        assert plan.top_k <= MOST_TOP_K, f"{plan.top_k} likeliest tokens do not fit a result"
        parts = (plan.rows, plan.sequences, plan.commits, plan.resets)
        buffer[: self.HEADER] = (*map(len, parts), plan.top_k, plan.stop)
        for part, (start, room) in zip(parts, self._regions, strict=True):
            assert part.size <= room, f"{len(part)} lines do not fit the wire layout"
            if part.size:
                buffer[start : start + part.size] = part.ravel()

    def decode(self, buffer: Int32) -> StepPlan:
        """The plan in `buffer`; its arrays are copies."""
        *lengths, top_k, stop = buffer[: self.HEADER].tolist()
        rows, sequences, commits, resets = (
            buffer[start : start + length * width].reshape(length, width).copy()
            for (start, _), length, width in zip(self._regions, lengths, _WIDTHS, strict=True)
        )
        return StepPlan(rows, sequences, commits, resets.ravel(), top_k, bool(stop))

    @functools.cached_property
    def _regions(self) -> list[tuple[int, int]]:
        """(start, words) of rows, sequences, commits and resets."""
        lines = self.max_rows, self.max_sequences, self.max_rows, self.max_sequences
        sizes = [count * width for count, width in zip(lines, _WIDTHS, strict=True)]
        starts = itertools.accumulate([self.HEADER, *sizes[:-1]])
        return list(zip(starts, sizes, strict=True))


_WIDTHS = len(Row), len(Seq), len(Commit), 1
