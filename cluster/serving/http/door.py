"""The HTTP server: uvicorn, on the event loop that it is started on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from cluster.serving import ports
from cluster.serving.access import Certificates
from cluster.serving.desk import Desk
from cluster.serving.http.app import make_app
from cluster.serving.http.protocol import Protocol


class _Server(uvicorn.Server):
    """Leaves signals to whoever started it."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpDoor:
    """`start`, then `stop`."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._server: _Server | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self, certificates: Certificates | None) -> str:
        """Listen; returns the address, HOST:PORT. Raises ConfigError if host or port cannot be had."""
        settings = self._desk.config.server
        assert settings.http_port is not None
        sockets = ports.listen(settings.host, settings.http_port, "server.http_port")
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # what clients do wrong is no news
        config = uvicorn.Config(
            make_app(self._desk, lambda: len(server.server_state.connections)),
            http=Protocol,
            ws="none",
            lifespan="off",
            loop="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=2,
        )
        if certificates is not None:
            config.load()
            config.ssl = certificates.context
        self._server = server = _Server(config)
        self._task = asyncio.create_task(self._server.serve(sockets))
        while not self._server.started:
            await asyncio.sleep(0)
            if self._task.done():
                self._task.result()
        return ports.shown(settings.host, sockets[0].getsockname()[1])

    async def stop(self, grace_s: float) -> None:
        """Close the port; what still runs has `grace_s` seconds for its last words."""
        if self._server is None or self._task is None:
            return
        self._server.config.timeout_graceful_shutdown = max(1, int(grace_s))
        self._server.should_exit = True
        await self._task
