"""The module that core.cpp defines."""

from collections.abc import Iterable, Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Int32 = NDArray[np.int32]
Bools = NDArray[np.bool_]

ProposalList = tuple[int, Sequence[tuple[int, int]]]
"""What one source says of the next token: the feature of all tokens that it does not propose here (absent), and (token,
feature that describes the proposal) of those it does, each token once."""

TAIL: int
"""Tokens of a row's past, its own included, that guesses are made from."""
BIAS: float
"""Logit of a token that nobody proposes; the weights of features are what they add to it."""
RUN: float
"""How far a guess behind a guess is trusted beside its own probability."""

MOST_TEXT: int
"""Tokens of the longest text whose beginning another sequence can have from History."""

def prior(probability: float) -> float:
    """The weight of a feature whose proposals are accepted with this probability when no other source agrees."""

def gumbel(seed: int, position: int, token: int) -> float:
    """The noise of a token at a position, as runtime.model.sampler.gumbel has it."""

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

    @property
    def root_position(self) -> int: ...
    def tokens_of(self, rows: Sequence[int]) -> list[int]:
        """Those of these rows."""

    def __len__(self) -> int: ...
    def add(self, token: int, parent: int, choose: int) -> int:
        """Append a row one position after `parent` (-1: after the cached tokens); returns its index."""

    def score(self, start: int, stop: int) -> None:
        """Have the chain's rows tell how likely the tokens at positions [start, stop) were, each the one behind it."""

    def add_chain(self, tokens: Sequence[int], reaches_end: bool) -> None:
        """The tokens that are not cached yet; with `reaches_end` the last one is the current token."""

class History:
    """What one sequence's text holds of each token (history.h), by which penalties are counted."""

    def __init__(self) -> None: ...
    @property
    def length(self) -> int:
        """Tokens that are committed."""

    def begin(self, output_start: int) -> None:
        """An answer begins at this position; what stands before is its prompt."""

    def commit(self, tokens: Sequence[int]) -> None:
        """The next tokens of the text."""

    def first(self, count: int) -> History:
        """That of a sequence whose text begins with this one's first `count` tokens, of at most MOST_TEXT."""

    def state(self) -> Ints:
        """All of it, for another rank to have with `restored`."""

    @staticmethod
    def restored(state: Sequence[int]) -> History:
        """One with this state. Raises ValueError."""

    def at(self, rows: Int32, row: int) -> tuple[Int32, Int32]:
        """Each token of the text that ends in this row of a plan, and how often the answer has it; 0: the prompt alone
        has it. [n], [n]"""

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

    def learn(self, rows: SequenceRows, before: Sequence[int], chosen: Sequence[int] | Int32, top: Int32) -> None:
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

    def learn(self, rows: SequenceRows, chosen: Int32) -> None:
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
    def sample_by(self, seed: int, temperature: float, top_k: int, top_p: float, min_p: float) -> None:
        """How the sequence's tokens are chosen (noise.h): where by chance, candidates are ranked with the noise."""

class Constraint:
    """What may follow a sequence's text (constraint.h). A subclass in Python has `mask`."""

    def __init__(self) -> None: ...
    @property
    def forced(self) -> int:
        """The only token that the mask which a tree asked for last allows; -1: there is none, or more."""

    def mask(self, path: Sequence[int]) -> Int32:
        """What may follow the text and these tokens behind it: bit t % 32 of word t / 32 stands for token t."""

class GrammarSource(Source):
    """Tokens that a constraint forces: the only ones it allows."""

    PRIORS: ClassVar[list[float]]
    def __init__(self, first_feature: int) -> None: ...
    def follow(self, constraint: Constraint | None) -> None:
        """The constraint that trees have from now on; without one the source is silent."""

class CandidateTree:
    """Candidates below the current token, grown best first (tree.h)."""

    def __init__(
        self,
        rows: SequenceRows,
        tail: Sequence[int],
        max_depth: int,
        sources: Sequence[Source],
        judge: Judge,
        constraint: Constraint | None = None,
    ) -> None:
        """`tail`: the text's last tokens, the current one included. No candidate stands deeper than `max_depth`. What
        the constraint forbids is no candidate."""

    @property
    def first_row(self) -> int:
        """The first candidate's."""

    def masks(self) -> Int32:
        """What the constraint allows behind the current token, and each candidate. [1 + num_candidates, words]"""

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

    def proposers(self) -> list[int]:
        """Of each candidate, in row order, which of the sources propose it: bit i for the i-th."""

    def walk(self, chosen: Sequence[int] | Int32) -> tuple[list[int], list[int]]:
        """Follow the tokens the model chose as far as the tree holds them.

        `chosen[row]` is what one-at-a-time decoding would emit after that row, so a candidate is accepted if and only
        if it equals that token: the text is the same, whatever was proposed.

        Returns the accepted rows below the root, and the tokens emitted: theirs, and the one that the model gives
        after the last of them.
        """

    def learn(self, chosen: Sequence[int] | Int32) -> None:
        """Have the judge learn from the nodes whose next token has become known, whatever fitted in behind them."""

    def credit(self, chosen: Sequence[int] | Int32, source: Source) -> int:
        """How many accepted tokens would have had no place in the tree without this source."""

    def tally(self, chosen: Int32) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """(candidates, accepted ones) that each source has proposed, in the sources' order, and that stand at each
        depth, from 1. What several sources propose counts for each."""

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

