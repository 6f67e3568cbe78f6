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
    SCORE = 3
    """How likely the prompt's next token is; it chooses none."""


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
    MIN_P = 8  # float32 bits, as the next three
    REPETITION = 9  # 0 and 1 are none
    PRESENCE = 10
    FREQUENCY = 11
    OUTPUT_START = 12  # position of the answer's first token
    IS_CONTROLLED = 13  # 1: what a row chooses is not simply its largest logit, at any temperature
    NEXT_TOKEN = 14  # of the prompt, behind the step's rows: what the last of them, if it is to SCORE, is asked about


class Commit(IntEnum):
    """Columns of `StepPlan.commits`: staged rows of the previous step that enter the cache, in order."""

    ROW = 0  # row index in the previous step
    SOURCE = 1  # replica whose keys and values the others copy; -1: every replica has run the row


class Bias(IntEnum):
    """Columns of `StepPlan.biases`: what is added to tokens' logits, told once, when a turn begins."""

    SLOT = 0
    TOKEN = 1
    VALUE = 2  # float32 bits
    UNTIL = 3  # position of the chosen token from which on it is not added any more


class Reuse(IntEnum):
    """Columns of `StepPlan.reuses`: slots whose new sequence begins as one that is or was in some slot, in order."""

    SLOT = 0
    SOURCE = 1  # the slot that has the tokens; its own, where the sequence there has ended
    LENGTH = 2  # tokens


MOST_BIASES = 2048
"""Of one turn."""
FOREVER = 2**31 - 1
"""Behind every position."""


MOST_LOGPROBS = 20
"""Likeliest tokens of which a request may be told the log-probabilities."""

MASK_WORDS = 1 << 18
"""Words of masks that a step may bring, besides one for each sequence."""
MOST_MASK_WORDS = 1 << 13
"""Of one mask: 262,144 tokens."""


def next_number(number: int) -> int:
    """Of the step behind the one with this number; they begin anew when an int32 is full."""
    return number % (2**31 - 1) + 1


def _no_commits() -> Int32:
    return np.empty((0, len(Commit)), np.int32)


def _no_biases() -> Int32:
    return np.empty((0, len(Bias)), np.int32)


def _no_masks() -> Int32:
    return np.empty((0, 0), np.int32)


def _no_masked() -> Int32:
    return np.empty((0, 2), np.int32)


def _no_reuses() -> Int32:
    return np.empty((0, len(Reuse)), np.int32)


def _no_slots() -> Int32:
    return np.empty(0, np.int32)


@dataclass
class StepPlan:
    """One step for every replica. A plan with no rows is a heartbeat."""

    rows: Int32  # [T, len(Row)]
    sequences: Int32  # [S, len(Seq)]
    commits: Int32 = field(default_factory=_no_commits)  # [C, len(Commit)]
    resets: Int32 = field(default_factory=_no_slots)  # [R] slots emptied before this step
    reuses: Int32 = field(default_factory=_no_reuses)  # [U, len(Reuse)] after commits and resets
    biases: Int32 = field(default_factory=_no_biases)  # [B, len(Bias)]
    masks: Int32 = field(default_factory=_no_masks)  # [M, words]: bit t % 32 of word t / 32 set: token t may be chosen
    masked: Int32 = field(default_factory=_no_masked)  # [N, 2] rows, ascending, and the mask of each
    number: int = 0
    """Of all steps, from 1 (`next_number`): a rank that has done what a plan brings besides its rows does it no second
    time. 0: the executor's to give."""
    top_k: int = 0
    """Likeliest tokens wanted of every row that chooses a token, besides the chosen one."""
    num_logprobs: int | None = None
    """Likeliest tokens whose log-probabilities are wanted besides the chosen one's; None: no log-probabilities are."""
    stop: bool = False
    """The workers leave their loop."""

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    @property
    def result_width(self) -> int:
        """int32 words that a row gives: its token, the likeliest ones, packed; then, if log-probabilities are wanted,
        the chosen token's (float32 bits), and ids and log-probabilities of the likeliest."""
        return 1 + self.top_k + (0 if self.num_logprobs is None else 1 + 2 * self.num_logprobs)

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
    logprobs: Int32
    """[T, 0, or 1 + 2 num_logprobs] as StepPlan.result_width says."""
    seconds: dict[str, float]
    """broadcast, forward, gather: seconds of each part, as the coordinator saw them."""

    @classmethod
    def of(cls, plan: StepPlan, found: Int32, seconds: dict[str, float]) -> StepResult:
        """`found` [T, plan.result_width]"""
        return cls(found[:, 0], found[:, 1 : 1 + plan.top_k], found[:, 1 + plan.top_k :], seconds)


