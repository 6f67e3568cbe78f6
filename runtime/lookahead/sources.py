"""Candidate sources: each proposes tokens that may follow a node of the candidate tree.

A new one is a class here, its name in SOURCES and in `LookaheadConfig.sources`. What it proposes may be written in
Python; the ones here do so in C++ (core/sources.h).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from runtime import core
from runtime.config import LookaheadConfig
from runtime.core import RecycleTable, SequenceRows, Source
from runtime.lookahead.window import Window
from runtime.step import Int32


class SourceType(Protocol):
    """What stands in SOURCES: a class of sources."""

    @property
    def PRIORS(self) -> Sequence[float]:
        """A weight for each feature, to begin with (core.prior)."""

    def __call__(
        self, config: LookaheadConfig, prompt: Sequence[int], first_feature: int, table: RecycleTable
    ) -> Source:
        """`first_feature` is the number of its first feature; `table` what the model gave before, shared by sources."""
        ...


class JacobiSource(core.NgramSource):
    """The paper's algorithm: an n-gram pool fed by the lookahead window, the prompt and the output."""

    def __init__(self, config: LookaheadConfig, prompt: Sequence[int], first_feature: int, table: RecycleTable) -> None:
        pool = config.ngram_size, config.guess_set_size, config.pool_from_prompt, config.pool_from_output
        super().__init__(first_feature, *pool)
        self._prompt = prompt
        self._needs_window = config.planner and "suffix" in config.sources
        """Without one its n-grams are the text's own, and `suffix` knows longer ones."""
        self._laid_out = False
        self.window: Window | None = None
        self.resize(*(0, 0) if config.planner else (config.window_size, config.ngram_size))

    def resize(self, window_size: int, ngram_size: int) -> None:
        """Go on with a window of this size, a new one if it has another now; 0 columns are none."""
        if window_size == 0:
            self.window = None
        elif self.window is None or (self.window.window_size, self.window.ngram_size) != (window_size, ngram_size):
            self.window = Window(window_size, ngram_size, self._prompt)
        self.is_silent = self.window is None and self._needs_window

    def lay_out(self, rows: SequenceRows, room: int) -> None:
        """Add the window's rows below `rows.root`, if there is room for all."""
        self._laid_out = self.window is not None and self.window.num_rows - 1 <= room
        if self.window is not None and self._laid_out:
            self.window.lay_out(rows)

    def learn(self, rows: SequenceRows, chosen: Int32) -> None:
        """See the token each row of the step chose; -1: none."""
        if self.window is not None and self._laid_out:
            for ngram in self.window.advance(rows.tokens[rows.root], chosen.tolist()):
                self.pool.add(ngram)


class SuffixSource(core.SuffixSource):
    """Prompt lookup: what followed the longest suffixes of the text where they stood before."""

    def __init__(self, config: LookaheadConfig, prompt: Sequence[int], first_feature: int, table: RecycleTable) -> None:
        super().__init__(first_feature)


class RecycleSource(core.RecycleSource):
    """The likeliest tokens that the model gave the last time it stood behind the same tokens, in whatever row."""

    def __init__(self, config: LookaheadConfig, prompt: Sequence[int], first_feature: int, table: RecycleTable) -> None:
        super().__init__(first_feature, table)


class GrammarSource(core.GrammarSource):
    """The tokens that the request's grammar forces."""

    def __init__(self, config: LookaheadConfig, prompt: Sequence[int], first_feature: int, table: RecycleTable) -> None:
        super().__init__(first_feature)


SOURCES: dict[str, SourceType] = {
    "jacobi": JacobiSource,
    "suffix": SuffixSource,
    "recycle": RecycleSource,
    "grammar": GrammarSource,
}


def has_rows(source: Source) -> bool:
    """Whether the source lays out rows of its own, or learns from every step's."""
    kind = type(source)
    return kind.lay_out is not Source.lay_out or kind.learn is not Source.learn


def priors() -> list[float]:
    """The weights of all sources' features, in the order of SOURCES."""
    return [weight for source in SOURCES.values() for weight in source.PRIORS]


def first_features() -> dict[str, int]:
    """Where each source's features begin among them."""
    first, starts = 0, {}
    for name, source in SOURCES.items():
        starts[name] = first
        first += len(source.PRIORS)
    return starts
