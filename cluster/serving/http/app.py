"""The paths, and a call's way: read, run, write, one event per step."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.serving import calls
from cluster.serving.desk import Desk, SlowReaderError
from cluster.serving.http import page
from cluster.serving.http.answers import Choice, Envelope, event
from cluster.serving.http.errors import HttpError, Refusal, refusal_of
from cluster.serving.http.guard import Guard
from cluster.serving.http.openapi import document
from cluster.serving.http.reading import Asked, UnknownModelError, model_id, read_chat, read_completion
from cluster.serving.http.replies import HEADERS, dump, refused, reply
from cluster.serving.visits import Visit
from runtime.errors import FieldError, WorkerError

if TYPE_CHECKING:
    from runtime.engine.engine import Engine  # which compiles when it is imported for the first time

MAX_BODY_BYTES = 16 * 2**20
BODY_TIMEOUT_S = 60.0
"""How long a client may take to send a body."""

CLIENT_LEFT = "499"
"""The status in logs of a call whose client went away, as nginx has it."""

Read = Callable[[bytes, "Engine", str, float], Asked]


def make_app(desk: Desk, num_connections: Callable[[], int]) -> ASGIApp:
    """All paths. `num_connections`: open now."""

    async def chat(scope: Scope, receive: Receive, send: Send) -> None:
        await Call(desk, scope, receive, send).answer(read_chat)

    async def completion(scope: Scope, receive: Receive, send: Send) -> None:
        await Call(desk, scope, receive, send).answer(read_completion)

    async def models(_: Request) -> Response:
        return reply({"object": "list", "data": [_model(desk)]})

    async def model(request: Request) -> Response:
        described, asked = _model(desk), request.path_params["model"]
        if asked != described["id"]:
            raise UnknownModelError(f"The model {asked[:200]!r} is not served here. There is {described['id']!r}.")
        return reply(described)

    async def alive(_: Request) -> Response:
        if desk.has_failed:
            raise WorkerError("the engine has failed")
        return reply({"status": "ok"})

    async def ready(_: Request) -> Response:
        desk.check_taking()
        return reply({"status": "ready"})

    described: dict[bool, bytes] = {}

    async def description(_: Request) -> Response:
        needs_token = desk.tokens is not None
        if needs_token not in described:
            described[needs_token] = dump(document(needs_token))
        return Response(described[needs_token], headers=HEADERS, media_type="application/json")

    async def metrics(_: Request) -> Response:
        return Response(desk.metrics.text(), headers=HEADERS, media_type=desk.metrics.content_type)

    routes = [
        Route("/v1/chat/completions", _raw(chat), methods=["POST"]),
        Route("/v1/completions", _raw(completion), methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{model:path}", model),
        Route("/openapi.json", description),
        Route("/metrics", metrics),
        Route("/health", alive),
        Route("/ready", ready),
        *page.routes(desk),
    ]
    handlers: Any = {HTTPException: _not_found, Exception: _failed}
    for kind in (HttpError, UnknownModelError, FieldError, WorkerError):
        handlers[kind] = _failed
    app = Starlette(routes=routes, exception_handlers=handlers)
    return Guard(app, desk, [route.path for route in routes], num_connections)


class _raw:  # noqa: N801
    """An ASGI application as an endpoint: what is no function is not wrapped."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


def _model(desk: Desk) -> dict[str, Any]:
    engine, loop = desk.opened
    created = int(time.time() - loop.stats.uptime_s)
    return {
        "id": model_id(engine.config),
        "object": "model",
        "created": created,
        "owned_by": "outrider",
        "max_model_len": engine.capacity if engine.config.cache.policy == "full" else None,
    }


async def _failed(_: Request, error: Exception) -> Response:
    return refused(refusal_of(error))


async def _not_found(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}. docs/http.md has the paths."
    headers = dict(error.headers or {})
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "refused")
    return refused(refusal_of(HttpError(error.status_code, code, message, headers)))


