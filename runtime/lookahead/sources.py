"""Candidate sources: each proposes tokens that may follow a node of the candidate tree.

A new one is a class here, its name in SOURCES and in `LookaheadConfig.sources`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from runtime.config import LookaheadConfig
from runtime.lookahead.acceptance import Column, prior
from runtime.lookahead.pool import NgramPool
from runtime.lookahead.recycling import CLASSES, MAX_ORDER, RecycleTable
from runtime.lookahead.rows import TAIL, SequenceRows
from runtime.lookahead.window import Window


class Source:
    """One sequence's source. The engine calls, per step: lay_out, propose (per node), learn, observe."""

    PRIORS: tuple[float, ...] = ()
    """A weight for each feature, to begin with (runtime.lookahead.acceptance)."""

    def __init__(self, config: LookaheadConfig, prompt: Sequence[int], first_feature: int, table: RecycleTable) -> None:
        """`first_feature` is the number of its first feature; `table` what the model gave before, shared by sources."""
        self.config = config
        self.first_feature = first_feature

    @property
    def features(self) -> range:
        """The numbers of its features."""
        return range(self.first_feature, self.first_feature + len(self.PRIORS))

    @property
    def is_silent(self) -> bool:
        """Whether it has nothing to propose in this step."""
        return False

    def propose(self, tail: tuple[int, ...], depth: int) -> Iterable[Column]:
        """Tokens that may follow a text that ends in `tail`, of which the last `depth` tokens are guesses."""
        raise NotImplementedError

    def lay_out(self, rows: SequenceRows, room: int) -> None:
        """Add rows of the source's own, at most `room`, below `rows.root`."""

    def learn(self, rows: SequenceRows, chosen: Sequence[int]) -> None:
        """See the token each row of the step chose; -1: none."""

    def observe(self, text: Sequence[int], num_new: int, is_prompt: bool) -> None:
        """See `text` grown by `num_new` tokens, a prompt's or the model's."""

    def forget(self, text: Sequence[int]) -> None:
        """Of the text only these tokens, the newest, are left."""


class JacobiSource(Source):
    """The paper's algorithm: an n-gram pool fed by the lookahead window, the prompt and the output."""

    DEPTHS, AGES = 3, 4
    PRIORS = (0.0, *(prior(p / (1 + age / 2)) for p in (0.06, 0.1, 0.15) for age in range(4)))
    """By how many tokens of the n-gram are there already, and by how old it is among the pool's."""

    def __init__(self, config: LookaheadConfig, prompt: Sequence[int], first_feature: int, table: RecycleTable) -> None:
        super().__init__(config, prompt, first_feature, table)
        self.pool = NgramPool(config.ngram_size, config.guess_set_size)
        self._prompt = prompt
        self.window = None if config.planner else Window(config.window_size, config.ngram_size, prompt)
        self._needs_window = config.planner and "suffix" in config.sources
        """Without one its n-grams are the text's own, and `suffix` knows longer ones."""
        self._laid_out = False
        self._next: dict[tuple[int, ...], list[int]] = {}  # guesses so far -> what follows them in the pool, new first

    @property
    def is_silent(self) -> bool:
        return self.window is None and self._needs_window

    def propose(self, tail: tuple[int, ...], depth: int) -> Iterable[Column]:
        if depth == 0:
            self._next.clear()
            for ngram in self.pool.tails(tail[-1]):
                for length, token in enumerate(ngram):
                    followers = self._next.setdefault(ngram[:length], [])
                    if token not in followers:
                        followers.append(token)
        followers = [] if depth >= TAIL else self._next.get(tail[len(tail) - depth :] if depth else (), [])
        first = self.first_feature + 1 + min(depth, self.DEPTHS - 1) * self.AGES
        oldest = self.AGES - 1
        yield Column(self.first_feature, first, [(token, min(age, oldest)) for age, token in enumerate(followers)])

    def resize(self, window_size: int, ngram_size: int) -> None:
        """Go on with a window of this size, a new one if it has another now; 0 columns are none."""
        if window_size == 0:
            self.window = None
        elif self.window is None or (self.window.window_size, self.window.ngram_size) != (window_size, ngram_size):
            self.window = Window(window_size, ngram_size, self._prompt)

    def lay_out(self, rows: SequenceRows, room: int) -> None:
        self._laid_out = self.window is not None and self.window.num_rows - 1 <= room
        if self.window is not None and self._laid_out:
            self.window.lay_out(rows)

    def learn(self, rows: SequenceRows, chosen: Sequence[int]) -> None:
        if self.window is not None and self._laid_out:
            for ngram in self.window.advance(rows.tokens[rows.root], chosen):
                self.pool.add(ngram)

    def observe(self, text: Sequence[int], num_new: int, is_prompt: bool) -> None:
        if self.is_silent:
            return
        if self.config.pool_from_prompt if is_prompt else self.config.pool_from_output:
            self.pool.add_text(text[-(num_new + self.config.ngram_size - 1) :])


