"""One running sequence: its text, what of it is cached, and what its next step should try."""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, replace

from runtime.lookahead.rows import SequenceRows
from runtime.lookahead.sources import SOURCES, Source
from runtime.lookahead.tree import CandidateTree
from runtime.request import FinishReason, Request, Usage
from runtime.retention import Ledger

HISTORY = 1 << 14
"""Tokens of the text that candidate sources are sure to know; an endless text is forgotten beyond twice as many."""


@dataclass
class StepRows:
    """What a sequence put into a step, until its results are back."""

    rows: SequenceRows
    tree: CandidateTree
    num_chain: int


class Sequence:
    """Plans the rows of one sequence's steps and takes in their results; a conversation's turns follow each other."""

    def __init__(self, request: Request, slot: int, ledger: Ledger, eos_token_ids: Collection[int]) -> None:
        self.slot, self.ledger, self._eos_token_ids = slot, ledger, eos_token_ids
        self.request = request
        self.text: list[int] = []
        """Prompts and answers, the newest tokens of them at least."""
        self.num_cached = 0
        """Tokens of the whole text in the cache once the next plan's commits are done."""
        self.rope_length = len(request.prompt_ids)
        """What dynamic RoPE scales by: the first prompt's length."""
        self.commit_rows: list[int] = []
        """Rows of the last step (this sequence's own numbering) that the next plan commits."""
        self._num_forgotten = 0  # tokens before text[0]
        self._sources: list[Source] = []
        self._step: StepRows | None = None
        self.begin_turn(request)

    def begin_turn(self, request: Request) -> None:
        """Append a prompt, to be answered."""
        renewed = not self._sources or self.request.lookahead != request.lookahead
        self.request = request
        self.usage = Usage(num_prompt_tokens=len(request.prompt_ids))
        self.num_coming = len(request.prompt_ids) + request.sampling.max_new_tokens
        """Tokens the turn may add, to be told to the workers with its first step; 0 afterwards."""
        self.ledger.begin_turn(self.num_coming)
        self.text += request.prompt_ids
        num_new = len(request.prompt_ids)
        if renewed:
            lookahead = request.lookahead
            names = lookahead.sources if lookahead.enabled else ()
            self._sources = [SOURCES[name](lookahead, self.text[-HISTORY:]) for name in names]
            num_new = len(self.text)
        for source in self._sources:
            source.observe(self.text, min(num_new, HISTORY), is_prompt=True)

    def withdraw_turn(self) -> None:
        """The turn ends before its time: what was not read of its prompt is dropped."""
        if self.usage.num_new_tokens == 0:
            unread = min(self.num_uncached, len(self.request.prompt_ids))
            del self.text[len(self.text) - unread :]

    @property
    def num_uncached(self) -> int:
        """Tokens of the text that are not in the cache: 1 while decoding, more while the prompt is read."""
        return self._num_forgotten + len(self.text) - self.num_cached

    @property
    def is_full(self) -> bool:
        """Whether the uncached tokens leave a bounded slot no room for one more."""
        uncached = self._uncached()
        return self.ledger.full_at(uncached) < len(uncached)

    def _uncached(self, count: int | None = None) -> list[int]:
        start = self.num_cached - self._num_forgotten
        return self.text[start : None if count is None else start + count]

    def plan(self, max_chain: int, room: int) -> SequenceRows:
        """The rows of the next step: at most `max_chain` uncached tokens, then at most `room` guesses."""
        rows = SequenceRows(first_position=self.num_cached)
        horizon = self.ledger.horizon
        chain = self._uncached(min(max_chain, horizon - self.num_cached))
        rows.add_chain(chain, reaches_end=len(chain) == self.num_uncached)
        tree = CandidateTree(rows)
        if self.request.sampling.max_new_tokens - self.usage.num_new_tokens == 1:
            room = 0  # the last token needs no guesses
        if rows.root >= 0:
            for source in self._sources:
                source.lay_out(rows, room - (len(rows) - len(chain)))
            proposals = [source.propose(self.text) for source in self._sources]
            tree.grow(proposals, room - (len(rows) - len(chain)), horizon)
        self._step = StepRows(rows, tree, len(chain))
        return rows

    def accept(self, chosen: Tokens[int], now_s: float) -> tuple[list[int], FinishReason | None]:
        """Take in the token each row chose (-1: none).

        Returns the tokens emitted, in order: they are what one-at-a-time decoding emits next, up to where it
        ends; and why it ends there, if it does.
        """
        assert self._step is not None, "accept follows plan"
        rows, tree, num_chain = self._step.rows, self._step.tree, self._step.num_chain
        self._step = None
        self.num_coming = 0
        self.commit_rows = list(range(num_chain))
        self._enter_cache(rows, self.commit_rows)
        if rows.root < 0:
            return [], None
        path, walked = tree.walk(chosen)
        emitted, reason = self._until_end(walked)
        del path[len(emitted) - 1 :]  # where a run is cut, its last token waits uncached, as it would one at a time
        self.commit_rows += path
        self._enter_cache(rows, path)
        self.text += emitted
        for source in self._sources:
            source.learn(rows, chosen)
            source.observe(self.text, len(emitted), is_prompt=False)
        self._count(len(emitted), len(rows) - num_chain + 1, now_s)
        self._forget()
        return emitted, reason

    def _enter_cache(self, rows: SequenceRows, accepted: list[int]) -> None:
        self.num_cached += len(accepted)
        self.ledger.commit([rows.tokens[row] for row in accepted])

    def _until_end(self, tokens: list[int]) -> tuple[list[int], FinishReason | None]:
        """Cut the tokens where one-at-a-time decoding would have ended, and say why it ended there."""
        sampling = self.request.sampling
        last = min(sampling.max_new_tokens - self.usage.num_new_tokens - 1, self.ledger.full_at(tokens))
        for index, token in enumerate(tokens):
            if token in sampling.stop_token_ids or token in self._eos_token_ids and not sampling.ignore_eos:
                return tokens[: index + 1], FinishReason.STOP
            if index == last:
                return tokens[: index + 1], FinishReason.LENGTH
        return tokens, None

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
            num_seen_tokens=self.ledger.length,
            kept_last=self.ledger.kept_last,
            kept_sum=self.ledger.kept_sum,
        )

    def _forget(self) -> None:
        """Keep an endless text from filling the memory."""
        if len(self.text) > 2 * HISTORY:
            self._num_forgotten += len(self.text) - HISTORY
            del self.text[:-HISTORY]
            for source in self._sources:
                source.forget(self.text)
