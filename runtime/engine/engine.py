"""The engine: admit, plan, execute, verify, emit. It alone owns requests; workers hold weights and caches."""

from __future__ import annotations

import itertools
import logging
import math
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any, TypeVar

import numpy as np
import torch

from runtime.config import Config, LookaheadConfig, SamplingParams, Section
from runtime.core import Bigrams
from runtime.engine import logprobs, resuming
from runtime.engine.admission import Admission
from runtime.engine.grammar import Grammar, Grammars
from runtime.engine.logprobs import PromptLogprobs
from runtime.engine.scheduler import TOP_K, Part, Scheduler, Step
from runtime.engine.session import Session
from runtime.engine.suspects import Suspects
from runtime.engine.turn import Turn
from runtime.errors import (
    CachesLostError,
    ConfigError,
    HarmfulRequestError,
    InvalidRequestError,
    NumericsError,
    WorkerError,
)
from runtime.lookahead.knowledge import Knowledge
from runtime.lookahead.sequence import Sequence as Running
from runtime.mesh.device import pick_device
from runtime.model.directory import checked_model, for_model
from runtime.model.shard import HeadShard
from runtime.model.spec import ModelSpec
from runtime.prompts import as_prompt, as_prompts, kind_of
from runtime.request import (
    AnswerSoFar,
    CacheReport,
    Completion,
    FinishReason,
    Past,
    Prompt,
    Request,
    SlotReport,
    StepOutput,
    TokenLogprobs,
    ToolChat,
    forks,
)
from runtime.retention import with_separator_ids
from runtime.step import Choose, Int32, StepPlan, StepResult
from runtime.stops import AnswerText, StopWatch
from runtime.tokenizer import Tokenizer
from runtime.tuning import choose, cost, priming
from runtime.tuning.cost import CostCurve, Measurement, RunningCost
from runtime.workers.executor import Executor, LocalExecutor
from runtime.workers.mesh_executor import MeshExecutor
from runtime.workers.pool import ProcessPool
from runtime.workers.roster import WorkerPool

log = logging.getLogger(__name__)

MEASURE_AGAIN_S = 300.0
"""How long a measurement that other programs disturbed is left alone."""
PATIENCE = 20.0
"""How many times as long as expected a step may take, beyond this, before ranks that do not answer are given up:"""
UNTIMED_S = 2.0
"""What a step may take where none has been measured."""
LEAST_PATIENCE_S = {"cpu": 5.0, "cuda": 120.0}
"""Kernels for GPUs are compiled, and graphs recorded, in the first steps that want them."""
LONGEST_ASIDE_S = 0.25
"""Most that a request should have to wait for a step that is timed aside."""
NO_NUMBERS = (
    "the model's logits are not finite numbers (NaN or infinity), so there is no next token. Check its weights; where "
    "model.dtype is float16, values may overflow: choose bfloat16 or float32."
)

Measuring = tuple[Measurement, Iterator[None]]
S = TypeVar("S", bound=Section)


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
    num_replicas: int = 1
    """That share the rows of a step now."""
    num_lost: int = 0
    """Workers that have died, or were given up."""
    num_rereads: int = 0
    """Times that nobody had the caches any more, and what ran was read again."""


