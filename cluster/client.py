"""A client for GenerationService. It needs gRPC and protobuf, not torch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.pb.outrider.v1 import generation_pb2_grpc as pb_grpc
from runtime.errors import InvalidRequestError, OutriderError
from runtime.pb.outrider.v1 import generation_pb2 as pb
from runtime.request import FinishReason, StepOutput, Usage

MAX_MESSAGE_BYTES = 16 * 2**20

_FINISH_REASONS = {pb.FINISH_REASON_STOP: FinishReason.STOP, pb.FINISH_REASON_LENGTH: FinishReason.LENGTH}

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


class Stream(Iterator[Chunk]):
    """The chunks of one call, as they come. Raises CallError. Closing it early cancels the request."""

    def __init__(self, call: Any, address: str) -> None:
        self._call, self._address = call, address

    def __next__(self) -> Chunk:
        try:
            return _chunk(next(self._call))
        except grpc.RpcError as error:
            raise _readable(error, self._address) from None

    def close(self) -> None:
        """Cancel the call if it has not ended."""
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Client:
    """One connection; calls may come from any number of threads at once."""

    def __init__(self, address: str) -> None:
        self.address = address
        limits = [
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ]
        self._channel = grpc.insecure_channel(address, options=limits)
        self._generation = pb_grpc.GenerationServiceStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)

    def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Mapping[str, str]] | None = None,
        token_ids: Sequence[int] | None = None,
        sampling: Mapping[str, Any] | None = None,
        lookahead: Mapping[str, Any] | None = None,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> Stream:
        """Start a call: text, chat messages or token ids, with the parameters that differ from the server's defaults.

        `sampling` and `lookahead` have the names of the config's sections; `timeout_s` bounds the whole call.
        Raises InvalidRequestError if the request cannot be put on the wire, CallError if the call fails.
        """
        given = {"text": prompt, "messages": messages, "token_ids": token_ids}
        kinds = [kind for kind, value in given.items() if value is not None]
        if len(kinds) != 1:
            raise InvalidRequestError("prompt", kinds, "is not one prompt", "Give one of prompt, messages, token_ids.")
        request = pb.GenerateRequest(
            **_message("sampling", pb.SamplingParams, sampling),
            **_message("lookahead", pb.LookaheadParams, lookahead),
        )
        try:
            if messages is not None:
                request.messages.CopyFrom(pb.ChatMessages(messages=[pb.ChatMessage(**turn) for turn in messages]))
            elif token_ids is not None:
                request.token_ids.CopyFrom(pb.TokenIds(ids=token_ids))
            elif prompt is not None:
                request.text = prompt
        except (TypeError, ValueError) as error:
            remedy = "See GenerateRequest in the proto."
            raise InvalidRequestError(kinds[0], given[kinds[0]], f"cannot be sent ({error})", remedy) from error
        if request_id is not None:
            request.request_id = request_id
        return Stream(self._generation.Generate(request, timeout=timeout_s), self.address)

    def complete(self, prompt: str | None = None, **arguments: Any) -> Answer:
        """`generate`, waiting for the end. Several threads calling this is how requests run side by side."""
        with self.generate(prompt, **arguments) as stream:
            chunks = list(stream)
        last = chunks[-1]
        assert last.finish_reason is not None and last.usage is not None
        return Answer(
            request_id=last.request_id,
            text="".join(chunk.text for chunk in chunks),
            token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
            finish_reason=last.finish_reason,
            usage=last.usage,
            run_lengths=tuple(len(chunk.token_ids) for chunk in chunks if chunk.token_ids),
        )

    def server_info(self, timeout_s: float = 10.0) -> pb.GetServerInfoResponse:
        """The server's description. Raises CallError."""
        try:
            return self._generation.GetServerInfo(pb.GetServerInfoRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            raise _readable(error, self.address) from None

    def is_serving(self, timeout_s: float = 5.0) -> bool:
        """The health service's answer. Raises CallError if there is none."""
        try:
            answer = self._health.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            raise _readable(error, self.address) from None
        return answer.status == health_pb2.HealthCheckResponse.SERVING

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Wait until the server takes requests; raises CallError with the last obstacle if it does not in time."""
        deadline = time.monotonic() + timeout_s
        while True:
            obstacle = CallError(self.address, grpc.StatusCode.UNAVAILABLE, "its health service says NOT_SERVING")
            try:
                if self.is_serving():
                    return
            except CallError as error:
                obstacle = error
            if time.monotonic() > deadline:
                raise obstacle
            time.sleep(0.1)

    def close(self) -> None:
        """End the connection; calls that are still running are cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def num_accepted(output: StepOutput) -> int:
    """Tokens the step gave beyond the one that every step gives: the accepted candidates."""
    return max(len(output.token_ids) - 1, 0)


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


def _chunk(message: pb.GenerateResponse) -> Chunk:
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
        )
    return Chunk(
        request_id=message.request_id,
        text=message.text,
        token_ids=tuple(message.token_ids),
        num_accepted=message.num_accepted,
        finish_reason=_FINISH_REASONS.get(message.finish_reason),
        usage=usage,
    )


def _readable(error: grpc.RpcError, address: str) -> CallError:
    return CallError(address, error.code(), error.details() or "no details")
