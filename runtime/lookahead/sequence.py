"""One running sequence: its text, what of it is cached, and what its next step should try."""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Collection
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, replace
from typing import Protocol

from runtime.core import TAIL, CandidateTree, Constraint, SequenceRows
from runtime.lookahead.guesser import Guesser
from runtime.lookahead.knowledge import Knowledge
from runtime.request import FinishReason, Past, Request, TurnStart, Usage
from runtime.retention import Ledger
from runtime.step import Int32

HISTORY = 1 << 14
"""Tokens of the text that candidate sources are sure to know; an endless text is forgotten beyond twice as many."""


@dataclass
class StepRows:
    """What a sequence put into a step, until its results are back."""

    rows: SequenceRows
    num_chain: int
    before: list[int]
    """Tokens before the first row."""
    tree: CandidateTree | None = None
    """None where nothing may be guessed."""


class Watch(Protocol):
    """Looks at an answer's text (runtime.stops)."""

    def first_end(self, tokens: Tokens) -> int | None:
        """Take in the next tokens; the index of the one that ends the answer."""


class Sequence:
    """Plans the rows of one sequence's steps and takes in their results; a conversation's turns follow each other."""

    def __init__(
        self,
        request: Request,
        slot: int,
        ledger: Ledger,
        eos_token_ids: Collection[int],
        knowledge: Knowledge,
        watch: Watch | None = None,
        constraint: Constraint | None = None,
        num_reused: int = 0,
        past: Past | None = None,
    ) -> None:
        """`knowledge` is what the sequences of an engine share, unless the request wants its own; of the prompt, the
        cache has `num_reused` tokens already. `past`: what is read again before the prompt."""
        self.slot, self.ledger, self._eos_token_ids = slot, ledger, eos_token_ids
        self._shared = knowledge
        self.request = request
        self.text: list[int] = list(past.token_ids) if past is not None else []
        """Prompts and answers, the newest tokens of them at least."""
        self.next_token = -1
        """The one behind the last planned step's chain; -1: none, the chain reaches the text's end."""
        self.num_cached = 0
        """Tokens of the whole text in the cache once the next plan's commits are done."""
        self.num_coming = 0
        """Tokens that a turn may add, to be told to the workers with its first step; 0 afterwards."""
        self.rope_length = past.rope_length if past is not None else len(request.prompt_ids)
        """What dynamic RoPE scales by: the first prompt's length."""
        self.commit_rows: list[int] = []
        """Rows of the last step (this sequence's own numbering) that the next plan commits."""
        self.proposed: list[tuple[str, ...]] = []
        """Of each candidate in the last step, the sources that proposed it."""
        self.accepted: list[tuple[str, ...]] = []
        """Of each candidate whose token the last step emitted, in order."""
        self._forgotten = array("i")  # tokens before text[0]: they may have to be read again
        # Where eviction is per turn
        self._turn_starts = list(past.turn_starts) if past is not None and ledger.per_turn else []
        self._turns_ahead = deque(self._turn_starts)  # of those, the ones that the text read so far does not reach
        self._num_settled = past.num_cached if past is not None else 0  # tokens in the cache when the last turn ended
        self._guesser: Guesser | None = None
        self._step: StepRows | None = None
        self._doubtful = False
        """The last step's rows had no numbers, perhaps because of guesses among them: the next step has none."""
        self.begin_turn(request, watch, constraint)
        self._enter_text(num_reused)

    def begin_turn(self, request: Request, watch: Watch | None = None, constraint: Constraint | None = None) -> None:
        """Append a prompt, to be answered, and what the caller has of the answer. `watch` says where the answer's text
        ends it, `constraint` which tokens it may have; both have seen what the caller has."""
        self.watch, self.is_stopped = watch, False
        self.constraint = constraint
        renewed = self._guesser is None or self.request.lookahead != request.lookahead
        self.request = request
        given = request.resume_from
        self.usage = Usage(len(request.prompt_ids), num_new_tokens=len(given), num_resumed_tokens=len(given))
        self._turn_starts_at(self.num_seen)
        self.text += request.prompt_ids
        self.output_start = self._num_forgotten + len(self.text)
        """Position of the answer's first token."""
        self.usage = replace(self.usage, queue_s=max(0.0, time.perf_counter() - request.arrival_s))
        num_new = len(request.prompt_ids)
        if renewed:
            lookahead = request.lookahead
            knowledge = self._shared if lookahead.share else self._shared.fresh()
            self._guesser = Guesser(lookahead, self.text[-HISTORY:], knowledge) if lookahead.enabled else None
            num_new = len(self.text)
        if self._guesser is not None:
            self._guesser.begin_turn(request.sampling, constraint)
            self._guesser.observe(self.text[-min(num_new, HISTORY) :], is_prompt=True)
        self.text += given
        if self._guesser is not None and given:
            self._guesser.observe(given, is_prompt=False)

    def read_again(self, ledger: Ledger) -> None:
        """The caches have lost the sequence: its whole text is read once more, in the same order, evicted at the same
        places, and the answer goes on where it stands. `ledger` is a new account."""
        self._num_settled = max(self.num_cached, self._num_settled)
        self.ledger = ledger
        self.text[:0] = self._forgotten
        self._forgotten = array("i")
        self.num_cached, self.commit_rows = 0, []
        self._step, self._doubtful = None, False
        self._turns_ahead = deque(self._turn_starts)
        if ledger.per_turn:
            self._begin_turns_here()
        else:
            self.num_coming = self._most_coming  # the workers are to know this turn's parameters

    @property
    def _most_coming(self) -> int:
        return len(self.request.prompt_ids) + self.request.sampling.max_new_tokens

    @property
    def num_seen(self) -> int:
        """Tokens that the conversation has put into the cache, though it may be reading some of them again."""
        return max(self.num_cached, self._num_settled)

    def past(self) -> Past:
        """What a sequence like this one, between two turns, would have to read."""
        text = (*self._forgotten, *self.text)
        return Past(text, self.rope_length, tuple(self._turn_starts), len(text) > self.num_seen)

    def _turn_starts_at(self, position: int) -> None:
        """A turn begins when so many tokens are in the cache."""
        if not self.ledger.per_turn:
            self.num_coming = self._most_coming
            return
        start = TurnStart(position, self._most_coming)
        self._turn_starts.append(start)
        self._turns_ahead.append(start)
        self._begin_turns_here()

    def _begin_turns_here(self) -> None:
        while self._turns_ahead and self._turns_ahead[0].position == self.num_cached:
            self.num_coming = self._turns_ahead.popleft().num_coming
            self.ledger.begin_turn(self.num_coming)

    def withdraw_turn(self) -> None:
        """The turn ends before its time: what was not read of its prompt is dropped."""
        if self.usage.num_new_tokens == 0:
            unread = min(self._num_forgotten + len(self.text) - self.num_seen, len(self.request.prompt_ids))
            del self.text[len(self.text) - unread :]
        else:
            self._num_settled = max(self.num_seen, self._num_forgotten + len(self.text) - 1)
        if self._turns_ahead and self._turns_ahead[-1].position >= self.num_seen:  # the turn has not begun
            self._turn_starts.pop()
            self._turns_ahead.pop()

    @property
    def _num_forgotten(self) -> int:
        return len(self._forgotten)

    @property
    def num_uncached(self) -> int:
        """Tokens of the text that are not in the cache: 1 while decoding, more while the prompt is read."""
        return self._num_forgotten + len(self.text) - self.num_cached

    @property
    def is_sound(self) -> bool:
        """Whether another sequence may go on from what this one has in the cache."""
        return not self._doubtful and self._num_forgotten == 0

    @property
    def cached_text(self) -> list[int]:
        """The tokens in the cache once the next plan's commits are done; of a sound one."""
        return self.text[: self.num_cached]

    @property
    def is_full(self) -> bool:
        """Whether the uncached tokens leave a bounded slot no room for one more."""
        uncached = self._uncached()
        return self.ledger.full_at(uncached) < len(uncached)

    def _uncached(self) -> list[int]:
        return self.text[self.num_cached - self._num_forgotten :]

    @property
    def wants_top(self) -> bool:
        """Whether the step's rows are to give the model's likeliest tokens."""
        return self._guesser is not None and self._guesser.wants_top

    def plan(self, max_chain: int, room: int) -> StepRows:
        """Begin the next step: at most `max_chain` uncached tokens, then the sources' own rows, at most `room`.

        The tree below them is the caller's to grow; it is None where nothing is to be guessed.
        """
        rows = SequenceRows(first_position=self.num_cached)
        horizon, start = self.ledger.horizon, self.num_cached - self._num_forgotten
        if self._turns_ahead:
            horizon = min(horizon, self._turns_ahead[0].position)
        chain = self.text[start : start + min(max_chain, horizon - self.num_cached)]
        rows.add_chain(chain, reaches_end=start + len(chain) == len(self.text))
        self.next_token = self.text[start + len(chain)] if start + len(chain) < len(self.text) else -1
        if self.request.sampling.prompt_logprobs is not None and self.usage.num_new_tokens == 0:
            rows.score(self.output_start - len(self.request.prompt_ids), self.output_start)
        self._step = StepRows(rows, len(chain), self.text[max(start - TAIL, 0) : start])
        missing = self.request.sampling.max_new_tokens - self.usage.num_new_tokens
        # The last token needs no guesses.
        if self._guesser is not None and rows.root >= 0 and missing > 1 and not self._doubtful:
            self._guesser.lay_out(rows, room)
            max_depth = min(horizon - 1 - rows.root_position, missing - 1, HISTORY)  # it fits an int of C++
            self._step.tree = self._guesser.plant(rows, self.text, max_depth)
        return self._step

    def accept(self, chosen: Int32, top: Int32, now_s: float) -> tuple[list[int], FinishReason | None]:
        """Take in the token each row chose (-1: none, NOT_A_NUMBER: it has none), and the likeliest ones, packed, where
        they were wanted.

        Returns the tokens emitted, in order: they are what one-at-a-time decoding emits next, up to where it
        ends; and why it ends there, if it does.

        Guesses whose keys or values are NaN or infinite reach rows that do not see them, since 0 times those is NaN.
        So where a row that counts has no token, and guesses stood beside it, a step without them decides.
        """
        assert self._step is not None, "accept follows plan"
        step, self._step = self._step, None
        rows, tree, num_chain = step.rows, step.tree, step.num_chain
        self.num_coming = 0
        self.proposed, self.accepted = [], []
        if tree is not None and tree.num_candidates:
            assert self._guesser is not None
            self.proposed = self._guesser.proposers(tree)
        path, walked = tree.walk(chosen) if tree is not None else ([], [int(chosen[rows.root])])
        self._doubtful = rows.root >= 0 and walked[-1] < 0 and len(rows) > num_chain
        if self._doubtful:
            walked.pop()
            self.commit_rows = list(range(num_chain)) if walked else []
        else:
            self._learn(step, chosen, top)
            self.commit_rows = list(range(num_chain))
        self._enter_cache(rows, self.commit_rows)
        self._begin_turns_here()
        if rows.root < 0 or not walked:
            return [], None
        emitted, reason = self._until_end(walked)
        del path[max(len(emitted) - 1, 0) :]  # where a run is cut, its last token waits uncached, as one at a time
        self.commit_rows += path
        if tree is not None:
            self.accepted = [self.proposed[row - tree.first_row] for row in path]
        self._enter_cache(rows, path)
        self.text += emitted
        if self._guesser is not None:
            self._guesser.observe(emitted, is_prompt=False)
        self._count(len(emitted), len(rows) - num_chain + 1, now_s)
        self._forget()
        return emitted, reason

    def _learn(self, step: StepRows, chosen: Int32, top: Int32) -> None:
        if step.tree is not None:
            assert self._guesser is not None
            self._guesser.learn(step.tree, chosen, top, step.before)
        elif self._guesser is not None:
            self._guesser.learn_rows(step.rows, chosen, top, step.before)

    def _enter_cache(self, rows: SequenceRows, accepted: list[int]) -> None:
        if accepted:
            self.num_cached += len(accepted)
            self.ledger.commit(rows.tokens_of(accepted))

    def _enter_text(self, count: int) -> None:
        """The first tokens of the prompt are in the cache."""
        if count:
            self.num_cached = count
            self.ledger.commit(self.text[:count])
            self.usage = replace(self.usage, num_reused_tokens=count)

    def _until_end(self, tokens: list[int]) -> tuple[list[int], FinishReason | None]:
        """Cut the tokens where one-at-a-time decoding would have ended, and say why it ended there."""
        sampling = self.request.sampling
        stopped_at = self.watch.first_end(tokens) if self.watch is not None else None
        last = min(sampling.max_new_tokens - self.usage.num_new_tokens - 1, self.ledger.full_at(tokens))
        for index, token in enumerate(tokens):
            if token < 0:
                return tokens[:index], FinishReason.ERROR
            if token in sampling.stop_token_ids or token in self._eos_token_ids and not sampling.ignore_eos:
                return tokens[: index + 1], FinishReason.STOP
            if index == stopped_at:
                self.is_stopped = True
                return tokens[: index + 1], FinishReason.STOP
            if index == last:
                return tokens[: index + 1], FinishReason.LENGTH
        return tokens, None

    def _count(self, num_new: int, num_rows: int, now_s: float) -> None:
        elapsed = now_s - self.request.arrival_s
        usage, ledger = self.usage, self.ledger
        self.usage = Usage(
            usage.num_prompt_tokens,
            usage.num_new_tokens + num_new,
            usage.num_steps + 1,
            usage.num_rows + num_rows,
            ttft_s=usage.ttft_s or elapsed,
            latency_s=elapsed,
            num_seen_tokens=ledger.length,
            kept_last=ledger.kept_last,
            kept_sum=ledger.kept_sum,
            num_reused_tokens=usage.num_reused_tokens,
            num_resumed_tokens=usage.num_resumed_tokens,
            queue_s=usage.queue_s,
        )

    def _forget(self) -> None:
        """Keep an endless text from filling the memory."""
        if len(self.text) > 2 * HISTORY:
            self._forgotten.extend(self.text[:-HISTORY])
            del self.text[:-HISTORY]
            if self._guesser is not None:
                self._guesser.forget(self.text)
