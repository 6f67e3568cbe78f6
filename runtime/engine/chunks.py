"""How many rows of prompts a step takes beside running answers, so that these do not stall."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from runtime.config import SchedulerConfig

RATE = 0.1
"""Weight of the newest step in what is usual."""
FIRST_ROWS = 4.0
"""Rows of an answer in a step, before there was one."""
LEAST = 32
"""Rows that prompts get in any case: fewer hardly shorten a step, and on a machine that other programs slow down a
prompt would never be read."""
MOST_STRETCH = 2.5
"""Most that prompts' rows are believed to take beyond the curve: more is the machine's doing, not theirs."""


class Chunks:
    """The chunk is as large as keeps the step within `max_stall` times the usual step of the answers that run, by the
    cost curve. What prompts' rows take beyond the curve, which was measured over a short text, is learned."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._max_rows, self._max_stall = config.max_rows, config.max_stall
        self._rows_each = FIRST_ROWS
        self._stretch = 1.0

    def decoded(self, num_rows: int, num_sequences: int) -> None:
        """A step without prompts has so many rows."""
        self._rows_each += RATE * (num_rows / num_sequences - self._rows_each)

    def observe(self, seconds: float, expected: float) -> None:
        """A step with prompts took `seconds`, where the curve says `expected`."""
        ratio = min(max(seconds / expected, 1 / MOST_STRETCH), MOST_STRETCH)
        self._stretch *= (ratio / self._stretch) ** RATE

    @property
    def guess_rows(self) -> int:
        """Most guesses of an answer beside a prompt: no more than it usually has."""
        return round(self._rows_each)

    def most_rows(self, num_answers: int, seconds: NDArray[np.float64]) -> int:
        """Of all prompts together, beside so many answers; `seconds` is t(T) for T = 0, 1, ..."""
        usual = min(max(round(self._rows_each * num_answers), num_answers), self._max_rows)
        bound = self._max_stall * seconds[usual] / max(self._stretch, 1.0)
        found = int(np.searchsorted(seconds, bound, side="right")) - 1 - usual
        return min(max(found, LEAST), self._max_rows // 2)
