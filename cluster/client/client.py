"""A client for GenerationService. It needs gRPC and protobuf, not torch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.client.access import Access
from cluster.client.address import checked
from cluster.client.calls import checked_id, checked_timeout, options, whole
from cluster.client.conversation import Conversation
from cluster.pb.outrider.v1 import generation_pb2 as pb
from cluster.pb.outrider.v1 import generation_pb2_grpc as pb_grpc
from cluster.wire.answers import Answer, Chunk, by_index, read_chunk
from cluster.wire.requests import prompted
from cluster.wire.statuses import CallError, call_error
from cluster.wire.transport import Compression


class Stream(Iterator[Chunk]):
    """The chunks of one call, as they come. Raises CallError. Closing it early cancels the request."""

    def __init__(self, call: Any, address: str) -> None:
        self._call, self._address = call, address

    def __next__(self) -> Chunk:
        try:
            message = next(self._call)
            return read_chunk(message, message.request_id)
        except grpc.RpcError as error:
            raise call_error(error, self._address) from None

    def close(self) -> None:
        """Cancel the call if it has not ended."""
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Client:
    """One connection; calls may come from any number of threads at once."""

    def __init__(
        self,
        address: str,
        *,
        token: str | None = None,
        tls_ca: str | None = None,
        tls_cert: str | None = None,
        tls_key: str | None = None,
        insecure: bool = False,
        compression: Compression = "none",
        keepalive_s: float | None = None,
    ) -> None:
        """`address` is HOST:PORT. What is left out of `token` and PEM files is taken from the environment
        (cluster.client.access.Access). `compression` is of what is sent; `keepalive_s`: seconds of silence after which
        the connection is tried by a ping. Raises ConfigError for what cannot be used."""
        self.address = checked(address)
        given = {"token": token, "tls_ca": tls_ca, "tls_cert": tls_cert, "tls_key": tls_key}
        access = Access.of(given, insecure)
        self._channel = access.channel(self.address, options(self.address, compression, keepalive_s))
        self._generation = pb_grpc.GenerationServiceStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)
        self._closed = False

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
        request = prompted(pb.GenerateRequest, prompt, messages, token_ids, sampling, lookahead)
        if request_id is not None:
            request.request_id = checked_id("request_id", request_id)
        timeout_s = checked_timeout(timeout_s)
        self._check_open()
        return Stream(self._generation.Generate(request, timeout=timeout_s), self.address)

    def converse(self, session_id: str | None = None, timeout_s: float | None = None) -> Conversation:
        """Begin a conversation; the server opens its session with the first turn. `timeout_s` bounds all of it."""
        if session_id is not None:
            session_id = checked_id("session_id", session_id)
        timeout_s = checked_timeout(timeout_s)
        self._check_open()
        return Conversation(self._generation, self.address, session_id, timeout_s)

    def complete(self, prompt: str | None = None, **arguments: Any) -> Answer:
        """`generate`, waiting for the end. Several threads calling this is how requests run side by side."""
        with self.generate(prompt, **arguments) as stream:
            first, *others = [whole(chunks) for chunks in by_index(stream)]
        return replace(first, others=tuple(others))

    def server_info(self, timeout_s: float = 10.0) -> pb.GetServerInfoResponse:
        """The server's description. Raises CallError."""
        self._check_open()
        try:
            return self._generation.GetServerInfo(pb.GetServerInfoRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            raise call_error(error, self.address) from None

    def is_serving(self, timeout_s: float = 5.0) -> bool:
        """The health service's answer. Raises CallError if there is none."""
        self._check_open()
        try:
            answer = self._health.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            raise call_error(error, self.address) from None
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
        """End the connection; calls that are still running are cancelled. Idempotent."""
        self._closed = True
        self._channel.close()

    def _check_open(self) -> None:
        if self._closed:
            raise CallError(self.address, grpc.StatusCode.CANCELLED, "the client is closed")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
