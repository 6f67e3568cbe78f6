"""Answers on the wire: one step's tokens as a message, and as the chunk that a client gets; and their sum."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from cluster.pb.outrider.v1 import generation_pb2 as pb
from runtime.errors import ResourceExhaustedError
from runtime.request import FinishReason, StepOutput, TokenLogprobs, Usage

_FINISH_REASONS = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
}
_FINISH_REASONS_BACK = {sent: reason for reason, sent in _FINISH_REASONS.items()}


@dataclass(frozen=True)
class Chunk:
    """What one decoding step gave; the last has a finish reason and the usage. See GenerateResponse in the proto."""

    request_id: str
    """In a conversation: the session's id, "#" and the turn's index, from 0."""
    text: str
    token_ids: tuple[int, ...]
    num_accepted: int
    finish_reason: FinishReason | None
    usage: Usage | None
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
    index: int = 0
    """Which of the request's n answers this belongs to; each has a last chunk of its own."""


@dataclass(frozen=True)
class Answer:
    """A whole answer."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    run_lengths: tuple[int, ...]
    """Tokens of each chunk that had some, in order."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
    others: tuple[Answer, ...] = ()
    """The further ones, where the request asked for n."""


def by_index(chunks: Iterable[Chunk]) -> list[list[Chunk]]:
    """The chunks of each of a request's answers."""
    found: dict[int, list[Chunk]] = {}
    for chunk in chunks:
        found.setdefault(chunk.index, []).append(chunk)
    return [found[index] for index in sorted(found)]


def num_accepted(output: StepOutput) -> int:
    """Tokens the step gave beyond the one that every step gives: the accepted candidates."""
    return max(len(output.token_ids) - 1, 0)


def cache_is_full(capacity: int) -> ResourceExhaustedError:
    """The error of a turn for which a conversation has no room any more."""
    problem = "the conversation fills its cache"
    remedy = "Begin a new one, raise cache.capacity, or keep less: --set cache.policy=sink, or cache.policy=sep."
    return ResourceExhaustedError("cache.capacity", capacity, problem, remedy)


def response(output: StepOutput, text: str, resume_key: str = "") -> pb.GenerateResponse:
    """One step's tokens; `output` must not have ended in cancellation or failure (those are statuses). `resume_key`:
    with the first response."""
    return pb.GenerateResponse(
        request_id=output.request_id, text=text, index=output.index, resume_key=resume_key, **_step(output)
    )


def converse_response(
    session_id: str, turn_index: int, output: StepOutput, text: str, is_kept: bool = False
) -> pb.ConverseResponse:
    """One step's tokens of a turn; `output` must not have ended in failure (that is a status). `is_kept`: the session
    outlives the call."""
    return pb.ConverseResponse(
        session_id=session_id, turn_index=turn_index, text=text, is_kept=is_kept, **_step(output)
    )


def _step(output: StepOutput) -> dict[str, Any]:
    return {
        "token_ids": output.token_ids,
        "num_accepted": num_accepted(output),
        "finish_reason": _FINISH_REASONS[output.finish_reason],
        "usage": _usage(output.usage) if output.finish_reason is not None else None,
        "logprobs": map(_logprobs, output.logprobs),
        "prompt_logprobs": map(_logprobs, output.prompt_logprobs),
    }


def _logprobs(found: TokenLogprobs | None) -> pb.TokenLogprobs:
    if found is None:
        return pb.TokenLogprobs()
    top = (pb.TopLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in found.top)
    return pb.TokenLogprobs(logprob=found.logprob, top=top)


def _read_logprobs(sent: pb.TokenLogprobs) -> TokenLogprobs | None:
    if not sent.HasField("logprob"):
        return None
    return TokenLogprobs(sent.logprob, tuple((likely.token_id, likely.logprob) for likely in sent.top))


def read_chunk(message: pb.GenerateResponse | pb.ConverseResponse, request_id: str) -> Chunk:
    """A response as a chunk."""
    return Chunk(
        request_id=request_id,
        text=message.text,
        token_ids=tuple(message.token_ids),
        num_accepted=message.num_accepted,
        finish_reason=_FINISH_REASONS_BACK.get(message.finish_reason),
        usage=_read_usage(message.usage) if message.HasField("usage") else None,
        logprobs=tuple(filter(None, map(_read_logprobs, message.logprobs))),
        prompt_logprobs=tuple(map(_read_logprobs, message.prompt_logprobs)),
        index=message.index if isinstance(message, pb.GenerateResponse) else 0,
    )


def _usage(usage: Usage) -> pb.Usage:
    # The message has the fields of the class, and its derived figures for those who read it without our code.
    return pb.Usage(**{name: getattr(usage, name) for name in pb.Usage.DESCRIPTOR.fields_by_name})


def _read_usage(sent: pb.Usage) -> Usage:
    return Usage(**{field.name: getattr(sent, field.name) for field in fields(Usage)})
