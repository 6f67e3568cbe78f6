"""The module that core.cpp defines."""

from collections.abc import Iterable, Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

ProposalList = tuple[int, Sequence[tuple[int, int]]]
"""What one source says of the next token: the feature of all tokens that it does not propose here (absent), and (token,
feature that describes the proposal) of those it does, each token once."""

TAIL: int
"""Tokens of a row's past, its own included, that guesses are made from."""
BIAS: float
"""Logit of a token that nobody proposes; the weights of features are what they add to it."""
RUN: float
"""How far a guess behind a guess is trusted beside its own probability."""

def prior(probability: float) -> float:
    """The weight of a feature whose proposals are accepted with this probability when no other source agrees."""

class SequenceRows:
    """The rows of one sequence in one step: a chain of uncached tokens, and guesses that hang on its end."""

    def __init__(self, first_position: int) -> None:
        """`first_position`: of a row without parent, which is the number of cached tokens."""

    @property
    def root(self) -> int:
        """The current token's row, where guesses begin; -1 while the prompt is not all there."""

    @property
    def tokens(self) -> list[int]: ...
    @property
    def positions(self) -> list[int]: ...
    @property
    def parents(self) -> list[int]: ...
    @property
    def choose(self) -> list[int]:
        """What each row's logits are for (runtime.step.Choose)."""

    def __len__(self) -> int: ...
    def add(self, token: int, parent: int, choose: int) -> int:
        """Append a row one position after `parent` (-1: after the cached tokens); returns its index."""

    def add_chain(self, tokens: Sequence[int], reaches_end: bool) -> None:
        """The tokens that are not cached yet; with `reaches_end` the last one is the current token."""

    def as_array(self) -> NDArray[np.int32]:
        """Token, position, parent and choose of each row. [T, 4]"""

class Acceptance:
    """Weights of all features (acceptance.h); several sequences may learn the same ones."""

    def __init__(self, priors: Sequence[float]) -> None: ...
    weights: list[float]
    """Those of `priors`, and then those of a token's circumstances: how many lists propose it, how often the text has
    had it, and whether it stands after the text or after a guess."""
    evidence: list[float]
    """Sums of squared gradients; the more, the slower a weight moves."""

class Judge:
    """Turns the sources' lists into guesses for one sequence, and learns from what the model chose."""

    def __init__(self, acceptance: Acceptance) -> None: ...
    bias: float
    """What this text adds to every logit: how much harder or easier to guess it is than others."""

    def observe(self, tokens: Sequence[int]) -> None:
        """The text has grown by these tokens. What it had before comes again more often than what it never had."""

    def forget(self, text: Sequence[int]) -> None:
        """Of the text only these tokens, the newest, are left."""

    def judge(self, lists: Sequence[ProposalList]) -> list[tuple[int, float]]:
        """All tokens proposed with their probabilities after the text, likeliest first; ties go to the lower id."""

    def without(self, lists: Sequence[ProposalList], token: int, source: Source) -> float:
        """The token's probability if `source` had not proposed it."""

    def learn(self, lists: Sequence[ProposalList], chosen: int) -> None:
        """The model chose `chosen` where this was said."""

class Bigrams:
    """What the model says behind each single token, whatever stands before it."""

    def __init__(self, top: NDArray[np.int32]) -> None:
        """`top`: the likeliest tokens, packed, behind the tokens from 0 on. [V or fewer, k]"""

class RecycleTable:
    """The model's likeliest next tokens by the last one, two and three tokens (recycling.h)."""

    def __init__(self, bigrams: Bigrams | None = None, max_contexts: int = ...) -> None:
        """At most `max_contexts` by one token, by two and by three; the one not updated for longest goes first.

        `bigrams` say what follows where that is not known.
        """

    def __len__(self) -> int: ...
    def update(self, tail: Sequence[int], top: Sequence[int]) -> None:
        """The likeliest tokens after a text that ends in `tail`, packed (runtime.step.TOP_BITS), likeliest first."""

    def learn(self, rows: SequenceRows, before: Sequence[int], chosen: Sequence[int], top: NDArray[np.int32]) -> None:
        """`update` with what a step gave behind each row. [T], [T, k]

        `before`: the tokens before the first row. Rows that chose no token (-1) are left out.
        """

    def lookup(self, tail: Sequence[int]) -> list[tuple[int, list[tuple[int, int]]]]:
        """Of the two longest contexts known, longest first: its number of tokens, 0 for bigrams, and (token, class of
        its log-probability in half nats) of the likeliest ones."""

