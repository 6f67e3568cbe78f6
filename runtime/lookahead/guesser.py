"""What one sequence guesses: its candidate sources, the judge of what they propose, and what both learn."""

from __future__ import annotations

from collections.abc import Sequence

from runtime.config import LookaheadConfig, SamplingParams
from runtime.core import TAIL, CandidateTree, Constraint, Judge, SequenceRows
from runtime.lookahead.knowledge import Knowledge
from runtime.lookahead.sources import SOURCES, GrammarSource, JacobiSource, RecycleSource, first_features, has_rows
from runtime.step import Int32


class Guesser:
    """The sources of one sequence. Per step: lay_out, plant (a tree, which then grows), learn, observe."""

    def __init__(self, config: LookaheadConfig, text: Sequence[int], knowledge: Knowledge) -> None:
        """`text` is what the window's first tokens are drawn from."""
        self.config = config
        self.knowledge = knowledge
        self.judge = Judge(knowledge.acceptance)
        starts = first_features()
        self.sources = [SOURCES[name](config, text, starts[name], knowledge.table) for name in config.sources]
        self._names: dict[int, tuple[str, ...]] = {}  # of sources, by their bits
        self._constraint: Constraint | None = None
        self._jacobi = next((source for source in self.sources if isinstance(source, JacobiSource)), None)
        self._learners = [source for source in self.sources if has_rows(source)]
        self.wants_top = any(isinstance(source, RecycleSource) for source in self.sources)
        """Whether rows are to give the model's likeliest tokens, not only the chosen one."""

    def begin_turn(self, sampling: SamplingParams, constraint: Constraint | None) -> None:
        """Tokens are chosen by these parameters from now on, among those that `constraint` allows."""
        self._constraint = constraint
        for source in self.sources:
            if isinstance(source, GrammarSource):
                source.follow(constraint)
            if isinstance(source, RecycleSource):
                kinds = sampling.top_k, sampling.top_p, sampling.min_p
                source.sample_by(sampling.seed, sampling.temperature, *kinds)

    def lay_out(self, rows: SequenceRows, room: int) -> None:
        """Add the rows that sources run for themselves, at most `room`."""
        if self._jacobi is not None and self.config.planner:
            window_size, ngram_size = self.knowledge.windows.size
            self._jacobi.resize(min(window_size, self.config.window_size), min(ngram_size, self.config.ngram_size))
        for source in self._learners:
            source.lay_out(rows, room)

    def plant(self, rows: SequenceRows, text: Sequence[int], max_depth: int) -> CandidateTree:
        """A tree below the current token, the last one of `text`, with no candidates yet."""
        return CandidateTree(rows, text[-TAIL:], max_depth, self.sources, self.judge, self._constraint)

    def proposers(self, tree: CandidateTree) -> list[tuple[str, ...]]:
        """Of each candidate, in row order, the names of the sources that propose it."""
        return [self._named(bits) for bits in tree.proposers()]

    def _named(self, bits: int) -> tuple[str, ...]:
        if bits not in self._names:
            self._names[bits] = tuple(name for index, name in enumerate(self.config.sources) if bits >> index & 1)
        return self._names[bits]

    def learn(self, tree: CandidateTree, chosen: Int32, top: Int32, before: Sequence[int]) -> None:
        """Take in a step's results: the token each row chose, and the likeliest ones, packed.

        `before`: the tokens before the step's first row.
        """
        self.knowledge.tally.add(self.config.sources, *tree.tally(chosen))
        if self._jacobi is not None and self.config.planner:
            self.knowledge.windows.observe(tree.credit(chosen, self._jacobi), tree.margin)
        tree.learn(chosen)
        self.learn_rows(tree.rows, chosen, top, before)
        for source in self._learners:
            source.learn(tree.rows, chosen)

    def learn_rows(self, rows: SequenceRows, chosen: Int32, top: Int32, before: Sequence[int]) -> None:
        """Remember what the model gave behind each row."""
        if self.wants_top:
            self.knowledge.table.learn(rows, before, chosen, top)

    def observe(self, tokens: Sequence[int], is_prompt: bool) -> None:
        """The text has grown by these tokens."""
        self.judge.observe(tokens)
        for source in self.sources:
            source.observe(tokens, is_prompt)

    def forget(self, text: Sequence[int]) -> None:
        """Of the text only these tokens, the newest, are left."""
        self.judge.forget(text)
        for source in self.sources:
            source.forget(text)
