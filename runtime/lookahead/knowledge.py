"""What lookahead learns about a model while it runs: kept by one sequence, or shared by all of an engine's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from runtime.core import Acceptance, Bigrams, RecycleTable
from runtime.lookahead.sources import SOURCES, priors
from runtime.lookahead.window import WindowChooser


@dataclass
class Tally:
    """How often guesses were made and accepted: [candidates, accepted ones]."""

    sources: dict[str, list[int]] = field(default_factory=lambda: {name: [0, 0] for name in SOURCES})
    """By who proposed them; what several do counts for each."""
    depths: list[list[int]] = field(default_factory=list)
    """By their depth in the tree, from 1."""

    def add(
        self, names: Sequence[str], by_source: Sequence[tuple[int, int]], by_depth: Sequence[tuple[int, int]]
    ) -> None:
        """A tree's (CandidateTree.tally), of these sources."""
        for name, pair in zip(names, by_source, strict=True):
            self.sources[name][0] += pair[0]
            self.sources[name][1] += pair[1]
        while len(self.depths) < len(by_depth):
            self.depths.append([0, 0])
        for count, pair in zip(self.depths, by_depth, strict=False):
            count[0] += pair[0]
            count[1] += pair[1]


class Knowledge:
    """The model's own likeliest continuations of short contexts, how far each kind of guess can be trusted, and how
    large a window pays.

    Bounded in memory (RecycleTable). Where it is shared, one client's text influences how many steps another's takes,
    never its tokens: a guess is accepted only where the model would have chosen that very token.
    """

    def __init__(self, bigrams: Bigrams | None = None, tally: Tally | None = None) -> None:
        """`bigrams`: what the model says behind single tokens (runtime.tuning.priming), known from the beginning.
        `tally`: to count on in."""
        self.tally = tally if tally is not None else Tally()
        self.bigrams = bigrams
        self.table = RecycleTable(bigrams)
        self.acceptance = Acceptance(priors())
        self.windows = WindowChooser()

    def fresh(self) -> Knowledge:
        """Knowledge of the same model that has learned nothing; it counts on in the same tally."""
        return Knowledge(self.bigrams, self.tally)
