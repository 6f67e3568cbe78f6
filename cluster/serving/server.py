"""The gRPC server: GenerationService on an engine loop, with standard health and reflection."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import gc
import logging
import signal
import socket
import threading
import time
from collections.abc import AsyncIterable, Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, aclosing, contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from cluster.pb.outrider.v1 import generation_pb2 as pb
from cluster.serving import calls
from cluster.serving.converse import Conversation
from cluster.serving.state import SessionStore
from cluster.serving.threads import RequestThreads
from cluster.wire import answers, requests
from cluster.wire.server_info import server_info
from cluster.wire.statuses import TAKEN
from runtime.config import Config
from runtime.engine.loop import EngineLoop
from runtime.errors import ConfigError, FieldError, WorkerError
from runtime.request import FinishReason, Request

if TYPE_CHECKING:
    from runtime.engine.engine import Engine  # which compiles when it is imported for the first time

log = logging.getLogger(__name__)

T = TypeVar("T")

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["GenerationService"].full_name
MAX_MESSAGE_BYTES = 16 * 2**20
DRAIN_GRACE_S = 30.0
"""How long live streams may go on after a signal to stop."""

ANOTHER_PORT = "Choose a free one; 0 lets the system choose."

_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Otherwise a second server on the same port is not an error, and takes half of the calls.
    ("grpc.so_reuseport", 0),
    # Finds clients that vanished without a word, whose sequences would run on.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # Clients do the same, however often and with nothing to say, and that is no reason to end what they wait for.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_ping_strikes", 0),
]


class GenerationService:
    """Text in, text out; everything between is the loop's. Messages come as bytes, since gRPC has no status for what
    it cannot read itself."""

    def __init__(self) -> None:
        self._threads = RequestThreads()
        self._opened: tuple[Engine, EngineLoop] | None = None
        self._store: SessionStore | None = None
        self._num_refused = 0
        self._draining = False
        self._live: set[asyncio.Task[object]] = set()
        self._conversations: set[Conversation] = set()

    def open(self, engine: Engine, loop: EngineLoop, store: SessionStore | None = None) -> None:
        """Take calls from now on. `store`: where conversations are kept that outlive their call."""
        self._opened, self._store = (engine, loop), store

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
        await self._carry_out(self._generate(message, context), context)

    async def Converse(self, messages: AsyncIterable[bytes], context: grpc.aio.ServicerContext) -> None:  # noqa: N802
        await self._carry_out(self._converse(messages, context), context)

    async def GetServerInfo(  # noqa: N802
        self, message: bytes, context: grpc.aio.ServicerContext
    ) -> pb.GetServerInfoResponse:
        try:
            requests.parse(pb.GetServerInfoRequest, message)
            return server_info(*self._engine_and_loop(), self._num_refused)
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
        self._threads.close()

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

    async def _generate(self, message: bytes, context: grpc.aio.ServicerContext) -> None:
        arrival_s = time.perf_counter()
        self._refuse_while_draining()
        engine, loop = self._engine_and_loop()
        request = await self._threads.run(len(message), _read, message, engine)
        request = dataclasses.replace(request, arrival_s=arrival_s)
        await context.send_initial_metadata(((TAKEN, "1"),))
        key = request.run_key
        async with aclosing(calls.answer(loop, engine.tokenizer, request)) as outputs:
            async for output, text in outputs:
                if output.finish_reason is FinishReason.CANCELLED:
                    # A client that cancels does not get here; this is `GenerationServer.stop`.
                    raise WorkerError("the server shut down before the text had ended")
                await context.write(answers.response(output, text, key))
                key = ""  # it is told once

    async def _converse(self, messages: AsyncIterable[bytes], context: grpc.aio.ServicerContext) -> None:
        self._refuse_while_draining()
        conversation = Conversation(*self._engine_and_loop(), self._threads, context, self._store)
        self._conversations.add(conversation)
        try:
            await conversation.run(messages)
        finally:
            self._conversations.discard(conversation)

    def _refuse_while_draining(self) -> None:
        if self._draining:
            raise WorkerError("the server is shutting down")

    def _engine_and_loop(self) -> tuple[Engine, EngineLoop]:
        if self._opened is None:
            raise WorkerError("the model is still being loaded")
        return self._opened


def _read(message: bytes, engine: Engine) -> Request:
    request = requests.parse(pb.GenerateRequest, message)
    prompt, request_id = requests.read_prompt(request), requests.read_id(request, "request_id")
    sampling = requests.read_sampling(request, engine.config.sampling)
    lookahead = requests.read_lookahead(request, engine.config.lookahead)
    so_far, key = requests.read_so_far(request), request.resume_key if request.HasField("resume_key") else None
    urgency = requests.read_urgency(request)
    return engine.make_request(prompt, sampling, lookahead, request_id, so_far=so_far, run_key=key, **urgency)


class GenerationServer:
    """The services and their port. `start`, `open` once there is an engine, then `drain` if streams should end by
    themselves, then `stop`."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._loop: EngineLoop | None = None
        self._store: SessionStore | None = None
        self._service = GenerationService()
        self._health = health.aio.HealthServicer()

    async def start(self) -> str:
        """Listen, and say to health checks that nothing is served yet; returns the address, HOST:PORT.

        Raises ConfigError if host or port cannot be had.
        """
        host, port = self._config.server.host, self._config.server.port
        check_free(host, port)
        host = f"[{host}]" if ":" in host else host
        self._grpc = grpc.aio.server(options=_OPTIONS)
        try:
            port = self._grpc.add_insecure_port(f"{host}:{port}")
        except RuntimeError as error:
            raise ConfigError("server.port", port, f"{host}:{port} cannot be bound ({error})", ANOTHER_PORT) from error
        self._grpc.add_generic_rpc_handlers((self._service.handler(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        names = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._grpc)
        await self._say(health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._grpc.start()
        return f"{host}:{port}"

    async def open(self, engine: Engine) -> None:
        """Serve this engine, which stays the caller's to close."""
        events = asyncio.get_running_loop()
        settings = self._config.server
        if settings.state_dir is not None:
            where = settings.state_dir, settings.state_bytes
            self._store = await asyncio.to_thread(SessionStore, *where, engine.identity)
        gc.freeze()  # what is here stays: looking through it for garbage would hold up a step for milliseconds
        self._loop = EngineLoop(
            engine, on_failure=lambda _: asyncio.run_coroutine_threadsafe(self._not_serving(), events)
        )
        self._service.open(engine, self._loop, self._store)
        await self._say(health_pb2.HealthCheckResponse.SERVING)

    async def drain(self, grace_s: float = DRAIN_GRACE_S) -> None:
        """Take no more requests, say so to health checks, and let live streams end, for at most `grace_s` seconds."""
        await self._not_serving()
        await self._service.drain(grace_s)

    async def stop(self) -> None:
        """End what is still live with UNAVAILABLE, and close the port."""
        await self._not_serving()
        if self._loop is not None:
            await asyncio.to_thread(self._loop.close)
        # The loop has told every stream; the grace is for the last words to reach the clients.
        await self._grpc.stop(grace=2.0)
        self._service.close()
        if self._store is not None:
            self._store.close()

    async def _say(self, status: Any) -> None:
        for name in ("", SERVICE_NAME):
            await self._health.set(name, status)

    async def _not_serving(self) -> None:
        await self._health.enter_graceful_shutdown()


def check_free(host: str, port: int) -> None:
    """Raise ConfigError naming server.host or server.port, whichever is to blame, if one could not listen there.

    gRPC does not say why it cannot, and is content with one of a name's several addresses.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        remedy = "Give an address or a name of this machine, or 0.0.0.0 or :: for all of its addresses."
        raise ConfigError("server.host", host, f"cannot be resolved ({error})", remedy) from error
    num_had, refused = 0, None
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(address)
                probe.listen(1)
            num_had += 1
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ConfigError("server.port", port, f"is taken at {address[0]}", ANOTHER_PORT) from error
            if error.errno in (errno.EACCES, errno.EPERM):
                problem = "is a port that only privileged programs may listen at"
                raise ConfigError("server.port", port, problem, "Choose one from 1024 on, or 0.") from error
            refused = error  # a name may have an address of a kind that this machine does not use
    if not num_had:
        problem, remedy = f"is no address that this machine can listen at ({refused})", "Give one of its addresses."
        raise ConfigError("server.host", host, problem, remedy)


def serve(
    config: Config,
    engine: AbstractContextManager[Engine],
    announce: Callable[[str], None] | None = None,
    grace_s: float = DRAIN_GRACE_S,
) -> None:
    """Listen, open the engine, and serve it until SIGINT or SIGTERM; then drain. A second signal ends the draining.

    `announce` gets the address, HOST:PORT, once calls are taken; before, health checks are answered NOT_SERVING. Must
    run in the main thread, which owns signals. Raises ConfigError, before the engine is opened, if the port cannot be
    had.
    """
    with _events() as run:
        server = GenerationServer(config)
        address = run(server.start()).result()
        try:
            with engine as opened, _caught() as (next_signal, wake):
                try:
                    run(server.open(opened)).result()
                    log.info("serving on %s", address)
                    if announce is not None:
                        announce(address)
                    name = signal.Signals(next_signal()).name
                    log.info("%s: finishing the live streams, for at most %g s", name, grace_s)
                    run(server.drain(grace_s)).add_done_callback(lambda _: wake())
                    next_signal()
                finally:  # the engine is closed after its loop
                    run(server.stop()).result()
        except BaseException:
            run(server.stop()).result()
            raise


@contextmanager
def _events() -> Iterator[Callable[[Coroutine[Any, Any, T]], Future[T]]]:
    """An event loop in a thread of its own, beside what the main thread loads; gives what runs a coroutine there."""
    began: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def until_ended() -> None:
        ended = asyncio.Event()
        began.set_result((asyncio.get_running_loop(), ended))
        await ended.wait()

    # `run` ends what is left of gRPC's tasks with the loop, and not with the process.
    thread = threading.Thread(target=lambda: asyncio.run(until_ended()), name="outrider-server", daemon=True)
    thread.start()
    events, ended = began.result()
    try:
        yield lambda coroutine: asyncio.run_coroutine_threadsafe(coroutine, events)
    finally:
        events.call_soon_threadsafe(ended.set)
        thread.join()


@contextmanager
def _caught() -> Iterator[tuple[Callable[[], int], Callable[[], None]]]:
    """Catch SIGINT and SIGTERM; gives what waits for the next one, and what wakes it without any (0).

    A signal is a byte in a socket, which arrives whichever thread the system has interrupted for it, and when.
    """
    numbers = (signal.SIGINT, signal.SIGTERM)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setblocking(False)
        descriptor = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        before = {number: signal.signal(number, lambda *_: None) for number in numbers}

        def next_signal() -> int:
            while (number := ours.recv(1)[0]) not in (0, *numbers):
                pass
            return number

        def wake() -> None:
            with suppress(OSError):  # nobody waits any more
                theirs.send(b"\0")

        try:
            yield next_signal, wake
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(descriptor)
