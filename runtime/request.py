"""What goes into the engine and what comes out: requests and token ids; text stays at the edge."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Literal

from runtime.config import LookaheadConfig, SamplingParams
from runtime.errors import OutriderError


@dataclass(frozen=True)
class ToolChat:
    """A conversation in which functions may be called, as chat templates take it, checked by whoever makes it."""

    messages: Sequence[Mapping[str, Any]]
    """Each has role and content; an assistant's may have tool_calls, whose arguments are mappings."""
    tools: Sequence[Mapping[str, Any]]
    """The functions, as JSON has them."""
    opening: str = ""
    """How the answer begins; it belongs to the prompt."""


Prompt = str | Sequence[int] | Sequence[Mapping[str, str]] | ToolChat
"""Text, token ids, or chat messages ({"role", "content"}), with tools beside them."""


class FinishReason(StrEnum):
    STOP = "stop"
    """An end token of the model, or a stop token or stop text of the request."""
    LENGTH = "length"
    """max_new_tokens reached, or the cache slot is full."""
    CANCELLED = "cancelled"
    """The caller withdrew the request."""
    ERROR = "error"
    """The model gave no numbers, or the workers failed; `StepOutput.error` and `Completion.error` say it."""


@dataclass(frozen=True)
class AnswerSoFar:
    """What a caller has of an answer already, from a run that was broken off."""

    token_ids: tuple[int, ...] = ()
    index: int = 0
    """Which of the request's n answers."""
    has_ended: bool = False
    """The answer is whole: nothing more of it is given."""


@dataclass(frozen=True)
class TurnStart:
    """Where a turn of a conversation began: eviction per turn makes room there, so whoever reads the text again has to
    know."""

    position: int
    """Tokens in the cache then."""
    num_coming: int
    """Most tokens that prompt and answer could have."""


@dataclass(frozen=True)
class Past:
    """What a conversation has had before, to be read again with its next turn."""

    token_ids: tuple[int, ...]
    """All prompts and answers."""
    rope_length: int
    """Of the first prompt, tokens: what dynamic RoPE scales by."""
    turn_starts: tuple[TurnStart, ...] = ()
    """Ascending; where eviction is per turn."""
    ends_in_answer: bool = True
    """False where the last turn was withdrawn while its prompt was read."""

    @property
    def num_cached(self) -> int:
        """Tokens that were in the cache at its end: an answer's last token waits for the next turn."""
        return len(self.token_ids) - self.ends_in_answer


@dataclass(frozen=True)
class Request:
    """One prompt to be continued."""

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    lookahead: LookaheadConfig
    session_id: str | None = None
    """The conversation whose next turn this is; the prompt is then what the turn appends to it."""
    index: int = 0
    """Which of the answers to one prompt this is for."""
    so_far: tuple[AnswerSoFar, ...] = ()
    """What the caller has already of each answer, at most one for each index; the rest is given, as if those tokens had
    been emitted just now."""
    priority: int = 0
    """Of requests that wait, the one with the highest is admitted first."""
    deadline_s: float | None = None
    """Seconds from its arrival after which the answer is of no use; None: it always is."""
    run_key: str = ""
    """Stands for all that decides the answers: model, cache policy, prompt and sampling."""
    is_checked: bool = False
    """`Engine.validate` has seen it, which takes a while for a long prompt, and found nothing."""
    arrival_s: float = field(default_factory=time.perf_counter)
    """time.perf_counter() when the request arrived; latencies count from here."""

    @property
    def resume_from(self) -> tuple[int, ...]:
        """Tokens of its own answer that the caller has already."""
        return next((so_far.token_ids for so_far in self.so_far if so_far.index == self.index), ())


