"""The n-gram pool: per first token, at most G n-grams, the least recently used one out first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


class NgramPool:
    """N-grams by their first token (Fu et al., 2024, section 3.2: the n-gram pool and its size G)."""

    def __init__(self, ngram_size: int, guess_set_size: int) -> None:
        self.ngram_size, self.guess_set_size = ngram_size, guess_set_size
        self._tails: dict[int, dict[tuple[int, ...], None]] = {}  # insertion order is age, oldest first

    def add(self, ngram: Sequence[int]) -> None:
        """Put an n-gram (length N) in, as the newest of its first token."""
        first, tail = ngram[0], tuple(ngram[1:])
        tails = self._tails.setdefault(first, {})
        tails.pop(tail, None)
        tails[tail] = None
        if len(tails) > self.guess_set_size:
            del tails[next(iter(tails))]

    def add_text(self, text: Sequence[int]) -> None:
        """Put every n-gram of `text` in."""
        for start in range(len(text) - self.ngram_size + 1):
            self.add(text[start : start + self.ngram_size])

    def tails(self, first: int) -> Iterator[tuple[int, ...]]:
        """The N-1 tokens after `first` in each of its n-grams, newest first."""
        return reversed(self._tails.get(first, {}))

    def __len__(self) -> int:
        return sum(len(tails) for tails in self._tails.values())
