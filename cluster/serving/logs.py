"""What the server writes down: lines of text or JSON, one for each call, and defects; no prompts, no secrets."""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from typing import IO, Any

from cluster.serving.visits import Visit
from runtime.config import ServerConfig

ACCESS = logging.getLogger("outrider.access")
POLLED = ("GET /live",)
"""Calls that the page makes all the time for whoever looks at it: their lines would be all that a log shows."""


class JsonFormatter(logging.Formatter):
    """A line is one JSON object: time (UTC), level, logger, message, and the record's fields."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {"time": f"{moment}.{int(record.msecs):03d}Z", "level": record.levelname.lower()}
        line |= {"logger": record.name, "message": record.getMessage()} | getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    """The record's fields come as key=value behind the message."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(name)s %(levelname)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", {})
        shown = " ".join(
            f"{key}={json.dumps(value) if isinstance(value, str) and ' ' in value else value}"
            for key, value in fields.items()
        )
        return f"{super().format(record)} {shown}".rstrip()


def configure(settings: ServerConfig, stream: IO[str] | None = None) -> None:
    """Have the whole process log as the settings say, to standard error."""
    handler = logging.StreamHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(JsonFormatter() if settings.log_format == "json" else TextFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


def access(visit: Visit) -> None:
    """A call is over."""
    fields: dict[str, Any] = {
        "id": visit.visit_id,
        "request_id": visit.request_id,
        "door": visit.door,
        "method": visit.method,
        "status": visit.status,
        "caller": visit.caller.name if visit.caller is not None else None,
        "prompt_tokens": visit.num_prompt_tokens or None,
        "new_tokens": visit.num_new_tokens or None,
        "ttft_s": round(visit.ttft_s, 6) if visit.ttft_s is not None else None,
        "seconds": round(visit.seconds, 6),
    }
    if visit.texts is not None:
        fields |= {"prompts": visit.prompts, "answers": ["".join(visit.texts[index]) for index in sorted(visit.texts)]}
    kept = {key: value for key, value in fields.items() if value is not None}
    level = logging.DEBUG if visit.method in POLLED and visit.status == "200" else logging.INFO
    ACCESS.log(level, "call", extra={"fields": kept})


def defect(log: logging.Logger, error: BaseException) -> None:
    """A call failed in a way that nobody foresaw: what kind of error, and where. What it says may be a client's text,
    and is left out."""
    where = "".join(traceback.format_tb(error.__traceback__)).rstrip()
    log.error("a request failed: %s\n%s", type(error).__name__, where)
