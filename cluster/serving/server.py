"""The gRPC server: GenerationService on an engine loop, with standard health and reflection."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import signal
import time
from collections.abc import AsyncIterable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from cluster.pb.outrider.v1 import generation_pb2 as pb
from cluster.pb.outrider.v1 import generation_pb2_grpc as pb_grpc
from cluster.serving import calls
from cluster.serving.converse import Conversation
from cluster.wire import answers, requests
from cluster.wire.server_info import server_info
from runtime.config import Config
from runtime.engine.engine import Engine
from runtime.engine.loop import EngineLoop
from runtime.errors import ConfigError, FieldError, WorkerError
from runtime.request import FinishReason, Request

log = logging.getLogger(__name__)

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["GenerationService"].full_name
MAX_MESSAGE_BYTES = 16 * 2**20
DRAIN_GRACE_S = 30.0
"""How long live streams may go on after a signal to stop."""

_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Otherwise a second server on the same port is not an error, and takes half of the calls.
    ("grpc.so_reuseport", 0),
    # Finds clients that vanished without a word, whose sequences would run on.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
]


class GenerationService(pb_grpc.GenerationServiceServicer):
    """Text in, text out; everything between is the loop's."""

    def __init__(self, engine: Engine, loop: EngineLoop) -> None:
        self._engine, self._loop = engine, loop
        # Tokenising a long prompt takes a while, and the event loop must not.
        self._threads = ThreadPoolExecutor(4, "outrider-tokenize")
        self._num_refused = 0
        self._draining = False
        self._live: set[asyncio.Task[object]] = set()
        self._conversations: set[Conversation] = set()

    async def Generate(self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext) -> None:  # noqa: N802
        await self._carry_out(self._generate(request, context), context)

    async def Converse(  # noqa: N802
        self, request_iterator: AsyncIterable[pb.ConverseRequest], context: grpc.aio.ServicerContext
    ) -> None:
        await self._carry_out(self._converse(request_iterator, context), context)

    async def GetServerInfo(  # noqa: N802
        self, request: pb.GetServerInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetServerInfoResponse:
        try:
            requests.refuse_unknown_fields(request)
            return server_info(self._engine, self._loop, self._num_refused)
        except Exception as error:
            await calls.abort(context, error)

    async def drain(self, grace_s: float) -> None:
        """Refuse new requests and turns, and wait, at most `grace_s` seconds, until the streams have ended."""
        self._draining = True
        for conversation in self._conversations:
            conversation.drain()
        if self._live:
            await asyncio.wait(self._live, timeout=grace_s)

    def close(self) -> None:
        self._threads.shutdown(wait=False)

    async def _carry_out(self, call: Coroutine[Any, Any, None], context: grpc.aio.ServicerContext) -> None:
        """Await a call's work within its deadline, and end it with a status if it fails."""
        task = asyncio.current_task()
        assert task is not None
        self._live.add(task)
        task.add_done_callback(self._live.discard)
        try:
            async with asyncio.timeout(context.time_remaining()) as deadline:
                await call
        except Exception as error:
            if deadline.expired():
                await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline passed before the last token")
            self._num_refused += isinstance(error, FieldError)
            await calls.abort(context, error)

    async def _generate(self, message: pb.GenerateRequest, context: grpc.aio.ServicerContext) -> None:
        arrival_s = time.perf_counter()
        self._refuse_while_draining()
        request = await asyncio.get_running_loop().run_in_executor(self._threads, self._read, message)
        request = dataclasses.replace(request, arrival_s=arrival_s)
        async with aclosing(calls.answer(self._loop, self._engine.tokenizer, request)) as outputs:
            async for output, text in outputs:
                if output.finish_reason is FinishReason.CANCELLED:
                    # A client that cancels does not get here; this is `GenerationServer.stop`.
                    raise WorkerError("the server shut down before the text had ended")
                await context.write(answers.response(output, text))

    async def _converse(self, messages: AsyncIterable[pb.ConverseRequest], context: grpc.aio.ServicerContext) -> None:
        self._refuse_while_draining()
        conversation = Conversation(self._engine, self._loop, self._threads, context)
        self._conversations.add(conversation)
        try:
            await conversation.run(messages)
        finally:
            self._conversations.discard(conversation)

    def _refuse_while_draining(self) -> None:
        if self._draining:
            raise WorkerError("the server is shutting down")

    def _read(self, message: pb.GenerateRequest) -> Request:
        requests.refuse_unknown_fields(message)
        prompt, request_id = requests.read_prompt(message), requests.read_id(message, "request_id")
        sampling = requests.read_sampling(message, self._engine.config.sampling)
        lookahead = requests.read_lookahead(message, self._engine.config.lookahead)
        return self._engine.make_request(prompt, sampling, lookahead, request_id)


class GenerationServer:
    """The services and their port. `start`, then `drain` if streams should end by themselves, then `stop`."""

    def __init__(self, engine: Engine, config: Config) -> None:
        self._engine, self._config = engine, config

    async def start(self) -> str:
        """Serve; returns the address, HOST:PORT. Raises ConfigError if the port cannot be had."""
        events = asyncio.get_running_loop()
        host, port = self._config.server.host, self._config.server.port
        host = f"[{host}]" if ":" in host else host
        self._grpc = grpc.aio.server(options=_OPTIONS)
        try:
            port = self._grpc.add_insecure_port(f"{host}:{port}")
        except RuntimeError as error:
            problem, remedy = f"{host}:{port} cannot be bound ({error})", "Choose a free one; 0 lets the system choose."
            raise ConfigError("server.port", port, problem, remedy) from error
        self._health = health.aio.HealthServicer()
        self._loop = EngineLoop(
            self._engine, on_failure=lambda _: asyncio.run_coroutine_threadsafe(self._not_serving(), events)
        )
        self._service = GenerationService(self._engine, self._loop)
        pb_grpc.add_GenerationServiceServicer_to_server(self._service, self._grpc)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        names = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._grpc)
        for name in ("", SERVICE_NAME):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        await self._grpc.start()
        return f"{host}:{port}"

    async def drain(self, grace_s: float = DRAIN_GRACE_S) -> None:
        """Take no more requests, say so to health checks, and let live streams end, for at most `grace_s` seconds."""
        await self._not_serving()
        await self._service.drain(grace_s)

    async def stop(self) -> None:
        """End what is still live with UNAVAILABLE, and close the port. The engine stays the caller's to close."""
        await self._not_serving()
        await asyncio.to_thread(self._loop.close)
        # The loop has told every stream; the grace is for the last words to reach the clients.
        await self._grpc.stop(grace=2.0)
        self._service.close()

    async def _not_serving(self) -> None:
        await self._health.enter_graceful_shutdown()


async def serve(
    engine: Engine,
    config: Config,
    announce: Callable[[str], None] | None = None,
    grace_s: float = DRAIN_GRACE_S,
) -> None:
    """Serve until SIGINT or SIGTERM, then drain; a second signal ends the draining.

    `announce` gets the address, HOST:PORT, once calls are taken. Must run in the main thread, which owns signals.
    """
    signals: asyncio.Queue[int] = asyncio.Queue()
    events = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        events.add_signal_handler(number, signals.put_nowait, number)
    server = GenerationServer(engine, config)
    try:
        address = await server.start()
        log.info("serving on %s", address)
        if announce is not None:
            announce(address)
        name = signal.Signals(await signals.get()).name
        log.info("%s: finishing the live streams, for at most %g s", name, grace_s)
        waits = [asyncio.ensure_future(server.drain(grace_s)), asyncio.ensure_future(signals.get())]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        await server.stop()
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            events.remove_signal_handler(number)
