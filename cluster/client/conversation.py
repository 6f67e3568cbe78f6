"""A conversation with a server: turns in, their answers out, over one call."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import grpc

from cluster.client.resuming import Patience, Retries
from cluster.pb.outrider.v1 import generation_pb2 as pb
from cluster.pb.outrider.v1 import generation_pb2_grpc as pb_grpc
from cluster.wire.answers import Chunk, read_chunk
from cluster.wire.requests import prompted
from cluster.wire.statuses import KEPT, CallError, call_error, has_no_room_now, is_away

log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 10.0
"""How long closing a conversation waits for the server's last word."""


class Conversation:
    """Turns over one session of the server, which keeps what was said in its cache. For one thread, but for `stop`.

    Only one answer runs at a time: asking again stops what is left of the one before. Where the connection breaks or
    the server goes away, and the server keeps its conversations on disk (server.state_dir), the session is taken up
    again and the answer goes on where it was. Any other CallError ends the conversation, and its session with it.
    """

    def __init__(
        self,
        stub: pb_grpc.GenerationServiceStub,
        address: str,
        session_id: str | None,
        timeout_s: float | None,
        patience: Patience,
        reached: threading.Event,
    ):
        """`reached`: set once a server has answered at this address."""
        self.session_id = session_id
        """Known from the first response on, if the server makes it up."""
        self._stub, self._address, self._reached = stub, address, reached
        self._deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        self._is_kept = self._has_resumed = self._closed = False
        self._num_whole = 0  # turns whose last response has come
        self._retries = Retries(patience)
        self._start()
        self._begun = False
        self._answer: ConversationAnswer | None = None

    def _start(self) -> None:
        left_s = None if self._deadline_s is None else max(self._deadline_s - time.monotonic(), 0.0)
        self._asked: queue.SimpleQueue[pb.ConverseRequest | None] = queue.SimpleQueue()
        self._call = self._stub.Converse(iter(self._asked.get, None), timeout=left_s)

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
        self._answer = ConversationAnswer(self, turn)
        self._retries.heard()
        self._send(pb.ConverseRequest(turn=turn))
        return self._answer

    def stop(self) -> None:
        """End the running answer, if there is one; its last chunk is still to be read. Safe in a signal handler."""
        if self._answer is not None and not self._answer.ended:
            self._answer.is_stopped = True
            self._send(pb.ConverseRequest(stop=pb.StopTurn()))

    def close(self) -> None:
        """End the conversation. Idempotent."""
        self._closed = True
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
        assert self._answer is not None
        while True:
            try:
                message = next(self._call)
            except grpc.RpcError as error:
                self._go_on(call_error(error, self._address), self._answer)
                continue
            except StopIteration:
                raise CallError(self._address, grpc.StatusCode.CANCELLED, "the conversation is closed") from None
            except BaseException:  # an interrupted call cannot be read from again
                self._call.cancel()
                raise
            break
        self._retries.heard()
        self._reached.set()
        self.session_id, self._is_kept = message.session_id, message.is_kept
        self._answer.turn.resume_from.extend(message.token_ids)
        self._num_whole += message.HasField("usage")
        return read_chunk(message, f"{message.session_id}#{message.turn_index}")

    def _go_on(self, error: CallError, answer: ConversationAnswer) -> None:
        """Take the session up again, after a pause. Raises the error where that cannot be, or is of no use."""
        if (kept := dict(self._call.initial_metadata() or ()).get(KEPT)) is not None:
            self.session_id, self._is_kept = bytes(kept).decode(), True
        is_in_use = (
            self._has_resumed and error.code is grpc.StatusCode.ALREADY_EXISTS
        )  # by the call that was broken off
        may = is_away(error) or self._has_resumed and has_no_room_now(error) or is_in_use
        is_new = self._reached.is_set() and not self._num_whole and not answer.turn.resume_from
        if not may or not (self._is_kept or is_new) or self._closed:
            raise error from None
        pause_s = self._retries.pause_after(error)
        if self._retries.count == 1:
            log.warning("%s; going on as soon as a server answers", error)
        time.sleep(pause_s)
        self._asked.put(None)
        self._has_resumed = True
        self._start()
        again = pb.ConverseRequest(turn=answer.turn, session_id=self.session_id)
        if self._is_kept:
            again.resume_turns = self._num_whole
        self._asked.put(again)
        if answer.is_stopped:
            self._asked.put(pb.ConverseRequest(stop=pb.StopTurn()))

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

    def __init__(self, conversation: Conversation, turn: pb.Turn) -> None:
        self._conversation = conversation
        self.turn = pb.Turn()
        """What is asked, and what has come of the answer."""
        self.turn.CopyFrom(turn)
        self.is_stopped = False
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
