"""A test double for runtime.engine.engine.Engine: the same interface, a script in place of the model.

It gives each sequence runs of tokens, waits at a gate and fails when told to, so that tests of the loop and of the
server can force what a real engine does only now and then.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

from runtime.config import Config, LookaheadConfig, SamplingParams
from runtime.engine.session import Session
from runtime.errors import InvalidRequestError
from runtime.model.spec import ModelSpec, RopeSpec
from runtime.request import AnswerSoFar, CacheReport, FinishReason, Past, Request, SlotReport, StepOutput, Usage


class LetterTokenizer:
    """Id i is the character with code point i."""

    vocab_size = 0x3000

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(letter) for letter in text]

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        return self.encode("".join(f"{message['role']}:{message['content']}\n" for message in messages))

    def encode_turn(self, messages: Sequence[dict[str, str]], after: int | None) -> list[int]:
        return [ord("|"), *self.encode_chat(messages)]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(token_id) for token_id in ids)

    def shows(self, token_id: int) -> bool:
        return 0 <= token_id < self.vocab_size


SPEC = ModelSpec(
    architecture="LlamaForCausalLM",
    num_layers=1,
    hidden_size=8,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    intermediate_size=16,
    vocab_size=LetterTokenizer.vocab_size,
    rms_eps=1e-5,
    tie_embeddings=True,
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
    qk_norm=False,
    sliding_windows=(None,),
    max_positions=64,
    eos_token_ids=(),
    activation="silu",
    rope=RopeSpec((1.0, 0.1)),
)


@dataclass
class _Sequence:
    request: Request
    usage: Usage
    tokens: list[int]
    """Of the prompt and the answer; in a conversation, of all its turns."""


class ScriptedEngine:
    """Emits, for a prompt p0 p1 ..., the tokens p0+1, p0+2, ... in runs of one, two, three, one, ... tokens.

    The first token of `stop_token_ids` that comes up is the last; max_new_tokens cuts the run. A conversation holds all
    tokens of its turns; once those are `capacity`, a turn gets none.
    """

    def __init__(self, config: Config, step_s: float = 0.0) -> None:
        self.config = config
        self.spec = SPEC
        self.knowledge = SimpleNamespace(tally=SimpleNamespace(sources={"suffix": [0, 0]}, depths=[]))
        self.cache_share = 0.0
        self.tokenizer = LetterTokenizer()
        self.capacity = SPEC.max_positions
        self.identity = "scripted"
        self.stats = SimpleNamespace(
            num_steps=0,
            num_rows=0,
            num_tokens=0,
            num_requests=0,
            seconds={"plan": 0.0, "forward": 0.0},
            num_replicas=1,
            num_lost=0,
            num_rereads=0,
        )
        self.gate = threading.Event()
        """Steps wait here."""
        self.gate.set()
        self.stepping = threading.Event()
        """A step has begun."""
        self.error: Exception | None = None
        """What the next step or heartbeat raises."""
        self.refusal: Exception | None = None
        """What the next add_request raises."""
        self.num_heartbeats = 0
        self.step_s = step_s
        self.sessions: dict[str, list[int]] = {}
        """The tokens of every open conversation."""
        self._sequences: dict[str, _Sequence] = {}
        self._aborted: set[str] = set()
        self._ids = itertools.count()

    def make_request(
        self,
        prompt: str | Sequence[int] | Sequence[dict[str, str]],
        sampling: SamplingParams | None = None,
        lookahead: LookaheadConfig | None = None,
        request_id: str | None = None,
        session: Session | None = None,
        so_far: Sequence[AnswerSoFar] = (),
        run_key: str | None = None,
        priority: int = 0,
        deadline_s: float | None = None,
    ) -> Request:
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
        elif prompt and isinstance(prompt[0], dict):
            goes_on = session is not None and session.num_turns
            ids = self.tokenizer.encode_turn(prompt, None) if goes_on else self.tokenizer.encode_chat(prompt)
        else:
            ids = list(prompt)
        return Request(
            request_id if request_id is not None else f"scripted-{next(self._ids)}",
            tuple(ids),
            sampling or self.config.sampling,
            lookahead or self.config.lookahead,
            session.session_id if session is not None else None,
            so_far=tuple(so_far),
            priority=priority,
            deadline_s=deadline_s,
        )

    def validate(self, request: Request) -> None:
        for token in request.prompt_ids:
            if not 0 <= token < self.spec.vocab_size:
                raise InvalidRequestError("token_ids", token, "is not a token id", "Use known ids.")
        if len(request.prompt_ids) >= self.capacity:
            raise InvalidRequestError("prompt", len(request.prompt_ids), "does not fit", "Shorten it.")

    def add_request(self, request: Request) -> None:
        if self.refusal is not None:
            raise self.refusal
        assert request.request_id not in self._sequences
        tokens: list[int] = []
        if request.session_id is not None:
            assert all(other.request.session_id != request.session_id for other in self._sequences.values())
            tokens = self.sessions[request.session_id]
        tokens += request.prompt_ids + request.resume_from
        given = len(request.resume_from)
        usage = Usage(len(request.prompt_ids), num_new_tokens=given, num_resumed_tokens=given)
        self._sequences[request.request_id] = _Sequence(request, usage, tokens)
        self.stats.num_requests += 1

    def open_session(self, session_id: str, past: Past | None = None) -> None:
        assert session_id not in self.sessions and len(self.sessions) < self.config.scheduler.session_limit
        self.sessions[session_id] = list(past.token_ids) if past is not None else []

    def close_session(self, session: Session) -> None:
        del self.sessions[session.session_id]
        for name, sequence in self._sequences.items():
            if sequence.request.session_id == session.session_id:
                self.abort(name)

    def slots(self) -> list[SlotReport]:
        return []

    def cache_report(self) -> CacheReport:
        return CacheReport("full", 100, 6400, 51200, self.config.scheduler.num_slots, self.capacity, self.capacity)

    def abort(self, request_id: str) -> None:
        self._aborted.add(request_id)

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    can_step = has_work

    @property
    def num_running(self) -> int:
        return min(len(self._sequences), self.config.scheduler.num_slots)

    def measure_aside(self) -> bool:
        return False

    def heartbeat(self) -> None:
        self.num_heartbeats += 1
        if self.error is not None:
            raise self.error

    def step(self) -> list[StepOutput]:
        outputs = []
        for name in self._aborted & set(self._sequences):
            usage = self._sequences.pop(name).usage
            outputs.append(StepOutput(name, (), usage, FinishReason.CANCELLED))
        self._aborted.clear()
        self.stepping.set()
        assert self.gate.wait(30)
        time.sleep(self.step_s)
        if self.error is not None:
            raise self.error
        for sequence in list(self._sequences.values())[: self.config.scheduler.num_slots]:
            outputs.append(self._emit(sequence))
        self.stats.num_steps += 1
        return outputs

    def _emit(self, sequence: _Sequence) -> StepOutput:
        request, usage = sequence.request, sequence.usage
        held = sequence.tokens
        if request.session_id is not None and len(held) >= self.capacity:
            del self._sequences[request.request_id]
            return StepOutput(request.request_id, (), usage, FinishReason.LENGTH)
        done = usage.num_new_tokens
        run = [request.prompt_ids[0] + done + 1 + index for index in range(1 + usage.num_steps % 3)]
        run = [token % LetterTokenizer.vocab_size for token in run]
        reason = None
        stops = [index for index, token in enumerate(run) if token in request.sampling.stop_token_ids]
        if stops:
            run, reason = run[: stops[0] + 1], FinishReason.STOP
        if not stops and done + len(run) >= request.sampling.max_new_tokens:
            run, reason = run[: request.sampling.max_new_tokens - done], FinishReason.LENGTH
        held += run
        now = time.perf_counter() - request.arrival_s
        sequence.usage = Usage(
            num_prompt_tokens=usage.num_prompt_tokens,
            num_new_tokens=done + len(run),
            num_steps=usage.num_steps + 1,
            num_rows=usage.num_rows + 10,
            ttft_s=usage.ttft_s or now,
            latency_s=now,
            num_seen_tokens=len(held),
            kept_last=0.5,
            kept_sum=0.75,
            num_resumed_tokens=usage.num_resumed_tokens,
        )
        self.stats.num_tokens += len(run)
        if reason is not None:
            del self._sequences[request.request_id]
        return StepOutput(request.request_id, tuple(run), sequence.usage, reason, index=request.index)
