"""What stands before every HTTP call: connections, hosts, tokens; and the visit that it is."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.serving.access import authorization_of, is_loopback
from cluster.serving.desk import Desk
from cluster.serving.http.errors import HttpError, refusal_of
from cluster.serving.http.replies import refused
from cluster.wire.statuses import UnauthenticatedError

OPEN = ("/health", "/ready")
"""What answers without a token."""


class Guard:
    """An ASGI application around another."""

    def __init__(self, app: ASGIApp, desk: Desk, paths: Iterable[str], num_connections: Callable[[], int]) -> None:
        """`paths`: those that logs and metrics may name."""
        self._app, self._desk, self._num_connections = app, desk, num_connections
        self._paths = frozenset(paths)
        settings = desk.config.server
        self._is_local = is_loopback(settings.host)
        self._hosts = {settings.host, "localhost"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        path = scope["path"]
        headers = [(name.decode("latin-1"), value) for name, value in scope["headers"]]
        method = f"{scope['method']} {path if path in self._paths else '(other)'}"
        try:
            self._check_connections()
            self._check_host(dict(headers).get("host", b"").decode("latin-1"))
            if path in OPEN:
                await self._app(scope, receive, send)
                return
            with self._desk.visit("http", method, authorization_of(headers)) as visit:
                scope.setdefault("state", {})["visit"] = visit

                async def send_on(message: Message) -> None:
                    if message["type"] == "http.response.start":
                        visit.status = str(message["status"])
                        message["headers"] = [*message["headers"], (b"x-request-id", visit.visit_id.encode())]
                    await send(message)

                await self._app(scope, receive, send_on)
        except (HttpError, UnauthenticatedError) as error:
            await refused(refusal_of(error))(scope, receive, send)

    def _check_connections(self) -> None:
        most = self._desk.config.server.max_connections
        if self._num_connections() > most:
            message = f"more than {most} connections are open (server.max_connections). Try again later."
            raise HttpError(503, "too_many_connections", message, {"retry-after": "1", "connection": "close"})

    def _check_host(self, host: str) -> None:
        """On loopback without tokens, a page of the web may reach the server through the browser of whoever opens it,
        by a name of its own that leads here. Such a name is refused."""
        if not self._is_local or self._desk.tokens is not None:
            return
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() and not host.endswith("]") else host
        if not (name in self._hosts or name.endswith(".localhost") or _is_loopback_number(name.strip("[]"))):
            message = f"host: {host[:100]!r} is no name of this machine's loopback. Call http://localhost."
            raise HttpError(421, "misdirected_request", message)


def _is_loopback_number(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
