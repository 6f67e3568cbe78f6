"""A client for GenerationService. It needs gRPC and protobuf, not torch."""

from __future__ import annotations

import logging
import threading
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
from cluster.client.resuming import Patience, Resumption
from cluster.pb.outrider.v1 import generation_pb2 as pb
from cluster.pb.outrider.v1 import generation_pb2_grpc as pb_grpc
from cluster.wire.answers import Answer, Chunk, by_index
from cluster.wire.requests import prompted, set_urgency
from cluster.wire.statuses import TAKEN, CallError, call_error
from cluster.wire.transport import Compression

log = logging.getLogger(__name__)


class Stream(Iterator[Chunk]):
    """The chunks of one request, as they come. Closing it early cancels the request.

    Where the connection breaks or the server goes away, the rest is asked for, and goes on identically: who reads sees
    a pause. Raises CallError where that does not help, or patience has ended.
    """

    def __init__(
        self,
        stub: pb_grpc.GenerationServiceStub,
        resumption: Resumption,
        reached: threading.Event,
        address: str,
        timeout_s: float | None,
    ) -> None:
        self._stub, self._resumption, self._reached, self._address = stub, resumption, reached, address
        self._deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        self._closed = threading.Event()
        self._call = self._start()

    def _start(self) -> Any:
        left_s = None if self._deadline_s is None else max(self._deadline_s - time.monotonic(), 0.0)
        return self._stub.Generate(self._resumption.request(), timeout=left_s)

    def __next__(self) -> Chunk:
        while True:
            try:
                message = next(self._call)
            except grpc.RpcError as error:
                broken = call_error(error, self._address)
                if self._resumption.is_whole_at(broken):
                    raise StopIteration from None
                self._go_on(broken)
                continue
            self._reached.set()
            return self._resumption.take(message)

    def _go_on(self, error: CallError) -> None:
        """Ask for the rest, after a pause. Raises the error where that is of no use."""
        if self._closed.is_set():
            raise error from None
        was_taken = TAKEN in dict(self._call.initial_metadata() or ())
        pause_s = self._resumption.pause_after(error, was_taken or self._reached.is_set())
        if self._resumption.num_tries == 1:
            log.warning("%s; going on as soon as a server answers", error)
        if self._deadline_s is not None:
            pause_s = min(pause_s, max(self._deadline_s - time.monotonic(), 0.0))
        if self._closed.wait(pause_s):
            raise error from None
        self._call = self._start()
        if self._closed.is_set():
            self._call.cancel()

    def close(self) -> None:
        """Cancel the call if it has not ended."""
        self._closed.set()
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
        keepalive_s: float | None = 20.0,
        retries: int = Patience.retries,
        patience_s: float = Patience.seconds,
    ) -> None:
        """`address` is HOST:PORT. What is left out of `token` and PEM files is taken from the environment
        (cluster.client.access.Access). `compression` is of what is sent; `keepalive_s`: seconds of silence after which
        the connection is tried by a ping, so that a server that vanished without a word is missed. An answer that is
        broken off is resumed, by at most so many tries in a row, for at most `patience_s` seconds without a sign of it;
        0 of either: its break is an error. Raises ConfigError for what cannot be used."""
        self.address = checked(address)
        self._patience = Patience(retries, patience_s)
        self._reached = threading.Event()  # whether a server has answered here
        given = {"token": token, "tls_ca": tls_ca, "tls_cert": tls_cert, "tls_key": tls_key}
        access = Access.of(given, insecure)
        self._channel = access.channel(self.address, options(self.address, compression, keepalive_s, retries=False))
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
        priority: int | None = None,
        deadline_s: float | None = None,
    ) -> Stream:
        """Start a call: text, chat messages or token ids, with the parameters that differ from the server's defaults.

        `sampling` and `lookahead` have the names of the config's sections; `timeout_s` bounds the whole call.
        Of requests that wait for the server, the highest `priority` comes first; after `deadline_s` seconds the answer
        is of no use, and the server, which knows of it, refuses what cannot be in time.
        Raises InvalidRequestError if the request cannot be put on the wire, CallError if the call fails.
        """
        request = prompted(pb.GenerateRequest, prompt, messages, token_ids, sampling, lookahead)
        if request_id is not None:
            request.request_id = checked_id("request_id", request_id)
        set_urgency(request, priority, deadline_s)
        timeout_s = checked_timeout(timeout_s)
        self._check_open()
        resumption = Resumption(request, self._patience)
        return Stream(self._generation, resumption, self._reached, self.address, timeout_s)

    def converse(self, session_id: str | None = None, timeout_s: float | None = None) -> Conversation:
        """Begin a conversation; the server opens its session with the first turn. `timeout_s` bounds all of it."""
        if session_id is not None:
            session_id = checked_id("session_id", session_id)
        timeout_s = checked_timeout(timeout_s)
        self._check_open()
        return Conversation(self._generation, self.address, session_id, timeout_s, self._patience, self._reached)

    def complete(self, prompt: str | None = None, **arguments: Any) -> Answer:
        """`generate`, waiting for the end. Several threads calling this is how requests run side by side."""
        with self.generate(prompt, **arguments) as stream:
            first, *others = [whole(chunks) for chunks in by_index(stream)]
        return replace(first, others=tuple(others))

    def server_info(self, timeout_s: float = 10.0) -> pb.GetServerInfoResponse:
        """The server's description. Raises CallError."""
        self._check_open()
        try:
            found = self._generation.GetServerInfo(pb.GetServerInfoRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            raise call_error(error, self.address) from None
        self._reached.set()
        return found

    def is_serving(self, timeout_s: float = 5.0) -> bool:
        """The health service's answer. Raises CallError if there is none."""
        self._check_open()
        try:
            answer = self._health.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            raise call_error(error, self.address) from None
        self._reached.set()
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