@dataclass(frozen=True)
class WireLayout:
    """Where the parts of a plan stand in its buffer; the same on every rank, from the config alone."""

    max_rows: int
    max_sequences: int

    HEADER = 14
    """Words: how many the plan has in all; lines of rows, sequences, commits, resets, reuses, biases, masks and masked;
    words of a mask; number, top_k, num_logprobs (-1: none), stop."""
    RESULT_HEADER = 1
    """Words before the rows in a replica's result: the step's microseconds on this worker."""

    @property
    def usual_length(self) -> int:
        """int32 words of a plan's buffer that every plan takes."""
        start, room = self._regions[-1]
        return start + room

    @property
    def length(self) -> int:
        """int32 words of a plan's buffer, with room for what only some plans have: biases, and masks."""
        return (
            self.usual_length
            + MASK_WORDS
            + 2 * self.max_rows
            + self.max_sequences * (len(Reuse) + MOST_BIASES * len(Bias) + MOST_MASK_WORDS)
        )

    @property
    def result_length(self) -> int:
        """int32 words of the longest result."""
        return self.RESULT_HEADER + self.max_rows * (2 + MOST_TOP_K + 2 * MOST_LOGPROBS)

    def result_words(self, plan: StepPlan, lp: int) -> int:
        """int32 words of a replica's result; as many on each, since a gather wants equal parts."""
        return self.RESULT_HEADER + plan.most_local_rows(lp) * plan.result_width

    def encode(self, plan: StepPlan, buffer: Int32) -> None:
        """Write `plan` into `buffer` [length]. Asserts that it fits."""
        assert plan.top_k <= MOST_TOP_K, f"{plan.top_k} likeliest tokens do not fit a result"
        assert (plan.num_logprobs or 0) <= MOST_LOGPROBS, f"{plan.num_logprobs} log-probabilities do not fit a result"
        parts = (plan.rows, plan.sequences, plan.commits, plan.resets)
        rare = (plan.reuses, plan.biases, plan.masks, plan.masked)
        num_logprobs = -1 if plan.num_logprobs is None else plan.num_logprobs
        used = self.usual_length + sum(part.size for part in rare)
        assert used <= len(buffer), "biases and masks do not fit the wire layout"
        lengths = (*map(len, parts), *map(len, rare), plan.masks.shape[1])
        buffer[: self.HEADER] = (used, *lengths, plan.number, plan.top_k, num_logprobs, plan.stop)
        for part, (start, room) in zip(parts, self._regions, strict=True):
            assert part.size <= room, f"{len(part)} lines do not fit the wire layout"
            if part.size:
                buffer[start : start + part.size] = part.ravel()
        start = self.usual_length
        for part in rare:
            buffer[start : start + part.size] = part.ravel()
            start += part.size

    def decode(self, buffer: Int32) -> StepPlan:
        """The plan in `buffer`; its arrays are copies."""
        _, *lengths, mask_words, number, top_k, num_logprobs, stop = buffer[: self.HEADER].tolist()
        rows, sequences, commits, resets = (
            buffer[start : start + length * width].reshape(length, width).copy()
            for (start, _), length, width in zip(self._regions, lengths, _WIDTHS, strict=False)
        )
        plan = StepPlan(rows, sequences, commits, resets.ravel(), number=number, top_k=top_k, stop=bool(stop))
        plan.num_logprobs = None if num_logprobs < 0 else num_logprobs
        start = self.usual_length
        if any(lengths[4:]):
            found = []
            for length, width in zip(lengths[4:], (len(Reuse), len(Bias), mask_words, 2), strict=True):
                found.append(buffer[start : start + length * width].reshape(length, width).copy())
                start += length * width
            plan.reuses, plan.biases, plan.masks, plan.masked = found
        return plan

    @functools.cached_property
    def _regions(self) -> list[tuple[int, int]]:
        """(start, words) of rows, sequences, commits and resets."""
        lines = self.max_rows, self.max_sequences, self.max_rows, self.max_sequences
        sizes = [count * width for count, width in zip(lines, _WIDTHS, strict=True)]
        starts = itertools.accumulate([self.HEADER, *sizes[:-1]])
        return list(zip(starts, sizes, strict=True))


_WIDTHS = len(Row), len(Seq), len(Commit), 1
