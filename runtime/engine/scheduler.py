"""Which requests run, and what rows the next step holds for each of them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection
from collections.abc import Sequence as Listing
from dataclasses import dataclass, replace

import numpy as np

from runtime import core
from runtime.config import Config
from runtime.core import CandidateTree, Constraint, SequenceRows
from runtime.engine import deadlines
from runtime.engine.chunks import Chunks
from runtime.engine.memory import memory_of
from runtime.engine.reuse import Place, TextsLeft
from runtime.errors import DeadlineError, ResourceExhaustedError
from runtime.lookahead.knowledge import Knowledge
from runtime.lookahead.sequence import Sequence, StepRows, Watch
from runtime.mesh.device import pick_device
from runtime.model.spec import ModelSpec
from runtime.request import Past, Request, SlotReport, Usage
from runtime.retention import Ledger, layer_groups
from runtime.step import FOREVER, MASK_WORDS, Bias, Int32, Seq, StepPlan
from runtime.tuning.cost import RunningCost, assumed

TOP_K = 8
"""Likeliest tokens that a row gives for the recycle table, as in the paper."""


Beside = tuple[Watch | None, Constraint | None]


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
    is_decoding: bool
    """No prompt is being read."""


class Scheduler:
    """Slots, the queue before them, and the rows of each step."""

    def __init__(
        self,
        config: Config,
        spec: ModelSpec,
        num_pages: Listing[int] | None = None,
        beside: Callable[[Request], Beside] = lambda _: (None, None),
    ) -> None:
        """`num_pages`: of the workers' caches, where sequences share them (runtime.engine.memory). `beside`: what looks
        at the text of a request's answer, and what its text is bound to."""
        self.config, self.spec, self._beside = config, spec, beside
        self.capacity = config.cache.slot_capacity(spec.max_positions)
        self.layer_groups = layer_groups(config.cache, spec.num_layers, spec.max_positions)
        self.waiting: deque[Request] = deque()
        self.running: dict[int, Sequence] = {}
        """By cache slot."""
        self.sessions: dict[str, Sequence | None] = {}
        """Open conversations; each has its sequence, and with it a slot, from its first turn on."""
        self._pasts: dict[str, Past] = {}  # of conversations without a sequence: what is to be read before a first turn
        self.knowledge = Knowledge()
        """What lookahead learns, shared by the sequences that do not want their own."""
        self.cost = RunningCost(assumed(config.scheduler.max_rows), config.scheduler.max_rows)
        """What a step costs by its rows."""
        self.pace = deadlines.Pace()
        self.chunks = Chunks(config.scheduler)
        """How much of a prompt is read beside running answers."""
        self.memory = memory_of(config, spec, self.layer_groups, num_pages)
        self._emptied: dict[int, None] = {}  # slots given away since the last plan, or whose memory others may have
        self._reused: list[tuple[int, int, int]] = []  # of slots given away, lines of StepPlan.reuses
        self._texts = TextsLeft()
        keeps_all = config.cache.policy == "full" and spec.rope.dynamic is None and not self.memory.is_shared
        self._reuses = config.scheduler.prefix_reuse and keeps_all and pick_device(config, 0).type == "cpu"
        self._lines: dict[int, tuple[Request, Int32]] = {}  # by slot: the parameters of what runs there
        self._commits: dict[int, Int32] = {}  # by slot, what the next plan commits: [C, len(Commit)]
        self.num_replicas = config.parallel.lp
        """That share the rows of the next step, and of one whose results are being taken in."""

    def add(self, request: Request) -> None:
        """Queue a request; whether it may come is Admission's to say."""
        place = len(self.waiting)
        while place and deadlines.order(self.waiting[place - 1]) > deadlines.order(request):
            place -= 1
        self.waiting.insert(place, request)

    def give_up_late(self, now_s: float) -> list[tuple[Request, Usage, DeadlineError]]:
        """Forget the requests that wait and cannot make their deadlines any more, and those that run and have missed
        them."""
        found: list[tuple[Request, Usage, DeadlineError]] = []
        if any(request.deadline_s is not None for request in self.waiting):
            reasons = [(request, self.pace.refusal(request, now_s)) for request in self.waiting]
            self.waiting = deque(request for request, error in reasons if error is None)
            found += [(request, self.unread(request), error) for request, error in reasons if error is not None]
        for sequence in list(self.running.values()):
            if now_s > deadlines.due_s(sequence.request):
                usage, asked = sequence.usage, sequence.request.sampling.max_new_tokens
                problem = f"{usage.num_new_tokens} of at most {asked} tokens had come when it passed"
                ((request, usage),) = self.drop([sequence.request.request_id])
                found.append((request, usage, DeadlineError(problem, "Allow more time, or ask for less.")))
        return found

    def open_session(self, session_id: str, past: Past | None = None) -> None:
        """Start a conversation, or go on with one that had this past."""
        self.sessions[session_id] = None
        if past is not None and past.token_ids:
            self._pasts[session_id] = past

    def close_session(self, session_id: str) -> str | None:
        """End a conversation. Its slot is free, at once or when its turn, whose request id is returned, is dropped."""
        sequence = self.sessions.pop(session_id)
        self._pasts.pop(session_id, None)
        if sequence is not None and sequence.slot not in self.running:
            self._leave(sequence)
        live = (*self.waiting, *(sequence.request for sequence in self.running.values()))
        return next((request.request_id for request in live if request.session_id == session_id), None)

    def slots(self) -> list[SlotReport]:
        """What the slots hold now. Safe from any thread: the dictionaries are copied at once."""
        most = max(group.new().max_stored for group in self.layer_groups)
        found = {slot: SlotReport(slot, "left", min(length, most)) for slot, length in self._texts.lengths().items()}
        for sequence in list(self.sessions.values()):
            if sequence is not None:
                found[sequence.slot] = SlotReport(sequence.slot, "held", min(sequence.num_cached, most))
        for sequence in list(self.running.values()):
            found[sequence.slot] = SlotReport(sequence.slot, "running", min(sequence.num_cached, most))
        return [found[slot] for slot in sorted(found)]

    def make_ledger(self) -> Ledger:
        """An account for a new sequence."""
        return Ledger(self.layer_groups, self.capacity if self.config.cache.bounded else None)

    def drop(self, request_ids: Collection[str]) -> list[tuple[Request, Usage]]:
        """Forget these requests, wherever they are; returns those found, with what they used."""
        dropped = [(r, self.unread(r)) for r in self.waiting if r.request_id in request_ids]
        self.waiting = deque(r for r in self.waiting if r.request_id not in request_ids)
        for slot, sequence in list(self.running.items()):
            if sequence.request.request_id in request_ids:
                sequence.withdraw_turn()
                self.release(slot)
                dropped.append((sequence.request, replace(sequence.usage, num_seen_tokens=sequence.num_seen)))
        return dropped

    def read_again(self) -> None:
        """The workers' caches are new and empty: all that they had is read again, what runs at once, a conversation
        that rests with its next turn."""
        self.forget_texts()
        self._reused.clear()
        resting = (sequence for sequence in self.sessions.values() if sequence is not None)
        for sequence in {id(sequence): sequence for sequence in (*self.running.values(), *resting)}.values():
            sequence.read_again(self.make_ledger())
            self._emptied[sequence.slot] = None

    def unread(self, request: Request) -> Usage:
        """What a request has cost that was never run."""
        sequence, past = self._conversation_of(request), self._past_of(request)
        seen = sequence.num_seen if sequence is not None else past.num_cached if past is not None else 0
        return Usage(num_prompt_tokens=len(request.prompt_ids), num_seen_tokens=seen)

    def forget_texts(self) -> None:
        """Slots without a sequence are to be written over, by steps that are not planned here."""
        self._texts.clear()
        self._commits.clear()

    def release(self, slot: int, is_sound: bool = True) -> None:
        """The request in `slot` has ended; a conversation stays where it is. `is_sound`: what it has in the cache is
        numbers."""
        sequence = self.running.pop(slot)
        if sequence not in self.sessions.values():
            self._leave(sequence, is_sound)

    def _leave(self, sequence: Sequence, is_sound: bool = True) -> None:
        """The sequence is over; another may begin with what is in its slot."""
        if self._reuses and is_sound and sequence.is_sound:
            self._texts.leave(sequence.slot, sequence.cached_text)
        else:
            self._commits.pop(sequence.slot, None)
        self.memory.give_back(sequence.slot)
        if self.memory.is_shared:
            self._emptied[sequence.slot] = None

    def _place(self, request: Request, free: deque[int]) -> Place | None:
        """The slot that a new request gets; None: it waits."""
        if not self._reuses or request.sampling.prompt_logprobs is not None or self._past_of(request) is not None:
            return Place(free[0])
        others = ((slot, other.text, other.num_cached) for slot, other in self.running.items() if other.is_sound)
        return self._texts.place(np.asarray(request.prompt_ids, np.int64), free, others)

    @property
    def can_step(self) -> bool:
        """Whether a step would do something: where open conversations hold all slots, or the memory, the queue waits
        for one's end, or for a deadline."""
        if self.running or not self.waiting:
            return bool(self.running)
        now_s = time.perf_counter()
        if any(self._conversation_of(request) or now_s > deadlines.due_s(request) for request in self.waiting):
            return True
        return bool(self.memory.among(self._free, self.waiting[0]))

    @property
    def _free(self) -> list[int]:
        """Slots that a new sequence may come into."""
        held = self._held
        return [slot for slot in range(self.config.scheduler.num_slots) if slot not in held]

    @property
    def _held(self) -> set[int]:
        """Slots that are not free."""
        return {sequence.slot for sequence in self.sessions.values() if sequence is not None} | self.running.keys()

    def why_waiting(self) -> ResourceExhaustedError:
        """What the queue waits for where nothing runs."""
        if len(self._held) < self.config.scheduler.num_slots:
            problem, remedy = "open conversations hold the memory that it takes", "Close one first, or lower it."
            return ResourceExhaustedError("cache.capacity", self.capacity, problem, remedy)
        problem, remedy = "open conversations hold every slot", "Close one first, or raise it."
        return ResourceExhaustedError("scheduler.max_sequences", self.config.scheduler.num_slots, problem, remedy)

    def admit(self) -> list[Request]:
        """Give the free slots to waiting requests, by priority, then deadline, then arrival; a conversation goes on in
        its own. Where memory is short, who comes later waits for who came first.

        Returns the turns for which a conversation's bounded slot has no room.
        """
        if not self.waiting:
            return []
        free = self._free
        refused: list[Request] = []
        waiting, self.waiting = self.waiting, deque()
        for request in waiting:
            sequence = self._conversation_of(request)
            if sequence is not None:
                sequence.begin_turn(request, *self._beside(request))
                if sequence.is_full:
                    sequence.withdraw_turn()
                    refused.append(request)
                else:
                    self.running[sequence.slot] = sequence
            elif free and not (roomy := self.memory.among(free, request)):
                free.clear()
                self.waiting.append(request)
            elif free and (place := self._place(request, roomy)) is not None:
                slot = place.slot
                free.remove(slot)
                self._texts.take(slot)
                self.memory.promise(slot, request)
                kinds = self.make_ledger(), self.spec.eos_token_ids, self.knowledge, *self._beside(request)
                past = self._past_of(request)
                sequence = Sequence(request, slot, *kinds, num_reused=place.length, past=past)
                if place.length:
                    self._reused.append((slot, place.source, place.length))
                else:
                    self._emptied[slot] = None
                if request.session_id is not None:
                    self.sessions[request.session_id] = sequence
                    self._pasts.pop(request.session_id, None)
                if past is not None and sequence.is_full:
                    sequence.withdraw_turn()
                    refused.append(request)
                else:
                    self.running[slot] = sequence
            else:
                self.waiting.append(request)
        return refused

    def _conversation_of(self, request: Request) -> Sequence | None:
        """The sequence that the request is a turn of, if that has begun."""
        return self.sessions.get(request.session_id) if request.session_id is not None else None

    def _past_of(self, request: Request) -> Past | None:
        """What is to be read before the request, the first turn since its conversation was taken up again."""
        return self._pasts.get(request.session_id) if request.session_id is not None else None

    def plan(self, alone: str | None = None) -> Step | None:
        """The next step: every running sequence's rows, in slot order, or those of one request `alone`. None if there
        are none.

        Each sequence's first uncached token has its row before anything else; then prompts take what `Chunks` gives
        them while others decode, all of it otherwise; guesses share the rest evenly. Prompts are read by priority, then
        deadline; where some would miss theirs at their present pace, the others do not guess.
        """
        sequences = [self.running[slot] for slot in sorted(self.running)]
        if alone is not None:
            sequences = [sequence for sequence in sequences if sequence.request.request_id == alone]
        if not sequences:
            return None
        max_rows = self.config.scheduler.max_rows
        uncached = [sequence.num_uncached for sequence in sequences]
        prompts = num_prompts = len(uncached) - uncached.count(1)
        prompt_rows = 0
        if prompts:
            limit = max_rows
            if prompts < len(sequences):
                limit = max(self.chunks.most_rows(len(sequences) - prompts, self.cost.seconds), prompts)
            prompt_rows = min(sum(count for count in uncached if count > 1), limit)
        late = self._late(sequences)
        num_guessing = len(late) or len(sequences)
        guess_rows = (max_rows - (len(sequences) - prompts) - prompt_rows) // num_guessing
        if 0 < prompts < len(sequences):  # a longer step makes more guesses pay, and is longer still
            guess_rows = min(guess_rows, self.chunks.guess_rows)
        chains = [1] * len(sequences)
        reading = [index for index, count in enumerate(uncached) if count > 1]
        for index in sorted(reading, key=lambda index: deadlines.order(sequences[index].request)):
            prompts -= 1
            chains[index] = min(uncached[index], prompt_rows - prompts)  # leave one row to each later prompt
            prompt_rows -= chains[index]
        num_bound = sum(sequence.constraint is not None for sequence in sequences)
        mask_room = MASK_WORDS // (-(-self.spec.vocab_size // 32) * max(num_bound, 1))
        steps: list[StepRows] = []
        trees: list[tuple[CandidateTree, int]] = []
        num_rows = 0
        for sequence, chain in zip(sequences, chains, strict=True):
            lookahead = sequence.request.lookahead
            most = lookahead.row_budget or max_rows if lookahead.planner else lookahead.fixed_rows
            room = min(guess_rows, most - 1) if not late or sequence.slot in late else 0
            if sequence.constraint is not None:
                room = min(room, mask_room)
            step = sequence.plan(chain, room)
            steps.append(step)
            if step.tree is not None:
                room -= len(step.rows) - step.num_chain
                if lookahead.planner:
                    trees.append((step.tree, room))
                else:
                    step.tree.fill(room)
            num_rows += len(step.rows)
        if trees:
            core.grow(trees, num_rows, self.cost.seconds)
        parts: list[Part] = []
        num_rows = 0
        for sequence, step in zip(sequences, steps, strict=True):
            parts.append(Part(sequence, step.rows, num_rows))
            num_rows += len(step.rows)
        num_replicas = self.num_replicas
        if trees and num_replicas > 1 and not self.cost.shares[num_rows]:
            num_replicas = 1
        if not num_prompts:
            self.chunks.decoded(num_rows, len(sequences))
        plan = self._assemble(parts, num_replicas)
        if num_bound:
            _bind(plan, parts, steps)
        return Step(plan, parts, is_decoding=num_prompts == 0)

    def observe(self, step: Step, seconds: float, num_tokens: int) -> None:
        """The step took this long, planning and verification included, and emitted so many tokens."""
        num_rows, num_sequences = step.plan.num_rows, len(step.parts)
        if step.is_decoding:
            self.cost.observe(num_rows, seconds)
            curve = self.cost.seconds
            alone = float(curve[-(-num_rows // num_sequences)] / curve[num_rows])
            self.pace.observe(seconds, num_tokens, num_sequences, alone)
            return
        self.chunks.observe(seconds, self.cost.seconds[num_rows])
        if num_rows > 2 * num_sequences:
            self.pace.observe_reading(seconds, num_rows)

    def _late(self, sequences: Listing[Sequence]) -> set[int]:
        """Slots of those that would miss their deadlines."""
        if all(sequence.request.deadline_s is None for sequence in sequences):
            return set()
        now_s = time.perf_counter()
        return {sequence.slot for sequence in sequences if self.pace.is_late(sequence, now_s)}

    def _assemble(self, parts: list[Part], num_replicas: int) -> StepPlan:
        sequences = [part.sequence for part in parts]
        rows = core.assemble([(part.rows, part.sequence.slot) for part in parts], num_replicas)
        plan = StepPlan(rows, self._parameters(sequences))
        beginning = [biases_of(sequence, self.spec.eos_token_ids) for sequence in sequences if sequence.num_coming]
        if any(map(len, beginning)):
            plan.biases = np.concatenate(beginning)
        if self._commits:
            commits = [self._commits[slot] for slot in sorted(self._commits)]
            plan.commits = np.concatenate(commits) if len(commits) > 1 else commits[0]
        if self._emptied:
            plan.resets = np.array(list(self._emptied), np.int32)
        if self._reused:
            plan.reuses = np.array(self._reused, np.int32)
        for sequence in sequences:
            if sequence.wants_top:
                plan.top_k = TOP_K
            if (asked := sequence.request.sampling.num_logprobs) is not None:
                plan.num_logprobs = max(asked, plan.num_logprobs or 0)
        self._emptied, self._reused, self._commits = {}, [], {}
        return plan

    def commit(self, step: Step, part: Part) -> None:
        """Have the next plan commit what the sequence of `part` accepted.

        The owner of the last accepted row has run all its ancestors, so it is the source of them all;
        nobody copies what every replica has run.
        """
        lines = core.commit_lines(step.plan.rows, part.start, part.sequence.commit_rows, self.num_replicas)
        self._commits[part.sequence.slot] = lines

    def _parameters(self, sequences: list[Sequence]) -> Int32:
        """StepPlan.sequences. A line is made once per turn, and holds the coming tokens in its first step only."""
        lines = np.empty((len(sequences), len(Seq)), np.int32)
        for index, sequence in enumerate(sequences):
            kept = self._lines.get(sequence.slot)
            if kept is None or kept[0] is not sequence.request:
                kept = self._lines[sequence.slot] = sequence.request, _line(sequence)
            lines[index] = kept[1]
            lines[index, Seq.NEXT_TOKEN] = sequence.next_token
            if sequence.num_coming:
                lines[index, Seq.NUM_COMING] = min(sequence.num_coming, 2**31 - 1)
        return lines


def _bind(plan: StepPlan, parts: list[Part], steps: list[StepRows]) -> None:
    """Give the plan what constraints allow behind the rows that choose a token of the text. Equal masks go once."""
    known: dict[bytes, int] = {}
    masks: list[Int32] = []
    masked: list[tuple[int, int]] = []
    for part, step in zip(parts, steps, strict=True):
        constraint, root = part.sequence.constraint, part.rows.root
        if constraint is None or root < 0:
            continue
        found = step.tree.masks() if step.tree is not None else constraint.mask([])[None]
        first = step.tree.first_row if step.tree is not None else 0
        for row, mask in zip([root, *range(first, first + len(found) - 1)], found, strict=True):
            number = known.setdefault(mask.tobytes(), len(masks))
            if number == len(masks):
                masks.append(mask)
            masked.append((part.start + row, number))
    if masks:
        plan.masks, plan.masked = np.stack(masks), np.array(masked, np.int32)


def _line(sequence: Sequence) -> Int32:
    """Of StepPlan.sequences, but for the coming tokens."""
    sampling = sequence.request.sampling
    line = np.zeros(len(Seq), np.int32)
    line[Seq.SLOT], line[Seq.ROPE_LENGTH] = sequence.slot, sequence.rope_length
    line[Seq.TOP_K] = min(sampling.top_k, 2**31 - 1)
    line[Seq.SEED_LOW] = sampling.seed & 0x7FFFFFFF
    line[Seq.SEED_HIGH] = np.uint32(sampling.seed >> 31).view(np.int32)
    reals = {
        Seq.TEMPERATURE: sampling.temperature,
        Seq.TOP_P: sampling.top_p,
        Seq.MIN_P: sampling.min_p,
        Seq.REPETITION: sampling.repetition_penalty,
        Seq.PRESENCE: sampling.presence_penalty,
        Seq.FREQUENCY: sampling.frequency_penalty,
    }
    for column, value in reals.items():
        line[column] = np.float32(value).view(np.int32)
    line[Seq.OUTPUT_START] = min(sequence.output_start, FOREVER)
    adds = sampling.has_penalties or bool(sampling.logit_bias) or sampling.min_new_tokens > 0
    line[Seq.IS_CONTROLLED] = adds or sequence.constraint is not None
    return line


def biases_of(sequence: Sequence, eos_token_ids: Collection[int]) -> Int32:
    """Of StepPlan.biases, what a turn that begins brings."""
    sampling, slot = sequence.request.sampling, sequence.slot
    lines = [(slot, token, np.float32(bias).view(np.int32), FOREVER) for token, bias in sampling.logit_bias.items()]
    if sampling.min_new_tokens:
        ends = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else eos_token_ids)}
        until = min(sequence.output_start + sampling.min_new_tokens, FOREVER)
        lines += [(slot, token, np.float32(-np.inf).view(np.int32), until) for token in sorted(ends)]
    return np.array(lines, np.int32).reshape(-1, len(Bias))
