"""What a step's rows are spent on: as many candidates as pay for themselves, by the measured cost of a step.

A step of T rows takes t(T) seconds (runtime.cost) and emits, in expectation, one token per sequence plus the sum of
the candidates' probabilities. The planner grows the trees of all running sequences together, likeliest candidate
first, and cuts them where expected tokens per second are highest. Where no candidate pays, none is run.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.lookahead.tree import CandidateTree

CHECK_EVERY = 8
"""Candidates between two looks at whether still more could pay."""

CAUTION = 0.02
"""Expected gain below which plain decoding is kept: estimates are not better than this."""


@dataclass
class Bed:
    """One sequence's tree, and how many candidates it may get."""

    tree: CandidateTree
    room: int


def grow(beds: Sequence[Bed], num_rows: int, seconds: NDArray[np.float64]) -> float:
    """Grow the trees to where expected tokens per second are highest.

    Args:
        num_rows: rows that the step has without them.
        seconds: t(T) for T = 0, 1, ..., non-decreasing; its length bounds the rows.
    Returns:
        The expected number of tokens of the step.
    """
    expected = float(len(beds))
    best_rate = (1 + CAUTION) * expected / seconds[num_rows]
    best_count, best_expected = 0, expected
    order: list[Bed] = []
    heap = [(-bed.tree.next_probability, index) for index, bed in enumerate(beds) if bed.room > 0]
    heapq.heapify(heap)
    while heap and num_rows + len(order) + 1 < len(seconds):
        negative, index = heapq.heappop(heap)
        if negative == 0:
            break
        bed = beds[index]
        if len(order) % CHECK_EVERY == 0:
            rest = seconds[num_rows + len(order) + 1 :]
            if ((expected - negative * np.arange(1, len(rest) + 1)) / rest).max() <= best_rate:
                break
        bed.tree.grow()
        order.append(bed)
        expected -= negative
        rate = expected / seconds[num_rows + len(order)]
        if rate > best_rate:
            best_rate, best_count, best_expected = rate, len(order), expected
        if bed.tree.num_candidates < bed.room:
            heapq.heappush(heap, (-bed.tree.next_probability, index))
    kept = order[:best_count]
    for bed in beds:
        bed.tree.truncate(sum(other is bed for other in kept))
    return best_expected


RUNGS = ((0, 0), (5, 4), (8, 5), (15, 5), (30, 5), (60, 5))
"""(W, N) of the windows to choose among, each about twice as many rows as the one before; the first is none."""

PRIOR_WORTH = 0.004
"""Tokens per step that a row of the smallest window gives beside the other sources, before anything is known."""

SATURATION = 0.6
"""A priori, what a row of the next larger window is worth beside one of this."""

PATIENCE = 16
"""Steps between two decisions: a window takes N-2 steps to fill, and its n-grams some more to be of use."""


class WindowChooser:
    """How large a window pays: learned per size from the accepted tokens that only the window's n-grams brought in.

    A window's rows compete with the tree's: the next larger one is taken while a row of it is worth more than the
    likeliest candidate that found no place any more.
    """

    def __init__(self) -> None:
        self.worth = [PRIOR_WORTH * SATURATION**rung for rung in range(len(RUNGS) - 1)]
        """Per rung from the second on, tokens per step and row."""
        self.rung = 0
        self._steps = 0
        self._credit = 0.0
        self._margin = 0.0

    @property
    def size(self) -> tuple[int, int]:
        """(W, N) of the window to run; (0, 0) is none."""
        return RUNGS[self.rung]

    def observe(self, credit: float, margin: float) -> None:
        """A step has passed: `credit` tokens were accepted that no other source would have brought in, and `margin` was
        the probability of the last candidate that the planner took in, 1 where it took none."""
        self._steps += 1
        self._credit += credit
        self._margin += margin
        if self._steps == PATIENCE:
            self._decide(self._credit / PATIENCE, self._margin / PATIENCE)
            self._steps, self._credit, self._margin = 0, 0.0, 0.0

    def _decide(self, credit: float, margin: float) -> None:
        for index in range(len(self.worth)):
            prior = PRIOR_WORTH * SATURATION**index
            if index + 1 == self.rung:
                self.worth[index] += 0.3 * (credit / rows_of(self.rung) - self.worth[index])
            else:
                self.worth[index] += 0.02 * (prior - self.worth[index])  # what is not tried is forgotten
        for index in range(len(self.worth) - 1, 0, -1):  # in a smaller window a row is worth at least as much
            self.worth[index - 1] = max(self.worth[index - 1], self.worth[index])
        self.rung = 0
        while self.rung < len(self.worth) and self.worth[self.rung] > margin:
            self.rung += 1


def rows_of(rung: int) -> int:
    """Rows of a full window of this size, W (N - 1)."""
    window_size, ngram_size = RUNGS[rung]
    return window_size * max(ngram_size - 1, 0)