class Engine:
    """Decodes requests step by step on a mesh of workers.

    Any number of `generate` and `stream` may go on at once, one inside another or on several threads: whichever of them
    runs a step hands the others their outputs. Who calls `step` gets those of the requests added by hand.
    """

    def __init__(self, config: Config, spec: ModelSpec, tokenizer: Tokenizer, executor: Executor) -> None:
        self.config, self.spec, self.tokenizer = config, spec, tokenizer
        self.stats = EngineStats()
        self.identity = resuming.identity_of(config, spec)
        """Stands for what decides answers beside prompts and sampling parameters: the model and the cache policy."""
        self.executor = executor
        self._scheduler = Scheduler(config, spec, executor.num_pages, self._beside)
        self._grammars = Grammars(tokenizer, spec.vocab_size, spec.eos_token_ids)
        self._prompt_logprobs = PromptLogprobs()
        self._admission = Admission(config.scheduler)
        self._measuring: Measuring | None = None
        self._measure_after = 0.0  # time.monotonic()
        self.capacity = self._scheduler.capacity
        """Tokens one slot keeps; under policy full, prompt and output together."""
        self._suspects = Suspects()
        self._aborted: set[str] = set()
        self._ids = itertools.count()
        self._turn = Turn()
        """Held by whoever steps, or changes what the next step does."""
        self._inboxes: dict[str, deque[StepOutput]] = {}
        """What has come for each request of `generate` and `stream`, and is not read yet."""
        self._process = os.getpid()
        self._closed = False
        self._is_timed = False  # the cost curve's seconds are such
        self._least_patience_s = LEAST_PATIENCE_S[pick_device(config, 0).type]
        self._count_workers()

    @classmethod
    def from_config(
        cls, config: Config | Mapping[str, Any] | str | Path | None = None, pool: WorkerPool | None = None
    ) -> Engine:
        """Load the model and start the workers: in this process for a 1x1 mesh, else in those of `pool`
        (by default, processes of this machine).

        Raises ConfigError where the configuration cannot be run, WorkerError where the workers do not start.
        """
        if not isinstance(config, Config | Mapping | str | PurePath | None):
            problem = f"is of type {type(config).__name__}"
            remedy = "Hand in a Config, a mapping of its sections, or the name of a YAML file."
            raise ConfigError("config", config, problem, remedy)
        if not isinstance(config, Config):
            config = Config.from_dict(config) if isinstance(config, Mapping) else Config.load(config)
        config = for_model(config)
        if config.is_open:
            assert pool is None, "a pool's workers are started once: choose before it is made"
            config = choose.resolved(config, cls.from_config)
        directory, spec = checked_model(config)
        tokenizer = Tokenizer(directory)
        opening = tokenizer.opening()
        tokenizer.decode(opening)  # template and decoder are made now: the first request would wait 20 ms for them
        config = config.model_copy(update={"cache": with_separator_ids(config.cache, tokenizer)})
        executor: Executor
        if pool is None and config.parallel.num_workers == 1:
            executor = LocalExecutor(config, spec)
        else:
            executor = MeshExecutor(config, spec, pool or ProcessPool())
        engine = cls(config, spec, tokenizer, executor)
        if config.lookahead.enabled and "recycle" in config.lookahead.sources:
            top = priming.primed(executor, config, spec, opening, TOP_K)
            engine.knowledge = Knowledge(Bigrams(top))
        if config.lookahead.enabled and config.lookahead.planner:
            engine.use_curve(cost.known(executor, config, spec, TOP_K))
        return engine

    @property
    def knowledge(self) -> Knowledge:
        """What lookahead has learned. Requests admitted from now on share it, but for those with `share: false`; set
        another (`Knowledge.fresh`) to begin anew, or to keep the records of two runs apart."""
        return self._scheduler.knowledge

    @knowledge.setter
    def knowledge(self, knowledge: Knowledge) -> None:
        self._scheduler.knowledge = knowledge

    def prepare(self) -> None:
        """Make now what the first request for structured output would make, holding all others up for a second."""
        self._grammars.prepare()

    def measure_cost(self) -> CostCurve:
        """Measure the cost curve anew, keep it and plan by it. Nothing may be running."""
        assert not self.has_work, "the measurement writes over a slot"
        self._scheduler.forget_texts()
        curve = cost.measure(self.executor, self.config, self.spec, TOP_K)
        self.use_curve(curve)
        return curve

    def measure_aside(self) -> bool:
        """Where nothing is to be done and the cost curve is a first look only, time one step towards a better one.

        Returns whether there is more to do. A request that comes in between ends the measurement, which begins anew.
        """
        if not self.cost.curve.provisional or self.has_work or self._scheduler.sessions:
            return False
        if self._measuring is None:
            if time.monotonic() < self._measure_after:
                return False
            measurement = Measurement(self.executor, self.config, self.spec, TOP_K, longest_s=LONGEST_ASIDE_S)
            self._measuring = measurement, measurement.steps()
        measurement, steps = self._measuring
        self._scheduler.forget_texts()
        try:
            if next(steps, steps) is None:
                return True
        except CachesLostError as error:
            self._caches_lost(error)
            return False
        finally:
            self._count_workers()
        self._measuring = None
        curve = measurement.curve
        if measurement.spread > cost.STEADY or len(curve.rows) < 2:
            # Other programs work here, or steps are too long for this: some other time.
            self._measure_after = time.monotonic() + MEASURE_AGAIN_S
            return False
        cost.store(self.config, self.spec, curve)
        self.use_curve(curve)
        return False

    def use_curve(self, curve: CostCurve) -> None:
        """Plan by this cost of a step."""
        self._scheduler.cost = RunningCost(curve, self.config.scheduler.max_rows)
        self._is_timed = True

    @property
    def cost(self) -> RunningCost:
        """What a step costs by its rows, as the planner sees it now."""
        return self._scheduler.cost

    # Requests

    def make_request(
        self,
        prompt: Prompt,
        sampling: SamplingParams | Mapping[str, Any] | None = None,
        lookahead: LookaheadConfig | Mapping[str, Any] | None = None,
        request_id: str | None = None,
        session: Session | None = None,
        so_far: Sequence[AnswerSoFar] = (),
        run_key: str | None = None,
        priority: int = 0,
        deadline_s: float | None = None,
    ) -> Request:
        """Tokenise a prompt (`runtime.prompts.as_prompt` says what may be one); parameters not given, or not named in a
        mapping, are the run's defaults. Raises InvalidRequestError.

        With a `session`, the request is its next turn, and the prompt what the turn appends. `so_far` is what the
        caller has already of the answers, from a run that was broken off: only what follows is given, the same as in
        that run, whose key may be named, too. Of requests that wait, those of the highest `priority` are admitted
        first, then those of the earliest deadline. An answer that is not whole `deadline_s` seconds after its arrival,
        or cannot be, ends with DeadlineError. Safe from any thread.
        """
        if session is not None and not isinstance(session, Session):
            problem, remedy = f"is of type {type(session).__name__}", "Hand in what open_session has given."
            raise InvalidRequestError("session", session, problem, remedy)
        goes_on = session is not None and session.num_turns > 0
        prompt = as_prompt(prompt)
        sampling = _parameters("sampling", sampling, self.config.sampling)
        if session is not None and sampling.n > 1:
            problem, remedy = "a turn of a conversation has one answer", "Leave it out, or ask outside a conversation."
            raise InvalidRequestError("sampling.n", sampling.n, problem, remedy)
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt, add_special_tokens=not goes_on)
        elif kind_of(prompt) == "messages":
            messages: Sequence[Mapping[str, str]] = prompt  # type: ignore[assignment]
            after = session.last_token if session is not None else None
            ids = self.tokenizer.encode_turn(messages, after) if goes_on else self.tokenizer.encode_chat(messages)
            sampling = self._ended_by_turn(sampling)
        elif isinstance(prompt, ToolChat):
            ids = self.tokenizer.encode_tool_chat(prompt)
            sampling = self._ended_by_turn(sampling)
        else:
            ids = list(prompt)  # type: ignore[arg-type]
        if sampling.structure is not None:
            sampling = self._ended_by_turn(sampling)  # a form's text may end with any end token
        request = Request(
            request_id=request_id if request_id is not None else f"request-{next(self._ids)}",
            prompt_ids=tuple(ids),
            sampling=sampling,
            lookahead=_parameters("lookahead", lookahead, self.config.lookahead),
            session_id=session.session_id if session is not None else None,
            so_far=tuple(so_far),
            priority=priority,
            deadline_s=deadline_s,
        )
        self.validate(request)
        return replace(request, is_checked=True, run_key=resuming.check_key(self.identity, request, run_key))

    def _ended_by_turn(self, sampling: SamplingParams) -> SamplingParams:
        """The token with which the chat template ends an answer ends it, whether or not the model's configs know of
        it."""
        end = self.tokenizer.turn_end_id
        if (
            end is None
            or end >= self.spec.vocab_size
            or sampling.ignore_eos
            or end in (*sampling.stop_token_ids, *self.spec.eos_token_ids)
        ):
            return sampling
        return sampling.model_copy(update={"stop_token_ids": (*sampling.stop_token_ids, end)})

    def validate(self, request: Request) -> None:
        """Raise InvalidRequestError if this engine can never run `request`. Safe from any thread."""
        if request.is_checked:
            return
        ids = request.prompt_ids
        if not ids:
            raise InvalidRequestError("prompt", "", "is empty", "Send at least one token.")
        if self.config.cache.policy == "full" and len(ids) > self.capacity:
            raise self._too_long(len(ids))  # before its tokens are looked at, which may be millions
        named = (
            ("token_ids", ids),
            ("resume_from", tuple(token for so_far in request.so_far for token in so_far.token_ids)),
            ("sampling.stop_token_ids", request.sampling.stop_token_ids),
            ("sampling.logit_bias", tuple(request.sampling.logit_bias)),
        )
        for field_name, values in named:
            if set(map(type, values)) == {int} and min(values) >= 0 and max(values) < self.spec.vocab_size:
                continue  # none is to blame
            for token in values:
                if not isinstance(token, int) or not 0 <= token < self.spec.vocab_size:
                    remedy = f"Token ids are whole numbers from 0 to {self.spec.vocab_size - 1}."
                    raise InvalidRequestError(field_name, token, "is not a token id of this model", remedy)
        if self._scheduler.make_ledger().full_at(ids) < len(ids):
            raise self._too_long(len(ids))
        room = self._room_for_turn(request)
        if room is not None and len(ids) + request.sampling.max_new_tokens > room:
            problem = f"with the prompt's {len(ids)} tokens they exceed what eviction per turn makes room for, {room}"
            remedy = "Lower it, shorten the prompt, enlarge the cache, or set cache.evict to token."
            raise InvalidRequestError("sampling.max_new_tokens", request.sampling.max_new_tokens, problem, remedy)
        _check_urgency(request)
        self._grammars.grammar(request.sampling)
        resuming.check(request, self.spec.eos_token_ids, self._scheduler.make_ledger, self._beside)
        rows = request.lookahead.window_rows
        if not request.lookahead.planner and rows > self.config.scheduler.max_rows:
            problem = f"the window takes {rows} rows, and a step holds {self.config.scheduler.max_rows}"
            remedy = "Lower window_size or ngram_size, or raise scheduler.max_rows."
            raise InvalidRequestError("lookahead.window_size", request.lookahead.window_size, problem, remedy)

    def _too_long(self, num_tokens: int) -> InvalidRequestError:
        problem = f"the prompt's {num_tokens} tokens leave no room in a cache of {self.capacity}"
        remedy = "Shorten it, raise cache.capacity, or set cache.policy to sink."
        return InvalidRequestError("prompt", f"{num_tokens} tokens", problem, remedy)

    def _room_for_turn(self, request: Request) -> int | None:
        """Most tokens, prompt and answer, that a turn may bring where eviction is per turn."""
        cache = self.config.cache
        if cache.evict != "turn":
            return None
        always = (cache.num_sinks or 0) + (cache.num_initial or 0)
        if cache.policy == "sep":
            always += (cache.max_separators or 0) + (cache.local or 0)
        return self.capacity - (always if request.session_id is not None else 0)

    def add_request(self, request: Request) -> None:
        """Queue a request. Raises InvalidRequestError, ResourceExhaustedError where the queue is full, or WorkerError
        once the engine is closed."""
        self.validate(request)
        self._check_open()
        with self._turn:
            self._admission.admit(request)
            self._measuring = None
            self._scheduler.add(request)
            self.stats.num_requests += 1

    def abort(self, request_id: str) -> None:
        """Withdraw a request: its slot is free before the next step, its last output says CANCELLED. One that has ended
        is not touched."""
        with self._turn:
            if self._admission.holds(request_id):
                self._aborted.add(request_id)

    def open_session(self, session_id: str | None = None, past: Past | None = None) -> Session:
        """Start a conversation, which holds its cache slot from its first turn on. One with a past goes on with it: it
        is read with the first turn.

        Raises InvalidRequestError where the id is in use, ResourceExhaustedError where too many are open.
        """
        session_id = session_id if session_id is not None else f"session-{next(self._ids)}"
        session = Session.with_past(session_id, past)
        if past is not None and not all(0 <= token < self.spec.vocab_size for token in past.token_ids):
            problem, remedy = (
                "has tokens that this model does not have",
                "Take it up with the model that it was had with.",
            )
            raise InvalidRequestError("past", f"{len(past.token_ids)} tokens", problem, remedy)
        self._check_open()
        with self._turn:
            self._admission.open(session.session_id)
            self._measuring = None
            self._scheduler.open_session(session_id, past)
        return session

    def close_session(self, session: Session) -> None:
        """End a conversation: a running turn is withdrawn, and the slot is free before the next step. Idempotent."""
        with self._turn:
            if not self._admission.has_session(session.session_id):
                return
            self._admission.close(session.session_id)
            request_id = self._scheduler.close_session(session.session_id)
            if request_id is not None:
                self.abort(request_id)

    def read_again(self) -> None:
        """To be called once the workers' caches are empty, as after they were started anew, and before the next step:
        every running request goes on where it stands, after its text has been read again, and open conversations too,
        with their next turns."""
        with self._turn:
            self._measuring = None
            for sequence in self._scheduler.running.values():
                if not sequence.usage.num_new_tokens:
                    self._prompt_logprobs.drop(sequence.request.request_id)
            self._scheduler.read_again()

    @property
    def has_work(self) -> bool:
        return bool(self.num_running or self.num_waiting)

    @property
    def can_step(self) -> bool:
        """Whether a step would do something now."""
        return bool(self._aborted) or self._scheduler.can_step

    @property
    def num_running(self) -> int:
        return len(self._scheduler.running)

    @property
    def num_waiting(self) -> int:
        return len(self._scheduler.waiting)

    # One step

    def step(self) -> list[StepOutput]:
        """Admit, plan, execute, verify, emit. Raises WorkerError if the workers fail, or the engine is closed."""
        self._check_open()
        with self._turn:
            outputs = self._step()
            for output in outputs:
                if output.finish_reason is not None:
                    self._admission.end(output.request_id)
                    self._prompt_logprobs.drop(output.request_id)
                if output.request_id in self._inboxes:
                    self._inboxes[output.request_id].append(output)
            return [output for output in outputs if output.request_id not in self._inboxes]

    def _check_open(self) -> None:
        if os.getpid() != self._process:
            problem = f"the engine belongs to process {self._process}, from which this one was forked"
            raise WorkerError(f"{problem}. Make an engine in this process, or start it by spawning.")
        if self._closed:
            raise WorkerError("the engine is closed. Make another, or use it inside its `with` block.")

    def _step(self) -> list[StepOutput]:
        started = time.perf_counter()
        outputs = self._drop_aborted() if self._aborted else []
        for request, usage, error in self._scheduler.give_up_late(started):
            index = request.index
            outputs.append(StepOutput(request.request_id, (), usage, FinishReason.ERROR, failure=error, index=index))
        for request in self._scheduler.admit():
            usage = self._scheduler.unread(request)
            outputs.append(StepOutput(request.request_id, (), usage, FinishReason.LENGTH, index=request.index))
        alone = None
        if self._suspects:
            alone = self._suspects.among({each.request.request_id for each in self._scheduler.running.values()})
        step = self._scheduler.plan(alone=alone)
        if step is None:
            return outputs
        planned = time.perf_counter()
        try:
            result = self.executor.execute(step.plan, self._patience_s(step.plan.num_rows))
        except CachesLostError as error:
            return outputs + self._caches_lost(error, [part.sequence for part in step.parts])
        finally:
            self._count_workers()
        executed = time.perf_counter()
        outputs += self._verify(step, result, executed)
        ended = time.perf_counter()
        self._account(step.plan, result.seconds, plan=planned - started, verify=ended - executed)
        taken = planned - started + sum(result.seconds.values()) + ended - executed  # without a fault's pause
        self._scheduler.observe(step, taken, sum(len(output.token_ids) for output in outputs))
        return outputs

    def _count_workers(self) -> None:
        """A step may have found that some are gone, or have come."""
        self._scheduler.num_replicas = self.stats.num_replicas = self.executor.num_replicas
        self.stats.num_lost = self.executor.num_lost

    def _patience_s(self, num_rows: int) -> float:
        """How long a step of so many rows may take before ranks that do not answer are given up."""
        expected_s = self._scheduler.cost.seconds[num_rows] if self._is_timed else UNTIMED_S
        return self._least_patience_s + PATIENCE * expected_s

    def _caches_lost(self, error: CachesLostError, sequences: Sequence[Running] = ()) -> list[StepOutput]:
        """Nobody has what was cached: it is read again. Nothing that was emitted is lost, or emitted twice. The request
        that is to blame, if it is known to be one of those whose step it was, is failed."""
        log.warning("%d requests are read again: %s", self.num_running, error)
        self.stats.num_rereads += 1
        self.read_again()
        guilty = self._suspects.accuse([sequence.request.request_id for sequence in sequences]) if sequences else None
        if guilty is None:
            return []
        ((request, usage),) = self._scheduler.drop([guilty])
        failure = HarmfulRequestError("the request has ended the workers, and again when it had them alone")
        log.error("request %s: %s", guilty, failure)
        return [StepOutput(guilty, (), usage, FinishReason.ERROR, index=request.index, failure=failure)]

    def heartbeat(self) -> None:
        """Keep idle ranks from running into a collective's time-out, and have those that have come join; call every few
        seconds without work."""
        try:
            self.executor.execute(StepPlan.empty(), self._least_patience_s)
        except CachesLostError as error:
            self._caches_lost(error)
        finally:
            self._count_workers()

    def _drop_aborted(self) -> list[StepOutput]:
        dropped = self._scheduler.drop(self._aborted)
        self._aborted.clear()
        return [StepOutput(request.request_id, (), usage, FinishReason.CANCELLED) for request, usage in dropped]

    def _verify(self, step: Step, result: StepResult, now_s: float) -> list[StepOutput]:
        outputs = []
        chosen = np.ascontiguousarray(result.tokens)
        for part in step.parts:
            sequence = part.sequence
            rows = slice(part.start, part.start + len(part.rows))
            emitted, reason = sequence.accept(chosen[rows], result.top[rows], now_s)
            if emitted and self._suspects:
                self._suspects.acquit(sequence.request.request_id)
            failure: Exception | None = NumericsError(NO_NUMBERS) if reason is FinishReason.ERROR else None
            grammar = sequence.constraint
            if isinstance(grammar, Grammar):
                grammar.accept(emitted)
                if grammar.error is not None and reason is None:
                    emitted, reason, failure = [], FinishReason.ERROR, _too_complex(sequence.request, grammar.error)
            self._scheduler.commit(step, part)
            of_tokens, of_prompt = self._read_logprobs(part, result.logprobs[rows], len(emitted))
            if reason is not None:
                self._scheduler.release(sequence.slot, is_sound=reason is not FinishReason.ERROR)
            self.stats.num_tokens += len(emitted)
            if emitted or reason is not None:
                outputs.append(
                    StepOutput(
                        sequence.request.request_id,
                        tuple(emitted),
                        sequence.usage,
                        reason,
                        index=sequence.request.index,
                        is_stopped=sequence.is_stopped,
                        sources=tuple(sequence.accepted),
                        logprobs=of_tokens,
                        prompt_logprobs=of_prompt,
                        failure=failure,
                    )
                )
        return outputs

    def _read_logprobs(
        self, part: Part, words: Int32, num_emitted: int
    ) -> tuple[tuple[TokenLogprobs, ...], tuple[TokenLogprobs | None, ...]]:
        """Those of the tokens that a step emitted, whose rows are the last that it accepted; and with the first ones
        those of the prompt."""
        sampling, request = part.sequence.request.sampling, part.sequence.request
        found: tuple[TokenLogprobs, ...] = ()
        of_prompt: tuple[TokenLogprobs | None, ...] = ()
        if sampling.logprobs is not None and num_emitted:
            decided = part.sequence.commit_rows[-num_emitted:]
            found = tuple(logprobs.read(words[row], sampling.logprobs) for row in decided)
        if sampling.prompt_logprobs is not None and part.sequence.usage.num_new_tokens == num_emitted:
            scored = [row for row, kind in enumerate(part.rows.choose) if kind == Choose.SCORE]
            self._prompt_logprobs.add(request.request_id, words[scored], sampling.prompt_logprobs)
            if num_emitted:
                of_prompt = self._prompt_logprobs.take(request.request_id, len(request.prompt_ids))
        return found, of_prompt

    def _beside(self, request: Request) -> tuple[StopWatch | None, Grammar | None]:
        """What looks at an answer's text, and what its text is bound to; both have seen what the caller has of it."""
        watch = StopWatch(self.tokenizer, request) if request.sampling.stop else None
        grammar = self._grammars.grammar(request.sampling)
        if watch is not None:
            watch.first_end(request.resume_from)
        if grammar is not None:
            grammar.accept(request.resume_from)
        return watch, grammar

    def _account(self, step: StepPlan, seconds: dict[str, float], plan: float, verify: float) -> None:
        self.stats.num_steps += 1
        self.stats.num_rows += step.num_rows
        spent = self.stats.seconds
        spent["plan"] += plan
        spent["verify"] += verify
        for phase, value in seconds.items():
            spent[phase] += value

    @property
    def cache_share(self) -> float:
        """Of the tokens that all slots can keep, the share that running sequences and conversations keep now. Safe from
        any thread."""
        most = max(group.new().max_stored for group in self._scheduler.layer_groups)
        held = [*self._scheduler.running.values(), *filter(None, list(self._scheduler.sessions.values()))]
        kept = sum(min(sequence.num_cached, most) for sequence in {id(each): each for each in held}.values())
        return kept / (most * self.config.scheduler.num_slots)

    def slots(self) -> list[SlotReport]:
        """What the cache's slots hold now. Safe from any thread."""
        return self._scheduler.slots()

    def cache_report(self) -> CacheReport:
        """What the KV cache takes on the most loaded worker."""
        config, spec = self.config, self.spec
        tp = config.parallel.tp
        shards = (HeadShard.of(spec.num_heads, spec.num_kv_heads, rank, tp) for rank in range(tp))
        most_heads = max(shard.num_kv_heads for shard in shards)
        bytes_per_layer = 2 * most_heads * spec.head_dim * getattr(torch, config.model.dtype).itemsize
        kinds = [(len(group.layers) * bytes_per_layer, group.new()) for group in self._scheduler.layer_groups]
        return CacheReport(
            policy=" ".join(filter(None, (config.cache.policy, config.cache.design))),
            bytes_per_token=spec.num_layers * bytes_per_layer,
            bytes_per_sequence=sum(size * kind.max_stored + size // 2 * kind.max_turned for size, kind in kinds),
            bytes_staged=config.scheduler.max_rows * spec.num_layers * bytes_per_layer,
            num_slots=config.scheduler.num_slots,
            tokens_per_sequence=self.capacity if config.cache.policy == "full" or config.cache.full_layers else None,
            max_stored_tokens=max(kind.max_stored for _, kind in kinds),
        )

    # The Python API

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling: SamplingParams | Mapping[str, Any] | None = None,
        lookahead: LookaheadConfig | Mapping[str, Any] | None = None,
        priority: int = 0,
        deadline_s: float | None = None,
    ) -> list[Completion]:
        """Continue every prompt, all in company; answers come in the order of the prompts, n of each, for one prompt as
        a list.

        A prompt is a text, token ids (a list, numpy's or torch's array of one dimension), or chat messages. Where the
        model gives no numbers for one, or it misses its deadline, its finish reason is ERROR and its `error` says so;
        the others go on. Raises InvalidRequestError before anything has run, WorkerError if the workers fail.
        """
        urgency: dict[str, Any] = {"priority": priority, "deadline_s": deadline_s}
        asked = [self.make_request(prompt, sampling, lookahead, **urgency) for prompt in as_prompts(prompts)]
        requests = [each for request in asked for each in forks(request)]
        runs: dict[str, list[StepOutput]] = {request.request_id: [] for request in requests}
        pending = deque(requests)
        with self._expecting(runs):
            while pending or any(not run or run[-1].finish_reason is None for run in runs.values()):
                with self._turn:
                    while pending and self.num_waiting + self.num_running < self.config.scheduler.num_slots:
                        self.add_request(pending.popleft())
                    for output in self._next_of(runs):
                        runs[output.request_id].append(output)
        return [self._completion(request, runs[request.request_id]) for request in requests]

    def stream(
        self,
        prompt: Prompt,
        sampling: SamplingParams | Mapping[str, Any] | None = None,
        lookahead: LookaheadConfig | Mapping[str, Any] | None = None,
        session: Session | None = None,
        priority: int = 0,
        deadline_s: float | None = None,
    ) -> Iterator[StepOutput]:
        """Continue one prompt, as in `generate`, step by step, as the next turn of `session` if there is one. With n
        answers, each output says by its index to which it belongs.

        Leaving the iterator early withdraws the request.
        """
        urgency: dict[str, Any] = {"priority": priority, "deadline_s": deadline_s}
        request = self.make_request(prompt, sampling, lookahead, session=session, **urgency)
        requests = forks(request)
        num_live = len(requests)
        with self._expecting(each.request_id for each in requests) as expected:
            for each in requests:
                self.add_request(each)
            while num_live:
                for output in self._next_of(expected):
                    if session is not None:
                        session.take(output)
                    num_live -= output.finish_reason is not None
                    yield output

    @contextmanager
    def _expecting(self, request_ids: Iterable[str]) -> Iterator[list[str]]:
        """Keep what comes for these requests, whoever steps, for `_next_of`; at the end, withdraw what still runs."""
        expected = list(request_ids)
        with self._turn:
            self._inboxes |= {request_id: deque() for request_id in expected}
        try:
            yield expected
        finally:
            if os.getpid() == self._process:  # a fork has the lock as it was
                with self._turn:
                    for request_id in expected:
                        del self._inboxes[request_id]
                        self.abort(request_id)

    def _next_of(self, request_ids: Iterable[str]) -> list[StepOutput]:
        """What has come for requests that are expected, after a step if there is nothing yet."""
        with self._turn:
            if not any(self._inboxes[request_id] for request_id in request_ids):
                was_idle, num_waiting = not self.num_running, self.num_waiting
                self.step()
                if was_idle and not self.num_running and num_waiting and self.num_waiting == num_waiting:
                    raise self._scheduler.why_waiting()
            boxes = [self._inboxes[request_id] for request_id in request_ids]
            return [box.popleft() for box in boxes for _ in range(len(box))]

    def _completion(self, request: Request, run: list[StepOutput]) -> Completion:
        ids = tuple(token for output in run for token in output.token_ids)
        last = run[-1]
        assert last.finish_reason is not None
        lengths = tuple(len(output.token_ids) for output in run if output.token_ids)
        shown = AnswerText(self.tokenizer, request.prompt_ids, request.sampling, request.resume_from)
        return Completion(
            request.request_id,
            request.prompt_ids,
            ids,
            "".join(map(shown.push, run)),
            last.finish_reason,
            last.usage,
            lengths,
            last.error,
            tuple(one for output in run for one in output.logprobs),
            run[0].prompt_logprobs,
            request.index,
        )

    def close(self) -> None:
        """End the workers; nothing is decoded any more. Idempotent. Does nothing in a process forked from its own."""
        if os.getpid() == self._process:
            self._closed = True
            self.executor.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check_urgency(request: Request) -> None:
    """Raise InvalidRequestError for a priority or a deadline that is none."""
    priority, deadline_s = request.priority, request.deadline_s
    if isinstance(priority, bool) or not isinstance(priority, int) or not -(2**31) <= priority < 2**31:
        raise InvalidRequestError("priority", priority, "is no whole number of 32 bits", "Give one; 0 is usual.")
    if deadline_s is None:
        return
    is_number = isinstance(deadline_s, int | float) and not isinstance(deadline_s, bool)
    if not is_number or not 0 < deadline_s < math.inf:
        problem, remedy = "is no number of seconds above 0", "Give one, or leave it out."
        raise InvalidRequestError("deadline_s", deadline_s, problem, remedy)


def _too_complex(request: Request, problem: str) -> InvalidRequestError:
    """The error of a request whose grammar turned out to take too much."""
    structure = request.sampling.structure
    assert structure is not None
    kind, text = structure
    brief = problem.strip().splitlines()[0][:200]
    return InvalidRequestError(f"sampling.{kind}", text, f"is too complex to go on with ({brief})", "Simplify it.")


def _parameters(name: str, given: S | Mapping[str, Any] | None, defaults: S) -> S:
    """A request's own parameters. Raises InvalidRequestError."""
    if given is None or isinstance(given, type(defaults)):
        return given or defaults
    if isinstance(given, Mapping):
        return defaults.merged(given, f"{name}.")
    remedy = f"Hand in {type(defaults).__name__}(...), or a mapping of what differs from the run's."
    raise InvalidRequestError(name, given, f"is of type {type(given).__name__}", remedy)
