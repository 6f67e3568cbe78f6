"""A server in a thread of the test's process, so that the test can look at both ends."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

from cluster.serving.generation import GenerationService
from cluster.serving.server import Addresses, GenerationServer
from runtime.engine.loop import EngineLoop


class ServerThread:
    """A running GenerationServer; `address` is where gRPC is, `url` where HTTP is, if it has that door."""

    def __init__(self, engine: Any, http: bool = False, **server: Any) -> None:
        """`server`: settings of that section that differ from the engine's."""
        settings = {"http_port": 0 if http else None} | server
        config = engine.config
        section = type(config.server).model_validate(config.server.model_dump() | settings)
        self._events = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._events.run_forever, name="test-server")
        self._thread.start()
        self._server = GenerationServer(config.model_copy(update={"server": section}))
        self._stopped = False
        try:
            addresses: Addresses = self.run(self._server.start())
            self.address, self.url = addresses.grpc, f"http://{addresses.http}"
            self.run(self._server.open(engine))
        except BaseException:
            self._end_thread()
            raise

    @property
    def service(self) -> GenerationService:
        return self._server._service

    @property
    def loop(self) -> EngineLoop:
        loop = self._server._loop
        assert loop is not None
        return loop

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._events).result(timeout=60)

    def drain(self, grace_s: float) -> None:
        self.run(self._server.drain(grace_s))

    def stop(self) -> None:
        if not self._stopped:
            self._stopped = True
            self.run(self._server.stop())

    def close(self) -> None:
        self.stop()
        self._end_thread()

    def _end_thread(self) -> None:
        self._events.call_soon_threadsafe(self._events.stop)
        self._thread.join(30)
        self._events.close()


@contextmanager
def serving(engine: Any, http: bool = False, **server_settings: Any) -> Iterator[ServerThread]:
    server = ServerThread(engine, http, **server_settings)
    try:
        yield server
    finally:
        server.close()
