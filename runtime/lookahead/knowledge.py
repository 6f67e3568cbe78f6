"""What lookahead learns about a model while it runs: kept by one sequence, or shared by all of an engine's."""

from __future__ import annotations

from runtime.core import Acceptance, Bigrams, RecycleTable
from runtime.lookahead.sources import priors
from runtime.lookahead.window import WindowChooser


class Knowledge:
    """The model's own likeliest continuations of short contexts, how far each kind of guess can be trusted, and how
    large a window pays.

    Bounded in memory (RecycleTable). Where it is shared, one client's text influences how many steps another's takes,
    never its tokens: a guess is accepted only where the model would have chosen that very token.
    """

    def __init__(self, bigrams: Bigrams | None = None) -> None:
        """`bigrams`: what the model says behind single tokens (runtime.tuning.priming), known from the beginning."""
        self.bigrams = bigrams
        self.table = RecycleTable(bigrams)
        self.acceptance = Acceptance(priors())
        self.windows = WindowChooser()

    def fresh(self) -> Knowledge:
        """Knowledge of the same model that has learned nothing."""
        return Knowledge(self.bigrams)
