"""Which requests run, and what rows the next step holds for each of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from runtime.config import Config
from runtime.errors import InvalidRequestError, ResourceExhaustedError
from runtime.lookahead.partition import partition
from runtime.lookahead.rows import SequenceRows
from runtime.lookahead.sequence import Sequence
from runtime.request import Request, Usage
from runtime.step import Commit, Int32, Row, Seq, StepPlan


@dataclass
class Part:
    """One sequence's rows within a step: [start, start + len(rows))."""

    sequence: Sequence
    rows: SequenceRows
    start: int


@dataclass
class Step:
    """A plan, and whose rows it holds."""

    plan: StepPlan
    parts: list[Part]


class Scheduler:
    """Slots, the queue before them, and the rows of each step."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.waiting: deque[Request] = deque()
        self.running: dict[int, Sequence] = {}
        """By cache slot."""
        self._admitted: list[int] = []  # slots given away since the last plan
        self._commits: dict[int, Int32] = {}  # by slot, what the next plan commits: [C, len(Commit)]

    def add(self, request: Request) -> None:
        """Queue a request. Raises ResourceExhaustedError where the queue is full."""
        limit = self.config.scheduler.max_waiting
        if len(self.running) + len(self.waiting) >= self.config.scheduler.max_sequences + limit:
            raise ResourceExhaustedError(
                "scheduler.max_waiting", limit, "every slot is taken and the queue is full", "Try again later."
            )
        running = (sequence.request for sequence in self.running.values())
        if any(other.request_id == request.request_id for other in (*self.waiting, *running)):
            raise InvalidRequestError("request_id", request.request_id, "is in use", "Give each request its own id.")
        self.waiting.append(request)

    def drop(self, request_ids: Collection[str]) -> list[tuple[Request, Usage]]:
        """Forget these requests, wherever they are; returns those found, with what they used."""
        dropped = [(r, Usage(num_prompt_tokens=len(r.prompt_ids))) for r in self.waiting if r.request_id in request_ids]
        self.waiting = deque(r for r in self.waiting if r.request_id not in request_ids)
        for slot, sequence in list(self.running.items()):
            if sequence.request.request_id in request_ids:
                self.release(slot)
                dropped.append((sequence.request, sequence.usage))
        return dropped

    def release(self, slot: int) -> None:
        """The sequence in `slot` has ended."""
        del self.running[slot]
        self._commits.pop(slot, None)

    def admit(self) -> None:
        """Give the free slots to waiting requests, first come, first served."""
        for slot in range(self.config.scheduler.max_sequences):
            if slot not in self.running and self.waiting:
                self.running[slot] = Sequence(self.waiting.popleft(), slot)
                self._admitted.append(slot)

    def plan(self) -> Step | None:
        """The next step: every running sequence's rows, in slot order. None if there are none.

        Each sequence's first uncached token has its row before anything else; then prompts take up to
        half the step while others decode, all of it otherwise; guesses share the rest evenly.
        """
        sequences = [self.running[slot] for slot in sorted(self.running)]
        if not sequences:
            return None
        max_rows = self.config.scheduler.max_rows
        prompts = sum(sequence.num_uncached > 1 for sequence in sequences)
        limit = max_rows if prompts == len(sequences) else max(max_rows // 2, prompts)
        prompt_rows = min(sum(s.num_uncached for s in sequences if s.num_uncached > 1), limit)
        guess_rows = (max_rows - (len(sequences) - prompts) - prompt_rows) // len(sequences)
        parts: list[Part] = []
        start = 0
        for sequence in sequences:
            chain = 1
            if sequence.num_uncached > 1:
                prompts -= 1
                chain = min(sequence.num_uncached, prompt_rows - prompts)  # leave one row to each later prompt
                prompt_rows -= chain
            budget = sequence.request.lookahead.row_budget
            rows = sequence.plan(chain, guess_rows if budget is None else min(guess_rows, budget - 1))
            parts.append(Part(sequence, rows, start))
            start += len(rows)
        return Step(self._assemble(parts), parts)

    def _assemble(self, parts: list[Part]) -> StepPlan:
        rows = np.zeros((sum(len(part.rows) for part in parts), len(Row)), np.int32)
        parents: list[int] = []
        for part in parts:
            block = rows[part.start : part.start + len(part.rows)]
            block[:, Row.TOKEN], block[:, Row.POSITION] = part.rows.tokens, part.rows.positions
            block[:, Row.SLOT], block[:, Row.CHOOSE] = part.sequence.slot, part.rows.choose
            parents += [parent + part.start if parent >= 0 else -1 for parent in part.rows.parents]
        rows[:, Row.PARENT] = parents
        rows[:, Row.OWNER], rows[:, Row.REPLICAS] = partition(parents, self.config.parallel.lp)
        commits = [self._commits[slot] for slot in sorted(self._commits)]
        plan = StepPlan(rows, np.stack([_parameters(part.sequence) for part in parts]))
        if commits:
            plan.commits = np.concatenate(commits)
        plan.resets = np.array(self._admitted, np.int32)
        self._admitted, self._commits = [], {}
        return plan

    def commit(self, step: Step, part: Part) -> None:
        """Have the next plan commit what the sequence of `part` accepted.

        The owner of the last accepted row has run all its ancestors, so it is the source of them all;
        nobody copies what every replica has run.
        """
        accepted = [part.start + row for row in part.sequence.commit_rows]
        everywhere = (1 << self.config.parallel.lp) - 1
        lines = np.empty((len(accepted), len(Commit)), np.int32)
        lines[:, Commit.ROW] = accepted
        shared = (step.plan.rows[accepted, Row.REPLICAS] == everywhere).all()
        lines[:, Commit.SOURCE] = -1 if shared else step.plan.rows[accepted[-1], Row.OWNER]
        self._commits[part.sequence.slot] = lines


def _parameters(sequence: Sequence) -> Int32:
    """A line of StepPlan.sequences."""
    sampling = sequence.request.sampling
    line = np.zeros(len(Seq), np.int32)
    line[Seq.SLOT], line[Seq.ROPE_LENGTH] = sequence.slot, len(sequence.request.prompt_ids)
    line[Seq.TEMPERATURE] = np.float32(sampling.temperature).view(np.int32)
    line[Seq.TOP_K] = min(sampling.top_k, 2**31 - 1)
    line[Seq.TOP_P] = np.float32(sampling.top_p).view(np.int32)
    line[Seq.SEED_LOW] = sampling.seed & 0x7FFFFFFF
    line[Seq.SEED_HIGH] = np.uint32(sampling.seed >> 31).view(np.int32)
    return line
