"""Candidate sources: each proposes what may follow the current token.

A new one is a class here, its name in SOURCES and in `LookaheadConfig.sources`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from runtime.config import LookaheadConfig
from runtime.lookahead.pool import NgramPool
from runtime.lookahead.rows import SequenceRows
from runtime.lookahead.window import Window


class Source:
    """One sequence's source. The engine calls, per step: lay_out, propose, learn, observe."""

    def __init__(self, config: LookaheadConfig, prompt: Sequence[int]) -> None:
        self.config = config

    def propose(self, text: Sequence[int]) -> Iterator[Sequence[int]]:
        """Continuations of `text` (prompt and output), best first; any number, any length."""
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

    def __init__(self, config: LookaheadConfig, prompt: Sequence[int]) -> None:
        super().__init__(config, prompt)
        self.pool = NgramPool(config.ngram_size, config.guess_set_size)
        self.window = Window(config.window_size, config.ngram_size, prompt)
        self._laid_out = False

    def propose(self, text: Sequence[int]) -> Iterator[Sequence[int]]:
        return self.pool.tails(text[-1])

    def lay_out(self, rows: SequenceRows, room: int) -> None:
        self._laid_out = self.window.num_rows - 1 <= room
        if self._laid_out:
            self.window.lay_out(rows)

    def learn(self, rows: SequenceRows, chosen: Sequence[int]) -> None:
        if self._laid_out:
            for ngram in self.window.advance(rows.tokens[rows.root], chosen):
                self.pool.add(ngram)

    def observe(self, text: Sequence[int], num_new: int, is_prompt: bool) -> None:
        if self.config.pool_from_prompt if is_prompt else self.config.pool_from_output:
            self.pool.add_text(text[-(num_new + self.config.ngram_size - 1) :])


class SuffixSource(Source):
    """Prompt lookup: what followed the longest suffix of the text the last times it was seen."""

    MAX_MATCH = 6
    """Longest suffix looked up, tokens."""
    MAX_DRAFT = 10
    """Tokens copied from behind a match."""

    def __init__(self, config: LookaheadConfig, prompt: Sequence[int]) -> None:
        super().__init__(config, prompt)
        self._ends: dict[tuple[int, ...], list[int]] = {}  # suffix -> where its continuations begin, oldest first

    def propose(self, text: Sequence[int]) -> Iterator[Sequence[int]]:
        seen: set[int] = set()
        for length in range(min(self.MAX_MATCH, len(text)), 0, -1):
            for start in reversed(self._ends.get(tuple(text[-length:]), ())):
                if len(seen) == self.config.guess_set_size:
                    return
                if start < len(text) and start not in seen:
                    seen.add(start)
                    yield text[start : start + self.MAX_DRAFT]

    def observe(self, text: Sequence[int], num_new: int, is_prompt: bool) -> None:
        for end in range(len(text) - num_new + 1, len(text) + 1):
            for length in range(1, min(self.MAX_MATCH, end) + 1):
                self._ends.setdefault(tuple(text[end - length : end]), []).append(end)

    def forget(self, text: Sequence[int]) -> None:
        self._ends.clear()
        self.observe(text, len(text), is_prompt=True)


SOURCES: dict[str, type[Source]] = {"jacobi": JacobiSource, "suffix": SuffixSource}
