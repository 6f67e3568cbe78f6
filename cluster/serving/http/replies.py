"""Answers that are whole: JSON with a status."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import Response

from cluster.serving.http.errors import Refusal

HEADERS = {"cache-control": "no-store", "x-content-type-options": "nosniff"}


def dump(value: Any) -> bytes:
    """JSON, as it is sent."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def reply(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A value, with a status."""
    return Response(dump(value), status, HEADERS | (headers or {}), media_type="application/json")


def refused(refusal: Refusal) -> Response:
    """What is wrong."""
    return reply(refusal.body, refusal.status, refusal.headers)