class Call:
    """One call that is answered by the engine."""

    def __init__(self, desk: Desk, scope: Scope, receive: Receive, send: Send) -> None:
        self._desk, self._scope, self._receive, self._send = desk, scope, receive, send
        self._arrival_s = time.perf_counter()
        self._visit: Visit = scope["state"]["visit"]
        self._has_begun = False

    async def answer(self, read: Read) -> None:
        """Read, run, write. A client that goes away withdraws what runs."""
        try:
            self._desk.check_taking()
            content = await self._body()
            work = asyncio.ensure_future(self._answer(read, content))
            gone = asyncio.ensure_future(self._until_gone())
            try:
                await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
                if not work.done():
                    raise ClientDisconnect
                work.result()
            finally:
                gone.cancel()
                await _ended(work)
        except (ClientDisconnect, SlowReaderError):
            self._visit.status = CLIENT_LEFT
        except Exception as error:
            if isinstance(error, FieldError | HttpError | UnknownModelError):
                self._desk.refused(error)
            await self._refuse(refusal_of(error))

    async def _answer(self, read: Read, content: bytes) -> None:
        engine, loop = self._desk.opened
        asked = await self._desk.threads.run(len(content), read, content, engine, self._visit.visit_id, self._arrival_s)
        self._visit.request_id = asked.answer_id
        for request in asked.requests:
            self._desk.check_length(len(request.prompt_ids))
        envelope = Envelope(asked, model_id(engine.config))
        choices = [Choice(asked, index, engine.tokenizer) for index in range(len(asked.requests))]
        pieces = []
        with calls.Running(loop, engine.tokenizer, asked.requests, self._visit) as outputs:
            if asked.stream:
                await self._begin(200, {"content-type": "text/event-stream; charset=utf-8", "x-accel-buffering": "no"})
            async for output, text in outputs:
                envelope.count(output, output.index)
                piece = choices[output.index].push(output, text)
                if asked.stream:
                    await self._write(envelope.event(piece))
                else:
                    pieces.append(piece)
        if asked.stream:
            await self._write(envelope.last_events(), more=False)
            return
        body = envelope.whole(pieces)
        await self._begin(200, {"content-type": "application/json", "content-length": str(len(body))})
        await self._write(body, more=False)

    async def _body(self) -> bytes:
        """All of it. Raises HttpError if it is too large, comes too slowly or is no JSON, ClientDisconnect."""
        request = Request(self._scope, self._receive)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            message = f"content-type: {kind[:100]!r} cannot be read. Send application/json."
            raise HttpError(415, "unsupported_media_type", message)
        chunks, length = [], 0
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                async for chunk in request.stream():
                    length += len(chunk)
                    if length > MAX_BODY_BYTES:
                        message = f"the body has more than {MAX_BODY_BYTES} bytes. Send a smaller one."
                        raise HttpError(413, "too_large", message, {"connection": "close"})
                    chunks.append(chunk)
        except TimeoutError:
            message = f"the body has not come within {BODY_TIMEOUT_S:g} s."
            raise HttpError(408, "timeout", message, {"connection": "close"}) from None
        return b"".join(chunks)

    async def _until_gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def _begin(self, status: int, headers: dict[str, str]) -> None:
        self._has_begun = True
        lines = [(name.encode(), value.encode()) for name, value in (HEADERS | headers).items()]
        await self._send({"type": "http.response.start", "status": status, "headers": lines})

    async def _write(self, content: bytes, more: bool = True) -> None:
        await self._desk.written(self._send({"type": "http.response.body", "body": content, "more_body": more}))

    async def _refuse(self, refusal: Refusal) -> None:
        """Say what is wrong: by a status, or, in a stream that has begun, by an event."""
        if self._has_begun:
            await self._write(event(refusal.body), more=False)
            return
        await refused(refusal)(self._scope, self._receive, self._send)


async def _ended(work: asyncio.Future[Any]) -> None:
    """Cancel it, if it still runs, and wait for its end."""
    if not work.done():
        work.cancel()
        await asyncio.wait((work,))
