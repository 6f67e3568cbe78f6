"""A conversation with a server: turns in, their answers out, over one call."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import grpc

from cluster.pb.outrider.v1 import generation_pb2 as pb
from cluster.pb.outrider.v1 import generation_pb2_grpc as pb_grpc
from cluster.wire.answers import Chunk, read_chunk
from cluster.wire.requests import prompted
from cluster.wire.statuses import CallError, call_error

CLOSE_TIMEOUT_S = 10.0
"""How long closing a conversation waits for the server's last word."""


class Conversation:
    """Turns over one session of the server, which keeps what was said in its cache. For one thread, but for `stop`.

    Only one answer runs at a time: asking again stops what is left of the one before. A CallError ends the
    conversation, and its session with it.
    """

    def __init__(
        self, stub: pb_grpc.GenerationServiceStub, address: str, session_id: str | None, timeout_s: float | None
    ):
        self.session_id = session_id
        """Known from the first response on, if the server makes it up."""
        self._address = address
        self._asked: queue.SimpleQueue[pb.ConverseRequest | None] = queue.SimpleQueue()
        self._call = stub.Converse(iter(self._asked.get, None), timeout=timeout_s)
        self._begun = False
        self._answer: ConversationAnswer | None = None

    def ask(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Mapping[str, str]] | None = None,
        token_ids: Sequence[int] | None = None,
        sampling: Mapping[str, Any] | None = None,
        lookahead: Mapping[str, Any] | None = None,
    ) -> Iterator[Chunk]:
        """Append text, chat messages (those since the last answer) or token ids, and answer them.

        Arguments and InvalidRequestError as in `Client.generate`. The chunks raise CallError; the last has a finish
        reason: CANCELLED if the turn was stopped.
        """
        turn = prompted(pb.Turn, prompt, messages, token_ids, sampling, lookahead)
        self._stop_rest()
        self._answer = ConversationAnswer(self)
        self._send(pb.ConverseRequest(turn=turn))
        return self._answer

    def stop(self) -> None:
        """End the running answer, if there is one; its last chunk is still to be read. Safe in a signal handler."""
        if self._answer is not None and not self._answer.ended:
            self._send(pb.ConverseRequest(stop=pb.StopTurn()))

    def close(self) -> None:
        """End the conversation. Idempotent."""
        timer = threading.Timer(CLOSE_TIMEOUT_S, self._call.cancel)
        timer.start()
        try:
            self._stop_rest()
            self._asked.put(None)
            for _ in self._call:  # the session is closed once this ends
                pass
        except (CallError, grpc.RpcError):
            pass
        finally:
            self._asked.put(None)
            timer.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def receive(self) -> Chunk:
        """The next chunk of the running answer. Raises CallError."""
        try:
            message = next(self._call)
        except grpc.RpcError as error:
            raise call_error(error, self._address) from None
        except StopIteration:
            raise CallError(self._address, grpc.StatusCode.CANCELLED, "the conversation is closed") from None
        except BaseException:  # an interrupted call cannot be read from again
            self._call.cancel()
            raise
        self.session_id = message.session_id
        return read_chunk(message, f"{message.session_id}#{message.turn_index}")

    def _send(self, message: pb.ConverseRequest) -> None:
        if not self._begun and self.session_id is not None:
            message.session_id = self.session_id
        self._begun = True
        self._asked.put(message)

    def _stop_rest(self) -> None:
        if self._answer is not None and not self._answer.ended:
            self.stop()
            for _ in self._answer:
                pass


class ConversationAnswer(Iterator[Chunk]):
    """The chunks of one turn, as they come. Raises CallError."""

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation
        self.ended = False
        """Whether the last chunk has been read, or an error has come in its place."""

    def __next__(self) -> Chunk:
        if self.ended:
            raise StopIteration
        try:
            chunk = self._conversation.receive()
        except BaseException:
            self.ended = True
            raise
        self.ended = chunk.usage is not None
        return chunk
