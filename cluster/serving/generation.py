"""The gRPC calls: text in, text out; everything between is the loop's."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import grpc

from cluster.pb.outrider.v1 import generation_pb2 as pb
from cluster.serving import calls
from cluster.serving.access import authorization_of
from cluster.serving.converse import Conversation
from cluster.serving.desk import Desk
from cluster.serving.visits import Visit
from cluster.wire import answers, requests
from cluster.wire.server_info import server_info
from cluster.wire.statuses import TAKEN, status_of
from runtime.errors import FieldError
from runtime.request import Request, forks

if TYPE_CHECKING:
    from runtime.engine.engine import Engine  # which compiles when it is imported for the first time

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["GenerationService"].full_name


class GenerationService:
    """The service's methods. Messages come as bytes, since gRPC has no status for what it cannot read itself."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._conversations: set[Conversation] = set()

    def handler(self) -> grpc.GenericRpcHandler:
        """The service's methods, as a server wants them."""
        write, write_turn = pb.GenerateResponse.SerializeToString, pb.ConverseResponse.SerializeToString
        write_info = pb.GetServerInfoResponse.SerializeToString
        methods = {
            "Generate": grpc.unary_stream_rpc_method_handler(self.Generate, response_serializer=write),
            "Converse": grpc.stream_stream_rpc_method_handler(self.Converse, response_serializer=write_turn),
            "GetServerInfo": grpc.unary_unary_rpc_method_handler(self.GetServerInfo, response_serializer=write_info),
        }
        return grpc.method_handlers_generic_handler(SERVICE_NAME, methods)

    async def Generate(self, message: bytes, context: grpc.aio.ServicerContext) -> None:  # noqa: N802
        async with self._visit("Generate", context) as visit:
            await self._generate(message, context, visit)

    async def Converse(self, messages: AsyncIterable[bytes], context: grpc.aio.ServicerContext) -> None:  # noqa: N802
        async with self._visit("Converse", context) as visit:
            await self._converse(messages, context, visit)

    async def GetServerInfo(  # noqa: N802
        self, message: bytes, context: grpc.aio.ServicerContext
    ) -> pb.GetServerInfoResponse:
        async with self._visit("GetServerInfo", context):
            requests.parse(pb.GetServerInfoRequest, message)
            return server_info(*self._desk.opened, self._desk.num_refused)
        raise AssertionError("what is raised ends the call")

    def drain(self) -> None:
        """Conversations end after their running turns."""
        for conversation in self._conversations:
            conversation.drain()

    @asynccontextmanager
    async def _visit(self, method: str, context: grpc.aio.ServicerContext) -> AsyncIterator[Visit]:
        """A call, within its deadline; an error ends it with a status."""
        with self._desk.visit("grpc", method, authorization_of(context.invocation_metadata())) as visit:
            try:
                async with asyncio.timeout(context.time_remaining()) as deadline:
                    yield visit
                visit.status = grpc.StatusCode.OK.name
            except asyncio.CancelledError:
                visit.status = grpc.StatusCode.CANCELLED.name
                raise
            except Exception as error:
                if deadline.expired():
                    visit.status = grpc.StatusCode.DEADLINE_EXCEEDED.name
                    await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline passed before the last token")
                visit.status = status_of(error).name
                if isinstance(error, FieldError):
                    self._desk.refused(error)
                await calls.abort(context, error)

    async def _generate(self, message: bytes, context: grpc.aio.ServicerContext, visit: Visit) -> None:
        arrival_s = time.perf_counter()
        self._desk.check_taking()
        engine, loop = self._desk.opened
        request = await self._desk.threads.run(len(message), _read, message, engine)
        request = dataclasses.replace(request, arrival_s=arrival_s)
        visit.request_id = request.request_id
        self._desk.check_length(len(request.prompt_ids))
        key = request.run_key
        with calls.Running(loop, engine.tokenizer, forks(request), visit) as outputs:
            await context.send_initial_metadata(((TAKEN, "1"),))
            async for output, text in outputs:
                output = dataclasses.replace(output, request_id=request.request_id)
                await self._desk.written(context.write(answers.response(output, text, key)))
                key = ""  # it is told once

    async def _converse(self, messages: AsyncIterable[bytes], context: grpc.aio.ServicerContext, visit: Visit) -> None:
        self._desk.check_taking()
        conversation = Conversation(self._desk, context, visit)
        self._conversations.add(conversation)
        try:
            await conversation.run(messages)
        finally:
            self._conversations.discard(conversation)


def _read(message: bytes, engine: Engine) -> Request:
    request = requests.parse(pb.GenerateRequest, message)
    prompt, request_id = requests.read_prompt(request), requests.read_id(request, "request_id")
    sampling = requests.read_sampling(request, engine.config.sampling)
    lookahead = requests.read_lookahead(request, engine.config.lookahead)
    so_far, key = requests.read_so_far(request), request.resume_key if request.HasField("resume_key") else None
    urgency = requests.read_urgency(request)
    return engine.make_request(prompt, sampling, lookahead, request_id, so_far=so_far, run_key=key, **urgency)
