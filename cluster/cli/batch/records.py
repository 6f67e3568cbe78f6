"""The input of a batch: a stream of lines, each of them one record, or an error that says what is wrong with it."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import select
import stat
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from runtime.config import SamplingParams
from runtime.errors import ConfigError, InvalidRequestError

if TYPE_CHECKING:
    from runtime.request import Prompt

PROMPT_KEYS = ("prompt", "messages", "token_ids", "turns")
ID_KEYS = ("id", "question_id", "task_id")
URGENCY = {"priority": "priority", "deadline": "deadline_s"}
"""Keys of a record, and what requests call them."""
DATASET_KEYS = ("turns", "task_id")
"""Marks of Spec-Bench's and HumanEval's own records, which say more beside the prompt; it is read over."""
MAX_LINE_BYTES = 64 * 2**20
"""A longer line is an error: what has no line ends must not fill the memory."""

_CHUNK_BYTES = 2**18
_BYTE_ORDER_MARK = "\ufeff"
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_STANDARD = ("/dev/stdin", "/dev/stdout", "/dev/stderr")
_DESCRIPTOR = re.compile(r"/(?:dev|proc/self)/fd/(\d+)")

# Lines


@dataclass(frozen=True)
class Line:
    """One line of the input that has something in it."""

    number: int
    """Of the line in the file, from 1; empty lines count."""
    content: bytes
    """Without its end. Of a line that is too long, the beginning."""
    end: int
    """Bytes of the input up to here."""
    is_too_long: bool = False


class Input:
    """The lines of a file, a pipe or a device. It is opened once, and read once, as it comes."""

    def __init__(self, source: Path) -> None:
        """Raises ConfigError if it cannot be opened. Waits for whoever writes to a named pipe."""
        try:
            inherited = _inherited(source)
            self._fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC) if inherited is None else os.dup(inherited)
        except OSError as error:
            raise unreadable(source, error) from error
        about = os.fstat(self._fd)
        self.num_bytes = about.st_size if stat.S_ISREG(about.st_mode) else None
        """Of a file; unknown of all else."""

    def lines(self) -> Iterator[Line]:
        """Lines as soon as they are there; those without anything in them are none. Raises OSError."""
        number = end = 0
        parts: list[bytes] = []
        held = 0
        while True:
            chunk = self._read()
            pieces = chunk.split(b"\n") if chunk else [b"", b""]  # the end of the input ends the last line
            for index, piece in enumerate(pieces):
                end += len(piece)
                if held <= MAX_LINE_BYTES:
                    parts.append(piece)
                    held += len(piece)
                if index == len(pieces) - 1:
                    break
                end, number = end + 1, number + 1
                content, parts, held, too_long = b"".join(parts), [], 0, held > MAX_LINE_BYTES
                if too_long or not _is_empty(content):
                    yield Line(number, content[:MAX_LINE_BYTES], end, too_long)
            if not chunk:
                return

    def _read(self) -> bytes:
        while True:
            try:
                # Not through a buffered reader: its lock would hold up the end of a program whose input says nothing.
                return os.read(self._fd, _CHUNK_BYTES)
            except BlockingIOError:
                select.select([self._fd], [], [])

    def close(self) -> None:
        """Whoever writes to the other end of a pipe hears that nobody reads any more. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def descriptor(path: Path) -> int | None:
    """The open file that a path like /dev/fd/3 stands for, if it does: opened anew, its place in it would be lost."""
    if str(path) in _STANDARD:
        return _STANDARD.index(str(path))
    found = _DESCRIPTOR.fullmatch(str(path))
    return int(found[1]) if found is not None else None


def _inherited(source: Path) -> int | None:
    return 0 if str(source) == "-" else descriptor(source)


def look_at(source: Path) -> os.stat_result:
    """What the input is, without waiting for it. Raises ConfigError if it is not there."""
    try:
        inherited = _inherited(source)
        about = os.stat(source) if inherited is None else os.fstat(inherited)
        if stat.S_ISDIR(about.st_mode):
            raise IsADirectoryError(errno.EISDIR, "Is a directory")
        return about
    except (OSError, ValueError) as error:
        raise unreadable(source, error) from error


def unreadable(source: Path, error: Exception) -> ConfigError:
    """What is said of an input that cannot be read."""
    problem = getattr(error, "strerror", None) or str(error)
    return ConfigError("IN", str(source), problem, "Name a readable file of UTF-8 JSON lines, or - for standard input.")


def read_lines(source: Path, limit: int | None) -> list[str]:
    """The first `limit` lines that have something in them, at once. Raises ConfigError if the file cannot be read."""
    with closing(Input(source)) as lines:
        try:
            return [_text(line) for line in islice(lines.lines(), limit)]
        except (OSError, InvalidRequestError) as error:
            raise unreadable(source, error) from error


def _is_empty(content: bytes) -> bool:
    return not content.removeprefix(_BYTE_ORDER_MARK.encode()).strip()


def _text(line: Line) -> str:
    name = f"line {line.number}"
    if line.is_too_long:
        problem = f"is longer than {MAX_LINE_BYTES} bytes"
        raise InvalidRequestError(name, line.content[:40], problem, "Write one object a line.")
    try:
        text = line.content.decode("utf-8")
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8 ({error.reason} at byte {error.start})"
        raise InvalidRequestError(name, line.content[:40], problem, "Save the file as UTF-8.") from None
    # Files joined one behind the other have a mark at each one's beginning.
    return text.removeprefix(_BYTE_ORDER_MARK).rstrip("\r")


# Records


