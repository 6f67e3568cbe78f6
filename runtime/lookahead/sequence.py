"""One running request: its text, what of it is cached, and what its next step should try."""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from dataclasses import dataclass, replace

from runtime.lookahead.rows import SequenceRows
from runtime.lookahead.sources import SOURCES
from runtime.lookahead.tree import CandidateTree
from runtime.request import Request, Usage


@dataclass
class StepRows:
    """What a sequence put into a step, until its results are back."""

    rows: SequenceRows
    tree: CandidateTree
    num_chain: int


class Sequence:
    """Plans the rows of one request's steps and takes in their results."""

    def __init__(self, request: Request, slot: int) -> None:
        self.request, self.slot = request, slot
        self.text = list(request.prompt_ids)
        self.num_cached = 0
        """Tokens of `text` in the cache once the next plan's commits are done."""
        self.usage = Usage(num_prompt_tokens=len(request.prompt_ids))
        self.commit_rows: list[int] = []
        """Rows of the last step (this sequence's own numbering) that the next plan commits."""
        lookahead = request.lookahead
        names = lookahead.sources if lookahead.enabled else ()
        self._sources = [SOURCES[name](lookahead, request.prompt_ids) for name in names]
        for source in self._sources:
            source.observe(self.text, len(self.text))
        self._step: StepRows | None = None

    @property
    def num_uncached(self) -> int:
        """Tokens of the text that are not in the cache: 1 while decoding, more while the prompt is read."""
        return len(self.text) - self.num_cached

    def plan(self, max_chain: int, room: int) -> SequenceRows:
        """The rows of the next step: at most `max_chain` uncached tokens, then at most `room` guesses."""
        rows = SequenceRows(first_position=self.num_cached)
        chain = self.text[self.num_cached : self.num_cached + max_chain]
        rows.add_chain(chain, reaches_end=len(chain) == self.num_uncached)
        tree = CandidateTree(rows)
        if self.request.sampling.max_new_tokens - self.usage.num_new_tokens == 1:
            room = 0  # the last token needs no guesses
        if rows.root >= 0:
            for source in self._sources:
                source.lay_out(rows, room - (len(rows) - len(chain)))
            tree.grow([source.propose(self.text) for source in self._sources], room - (len(rows) - len(chain)))
        self._step = StepRows(rows, tree, len(chain))
        return rows

    def accept(self, chosen: Tokens[int], now_s: float) -> list[int]:
        """Take in the token each row chose (-1: none); returns the tokens emitted, in order.

        They are what one-at-a-time decoding emits next; the caller cuts them where the request ends.
        """
        assert self._step is not None, "accept follows plan"
        rows, tree, num_chain = self._step.rows, self._step.tree, self._step.num_chain
        self._step = None
        self.commit_rows = list(range(num_chain))
        self.num_cached += num_chain
        if rows.root < 0:
            return []
        path, emitted = tree.walk(chosen)
        self.commit_rows += path
        self.num_cached += len(path)
        self.text += emitted
        for source in self._sources:
            source.learn(rows, chosen)
            source.observe(self.text, len(emitted))
        self._count(len(emitted), len(rows) - num_chain + 1, now_s)
        return emitted

    def cut(self, num_tokens: int) -> None:
        """The request ended before its last `num_tokens` emitted tokens: they do not count."""
        self.usage = replace(self.usage, num_new_tokens=self.usage.num_new_tokens - num_tokens)

    def _count(self, num_new: int, num_rows: int, now_s: float) -> None:
        elapsed = now_s - self.request.arrival_s
        usage = self.usage
        self.usage = replace(
            usage,
            num_new_tokens=usage.num_new_tokens + num_new,
            num_steps=usage.num_steps + 1,
            num_rows=usage.num_rows + num_rows,
            ttft_s=usage.ttft_s or elapsed,
            latency_s=elapsed,
        )
