"""Texts in the cache that a new prompt may begin with: prefix reuse.

A sequence that has ended leaves its tokens in its slot until the slot is given away. A new request takes the slot whose
text its prompt has most of, or copies what a running sequence has. One that would read what a running sequence is just
reading waits for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from runtime.core import MOST_TEXT
from runtime.retention import Ints

LEAST = 16
"""Tokens that are worth it: fewer are read along with the rest."""


@dataclass(frozen=True)
class Place:
    """Where a request begins."""

    slot: int
    source: int = -1
    length: int = 0
    """Tokens of its prompt that `source` has."""


class TextsLeft:
    """The texts of slots without a sequence."""

    def __init__(self) -> None:
        self._left: dict[int, Ints] = {}  # by slot, the one left longest ago first

    def leave(self, slot: int, text: Sequence[int]) -> None:
        """A sequence has ended whose cached tokens are these."""
        self._left.pop(slot, None)
        if LEAST <= len(text) <= MOST_TEXT:
            self._left[slot] = np.asarray(text, np.int64)

    def lengths(self) -> dict[int, int]:
        """Tokens of each, by slot. Safe from any thread."""
        return {slot: len(text) for slot, text in list(self._left.items())}

    def clear(self) -> None:
        """Something has written over the slots."""
        self._left.clear()

    def take(self, slot: int) -> None:
        """The slot is another sequence's now."""
        self._left.pop(slot, None)

    def place(
        self, prompt: Ints, free: Iterable[int], running: Iterable[tuple[int, Sequence[int], int]]
    ) -> Place | None:
        """Where a request with this prompt begins; None: it waits for what a running sequence is reading.

        Args:
            free: slots, at least one.
            running: (slot, text, cached tokens of it) of sequences that read or answer now.
        """
        most = len(prompt) - 1  # the last token's row chooses the answer's first
        free = list(free)
        kept = [(_alike(prompt[:most], self._left[slot]), slot) for slot in free if slot in self._left]
        length, source = max(kept, default=(0, -1))
        others = [(_alike(prompt[:most], np.asarray(text[:most])), cached, slot) for slot, text, cached in running]
        if any(alike - max(cached, length) >= LEAST for alike, cached, _ in others):
            return None
        copied, copied_from = max(((min(alike, cached), slot) for alike, cached, slot in others), default=(0, -1))
        if length >= LEAST and length >= copied:
            return Place(source, source, length)
        # A slot without a text, or the one whose text was left longest ago
        order = list(self._left)
        slot = min(free, key=lambda one: order.index(one) if one in self._left else -1)
        return Place(slot, copied_from, copied) if copied >= LEAST else Place(slot)


def _alike(one: Ints, other: Ints) -> int:
    """Tokens with which both begin."""
    count = min(len(one), len(other))
    differing = np.flatnonzero(one[:count] != other[:count])
    return int(differing[0]) if len(differing) else count