class SuffixSource(Source):
    """Prompt lookup: what followed the longest suffixes of the text where they stood before."""

    MAX_PROPOSALS = 8
    PRIORS = (
        0.0,
        *(
            prior(match * share)
            for match in (0.08, 0.2, 0.4, 0.55, 0.65, 0.7, 0.75, 0.8)
            for share in (0.3, 0.6, 1.0)
            for _ in range(2)
        ),
    )
    """By the length of the match, the share of its followers that were this token, and whether it was seen twice."""
    MAX_MATCH = len(PRIORS) // 6
    MAX_PLACES = 32
    """Places of the text looked at, the newest ones."""

    def __init__(self, config: LookaheadConfig, prompt: Sequence[int], first_feature: int, table: RecycleTable) -> None:
        super().__init__(config, prompt, first_feature, table)
        self._text: list[int] = []
        self._places: dict[tuple[int, ...], list[int]] = {}  # two tokens -> where in the text others followed them
        self._followers: dict[int, dict[int, int]] = {}  # one token -> how often which one followed it, newest last
        self._counts: dict[int, int] = {}  # one token -> how often any did

    def propose(self, tail: tuple[int, ...], depth: int) -> Iterable[Column]:
        proposals: dict[int, int] = {}
        matches = [(self._match(tail, place), self._text[place]) for place in self._newest_places(tail[-2:])]
        for length in sorted({length for length, _ in matches}, reverse=True):
            followers: dict[int, int] = {}
            for other, token in matches:
                if other >= length:
                    followers[token] = followers.get(token, 0) + 1
            self._add(proposals, followers.items(), sum(followers.values()), length)
        newest = reversed(self._followers.get(tail[-1], {}).items())
        self._add(proposals, newest, self._counts.get(tail[-1], 0), 1)
        yield Column(self.first_feature, self.first_feature + 1, list(proposals.items()))

    def _newest_places(self, pair: tuple[int, ...]) -> list[int]:
        return self._places.get(pair, [])[: -self.MAX_PLACES - 1 : -1]

    def _match(self, tail: tuple[int, ...], place: int) -> int:
        """How many of the tail's last tokens, two of which do, stand before a place of the text."""
        length, most = 2, min(self.MAX_MATCH, len(tail), place)
        while length < most and self._text[place - length - 1] == tail[-length - 1]:
            length += 1
        return length

    def _add(self, proposals: dict[int, int], followers: Iterable[tuple[int, int]], total: int, length: int) -> None:
        """Propose those of the followers, newest first, that no longer match proposes, while there is room."""
        for token, count in followers:
            if len(proposals) == self.MAX_PROPOSALS:
                return
            if token not in proposals:
                share = 2 if count == total else int(2 * count >= total)
                proposals[token] = (length - 1) * 6 + 2 * share + (count > 1)

    def observe(self, text: Sequence[int], num_new: int, is_prompt: bool) -> None:
        start = max(len(self._text), 1)
        self._text += text[len(text) - num_new :]
        for place in range(start, len(self._text)):
            token, before = self._text[place], self._text[place - 1]
            followers = self._followers.setdefault(before, {})
            followers[token] = followers.pop(token, 0) + 1  # to the young end
            self._counts[before] = self._counts.get(before, 0) + 1
            if place >= 2:
                self._places.setdefault((self._text[place - 2], before), []).append(place)

    def forget(self, text: Sequence[int]) -> None:
        self._text, self._places, self._followers, self._counts = [], {}, {}, {}
        self.observe(text, len(text), is_prompt=True)


class RecycleSource(Source):
    """The likeliest tokens that the model gave the last time it stood behind the same tokens, in whatever row."""

    PRIORS = (
        0.0,  # nothing is known here
        *(
            weight * prior(trust * math.exp(-(kind + 0.5) * 0.5)) if kind < CLASSES else 0.0
            for weight in (1.0, 0.3)  # of the longest context known, and of the next
            for trust in (0.5, 0.75, 0.85)  # that the probability given behind 1, 2, 3 tokens holds here, too
            for kind in range(CLASSES + 1)  # the last: not among the likeliest
        ),
    )
    """By context (the longest known, or the next), by its length, and by the log-probability it gave."""

    def __init__(self, config: LookaheadConfig, prompt: Sequence[int], first_feature: int, table: RecycleTable) -> None:
        super().__init__(config, prompt, first_feature, table)
        self.table = table

    def propose(self, tail: tuple[int, ...], depth: int) -> Iterable[Column]:
        place = 0
        for place, (order, likeliest) in enumerate(self.table.lookup(tail), 1):
            first = self.first_feature + 1 + ((place - 1) * MAX_ORDER + order - 1) * (CLASSES + 1)
            yield Column(first + CLASSES, first, likeliest)
        for _ in range(place, 2):
            yield Column(self.first_feature, self.first_feature, ())


SOURCES: dict[str, type[Source]] = {"jacobi": JacobiSource, "suffix": SuffixSource, "recycle": RecycleSource}


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
