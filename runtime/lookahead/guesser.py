"""What one sequence guesses: its candidate sources, the judge of what they propose, and what both learn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from runtime.config import LookaheadConfig
from runtime.lookahead.acceptance import Column, Guesses, Judge
from runtime.lookahead.knowledge import Knowledge
from runtime.lookahead.recycling import MAX_ORDER
from runtime.lookahead.rows import TAIL, SequenceRows
from runtime.lookahead.sources import SOURCES, JacobiSource, RecycleSource, first_features
from runtime.lookahead.tree import CandidateTree, Node


class Guesser:
    """The sources of one sequence. Per step: lay_out, plant (a tree, which grows by `expand`), learn, observe."""

    def __init__(self, config: LookaheadConfig, text: Sequence[int], knowledge: Knowledge) -> None:
        """`text` is what the window's first tokens are drawn from."""
        self.config = config
        self.knowledge = knowledge
        self.judge = Judge(knowledge.acceptance)
        starts = first_features()
        self.sources = [SOURCES[name](config, text, starts[name], knowledge.table) for name in config.sources]
        self._jacobi = next((source for source in self.sources if isinstance(source, JacobiSource)), None)
        self.wants_top = any(isinstance(source, RecycleSource) for source in self.sources)
        """Whether rows are to give the model's likeliest tokens, not only the chosen one."""

    def lay_out(self, rows: SequenceRows, room: int) -> None:
        """Add the rows that sources run for themselves, at most `room`."""
        if self._jacobi is not None and self.config.planner:
            window_size, ngram_size = self.knowledge.windows.size
            self._jacobi.resize(min(window_size, self.config.window_size), min(ngram_size, self.config.ngram_size))
        for source in self.sources:
            source.lay_out(rows, room)

    def plant(self, rows: SequenceRows, text: Sequence[int], max_depth: int) -> CandidateTree:
        """A tree below the current token, the last one of `text`, with no candidates yet."""
        return CandidateTree(rows, tuple(text[-TAIL:]), max_depth, self.expand)

    def expand(self, tail: tuple[int, ...], depth: int) -> Guesses:
        """What may follow a node."""
        columns: list[Column] = []
        for source in self.sources:
            if not source.is_silent:
                columns += source.propose(tail, depth)
        return self.judge.judge(columns)

    def learn(
        self, tree: CandidateTree, chosen: Sequence[int], top: NDArray[np.int32], before: tuple[int, ...]
    ) -> None:
        """Take in a step's results: the token each row chose, and the likeliest ones, packed.

        `before`: the tokens before the step's first row.
        """
        rows = tree.rows
        decided = tree.decided(chosen)
        if self._jacobi is not None and self.config.planner:
            credit = sum(self._only_by_window(tree, node, chosen[node.row]) for node in decided)
            self.knowledge.windows.observe(credit, tree.margin)
        for node in decided:
            self.judge.learn(node.guesses, chosen[node.row])
        self.learn_rows(rows, chosen, top, before)
        for source in self.sources:
            source.learn(rows, chosen)

    def _only_by_window(self, tree: CandidateTree, node: Node, token: int) -> bool:
        """Whether an accepted token would have had no place in the tree if `jacobi` had not proposed it."""
        assert self._jacobi is not None
        if not tree.holds(node.row, token):
            return False
        return node.probability * self.judge.without(node.guesses, token, self._jacobi.features) < tree.margin

    def learn_rows(
        self, rows: SequenceRows, chosen: Sequence[int], top: NDArray[np.int32], before: tuple[int, ...]
    ) -> None:
        """Remember what the model gave behind each row."""
        if self.wants_top:
            for tail, token, likeliest in zip(rows.tails(before, MAX_ORDER), chosen, top.tolist(), strict=True):
                if token >= 0:
                    self.knowledge.table.update(tail, likeliest)

    def observe(self, text: Sequence[int], num_new: int, is_prompt: bool) -> None:
        """The text has grown by `num_new` tokens."""
        for source in self.sources:
            source.observe(text, num_new, is_prompt)

    def forget(self, text: Sequence[int]) -> None:
        """Of the text only these tokens, the newest, are left."""
        for source in self.sources:
            source.forget(text)
