"""The engine: admit, plan, execute, verify, emit. It alone owns requests; workers hold weights and caches."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runtime.config import Config, LookaheadConfig, SamplingParams
from runtime.errors import InvalidRequestError
from runtime.executor import Executor, LocalExecutor, MeshExecutor, WorkerPool
from runtime.lookahead.sequence import Sequence as RunningSequence
from runtime.model.loader import load_spec, resolve_model
from runtime.model.spec import ModelSpec
from runtime.pool import ProcessPool
from runtime.request import Completion, FinishReason, Request, StepOutput
from runtime.scheduler import Scheduler, Step
from runtime.step import StepPlan
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


class Engine:
    """Decodes requests step by step on a mesh of workers. Not thread-safe; runtime.loop makes it so."""

    def __init__(self, config: Config, spec: ModelSpec, tokenizer: Tokenizer, executor: Executor) -> None:
        self.config, self.spec, self.tokenizer = config, spec, tokenizer
        self.stats = EngineStats()
        self.capacity = config.cache.slot_capacity(spec.max_positions)
        """Tokens one request may hold, prompt and output together."""
        self._executor = executor
        self._scheduler = Scheduler(config)
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
        for field_name, values in (("token_ids", ids), ("sampling.stop_token_ids", request.sampling.stop_token_ids)):
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
        self._scheduler.add(request)
        self.stats.num_requests += 1

    def abort(self, request_id: str) -> None:
        """Withdraw a request: its slot is free before the next step, its last output says CANCELLED."""
        self._aborted.add(request_id)

    @property
    def has_work(self) -> bool:
        return bool(self.num_running or self.num_waiting)

    @property
    def num_running(self) -> int:
        return len(self._scheduler.running)

    @property
    def num_waiting(self) -> int:
        return len(self._scheduler.waiting)

    # One step

    def step(self) -> list[StepOutput]:
        """Admit, plan, execute, verify, emit. Raises WorkerError if the workers fail."""
        started = time.perf_counter()
        outputs = self._drop_aborted()
        self._scheduler.admit()
        step = self._scheduler.plan()
        if step is None:
            return outputs
        planned = time.perf_counter()
        result = self._executor.execute(step.plan)
        executed = time.perf_counter()
        outputs += self._verify(step, result.tokens.tolist(), executed)
        self._account(step.plan, result.seconds, plan=planned - started, verify=time.perf_counter() - executed)
        return outputs

    def heartbeat(self) -> None:
        """Keep idle ranks from running into a collective's time-out; call every few seconds without work."""
        self._executor.execute(StepPlan.empty())

    def _drop_aborted(self) -> list[StepOutput]:
        dropped = self._scheduler.drop(self._aborted) if self._aborted else []
        self._aborted.clear()
        return [StepOutput(request.request_id, (), usage, FinishReason.CANCELLED) for request, usage in dropped]

    def _verify(self, step: Step, chosen: list[int], now_s: float) -> list[StepOutput]:
        outputs = []
        for part in step.parts:
            sequence = part.sequence
            emitted = sequence.accept(chosen[part.start : part.start + len(part.rows)], now_s)
            kept, reason = self._finish(sequence, emitted)
            if reason is None:
                self._scheduler.commit(step, part)
            else:
                self._scheduler.release(sequence.slot)
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

    def _account(self, step: StepPlan, seconds: dict[str, float], **phases: float) -> None:
        self.stats.num_steps += 1
        self.stats.num_rows += step.num_rows
        for phase, value in (seconds | phases).items():
            self.stats.seconds[phase] += value

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
