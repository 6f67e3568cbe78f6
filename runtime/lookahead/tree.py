"""The verification branch: candidates as one tree of rows, grown best first, and the walk that accepts a path of it."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from runtime.lookahead.acceptance import Guesses, probability
from runtime.lookahead.rows import TAIL, SequenceRows
from runtime.step import Choose

Expand = Callable[[tuple[int, ...], int], Guesses]
"""(the tokens before a node and its own, how many of the last of them are guesses) -> what may follow."""

RUN = 0.96
"""How far a guess behind a guess is trusted beside its own probability: where one of a run that looked safe is wrong,
the next ones are, too."""


@dataclass(slots=True)
class Node:
    """A row of the tree, and what may follow it."""

    row: int
    tail: tuple[int, ...]
    depth: int
    probability: float
    """Of being accepted: the product along the path."""
    guesses: Guesses


class CandidateTree:
    """Candidates below the current token. A prefix that several share is stored once; ties are broken by age."""

    def __init__(self, rows: SequenceRows, tail: tuple[int, ...], max_depth: int, expand: Expand) -> None:
        """`tail`: the text's last tokens, the current one included. No candidate stands deeper than `max_depth`."""
        self.rows = rows
        self.first_row = len(rows)
        """The first candidate's row."""
        self._max_depth = max_depth
        self._expand = expand
        self._children: dict[tuple[int, int], int] = {}  # (row, token) -> the row of that token after it
        self.nodes: dict[int, Node] = {}
        """By row, what has been expanded."""
        self._frontier: list[tuple[float, int, int, int]] = []  # (-probability, age, row, index of its candidate)
        self._add_node(Node(rows.root, tail, 0, 1.0, expand(tail, 0)))

    @property
    def num_candidates(self) -> int:
        return len(self.rows) - self.first_row

    @property
    def margin(self) -> float:
        """Probability of the least likely candidate taken in; 1 where there is none."""
        return self.nodes[len(self.rows) - 1].probability if self.num_candidates else 1.0

    @property
    def next_probability(self) -> float:
        """Of being accepted, of the row that `grow` would add; 0 where there is none."""
        return -self._frontier[0][0] if self._frontier else 0.0

    def grow(self) -> None:
        """Add the likeliest candidate that is not in the tree yet."""
        negative, _, row, index = heapq.heappop(self._frontier)
        parent = self.nodes[row]
        token = parent.guesses.ranked[index][1]
        child = self.rows.add(token, row, Choose.SAMPLE)
        self._children[row, token] = child
        self._offer(parent, index + 1)
        tail = (*parent.tail, token)[-TAIL:]
        depth = parent.depth + 1
        self._add_node(Node(child, tail, depth, -negative, self._expand(tail, depth)))

    def fill(self, room: int) -> None:
        """Grow until `room` candidates are in the tree, or no more are known."""
        while self._frontier and self.num_candidates < room:
            self.grow()

    def truncate(self, count: int) -> None:
        """Keep the first `count` candidates only; the tree cannot grow any more."""
        self.rows.truncate(self.first_row + count)
        self._children = {key: row for key, row in self._children.items() if row < len(self.rows)}
        self._frontier.clear()

    def _add_node(self, node: Node) -> None:
        self.nodes[node.row] = node
        if node.depth < self._max_depth:
            self._offer(node, 0)

    def _offer(self, node: Node, index: int) -> None:
        """Let a node's guess with this index compete; the ones after it are less likely."""
        ranked = node.guesses.ranked
        if index < len(ranked):
            path = node.probability * probability(ranked[index][0]) * (RUN if node.depth else 1.0)
            heapq.heappush(self._frontier, (-path, len(self.rows), node.row, index))

    def decided(self, chosen: Sequence[int]) -> list[Node]:
        """The nodes whose next token has become known: the current token's, and the accepted ones'."""
        path, _ = self.walk(chosen)
        return [self.nodes[row] for row in (self.rows.root, *path)]

    def holds(self, row: int, token: int) -> bool:
        """Whether `token` stands behind `row` in the tree."""
        return (row, token) in self._children

    def walk(self, chosen: Sequence[int]) -> tuple[list[int], list[int]]:
        """Follow the tokens the model chose as far as the tree holds them.

        `chosen[row]` is what one-at-a-time decoding would emit after that row, so a candidate is
        accepted if and only if it equals that token: the text is the same, whatever was proposed.

        Returns the accepted rows below the root, and the tokens emitted: theirs, and the one
        that the model gives after the last of them.
        """
        row = self.rows.root
        path: list[int] = []
        while (child := self._children.get((row, chosen[row]))) is not None:
            path.append(child)
            row = child
        return path, [*(self.rows.tokens[accepted] for accepted in path), chosen[row]]
