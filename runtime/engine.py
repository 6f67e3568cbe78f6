"""The engine: admit, plan, execute, verify, emit. It alone owns requests; workers hold weights and caches."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from runtime.config import Config, LookaheadConfig, SamplingParams
from runtime.errors import InvalidRequestError, ResourceExhaustedError
from runtime.executor import Executor, LocalExecutor, MeshExecutor, WorkerPool
from runtime.lookahead.partition import partition
from runtime.lookahead.rows import SequenceRows
from runtime.lookahead.sequence import Sequence as RunningSequence
from runtime.model.loader import load_spec, resolve_model
from runtime.model.spec import ModelSpec
from runtime.pool import ProcessPool
from runtime.request import Completion, FinishReason, Request, StepOutput, Usage
from runtime.step import Commit, Row, Seq, StepPlan
from runtime.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
"""Text, token ids, or chat messages ({"role", "content"})."""


@dataclass
class EngineStats:
    """Counters since the engine started."""

    num_steps: int = 0
    num_rows: int = 0
    num_tokens: int = 0
    num_requests: int = 0
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("plan", "broadcast", "forward", "gather", "verify"), 0.0)
    )
    """Where the steps' time went, by phase."""


@dataclass
class _Placed:
    """A sequence's rows within a step: [start, start + len(rows))."""

    sequence: RunningSequence
    rows: SequenceRows
    start: int


