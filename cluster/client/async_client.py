"""The client for asyncio: the methods of `Client`, awaited. Any number of its calls go on in one event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.client.access import Access
from cluster.client.address import checked
from cluster.client.async_conversation import AsyncConversation
from cluster.client.calls import checked_id, checked_timeout, options, whole
from cluster.pb.outrider.v1 import generation_pb2 as pb
from cluster.pb.outrider.v1 import generation_pb2_grpc as pb_grpc
from cluster.wire.answers import Answer, Chunk, by_index, read_chunk
from cluster.wire.requests import prompted
from cluster.wire.statuses import CallError, call_error
from cluster.wire.transport import Compression


class AsyncStream(AsyncIterator[Chunk]):
    """The chunks of one call, as they come. Raises CallError. Closing it early cancels the request."""

    def __init__(self, call: Any, address: str) -> None:
        self._call, self._messages, self._address = call, call.__aiter__(), address

    async def __anext__(self) -> Chunk:
        try:
            message = await anext(self._messages)
            return read_chunk(message, message.request_id)
        except grpc.RpcError as error:
            raise call_error(error, self._address) from None

    def close(self) -> None:
        """Cancel the call if it has not ended."""
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()


class AsyncClient:
    """One connection, of the event loop that is running when it is made."""

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
        """Arguments and errors as of `Client`."""
        self.address = checked(address)
        given = {"token": token, "tls_ca": tls_ca, "tls_cert": tls_cert, "tls_key": tls_key}
        access = Access.of(given, insecure)
        credentials, settings = access.credentials(self.address), options(self.address, compression, keepalive_s)
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(self.address, options=settings)
        else:
            self._channel = grpc.aio.secure_channel(self.address, credentials, options=settings)
        self._metadata = access.metadata
        # The generated stub is typed as one that waits; on this channel its calls are asyncio's.
        self._generation: Any = pb_grpc.GenerationServiceStub(self._channel)
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)
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
    ) -> AsyncStream:
        """Start a call, for `async for`. Arguments and errors as of `Client.generate`."""
        request = prompted(pb.GenerateRequest, prompt, messages, token_ids, sampling, lookahead)
        if request_id is not None:
            request.request_id = checked_id("request_id", request_id)
        timeout_s = checked_timeout(timeout_s)
        self._check_open()
        return AsyncStream(self._generation.Generate(request, timeout=timeout_s, metadata=self._metadata), self.address)

    def converse(self, session_id: str | None = None, timeout_s: float | None = None) -> AsyncConversation:
        """Begin a conversation; the server opens its session with the first turn. `timeout_s` bounds all of it."""
        if session_id is not None:
            session_id = checked_id("session_id", session_id)
        timeout_s = checked_timeout(timeout_s)
        self._check_open()
        return AsyncConversation(
            self._generation.Converse(timeout=timeout_s, metadata=self._metadata), self.address, session_id
        )

    async def complete(self, prompt: str | None = None, **arguments: Any) -> Answer:
        """`generate`, waiting for the end. Several of them in `asyncio.gather` run side by side."""
        async with self.generate(prompt, **arguments) as stream:
            first, *others = [whole(chunks) for chunks in by_index([chunk async for chunk in stream])]
        return replace(first, others=tuple(others))

    async def server_info(self, timeout_s: float = 10.0) -> pb.GetServerInfoResponse:
        """The server's description. Raises CallError."""
        self._check_open()
        try:
            return await self._generation.GetServerInfo(
                pb.GetServerInfoRequest(), timeout=timeout_s, metadata=self._metadata
            )
        except grpc.RpcError as error:
            raise call_error(error, self.address) from None

    async def is_serving(self, timeout_s: float = 5.0) -> bool:
        """The health service's answer. Raises CallError if there is none."""
        self._check_open()
        try:
            answer = await self._health.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            raise call_error(error, self.address) from None
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    async def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Wait until the server takes requests; raises CallError with the last obstacle if it does not in time."""
        deadline = time.monotonic() + timeout_s
        while True:
            obstacle = CallError(self.address, grpc.StatusCode.UNAVAILABLE, "its health service says NOT_SERVING")
            try:
                if await self.is_serving():
                    return
            except CallError as error:
                obstacle = error
            if time.monotonic() > deadline:
                raise obstacle
            await asyncio.sleep(0.1)

    async def close(self) -> None:
        """End the connection; calls that are still running are cancelled. Idempotent."""
        self._closed = True
        await self._channel.close()

    def _check_open(self) -> None:
        if self._closed:
            raise CallError(self.address, grpc.StatusCode.CANCELLED, "the client is closed")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
