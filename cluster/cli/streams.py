"""Standard input and output: bytes that are no text, characters that cannot be shown, and readers that have gone bring
nothing down."""

from __future__ import annotations

import io
import json
import os
import sys
from typing import Any, TextIO

from runtime.errors import ConfigError, InvalidRequestError


def prepare_output() -> None:
    """What an output cannot show is escaped; one that is closed takes everything and keeps nothing."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  for the program's whole life
        elif isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def finish_output() -> None:
    """Write what is left. Whoever has stopped reading (`| head`) is no reason for words at the interpreter's end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def read_text() -> str:
    """All of standard input, which is UTF-8, its line ends as they are. Raises InvalidRequestError where it is not."""
    stdin = require_input()
    if isinstance(stdin, io.TextIOWrapper):
        stdin.reconfigure(encoding="utf-8-sig", errors="strict", newline="")
    try:
        return stdin.read()
    except UnicodeDecodeError as error:
        found = f"byte 0x{error.object[error.start]:02X}"
        problem = f"standard input is no UTF-8 text ({error.reason})"
        raise InvalidRequestError("prompt", found, problem, "Convert it first, for example with iconv.") from None


def require_input() -> TextIO:
    """Standard input. Raises ConfigError where it is closed."""
    if sys.stdin is None:
        raise ConfigError("standard input", None, "is closed", "Give the command one, for example /dev/null.")
    return sys.stdin


def print_json(value: Any) -> None:
    """On standard output, in one line; as ASCII where that cannot show all characters."""
    shows_all = (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf")
    print(json.dumps(value, ensure_ascii=not shows_all), flush=True)
