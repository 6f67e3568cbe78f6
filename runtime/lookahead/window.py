"""The lookahead branch: a 2D window of W columns and N-1 rows that holds a Jacobi trajectory.

Row r, column c stands at position p + c + r, where p is the position of the current token, which is
row 0, column 0. A cell attends to the committed text, to row 0 columns 0..c, and to rows 1..r of its
own column: as parents, (r, c) hangs on (r-1, c), and (0, c) on (0, c-1).
(Fu et al., 2024, arXiv 2402.02057, sections 3.1 and 3.2.)
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from runtime.core import SequenceRows
from runtime.step import Choose


class Window:
    """The window of one sequence.

    It starts as one row of tokens drawn from the prompt and gains a row per step; while it fills,
    its columns move left by one per step, so it starts N-2 columns wider than W.
    """

    def __init__(self, window_size: int, ngram_size: int, prompt: Sequence[int], seed: int = 0) -> None:
        self.window_size, self.ngram_size = window_size, ngram_size
        self._random = random.Random(seed)
        self._prompt = prompt
        width = window_size + ngram_size - 2
        self.levels: list[list[int]] = [self._draw(width)]
        """levels[r][c]; levels[0][0] is a place-holder for the current token."""
        self._last_row: list[int] = []

    @property
    def num_rows(self) -> int:
        """Rows the next step takes, the current token's included."""
        return sum(len(level) for level in self.levels)

    @property
    def is_full(self) -> bool:
        return len(self.levels) == self.ngram_size - 1

    def lay_out(self, rows: SequenceRows) -> None:
        """Hang the window on the current token. Only the last row's cells choose a token."""
        above: list[int] = []
        last = len(self.levels) - 1
        for r, level in enumerate(self.levels):
            choose = Choose.ARGMAX if r == last else Choose.NOTHING
            if r == 0:
                above = [rows.root]
                for token in level[1:]:
                    above.append(rows.add(token, above[-1], choose))
            else:
                above = [rows.add(token, parent, choose) for token, parent in zip(level, above, strict=True)]
        self._last_row = above

    def advance(self, current: int, chosen: Sequence[int]) -> list[tuple[int, ...]]:
        """Move on after a step: `current` was its current token, `chosen` the token each row chose.

        Rows shift up by one however many tokens the step emitted, as in the paper's code: moving the
        columns by the other accepted tokens too was measured, and gains nothing. A cell without a token
        (negative: its logits are not numbers) guesses the current one.
        Returns the W new n-grams (length N), none while the window is filling.
        """
        guesses = [chosen[row] if chosen[row] >= 0 else current for row in self._last_row]
        self.levels[0][0] = current
        if not self.is_full:
            self.levels = [level[1:] for level in [*self.levels, guesses]]
            return []
        ngrams = list(zip(*self.levels, guesses, strict=True))
        self.levels = [*self.levels[1:], guesses]
        return ngrams

    def _draw(self, count: int) -> list[int]:
        return self._random.choices(self._prompt, k=count)


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