def derived_seed(seed: int, index: int) -> int:
    """The seed of a request's answer number `index`, from 0, whose own is the request's: one round of SplitMix64."""
    if index == 0:
        return seed
    x = (seed + index * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    x = (x ^ x >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return (x ^ x >> 31) >> 1


def forks(request: Request) -> list[Request]:
    """The requests for each of its n answers that is not whole already; where n is 1, itself."""
    sampling = request.sampling
    if sampling.n == 1:
        return [request]
    whole = {so_far.index for so_far in request.so_far if so_far.has_ended}
    return [
        replace(
            request,
            request_id=f"{request.request_id}/{index}",
            sampling=sampling.model_copy(update={"n": 1, "seed": derived_seed(sampling.seed, index)}),
            index=index,
        )
        for index in range(sampling.n)
        if index not in whole
    ]


@dataclass(frozen=True)
class Usage:
    """What one request cost so far."""

    num_prompt_tokens: int = 0
    num_new_tokens: int = 0
    """Tokens of the answer, those included that the caller had before."""
    num_steps: int = 0
    """Steps that emitted tokens: the first is the one that ran the prompt's last chunk."""
    num_rows: int = 0
    """Rows run in those steps (the prompt's own rows left out)."""
    ttft_s: float = 0.0
    """Arrival to first token, seconds."""
    latency_s: float = 0.0
    """Arrival to the newest token, seconds."""
    num_reused_tokens: int = 0
    """Tokens of the prompt that were in the cache before: another request had left them there."""
    queue_s: float = 0.0
    """Arrival to a place among the sequences that run, seconds."""
    num_seen_tokens: int = 0
    """Tokens that the sequence has put into the cache, earlier turns included."""
    kept_last: float = 1.0
    """Of the tokens up to the newest cached one, the share that it saw: the kept KV at the last step."""
    kept_sum: float = 1.0
    """The same, summed over all tokens before the division: the mean kept KV, as SepLLM's r.KV counts it."""
    num_resumed_tokens: int = 0
    """Tokens of the answer that the caller had before; no step of this run emitted them."""

    @property
    def tokens_per_step(self) -> float:
        """S, the step compression."""
        return (self.num_new_tokens - self.num_resumed_tokens) / self.num_steps if self.num_steps else 0.0

    @property
    def rows_per_step(self) -> float:
        """T of this sequence."""
        return self.num_rows / self.num_steps if self.num_steps else 0.0


@dataclass(frozen=True)
class TokenLogprobs:
    """How likely a token was to the model, before any sampling parameter; natural logarithms."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """Ids and log-probabilities of the likeliest tokens, likeliest first."""


@dataclass(frozen=True)
class StepOutput:
    """The tokens one step gave one request. The last of a request has a finish reason."""

    request_id: str
    token_ids: tuple[int, ...]
    """New tokens in order, the stop token that ended the request included; each but the one the step's
    last accepted row gave was an accepted candidate."""
    usage: Usage
    finish_reason: FinishReason | None = None
    failure: Exception | None = None
    """What happened, where the finish reason is ERROR: NumericsError, WorkerError, or a defect."""
    index: int = 0
    """Which of the request's n answers it belongs to; each has a last output of its own."""
    is_stopped: bool = False
    """The finish reason is STOP because the last token's text completed a stop string."""
    sources: tuple[tuple[str, ...], ...] = ()
    """Of each token but the last, which were accepted candidates: the sources that had proposed it."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """Of the tokens, where the request wants them."""
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
    """With a request's first output, where it wants them: of the prompt's tokens; None where none stands before."""

    @property
    def error(self) -> str | None:
        """What happened, in words."""
        if self.failure is None or isinstance(self.failure, OutriderError):
            return str(self.failure) if self.failure is not None else None
        return f"{type(self.failure).__name__}: {self.failure}"

    @property
    def text_ids(self) -> tuple[int, ...]:
        """The tokens that become text: all but the stop token."""
        ends = self.finish_reason is FinishReason.STOP and not self.is_stopped
        return self.token_ids[:-1] if ends else self.token_ids


@dataclass(frozen=True)
class CacheReport:
    """What the KV cache takes on the most loaded worker."""

    policy: str
    bytes_per_token: int
    """Keys and values of one token, all layers."""
    bytes_per_sequence: int
    """Of the most tokens that stay stored of one sequence."""
    bytes_staged: int
    """Of the most rows that a step may stage for one sequence, on top of those."""
    num_slots: int
    tokens_per_sequence: int | None
    """Most tokens of a sequence; None: there is no fixed number."""
    max_stored_tokens: int
    """Most tokens that stay stored in a layer of one sequence."""


@dataclass(frozen=True)
class SlotReport:
    """A cache slot that is in use."""

    slot: int
    state: Literal["running", "held", "left"]
    """It runs; a conversation holds it between turns; it is free, but its text may be reused."""
    num_tokens: int
    """Tokens that stand in it, in the layer that keeps most."""


@dataclass(frozen=True)
class Completion:
    """A whole answer, as `Engine.generate` returns it."""

    request_id: str
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    """The stop token, if one ended the text, included; `text` leaves it out."""
    text: str
    """What the text of prompt and answer has beyond that of the prompt: joined they are one text."""
    finish_reason: FinishReason
    usage: Usage
    run_lengths: tuple[int, ...]
    """Tokens each step emitted, in order; they sum to len(token_ids)."""
    error: str | None = None
    """What happened, where the finish reason is ERROR; `token_ids` are those before it."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
    """As StepOutput has them."""
    index: int = 0
    """Which of the n answers to its prompt."""
