"""The page at `/`: a playground, and a live view of the mesh. `static/` has its files, `live` what it asks for."""

from __future__ import annotations

import hashlib
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cluster.serving.desk import Desk
from cluster.serving.http.page import live

STATIC = Path(__file__).parent / "static"
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
"""Nothing from elsewhere, no script or style within the markup, and no text that becomes markup."""
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}


def routes(desk: Desk) -> list[Route]:
    """The page's files, which are the same for everyone, and what it shows of the engine."""
    files = {path.name: _File(path) for path in STATIC.iterdir() if path.suffix in KINDS}

    async def index(request: Request) -> Response:
        return files["index.html"].response(request)

    async def file(request: Request) -> Response:
        found = files.get(request.path_params["name"])
        if found is None:
            raise HTTPException(404)
        return found.response(request)

    async def now(_: Request) -> Response:
        return live.response(desk)

    return [Route("/", index), Route("/page/{name}", file), Route("/live", now)]


class _File:
    """One of them, in memory."""

    def __init__(self, path: Path) -> None:
        self._content = path.read_bytes()
        self._kind = KINDS[path.suffix]
        self._tag = f'"{hashlib.sha256(self._content).hexdigest()[:16]}"'

    def response(self, request: Request) -> Response:
        headers = HEADERS | {"etag": self._tag}
        if request.headers.get("if-none-match") == self._tag:
            return Response(status_code=304, headers=headers)
        return Response(self._content, headers=headers, media_type=self._kind)
