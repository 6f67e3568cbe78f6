"""What an earlier run has written, and how it joins what a later one writes."""

from __future__ import annotations

import errno
import json
import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import ConfigError


@dataclass(frozen=True)
class Earlier:
    """One line of an earlier run's output."""

    line: bytes
    is_answer: bool
    """Else it is an error."""


@dataclass(frozen=True)
class Entry:
    """One line of an output."""

    key: str
    """Its record's id, written so that 1 and "1" differ."""
    is_answer: bool
    start: int
    """Where the line is in the file; bytes."""
    size: int


def entries(path: Path) -> Iterator[Entry]:
    """The lines of an output; what a run that was killed has left of one at the end is none. Raises ConfigError if it
    is something else."""
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                fields = json.loads(line.decode("utf-8"))
                entry = Entry(_key(fields["id"]), "error" not in fields, start, len(line))
            except (ValueError, TypeError, KeyError, RecursionError):
                if not line.endswith(b"\n"):
                    return
                problem, remedy = f"line {number} is no record of a batch", "Name another OUT, or leave out --resume."
                raise ConfigError("OUT", str(path), problem, remedy) from None
            yield entry
            start += len(line)


def _key(record_id: object) -> str:
    return json.dumps(record_id)


class EarlierLines:
    """The lines of an output, each to be taken once, by id. Where they come in the order of the input, as they do
    unless that has changed, nothing is held in memory but the next."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._ahead = entries(path)
        self._passed: dict[str, deque[Entry]] = {}

    def take(self, record_id: str | int) -> Earlier | None:
        """The next line with this id."""
        entry = self.take_entry(_key(record_id))
        return Earlier(self._read(entry), entry.is_answer) if entry is not None else None

    def rest(self) -> Iterator[bytes]:
        """The lines that nobody has taken, in their order."""
        passed = [entry for entries in self._passed.values() for entry in entries]
        for entry in sorted(passed, key=lambda entry: entry.start):
            yield self._read(entry)
        for entry in self._ahead:
            yield self._read(entry)

    def take_entry(self, key: str) -> Entry | None:
        """The same, without reading it."""
        if passed := self._passed.get(key):
            entry = passed.popleft()
            if not passed:
                del self._passed[key]
            return entry
        for entry in self._ahead:
            if entry.key == key:
                return entry
            self._passed.setdefault(entry.key, deque()).append(entry)
        return None

    def _read(self, entry: Entry) -> bytes:
        self._file.seek(entry.start)
        return self._file.read(entry.size).removesuffix(b"\n") + b"\n"


def merge(scratch: Path, base: Path) -> None:
    """Write behind the lines of `scratch` those of `base` that it does not have. May be broken off and done again."""
    lines, size = EarlierLines(base), 0
    for entry in entries(scratch):
        lines.take_entry(entry.key)
        size = entry.start + entry.size
    with scratch.open("r+b") as file:
        file.truncate(size)  # half a line at the end
        file.seek(size)
        file.writelines(lines.rest())
        file.flush()
        sync(file.fileno())


def sync(fd: int) -> None:
    """What is written is on the disk. Raises OSError, as a full disk may do only now."""
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # not every file system can
            raise