@dataclass(frozen=True)
class Record:
    """What one line asks for."""

    id: Any
    """A text or a whole number: the record's own, else its line's number."""
    prompt: Prompt
    """Raw text, chat messages or token ids."""
    sampling: dict[str, Any] = field(default_factory=dict)
    lookahead: dict[str, Any] = field(default_factory=dict)
    urgency: dict[str, Any] = field(default_factory=dict)
    """`priority` and `deadline_s`, where it has them."""


@dataclass(frozen=True)
class BadRecord:
    """A line that asks for nothing that could be answered."""

    id: Any
    error: str


def read_record(line: Line) -> Record | BadRecord:
    """What a line asks for; never fails."""
    record_id: Any = line.number
    try:
        fields = _fields(_text(line), line.number)
        record_id = _id(fields, line.number)
        return _record(fields, record_id)
    except InvalidRequestError as error:
        return BadRecord(record_id, str(error))
    except RecursionError:  # of a value that an error would show
        return BadRecord(record_id, str(_too_deep(f"line {line.number}", line.content[:40])))


def parse(line: str, number: int) -> Record:
    """The record in line `number` (from 1). Raises InvalidRequestError naming the key that is wrong."""
    fields = _fields(line, number)
    return _record(fields, _id(fields, number))


def _fields(line: str, number: int) -> dict[str, Any]:
    """The line's object. Raises InvalidRequestError if it has none, or text that cannot be sent or written."""
    name, remedy = f"line {number}", "Write one object a line."
    try:
        fields = json.loads(line, object_pairs_hook=_unique, parse_constant=_no_number)
        if _SURROGATE.search(line):
            json.dumps(fields, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise _too_deep(name, line[:80]) from None
    except UnicodeEncodeError:
        problem, remedy = "holds half of a surrogate pair", "Write both halves, or the character itself."
        raise InvalidRequestError(name, line[:80], problem, remedy) from None
    except ValueError as error:
        raise InvalidRequestError(name, line[:80], f"is not JSON ({str(error)[:200]})", remedy) from None
    if not isinstance(fields, dict):
        raise InvalidRequestError(name, line[:80], "is not an object", 'Write for example {"prompt": "..."}.')
    return fields


def _too_deep(name: str, beginning: str | bytes) -> InvalidRequestError:
    return InvalidRequestError(name, beginning, "is nested too deeply", "See `outrider batch --help`.")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return fields


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def _id(fields: dict[str, Any], number: int) -> str | int:
    """The record's own id, else the line's number. Raises InvalidRequestError if it can be no id."""
    for key in ID_KEYS:
        value = fields.get(key)
        if value is None:
            continue
        if not isinstance(value, str | int) or isinstance(value, bool):
            remedy = "Leave it out, and the line's number stands for it."
            raise InvalidRequestError(key, value, "is neither a text nor a whole number", remedy)
        return value
    return number


def _record(fields: dict[str, Any], record_id: str | int) -> Record:
    given = [key for key in PROMPT_KEYS if key in fields]
    if len(given) != 1:
        remedy = f"Give one of {', '.join(PROMPT_KEYS)}."
        raise InvalidRequestError("record", given or list(fields), "needs exactly one prompt", remedy)
    known = {*PROMPT_KEYS, *ID_KEYS, *SamplingParams.model_fields, *URGENCY, "lookahead"}
    unknown = [key for key in fields if key not in known]
    if unknown and not any(key in fields for key in DATASET_KEYS):
        remedy = f"Known here: {', '.join(sorted(known))}."
        raise InvalidRequestError(unknown[0], fields[unknown[0]], "unknown key", remedy)
    lookahead = fields.get("lookahead", {})
    if not isinstance(lookahead, dict):
        raise InvalidRequestError("lookahead", lookahead, "is not a mapping", 'Write for example {"enabled": false}.')
    sampling = {key: value for key, value in fields.items() if key in SamplingParams.model_fields}
    urgency = {name: fields[key] for key, name in URGENCY.items() if fields.get(key) is not None}
    for key, name in URGENCY.items():
        if name in urgency:
            check_urgency(key, urgency[name])
    return Record(record_id, _prompt(given[0], fields[given[0]]), sampling, lookahead, urgency)


def check_urgency(key: str, value: Any) -> None:
    """Raise InvalidRequestError for a priority or a deadline that is none."""
    kinds = int if key.endswith("priority") else int | float
    is_number = isinstance(value, kinds) and not isinstance(value, bool)
    if not is_number or key.endswith("deadline") and not 0 < value < math.inf:
        wanted = "a whole number" if key.endswith("priority") else "a number of seconds above 0"
        raise InvalidRequestError(key, value, f"is not {wanted}", "Give one, or leave it out.")


def _prompt(key: str, value: Any) -> Prompt:
    """Checks the shape; what stands inside is the engine's to judge."""
    if key == "prompt":
        if not isinstance(value, str):
            raise InvalidRequestError(key, value, "is not a text", "Use messages or token_ids for other prompts.")
        return value
    if not isinstance(value, list) or not value:
        raise InvalidRequestError(key, value, "is not a list with something in it", "See `outrider batch --help`.")
    if key == "turns":
        if not isinstance(value[0], str):
            raise InvalidRequestError(key, value[0], "is not a text", "The first turn is the user's message.")
        return [{"role": "user", "content": value[0]}]
    kind = dict if key == "messages" else int
    for item in value:
        if not isinstance(item, kind) or isinstance(item, bool):
            expected = "a message" if kind is dict else "a token id"
            raise InvalidRequestError(key, item, f"is not {expected}", "See `outrider batch --help`.")
    return value