# Plans

def assemble(parts: Sequence[tuple[SequenceRows, int]], num_replicas: int) -> Int32:
    """The rows of a step (runtime.step.Row), given those of its sequences and their slots, divided among replicas by
    `partition`. [T, len(Row)]"""

def commit_lines(rows: Int32, start: int, accepted: Sequence[int], num_replicas: int) -> Int32:
    """Lines (runtime.step.Commit) with which the next plan commits these rows of a sequence.

    Args:
        rows: those of the plan [T, len(Row)], of which the sequence's begin at `start`.
        accepted: counted from there, ascending.
    """

GREEDY_BELOW: float
"""runtime.model.sampler.GREEDY_BELOW"""

class Share:
    """The rows of a step that one replica runs, as its decoder wants them. Indices count the replica's own rows.

    Arrays are views: they live as long as they are held.
    """

    def __init__(self, rows: Int32, sequences: Int32, replica: int = 0, min_rows: int = 1) -> None:
        """`rows` and `sequences` of a StepPlan. Rows are repeated where they are fewer than `min_rows`.

        Raises ValueError where rows of one slot do not stand together.
        """

    @property
    def num_rows(self) -> int:
        """L; P is the same or, where rows are repeated, more."""

    @property
    def local(self) -> Ints:
        """[L] indices of the plan's rows."""

    @property
    def columns(self) -> Ints:
        """[3, P] token, position, and the length that dynamic RoPE scales by."""

    @property
    def parents(self) -> Int32:
        """[P] counted from the first row of the same slot; -1: none."""

    @property
    def runs(self) -> list[tuple[int, int, int]]:
        """Slot, first row and end of the rows of each slot."""

    @property
    def wanted(self) -> Ints:
        """[R] rows whose token this replica finds."""

    @property
    def sequence_of(self) -> Ints:
        """[R] the line of `sequences` of each of them."""

    @property
    def sampled(self) -> Ints:
        """Those of the R that choose by chance."""

    @property
    def turns(self) -> list[tuple[int, int]]:
        """Slots in which a turn begins, and how many tokens it may bring."""

    def spread(self, results: Int32) -> tuple[Int32, list[int]]:
        """What each of the L rows gave, from what the wanted ones found.

        Args:
            results: token and packed likeliest ones. [R, 1 + top_k]
        Returns:
            The same for all rows, -1 and zeros for those that chose none [L, 1 + top_k]; and the slots of rows that
            should have chosen one and had none (NOT_A_NUMBER; their other columns are 0).
        """

    def commits(self, lines: Int32) -> list[tuple[int, int, list[int], list[int]]]:
        """What the next plan's commits [C, len(Commit)] say of these rows.

        Per slot: itself, the replica to copy from (-1: none), the rows that the slot staged, and their tokens.
        """

def merge(rows: Int32, results: Sequence[Int32], width: int) -> Int32:
    """What the owner of each row found for it, given every replica's results, line by line. [T, width]"""

def ancestry(parents: NDArray[np.integer]) -> Bools:
    """[t, t]: row i has row j as an ancestor, or is row j. Parents come before their children, else ValueError; -1 is
    none."""

class Keys:
    """In which columns the CPU kernels find the keys of one sequence's rows (keys.h)."""

    def __init__(
        self, retained: Retention, positions: Ints, tokens: Ints, parents: Int32, window: int | None, block: int
    ) -> None: ...
    def addresses(self) -> tuple[int, int, int]:
        """Where `columns`, `tails` and `visible` stand in memory while this object lives; 0: there are none."""

    @property
    def num_columns(self) -> int:
        """C"""

    @property
    def columns(self) -> Ints:
        """[C] indices into the stored tokens and the rows behind them; -1 is none."""

    @property
    def num_tail(self) -> int:
        """Columns that every row of a tree has of its own."""

    @property
    def tails(self) -> Ints:
        """[t * num_tail]"""

    @property
    def num_shared(self) -> int:
        """How many keys, the first ones, `columns` hold."""

    @property
    def visible(self) -> NDArray[np.uint8]:
        """[t * C] whether a row sees a column; empty: all columns that hold keys up to itself."""

# What a cache keeps

class Compaction:
    """How the stored tokens change: some are dropped, and the anchors' keys may move to other positions."""

    @property
    def kept(self) -> Ints:
        """Indices into the tokens stored before, ascending."""

    @property
    def turns(self) -> Ints:
        """[a] for the first a of those kept, the anchors: by how many positions their keys, as they were when they were
        stored, are to be turned. Empty where keys stay as they are."""

    @property
    def num_turned_before(self) -> int:
        """How many of the tokens stored before, the first ones, an earlier compaction has turned."""

