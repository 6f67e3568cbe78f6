"""The server: its doors, gRPC (with standard health and reflection) and HTTP, on one event loop and one engine."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from cluster.serving import access, supervisor, transport
from cluster.serving.desk import Desk
from cluster.serving.gate import Gate
from cluster.serving.generation import SERVICE_NAME, GenerationService
from cluster.serving.http.door import HttpDoor
from cluster.serving.ports import ANOTHER_PORT, check_free, shown
from cluster.serving.state import SessionStore
from runtime.config import Config
from runtime.engine.loop import EngineLoop
from runtime.errors import ConfigError, WorkerError

if TYPE_CHECKING:
    from runtime.engine.engine import Engine  # which compiles when it is imported for the first time

log = logging.getLogger(__name__)

T = TypeVar("T")

DRAIN_GRACE_S = 30.0
"""How long live streams may go on after a signal to stop."""

LIVENESS = "liveness"
"""Name under which a health check asks whether the process is well, though it may still be loading; under any other,
whether it takes requests."""


@dataclass(frozen=True)
class Addresses:
    """Where the doors are, as HOST:PORT."""

    grpc: str
    http: str | None
    """None: there is no such door."""

    @property
    def settings(self) -> list[str]:
        """What to add to a command line for the same ports again."""
        doors = {"server.port": self.grpc, "server.http_port": self.http}
        known = {key: address.rpartition(":")[2] for key, address in doors.items() if address is not None}
        return [part for key, port in known.items() for part in ("--set", f"{key}={port}")]

    def __str__(self) -> str:
        return f"serving on {self.grpc}" + (f"\nhttp on {self.http}" if self.http is not None else "")


class GenerationServer:
    """The services and their ports. `start`, `open` once there is an engine, then `drain` if streams should end by
    themselves, then `stop`."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._loop: EngineLoop | None = None
        self._desk = Desk(config)
        self._service = GenerationService(self._desk)
        self._http = HttpDoor(self._desk) if config.server.http_port is not None else None
        self._health = health.aio.HealthServicer()
        self._grpc: grpc.aio.Server | None = None

    async def start(self) -> Addresses:
        """Listen, and say to health checks that nothing is served yet.

        Raises ConfigError if the host or a port cannot be had, if tokens or certificates cannot be read, or if others
        can reach it and there is no TLS.
        """
        settings = self._config.server
        host, port = settings.host, settings.port
        access.check_reach(self._config)
        certificates = access.read_certificates(settings)
        self._desk.tokens = access.read_tokens(settings)
        check_free(host, port)
        http = await self._http.start(certificates) if self._http is not None else None
        self._grpc = transport.server(settings, [Gate(self._desk)])
        try:
            port = _bind(self._grpc, shown(host, port), certificates)
        except RuntimeError as error:
            problem = f"{shown(host, port)} cannot be bound ({error})"
            raise ConfigError("server.port", port, problem, ANOTHER_PORT) from error
        self._grpc.add_generic_rpc_handlers((self._service.handler(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        names = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._grpc)
        await self._say(health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._health.set(LIVENESS, health_pb2.HealthCheckResponse.SERVING)
        await self._grpc.start()
        return Addresses(shown(host, port), http)

    async def open(self, engine: Engine, on_failure: Callable[[], None] = lambda: None) -> None:
        """Serve this engine, which stays the caller's to close. `on_failure` is called when it can answer no more."""
        events = asyncio.get_running_loop()
        settings = self._config.server
        if settings.state_dir is not None:
            where = settings.state_dir, settings.state_bytes
            self._desk.store = await asyncio.to_thread(SessionStore, *where, engine.identity)
        gc.freeze()  # what is here stays: looking through it for garbage would hold up a step for milliseconds

        def failed(_: Exception) -> None:
            asyncio.run_coroutine_threadsafe(self._not_serving(), events)
            on_failure()

        self._loop = EngineLoop(engine, on_failure=failed)
        self._desk.open(engine, self._loop)
        await self._say(health_pb2.HealthCheckResponse.SERVING)

    async def drain(self, grace_s: float = DRAIN_GRACE_S) -> None:
        """Take no more requests, say so to health checks, and let live streams end, for at most `grace_s` seconds."""
        await self._not_serving()
        self._service.drain()
        await self._desk.drain(grace_s)

    async def stop(self) -> None:
        """End what is still live with UNAVAILABLE, and close the ports."""
        await self._not_serving()
        if self._loop is not None:
            await asyncio.to_thread(self._loop.close)
        # The loop has told every stream; the grace is for the last words to reach the clients.
        if self._http is not None:
            await self._http.stop(grace_s=2.0)
        if self._grpc is not None:
            await self._grpc.stop(grace=2.0)
        self._desk.close()

    @property
    def failure(self) -> Exception | None:
        """Why the engine can answer no more."""
        return self._loop.failed if self._loop is not None else None

    async def _say(self, status: Any) -> None:
        for name in ("", SERVICE_NAME):
            await self._health.set(name, status)

    async def _not_serving(self) -> None:
        await self._health.enter_graceful_shutdown()


def _bind(server: grpc.aio.Server, address: str, certificates: access.Certificates | None) -> int:
    """Listen at an address; the port."""
    if certificates is None:
        return int(server.add_insecure_port(address))
    credentials = grpc.ssl_server_credentials(
        [(certificates.key, certificates.cert)],
        root_certificates=certificates.client_ca,
        require_client_auth=certificates.client_ca is not None,
    )
    return int(server.add_secure_port(address, credentials))


def serve(
    config: Config,
    engine: AbstractContextManager[Engine],
    announce: Callable[[Addresses], None] | None = None,
    grace_s: float = DRAIN_GRACE_S,
) -> None:
    """Listen, open the engine, and serve it until SIGINT or SIGTERM; then drain. A second signal ends the draining.

    `announce` gets the addresses once calls are taken; before, health checks are answered NOT_SERVING. Must run in the
    main thread, which owns signals. Raises ConfigError, before the engine is opened, if a port cannot be had;
    WorkerError where the engine fails so that it can answer no more.
    """
    with _events() as run:
        server = GenerationServer(config)
        try:
            addresses = run(server.start()).result()
            with engine as opened, _caught() as (next_signal, wake):
                try:
                    run(server.open(opened, on_failure=wake)).result()
                    log.info("%s", str(addresses).replace("\n", ", "))
                    if announce is not None:
                        announce(addresses)
                    supervisor.serving(addresses.settings)
                    number = next_signal()
                    if number == 0:
                        raise WorkerError(f"the engine has failed: {server.failure}")
                    log.info("%s: finishing the live streams, for at most %g s", signal.Signals(number).name, grace_s)
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
