"""A conversation's call: turns in, their answers out, over a session that keeps its cache slot between them."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import deque
from collections.abc import AsyncIterable
from dataclasses import dataclass, field
from typing import cast

import grpc

from cluster.pb.outrider.v1 import generation_pb2 as pb
from cluster.serving import calls
from cluster.serving.desk import Desk
from cluster.serving.state import SessionLog, TurnRecord, past_of
from cluster.serving.visits import Visit
from cluster.wire import answers, requests
from cluster.wire.answers import cache_is_full
from cluster.wire.statuses import KEPT, IdleError, LostSessionError
from runtime.engine.session import Session
from runtime.errors import InvalidRequestError, ResourceExhaustedError, WorkerError
from runtime.request import FinishReason, Request, StepOutput, Usage

VANISHED_S = 0.05
"""A connection that breaks ends a stream of requests as closing it does; that it broke is heard a moment later."""
MAX_UNANSWERED_TURNS = 8
"""Turns that a client may have sent without having a complete answer."""


@dataclass
class _Turn:
    """A turn that is not answered yet."""

    index: int
    message: pb.Turn
    stopped: bool = False
    request_id: str | None = None
    """Set once it runs."""
    arrival_s: float = field(default_factory=time.perf_counter)


class Conversation:
    """One call of Converse. Two tasks share it: one reads, so that a stop gets through, the other answers."""

    def __init__(self, desk: Desk, context: grpc.aio.ServicerContext, visit: Visit) -> None:
        self._desk, self._threads, self._context, self._visit = desk, desk.threads, context, visit
        self._store, self._log = desk.store, cast(SessionLog | None, None)
        self._text_length = 0  # tokens of the conversation, after the last turn
        self._has_written = False
        self._engine, self._loop = desk.opened
        self._idle_timeout_s = self._engine.config.server.session_idle_timeout_s
        self._session: Session | None = None
        self._num_turns = 0
        self._unanswered: deque[_Turn] = deque()  # oldest first; the running one included
        # What the reader hands on: turns, then None at the stream's end, or what is wrong with it.
        self._inbox: asyncio.Queue[_Turn | Exception | None] = asyncio.Queue()
        self._usage = Usage()  # of the last turn that ran

    async def run(self, messages: AsyncIterable[bytes]) -> None:
        """Answer turns until the client closes its stream. Raises what ends the conversation otherwise."""
        reader = asyncio.create_task(self._read(messages))
        try:
            while (turn := await self._next()) is not None:
                await self._answer(turn)
                self._unanswered.popleft()
            if self._log is not None:
                await asyncio.sleep(VANISHED_S)  # cancelled here where the stream ended since its client vanished
                self._log.forget()
        finally:
            reader.cancel()
            if self._session is not None:
                self._loop.close_session(self._session)
            if self._log is not None:
                is_known = self._has_written or self._log.turns  # to its client, who may come back
                self._log.release() if is_known else self._log.forget()

    def drain(self) -> None:
        """End after the running turn; those that wait are not answered."""
        while not self._inbox.empty():
            self._inbox.get_nowait()
        self._inbox.put_nowait(WorkerError("the server is shutting down"))

    # Reading

    async def _read(self, messages: AsyncIterable[bytes]) -> None:
        try:
            async for message in messages:
                parsed = await self._threads.run(len(message), _parse, message)
                if self._session is None:
                    await self._open(parsed)
                else:
                    _refuse_opening(parsed)
                self._take(parsed)
            self._inbox.put_nowait(None)
        except Exception as error:  # raised where its turn is
            self._inbox.put_nowait(error)

    async def _open(self, message: pb.ConverseRequest) -> None:
        """Open the session that the first message names, takes up, or leaves to us."""
        _event(message)
        session_id = requests.read_id(message, "session_id")
        if not message.HasField("resume_turns"):
            self._session = self._loop.open_session(session_id)
            if self._store is not None:
                self._log = await asyncio.to_thread(self._store.begin, self._session.session_id)
            await self._say_kept()
            return
        num_turns = message.resume_turns
        if session_id is None or num_turns < 0:
            problem, remedy = "takes up no session", "Name it in session_id, and at least 0 turns."
            raise InvalidRequestError("resume_turns", num_turns, problem, remedy)
        if self._store is None:
            raise LostSessionError(f"session {session_id!r} is not known here: the server keeps none on disk")
        taken_up = await asyncio.to_thread(self._store.take_up, session_id, num_turns)
        try:
            past = past_of(taken_up.turns)
            self._session = self._loop.open_session(session_id, past)
        except BaseException:
            taken_up.release()
            raise
        self._log, self._num_turns = taken_up, num_turns
        self._text_length = len(past.token_ids) if past is not None else 0
        await self._say_kept()

    async def _say_kept(self) -> None:
        assert self._session is not None
        self._visit.request_id = self._session.session_id
        if self._log is not None and self._log.is_good:
            await self._context.send_initial_metadata(((KEPT, self._session.session_id.encode()),))

    def _take(self, message: pb.ConverseRequest) -> None:
        event = _event(message)
        if event == "stop":
            for turn in self._unanswered:
                turn.stopped = True
                if turn.request_id is not None:
                    self._loop.cancel(turn.request_id)
            return
        if len(self._unanswered) >= MAX_UNANSWERED_TURNS:
            problem = f"{len(self._unanswered)} turns are not answered yet"
            raise ResourceExhaustedError("turn", self._num_turns, problem, "Read their answers before sending more.")
        turn = _Turn(self._num_turns, message.turn)
        self._num_turns += 1
        self._unanswered.append(turn)
        self._inbox.put_nowait(turn)

    # Answering

    async def _next(self) -> _Turn | None:
        try:
            async with asyncio.timeout(self._idle_timeout_s):
                item = await self._inbox.get()
        except TimeoutError:
            raise self._idle("no turn came") from None
        if isinstance(item, Exception):
            raise item
        return item

    async def _answer(self, turn: _Turn) -> None:
        assert self._session is not None
        request = await self._threads.run(turn.message.ByteSize(), self._make_request, turn)
        self._desk.check_length(len(request.prompt_ids))
        if turn.stopped:
            usage = Usage(
                kept_last=self._usage.kept_last,
                kept_sum=self._usage.kept_sum,
                num_seen_tokens=self._usage.num_seen_tokens,
            )
            await self._keep(TurnRecord(len(request.prompt_ids), None, (), ends_in_answer=False))
            await self._write(turn, StepOutput(request.request_id, (), usage, FinishReason.CANCELLED), "")
            return
        turn.request_id = request.request_id
        answer, seen_before = list(request.resume_from), self._session.num_seen_tokens
        with calls.Running(
            self._loop, self._engine.tokenizer, [request], self._visit, may_be_cancelled=True
        ) as outputs:
            async for output, text in outputs:
                self._usage = output.usage
                self._session.take(output)
                answer += output.token_ids
                if output.finish_reason is FinishReason.CANCELLED and not turn.stopped:
                    raise WorkerError("the server shut down before the answer had ended")
                if output.finish_reason is FinishReason.LENGTH and not output.usage.num_new_tokens:
                    raise cache_is_full(self._engine.capacity)
                if output.finish_reason is not None:
                    await self._keep(TurnRecord.of(request, seen_before, self._text_length, answer, output.usage))
                await self._write(turn, output, text)

    def _make_request(self, turn: _Turn) -> Request:
        assert self._session is not None
        prompt = requests.read_prompt(turn.message)
        sampling = requests.read_sampling(turn.message, self._engine.config.sampling)
        lookahead = requests.read_lookahead(turn.message, self._engine.config.lookahead)
        request_id = f"{self._session.session_id}#{turn.index}"
        so_far = requests.read_so_far(turn.message)
        urgency = requests.read_urgency(turn.message)
        request = self._engine.make_request(prompt, sampling, lookahead, request_id, self._session, so_far, **urgency)
        return dataclasses.replace(request, arrival_s=turn.arrival_s)

    async def _keep(self, turn: TurnRecord) -> None:
        """Before the client hears that the turn has ended: what it has heard of is there after a restart."""
        self._text_length += len(turn.token_ids)
        if self._log is not None:
            await asyncio.to_thread(self._log.append, turn)

    async def _write(self, turn: _Turn, output: StepOutput, text: str) -> None:
        assert self._session is not None
        is_kept = self._log is not None and self._log.is_good
        message = answers.converse_response(self._session.session_id, turn.index, output, text, is_kept)
        try:
            async with asyncio.timeout(self._idle_timeout_s):
                await self._context.write(message)
            self._has_written = True
        except TimeoutError:
            raise self._idle("the responses were not read") from None

    def _idle(self, what: str) -> IdleError:
        return IdleError(
            f"{what} for {self._idle_timeout_s:g} s (server.session_idle_timeout_s); the session is closed"
        )


def _event(message: pb.ConverseRequest) -> str:
    event: str | None = message.WhichOneof("event")
    if event is None:
        raise InvalidRequestError("event", None, "is missing", "Set one of turn and stop.")
    return event


def _refuse_opening(message: pb.ConverseRequest) -> None:
    """Raise InvalidRequestError where a later message names a session."""
    _event(message)
    for name in ("session_id", "resume_turns"):
        if message.HasField(name):
            problem, remedy = "the conversation has its session", "Name it in the first message only."
            raise InvalidRequestError(name, getattr(message, name), problem, remedy)


def _parse(message: bytes) -> pb.ConverseRequest:
    return requests.parse(pb.ConverseRequest, message)
