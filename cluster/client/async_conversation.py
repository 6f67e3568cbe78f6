"""A conversation with a server, for asyncio: turns in, their answers out, over one call."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Self

import grpc

from cluster.client.conversation import CLOSE_TIMEOUT_S
from cluster.pb.outrider.v1 import generation_pb2 as pb
from cluster.wire.answers import Chunk, read_chunk
from cluster.wire.requests import prompted
from cluster.wire.statuses import CallError, call_error


class AsyncConversation:
    """Turns over one session of the server, which keeps what was said in its cache.

    Only one answer runs at a time: asking again stops what is left of the one before. A CallError ends the
    conversation, and its session with it.
    """

    def __init__(self, call: Any, address: str, session_id: str | None) -> None:
        self.session_id = session_id
        """Known from the first response on, if the server makes it up."""
        self._call, self._address = call, address
        self._begun = False
        self._answer: AsyncConversationAnswer | None = None

    async def ask(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Mapping[str, str]] | None = None,
        token_ids: Sequence[int] | None = None,
        sampling: Mapping[str, Any] | None = None,
        lookahead: Mapping[str, Any] | None = None,
    ) -> AsyncIterator[Chunk]:
        """Append text, chat messages (those since the last answer) or token ids, and answer them.

        Arguments, errors and the last chunk as of `Conversation.ask`.
        """
        turn = prompted(pb.Turn, prompt, messages, token_ids, sampling, lookahead)
        await self._stop_rest()
        answer = AsyncConversationAnswer(self)
        await self._send(pb.ConverseRequest(turn=turn))
        self._answer = answer
        return answer

    async def stop(self) -> None:
        """End the running answer, if there is one; its last chunk is still to be read."""
        if self._answer is not None and not self._answer.ended:
            await self._send(pb.ConverseRequest(stop=pb.StopTurn()))

    async def close(self) -> None:
        """End the conversation. Idempotent."""
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._stop_rest()
                await self._call.done_writing()
                while await self._call.read() is not grpc.aio.EOF:  # the session is closed once this ends
                    pass
        except (CallError, grpc.RpcError, asyncio.InvalidStateError, TimeoutError):
            pass
        finally:
            self._call.cancel()

    async def receive(self) -> Chunk:
        """The next chunk of the running answer. Raises CallError."""
        try:
            message = await self._call.read()
        except grpc.RpcError as error:
            raise call_error(error, self._address) from None
        except asyncio.InvalidStateError:
            message = grpc.aio.EOF
        if message is grpc.aio.EOF:
            raise CallError(self._address, grpc.StatusCode.CANCELLED, "the conversation is closed")
        self.session_id = message.session_id
        return read_chunk(message, f"{message.session_id}#{message.turn_index}")

    async def _send(self, message: pb.ConverseRequest) -> None:
        if not self._begun and self.session_id is not None:
            message.session_id = self.session_id
        self._begun = True
        with suppress(grpc.RpcError, asyncio.InvalidStateError):  # reading the answer says what has ended the call
            await self._call.write(message)

    async def _stop_rest(self) -> None:
        if self._answer is not None and not self._answer.ended:
            await self.stop()
            async for _ in self._answer:
                pass

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class AsyncConversationAnswer(AsyncIterator[Chunk]):
    """The chunks of one turn, as they come. Raises CallError."""

    def __init__(self, conversation: AsyncConversation) -> None:
        self._conversation = conversation
        self.ended = False
        """Whether the last chunk has been read, or an error has come in its place."""

    async def __anext__(self) -> Chunk:
        if self.ended:
            raise StopAsyncIteration
        try:
            chunk = await self._conversation.receive()
        except BaseException:
            self.ended = True
            raise
        self.ended = chunk.usage is not None
        return chunk