class NgramPool:
    """The n-gram pool: per first token, at most G n-grams, the least recently used one out first (Fu et al., 2024,
    section 3.2)."""

    def __init__(self, ngram_size: int, guess_set_size: int) -> None: ...
    def add(self, ngram: Sequence[int]) -> None:
        """Put an n-gram (length N) in, as the newest of its first token."""

    def add_text(self, text: Sequence[int]) -> None:
        """Put every n-gram of `text` in."""

    def tails(self, first: int) -> list[list[int]]:
        """The N-1 tokens after `first` in each of its n-grams, newest first."""

class Source:
    """One sequence's source of candidates. A subclass in Python has at least `propose`."""

    def __init__(self, first_feature: int, num_features: int) -> None:
        """Its features have the numbers from `first_feature` on."""

    @property
    def first_feature(self) -> int: ...
    is_silent: bool
    """It has nothing to propose in this step."""

    def propose(self, tail: Sequence[int], depth: int) -> Iterable[ProposalList]:
        """Tokens that may follow a text that ends in `tail`, of which the last `depth` tokens are guesses."""

    def lay_out(self, rows: SequenceRows, room: int) -> None:
        """Add rows of the source's own, at most `room`, below `rows.root`."""

    def learn(self, rows: SequenceRows, chosen: Sequence[int]) -> None:
        """See the token each row of the step chose; -1: none."""

    def observe(self, tokens: Sequence[int], is_prompt: bool) -> None:
        """The text has grown by these tokens, a prompt's or the model's."""

    def forget(self, text: Sequence[int]) -> None:
        """Of the text only these tokens, the newest, are left."""

class NgramSource(Source):
    """What an n-gram pool holds behind the last tokens: the paper's verification branch."""

    PRIORS: ClassVar[list[float]]
    def __init__(
        self, first_feature: int, ngram_size: int, guess_set_size: int, from_prompt: bool, from_output: bool
    ) -> None: ...
    @property
    def pool(self) -> NgramPool: ...

class SuffixSource(Source):
    """Prompt lookup: what followed the longest suffixes of the text where they stood before."""

    PRIORS: ClassVar[list[float]]
    def __init__(self, first_feature: int) -> None: ...

class RecycleSource(Source):
    """The likeliest tokens that the model gave the last time it stood behind the same tokens, in whatever row."""

    PRIORS: ClassVar[list[float]]
    def __init__(self, first_feature: int, table: RecycleTable) -> None: ...

class CandidateTree:
    """Candidates below the current token, grown best first (tree.h)."""

    def __init__(
        self, rows: SequenceRows, tail: Sequence[int], max_depth: int, sources: Sequence[Source], judge: Judge
    ) -> None:
        """`tail`: the text's last tokens, the current one included. No candidate stands deeper than `max_depth`."""

    @property
    def rows(self) -> SequenceRows: ...
    @property
    def num_candidates(self) -> int: ...
    @property
    def margin(self) -> float:
        """Probability of the least likely candidate taken in; 1 where there is none."""

    @property
    def next_probability(self) -> float:
        """Of being accepted, of the candidate that would come next; 0 where there is none."""

    def fill(self, room: int) -> None:
        """Grow until `room` candidates are in the tree, or no more are known."""

    def truncate(self, count: int) -> None:
        """Keep the first `count` candidates only; the tree cannot grow any more."""

    def walk(self, chosen: Sequence[int]) -> tuple[list[int], list[int]]:
        """Follow the tokens the model chose as far as the tree holds them.

        `chosen[row]` is what one-at-a-time decoding would emit after that row, so a candidate is accepted if and only
        if it equals that token: the text is the same, whatever was proposed.

        Returns the accepted rows below the root, and the tokens emitted: theirs, and the one that the model gives
        after the last of them.
        """

    def learn(self, chosen: Sequence[int]) -> None:
        """Have the judge learn from the nodes whose next token has become known, whatever fitted in behind them."""

    def credit(self, chosen: Sequence[int], source: Source) -> int:
        """How many accepted tokens would have had no place in the tree without this source."""

def grow(trees: Sequence[tuple[CandidateTree, int]], num_rows: int, seconds: NDArray[np.float64]) -> float:
    """Grow trees, each to at most so many candidates, to where expected tokens per second are highest (planner.h).

    Args:
        num_rows: rows that the step has without them.
        seconds: t(T) for T = 0, 1, ..., non-decreasing; its length bounds the rows.
    Returns:
        The expected number of tokens of the step.
    """

def partition(
    parents: Sequence[int] | NDArray[np.int32], num_replicas: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Divide a forest of rows into parts of nearly equal size, each closed under ancestors (partition.h).

    The leaves, in depth-first order, are cut into contiguous runs, so that neighbours share their
    ancestors; the cut makes the largest part as small as such a cut can.

    Args:
        parents: per row its parent's index, lower than its own, or -1. [T]
        num_replicas: at most 31.
    Returns:
        owner [T], the first replica that has the row, and replicas [T], the bit set of all that have it.
    """
