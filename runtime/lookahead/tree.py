"""The verification branch: candidates as one tree of rows, and the walk that accepts a path of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest

from runtime.lookahead.rows import SequenceRows
from runtime.step import Choose


class CandidateTree:
    """Candidates below the current token; a prefix that several share is stored once."""

    def __init__(self, rows: SequenceRows) -> None:
        self.rows = rows
        self._children: dict[tuple[int, int], int] = {}  # (row, token) -> the row of that token after it

    def grow(self, proposals: Iterable[Iterator[Sequence[int]]], room: int, horizon: int) -> None:
        """Add candidates, the sources taking turns, until they are exhausted or `room` rows are used.

        No candidate reaches position `horizon`: a token there sees another cache than this step's.
        """
        max_depth = max(horizon - 1 - self.rows.positions[self.rows.root], 0)
        for round_of_candidates in zip_longest(*proposals, fillvalue=()):
            for candidate in round_of_candidates:
                parent = self.rows.root
                for token in candidate[:max_depth]:
                    child = self._children.get((parent, token))
                    if child is None:
                        if room == 0:
                            return
                        room -= 1
                        child = self._children[parent, token] = self.rows.add(token, parent, Choose.SAMPLE)
                    parent = child

    def walk(self, chosen: Sequence[int]) -> tuple[list[int], list[int]]:
        """Follow the tokens the model chose as far as the tree holds them.

        `chosen[row]` is what one-at-a-time decoding would emit after that row, so a candidate is
        accepted if and only if it equals that token: the text is the same, whatever was proposed.

        Returns the accepted rows below the root, and the tokens emitted: theirs, and the one
        that the model gives after the last of them.
        """
        row = self.rows.root
        path: list[int] = []
        while (child := self._children.get((row, chosen[row]))) is not None:
            path.append(child)
            row = child
        return path, [*(self.rows.tokens[accepted] for accepted in path), chosen[row]]