class Engine:
    """Decodes requests step by step on a mesh of workers. Not thread-safe; runtime.loop makes it so."""

    def __init__(self, config: Config, spec: ModelSpec, tokenizer: Tokenizer, executor: Executor) -> None:
        self.config, self.spec, self.tokenizer = config, spec, tokenizer
        self.stats = EngineStats()
        self.capacity = config.cache.slot_capacity(spec.max_positions)
        """Tokens one request may hold, prompt and output together."""
        self._executor = executor
        self._waiting: deque[Request] = deque()
        self._running: dict[int, RunningSequence] = {}  # by slot
        self._commits: dict[int, list[tuple[int, int]]] = {}  # by slot: (row of the last step, source replica)
        self._aborted: set[str] = set()
        self._ids = itertools.count()

    @classmethod
    def from_config(
        cls, config: Config | Mapping[str, Any] | str | Path | None = None, pool: WorkerPool | None = None
    ) -> Engine:
        """Load the model and start the workers: in this process for a 1x1 mesh, else in those of `pool`
        (by default, processes of this machine).

        Raises ConfigError where the configuration cannot be run, WorkerError where the workers do not start.
        """
        if not isinstance(config, Config):
            config = Config.from_dict(config) if isinstance(config, Mapping) else Config.load(config)
        directory = resolve_model(config.model.path)
        spec = load_spec(directory)
        spec.check_tp(config.parallel.tp)
        executor: Executor
        if pool is None and config.parallel.num_workers == 1:
            executor = LocalExecutor(config, spec)
        else:
            executor = MeshExecutor(config, spec, pool or ProcessPool())
        return cls(config, spec, Tokenizer(directory), executor)

    # Requests

    def make_request(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        lookahead: LookaheadConfig | None = None,
        request_id: str | None = None,
    ) -> Request:
        """Tokenise a prompt; parameters not given are the run's defaults. Raises InvalidRequestError."""
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
        elif prompt and isinstance(prompt[0], Mapping):
            ids = self.tokenizer.encode_chat(prompt)  # type: ignore[arg-type]
        else:
            ids = list(prompt)  # type: ignore[arg-type]
        request_id = request_id if request_id is not None else f"request-{next(self._ids)}"
        request = Request(request_id, tuple(ids), sampling or self.config.sampling, lookahead or self.config.lookahead)
        self.validate(request)
        return request

    def validate(self, request: Request) -> None:
        """Raise InvalidRequestError if this engine can never run `request`. Safe from any thread."""
        ids = request.prompt_ids
        if not ids:
            raise InvalidRequestError("prompt", "", "is empty", "Send at least one token.")
        for field_name, values in (("token_ids", ids), ("stop_token_ids", request.sampling.stop_token_ids)):
            for token in values:
                if not isinstance(token, int) or not 0 <= token < self.spec.vocab_size:
                    remedy = f"Token ids are whole numbers from 0 to {self.spec.vocab_size - 1}."
                    raise InvalidRequestError(field_name, token, "is not a token id of this model", remedy)
        if len(ids) >= self.capacity:
            problem = f"the prompt's {len(ids)} tokens leave no room in a cache of {self.capacity}"
            raise InvalidRequestError("prompt", f"{len(ids)} tokens", problem, "Shorten it, or raise cache.capacity.")
        rows = request.lookahead.window_rows
        if rows > self.config.scheduler.max_rows:
            problem = f"the window takes {rows} rows, and a step holds {self.config.scheduler.max_rows}"
            remedy = "Lower window_size or ngram_size, or raise scheduler.max_rows."
            raise InvalidRequestError("lookahead.window_size", request.lookahead.window_size, problem, remedy)

    def add_request(self, request: Request) -> None:
        """Queue a request. Raises InvalidRequestError, or ResourceExhaustedError where the queue is full."""
        self.validate(request)
        limit = self.config.scheduler.max_waiting
        if len(self._running) + len(self._waiting) >= self.config.scheduler.max_sequences + limit:
            raise ResourceExhaustedError(
                "scheduler.max_waiting", limit, "every slot is taken and the queue is full", "Try again later."
            )
        if any(other.request_id == request.request_id for other in self._requests()):
            raise InvalidRequestError("request_id", request.request_id, "is in use", "Give each request its own id.")
        self._waiting.append(request)
        self.stats.num_requests += 1

    def abort(self, request_id: str) -> None:
        """Withdraw a request: its slot is free before the next step, its last output says CANCELLED."""
        self._aborted.add(request_id)

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    # One step

    def step(self) -> list[StepOutput]:
        """Admit, plan, execute, verify, emit. Raises WorkerError if the workers fail."""
        started = time.perf_counter()
        outputs = self._drop_aborted()
        plan, placed = self._plan(self._admit())
        if not placed:
            return outputs
        planned = time.perf_counter()
        result = self._executor.execute(plan)
        executed = time.perf_counter()
        outputs += self._verify(plan, placed, result.tokens.tolist(), executed)
        self._account(plan, result.seconds, plan=planned - started, verify=time.perf_counter() - executed)
        return outputs

    def heartbeat(self) -> None:
        """Keep idle ranks from running into a collective's time-out; call every few seconds without work."""
        self._executor.execute(StepPlan.empty())

    def _drop_aborted(self) -> list[StepOutput]:
        if not self._aborted:
            return []
        dropped = [r for r in self._waiting if r.request_id in self._aborted]
        outputs = [StepOutput(r.request_id, (), Usage(num_prompt_tokens=len(r.prompt_ids)), FinishReason.CANCELLED) for r in dropped]
        self._waiting = deque(r for r in self._waiting if r.request_id not in self._aborted)
        for slot, sequence in list(self._running.items()):
            if sequence.request.request_id in self._aborted:
                self._release(slot)
                outputs.append(StepOutput(sequence.request.request_id, (), sequence.usage, FinishReason.CANCELLED))
        self._aborted.clear()
        return outputs

    def _admit(self) -> list[int]:
        """Give waiting requests the free slots; returns those slots."""
        free = [slot for slot in range(self.config.scheduler.max_sequences) if slot not in self._running]
        admitted = free[: len(self._waiting)]
        for slot in admitted:
            self._running[slot] = RunningSequence(self._waiting.popleft(), slot)
        return admitted

    def _plan(self, admitted: list[int]) -> tuple[StepPlan, list[_Placed]]:
        """Every running sequence's rows, in slot order. Decoding goes first; prompts share what is left.

        Guesses never crowd out progress: each sequence's first uncached token has its row before any guess.
        """
        max_rows = self.config.scheduler.max_rows
        sequences = [self._running[slot] for slot in sorted(self._running)]
        prompts = [sequence for sequence in sequences if sequence.num_uncached > 1]
        reserved = max_rows // 2 if len(prompts) < len(sequences) else max_rows
        prompt_rows = min(sum(s.num_uncached for s in prompts), max(reserved, len(prompts)))
        guess_rows = (max_rows - len(sequences) + len(prompts) - prompt_rows) // max(len(sequences), 1)
        placed: list[_Placed] = []
        start = 0
        for index, sequence in enumerate(sequences):
            if sequence.num_uncached > 1:
                later = sum(other.num_uncached > 1 for other in sequences[index + 1 :])
                chain = min(sequence.num_uncached, prompt_rows - later)
                prompt_rows -= chain
            else:
                chain = 1
            budget = sequence.request.lookahead.row_budget
            room = guess_rows if budget is None else min(guess_rows, budget - 1)
            rows = sequence.plan(chain, room)
            placed.append(_Placed(sequence, rows, start))
            start += len(rows)
        return self._assemble(placed, admitted), placed

    def _assemble(self, placed: list[_Placed], admitted: list[int]) -> StepPlan:
        lines: list[np.ndarray] = []
        parents: list[int] = []
        for part in placed:
            block = np.zeros((len(part.rows), len(Row)), np.int32)
            block[:, Row.TOKEN], block[:, Row.POSITION] = part.rows.tokens, part.rows.positions
            block[:, Row.SLOT], block[:, Row.CHOOSE] = part.sequence.slot, part.rows.choose
            lines.append(block)
            parents += [parent + part.start if parent >= 0 else -1 for parent in part.rows.parents]
        if not lines:
            return StepPlan.empty()
        rows = np.concatenate(lines)
        rows[:, Row.PARENT] = parents
        rows[:, Row.OWNER], rows[:, Row.REPLICAS] = partition(parents, self.config.parallel.lp)
        commits = [pair for part in placed for pair in self._commits.get(part.sequence.slot, ())]
        self._commits.clear()
        return StepPlan(
            rows=rows,
            sequences=np.stack([_parameters(part.sequence) for part in placed]),
            commits=np.array(commits, np.int32).reshape(-1, len(Commit)),
            resets=np.array(admitted, np.int32),
        )

    def _verify(
        self, plan: StepPlan, placed: list[_Placed], chosen: list[int], now_s: float
    ) -> list[StepOutput]:
        outputs = []
        everywhere = (1 << self.config.parallel.lp) - 1
        for part in placed:
            sequence, start = part.sequence, part.start
            emitted = sequence.accept(chosen[start : start + len(part.rows)], now_s)
            commits = [start + row for row in sequence.commit_rows]
            # The last row's owner has run all its ancestors; nobody copies what every replica has run.
            shared = bool((plan.rows[commits, Row.REPLICAS] == everywhere).all())
            source = -1 if shared else int(plan.rows[commits[-1], Row.OWNER])
            self._commits[sequence.slot] = [(row, source) for row in commits]
            kept, reason = self._finish(sequence, emitted)
            if reason is not None:
                self._release(sequence.slot)
            self.stats.num_tokens += len(kept)
            if emitted:
                outputs.append(StepOutput(sequence.request.request_id, tuple(kept), sequence.usage, reason))
        return outputs

    def _finish(self, sequence: RunningSequence, emitted: list[int]) -> tuple[list[int], FinishReason | None]:
        """Cut the emitted tokens where one-at-a-time decoding would have ended, and say why it ended there."""
        sampling = sequence.request.sampling
        ends = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else set(self.spec.eos_token_ids))
        before = sequence.usage.num_new_tokens - len(emitted)
        room = min(sampling.max_new_tokens, self.capacity - len(sequence.request.prompt_ids)) - before
        for count, token in enumerate(emitted):
            if token in ends:
                reason = FinishReason.STOP
            elif count + 1 == room:
                reason = FinishReason.LENGTH
            else:
                continue
            sequence.cut(len(emitted) - count - 1)
            return emitted[: count + 1], reason
        return emitted, None

    def _release(self, slot: int) -> None:
        del self._running[slot]
        self._commits.pop(slot, None)

    def _account(self, step: StepPlan, seconds: dict[str, float], **phases: float) -> None:
        self.stats.num_steps += 1
        self.stats.num_rows += step.num_rows
        for phase, value in (seconds | phases).items():
            self.stats.seconds[phase] += value

    def _requests(self) -> Iterator[Request]:
        yield from self._waiting
        yield from (sequence.request for sequence in self._running.values())

    # The Python API

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams | None = None,
        lookahead: LookaheadConfig | None = None,
    ) -> list[Completion]:
        """Continue every prompt, all in company; answers come in the order of the prompts."""
        requests = [self.make_request(prompt, sampling, lookahead) for prompt in prompts]
        runs: dict[str, list[StepOutput]] = {request.request_id: [] for request in requests}
        pending = deque(requests)
        while pending or any(not run or run[-1].finish_reason is None for run in runs.values()):
            while pending and self.num_waiting + self.num_running < self.config.scheduler.max_sequences:
                self.add_request(pending.popleft())
            for output in self.step():
                if output.request_id in runs:
                    runs[output.request_id].append(output)
        return [self._completion(request, runs[request.request_id]) for request in requests]

    def stream(
        self, prompt: Prompt, sampling: SamplingParams | None = None, lookahead: LookaheadConfig | None = None
    ) -> Iterator[StepOutput]:
        """Continue one prompt, step by step. Leaving the iterator early withdraws the request."""
        request = self.make_request(prompt, sampling, lookahead)
        self.add_request(request)
        finished = False
        try:
            while not finished:
                for output in self.step():
                    if output.request_id == request.request_id:
                        finished = output.finish_reason is not None
                        yield output
        finally:
            if not finished:
                self.abort(request.request_id)

    def _completion(self, request: Request, run: list[StepOutput]) -> Completion:
        ids = tuple(token for output in run for token in output.token_ids)
        last = run[-1]
        assert last.finish_reason is not None
        lengths = tuple(len(output.token_ids) for output in run if output.token_ids)
        text = self.tokenizer.decode([token for output in run for token in output.text_ids])
        return Completion(request.request_id, request.prompt_ids, ids, text, last.finish_reason, last.usage, lengths)

    def close(self) -> None:
        """End the workers."""
        self._executor.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _parameters(sequence: RunningSequence) -> np.ndarray:
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