class Retention:
    """What is stored of one sequence in a group of layers."""

    @property
    def slot(self) -> bool:
        """Positions are those in the cache."""

    @property
    def num_initial(self) -> int: ...
    @property
    def separators(self) -> list[int]:
        """Ids, ascending."""

    @property
    def max_stored(self) -> int:
        """Most tokens that stay stored between two steps."""

    @property
    def max_turned(self) -> int:
        """Most of them whose keys get turned."""

    length: int
    """Tokens the sequence has had."""

    @property
    def positions(self) -> Ints:
        """[n] positions in the text of the tokens stored, ascending. A copy."""

    @property
    def anchored(self) -> Bools:
        """[n] whether the policy keeps the token when the window leaves it: initial tokens and separators. A copy."""

    @property
    def num_stored(self) -> int: ...
    @property
    def horizon(self) -> int:
        """The first position that a row of the next step must not have: the tokens before are to be stored first."""

    @property
    def num_slot_anchors(self) -> int:
        """Stored tokens, the first ones, whose distance to a row counts from the row's slot, not from its position."""

    def reset(self) -> None:
        """Forget the sequence."""

    def state(self) -> Ints:
        """All that decides what comes next, for another rank to `restore`."""

    def restore(self, state: Sequence[int]) -> None:
        """Stand for the sequence with this state. Raises ValueError where it is none, or needs more room."""

    def commit(self, tokens: Sequence[int] | NDArray[np.integer]) -> Compaction | None:
        """Store the next tokens of the sequence; returns what that changes about those stored."""

    def begin_turn(self, num_coming: int) -> Compaction | None:
        """Make room for the prompt and the answer of a turn, `num_coming` tokens, where the policy evicts per turn."""

    def may_anchor(self, positions: Ints, tokens: Ints) -> Bools:
        """[t] whether tokens at these positions are initial ones or separators."""

    def slots(self, positions: Ints) -> Ints:
        """[t] the places in the cache of rows at these positions."""

    def sees(self, queries: Ints, keys: Ints, anchored: Bools) -> Bools | None:
        """[t, k] whether rows at positions `queries` [t] see tokens before them at `keys` [k]; None: they see all."""

    def num_seen(self, tokens: Sequence[int] | NDArray[np.integer]) -> Ints:
        """[t] how many tokens each of these next ones of the sequence sees, itself included."""

def pull_rows(
    address: int, num_blocks: int, block_bytes: int, row_bytes: int, start: int, rows: Sequence[int] | Ints
) -> None:
    """In this process's memory, blocks of rows from `address` on: row start + i of each block becomes what its row
    start + rows[i] was. Raises ValueError unless `rows` are ascending."""

class Sliding(Retention):
    """Anchors and a window of recent tokens (full: all of them). StreamingLLM section 3.2, SepLLM section 3.1."""

    def __init__(
        self, window: int | None, max_kept: int, slot: bool, separators: Sequence[int] = (), num_initial: int = 0
    ) -> None:
        """`window` counts the current token, None is everything; `max_kept` bounds anchors and window together.

        Tokens that have left the window are dropped whenever the length is a multiple of `interval`.
        """

    @property
    def window(self) -> int | None: ...
    @property
    def interval(self) -> int:
        """A power of two, about an eighth of the window."""

class Compacting(Retention):
    """Initial tokens, the newest separators, and a recent run that is compacted when it is time.

    SepLLM section 3.3, and, with eviction per turn, StreamingLLM's demo.
    """

    def __init__(
        self,
        size: int,
        local: int | None,
        slot: bool,
        separators: Sequence[int] = (),
        num_initial: int = 0,
        max_separators: int = 0,
        compact_after_attention: bool = False,
        per_turn: bool = False,
    ) -> None:
        """`size` is c, the most tokens stored; `local` is w, how many of the newest stay after a compaction. None,
        for eviction per turn: as many as leave room for the turn."""

    @property
    def max_separators(self) -> int: ...
    @property
    def num_anchors(self) -> int:
        """Initial tokens and separators before the recent run; none until the first compaction."""

class Ledger:
    """The account of what one sequence keeps, over all groups of layers (runtime.retention.Ledger)."""

    def __init__(self, groups: Sequence[tuple[Retention, int]], capacity: int | None) -> None:
        """What each group keeps, and how many layers it has."""

    @property
    def length(self) -> int: ...
    @property
    def horizon(self) -> int:
        """The first position that a row of the next step must not have."""

    @property
    def kept_last(self) -> float:
        """Tokens that the newest token saw over all tokens up to it, mean over layers."""

    @property
    def kept_sum(self) -> float:
        """The same, both counts summed over all tokens so far."""

    def full_at(self, tokens: Sequence[int]) -> int:
        """Index of the one of these next tokens that fills the slot of a bounded policy; len(tokens) if none does."""

    def begin_turn(self, num_coming: int) -> None:
        """A turn of so many tokens begins."""

    def commit(self, tokens: Sequence[int]) -> None:
        """The next tokens have entered the cache."""
