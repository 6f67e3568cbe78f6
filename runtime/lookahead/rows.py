"""The rows of one sequence in one step: a chain of uncached tokens, and guesses that hang on its end."""

from __future__ import annotations

from dataclasses import dataclass, field

from runtime.step import Choose

TAIL = 8
"""Tokens of a row's past, its own included, that guesses are made from."""


@dataclass
class SequenceRows:
    """A forest of rows under construction. `tokens`, `parents` and `choose` run in parallel."""

    first_position: int
    """Position of a row without parent: the number of cached tokens."""
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    choose: list[Choose] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    root: int = -1
    """The current token's row, where guesses begin; -1 while the prompt is not all there."""

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, token: int, parent: int, choose: Choose) -> int:
        """Append a row one position after `parent` (-1: after the cached tokens); returns its index."""
        self.tokens.append(token)
        self.parents.append(parent)
        self.choose.append(choose)
        self.positions.append(self.positions[parent] + 1 if parent >= 0 else self.first_position)
        return len(self.tokens) - 1

    def truncate(self, count: int) -> None:
        """Keep the first `count` rows."""
        for column in (self.tokens, self.parents, self.choose, self.positions):
            del column[count:]

    def tails(self, before: tuple[int, ...], length: int) -> list[tuple[int, ...]]:
        """Per row its last `length` tokens, itself included; `before` are those that stand before the first row."""
        tails: list[tuple[int, ...]] = []
        for token, parent in zip(self.tokens, self.parents, strict=True):
            tails.append(((*tails[parent], token) if parent >= 0 else (*before, token))[-length:])
        return tails

    def add_chain(self, tokens: list[int], reaches_end: bool) -> None:
        """The tokens that are not cached yet; with `reaches_end` the last one is the current token."""
        parent = -1
        for token in tokens:
            parent = self.add(token, parent, Choose.NOTHING)
        if reaches_end:
            self.root = parent
            self.choose[parent] = Choose.SAMPLE
