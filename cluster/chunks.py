"""What clients send and get: prompts as messages, and an answer in chunks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from runtime.errors import InvalidRequestError, OutriderError, ResourceExhaustedError
from runtime.pb.outrider.v1 import generation_pb2 as pb
from runtime.request import FinishReason, StepOutput, Usage

_FINISH_REASONS = {
    pb.FINISH_REASON_STOP: FinishReason.STOP,
    pb.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    pb.FINISH_REASON_CANCELLED: FinishReason.CANCELLED,
}

_MEANINGS = {
    grpc.StatusCode.INVALID_ARGUMENT: "the server refused the request",
    grpc.StatusCode.ALREADY_EXISTS: "the server refused the request",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "the server has no room for the request",
    grpc.StatusCode.DEADLINE_EXCEEDED: "the answer took longer than the time allowed",
    grpc.StatusCode.UNAVAILABLE: "the server cannot be reached, or cannot serve now",
    grpc.StatusCode.CANCELLED: "the call was cancelled",
    grpc.StatusCode.UNIMPLEMENTED: "there is another kind of server",
}


class CallError(OutriderError):
    """A call failed; `code` is its gRPC status."""

    def __init__(self, address: str, code: grpc.StatusCode, details: str) -> None:
        self.address, self.code, self.details = address, code, details
        meaning = _MEANINGS.get(code, "the call failed")
        super().__init__(f"{address}: {meaning} ({code.name}): {details}")


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


@dataclass(frozen=True)
class Answer:
    """A whole stream."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    run_lengths: tuple[int, ...]
    """Tokens of each chunk that had some, in order."""


def num_accepted(output: StepOutput) -> int:
    """Tokens the step gave beyond the one that every step gives: the accepted candidates."""
    return max(len(output.token_ids) - 1, 0)


def cache_is_full(capacity: int) -> ResourceExhaustedError:
    """The error of a turn for which a conversation has no room any more."""
    problem = "the conversation fills its cache"
    remedy = "Begin a new one, raise cache.capacity, or keep less: --set cache.policy=sink, or cache.policy=sep."
    return ResourceExhaustedError("cache.capacity", capacity, problem, remedy)


def prompted(
    kind: Any,
    prompt: str | None,
    messages: Sequence[Mapping[str, str]] | None,
    token_ids: Sequence[int] | None,
    sampling: Mapping[str, Any] | None,
    lookahead: Mapping[str, Any] | None,
) -> Any:
    """A GenerateRequest or a Turn: the prompt, and the parameters that are named. Raises InvalidRequestError."""
    name, value = one_prompt(prompt, messages, token_ids)
    request = kind(
        **_message("sampling", pb.SamplingParams, sampling), **_message("lookahead", pb.LookaheadParams, lookahead)
    )
    try:
        if name == "messages":
            request.messages.CopyFrom(pb.ChatMessages(messages=[pb.ChatMessage(**message) for message in value]))
        elif name == "token_ids":
            request.token_ids.CopyFrom(pb.TokenIds(ids=value))
        else:
            request.text = value
    except (TypeError, ValueError) as error:
        remedy = f"See {kind.DESCRIPTOR.name} in the proto."
        raise InvalidRequestError(name, value, f"cannot be sent ({error})", remedy) from error
    return request


def one_prompt(
    prompt: str | None, messages: Sequence[Mapping[str, str]] | None, token_ids: Sequence[int] | None
) -> tuple[str, Any]:
    """The one that is given, and its name on the wire. Raises InvalidRequestError if it is not one."""
    given = {"text": prompt, "messages": messages, "token_ids": token_ids}
    kinds = [kind for kind, value in given.items() if value is not None]
    if len(kinds) != 1:
        raise InvalidRequestError("prompt", kinds, "is not one prompt", "Give one of prompt, messages, token_ids.")
    return kinds[0], given[kinds[0]]


def _message(section: str, kind: Any, values: Mapping[str, Any] | None) -> dict[str, Any]:
    """Keyword argument for one parameter section, or none."""
    if not values:
        return {}
    known = kind.DESCRIPTOR.fields_by_name
    message = kind()
    for name, value in values.items():
        if name not in known:
            raise InvalidRequestError(f"{section}.{name}", value, "unknown key", f"Known here: {', '.join(known)}.")
        try:
            message.MergeFrom(kind(**{name: value}))
        except (TypeError, ValueError) as error:
            problem, remedy = f"cannot be sent ({error})", "Give a value of the field's type."
            raise InvalidRequestError(f"{section}.{name}", value, problem, remedy) from error
    return {section: message}


def read_chunk(message: pb.GenerateResponse | pb.ConverseResponse, request_id: str) -> Chunk:
    """A response as a chunk."""
    usage = None
    if message.HasField("usage"):
        sent = message.usage
        usage = Usage(
            num_prompt_tokens=sent.num_prompt_tokens,
            num_new_tokens=sent.num_new_tokens,
            num_steps=sent.num_steps,
            num_rows=sent.num_rows,
            ttft_s=sent.ttft_s,
            latency_s=sent.latency_s,
            kept_last=sent.kept_last,
            kept_sum=sent.kept_sum,
            num_seen_tokens=sent.num_seen_tokens,
        )
    return Chunk(
        request_id=request_id,
        text=message.text,
        token_ids=tuple(message.token_ids),
        num_accepted=message.num_accepted,
        finish_reason=_FINISH_REASONS.get(message.finish_reason),
        usage=usage,
    )


def call_error(error: grpc.RpcError, address: str) -> CallError:
    """What gRPC raised, readably."""
    return CallError(address, error.code(), error.details() or "no details")
