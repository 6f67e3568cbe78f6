"""Conversations on disk: the token ids of each, in a log of its own, so that a session is still good after a restart.

A log is only ever appended to. Its records are a length, a checksum and a content each; what stands behind the first
one that is not whole, a torn write's tail, is cut off. The logs together are bounded: the one written to longest ago
goes first. Where the disk is full, a conversation goes on without its log, and the server's log says so.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import struct
import threading
import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.wire.statuses import LostSessionError
from runtime.errors import ConfigError
from runtime.request import Past, Request, TurnStart, Usage

log = logging.getLogger(__name__)

FORMAT = 1
_FRAME = struct.Struct("<II")  # bytes of the content, and their CRC-32
_HEAD = struct.Struct("<IIqq?")  # see TurnRecord
_SUFFIX = ".turns"


@dataclass(frozen=True)
class TurnRecord:
    """What one turn has left in its conversation."""

    num_prompt: int
    """Tokens that it brought, whether or not all of them were read."""
    start: TurnStart | None
    """None: it was withdrawn before anything of it was read."""
    token_ids: Sequence[int]
    """Of prompt and answer, those that are part of the conversation."""
    ends_in_answer: bool

    @classmethod
    def of(
        cls, request: Request, seen_before: int, length_before: int, answer: Sequence[int], usage: Usage
    ) -> TurnRecord:
        """What a request has left that has ended with this usage, after an answer that the caller has seen.

        `seen_before`: tokens in the cache when it came; `length_before`: those of the conversation's text.
        """
        prompt = request.prompt_ids
        num_read = len(prompt) if answer else min(max(usage.num_seen_tokens - length_before, 0), len(prompt))
        start = TurnStart(seen_before, len(prompt) + request.sampling.max_new_tokens)
        has_begun = bool(answer) or usage.num_seen_tokens > seen_before
        ids = (*prompt[:num_read], *answer)
        return cls(len(prompt), start if has_begun else None, ids, bool(answer))

    def encoded(self) -> bytes:
        position, coming = (self.start.position, self.start.num_coming) if self.start is not None else (-1, 0)
        head = _HEAD.pack(self.num_prompt, len(self.token_ids), position, coming, self.ends_in_answer)
        return head + array("i", self.token_ids).tobytes()

    @classmethod
    def decoded(cls, content: bytes) -> TurnRecord:
        """Raises ValueError, struct.error."""
        num_prompt, num_tokens, position, coming, ends_in_answer = _HEAD.unpack_from(content)
        ids = array("i")
        ids.frombytes(content[_HEAD.size :])
        if len(ids) != num_tokens:
            raise ValueError("a turn's tokens are not all there")
        start = TurnStart(position, coming) if position >= 0 else None
        return cls(num_prompt, start, tuple(ids), ends_in_answer)


def past_of(turns: Sequence[TurnRecord]) -> Past | None:
    """What a conversation of these turns had before; None: nothing."""
    ids = tuple(token for turn in turns for token in turn.token_ids)
    if not ids:
        return None
    begun = [turn for turn in turns if turn.start is not None]
    starts = tuple(turn.start for turn in begun if turn.start is not None)
    return Past(ids, begun[0].num_prompt, starts, begun[-1].ends_in_answer)


class SessionLog:
    """The log of one conversation, open for its next turns. For one thread at a time."""

    def __init__(self, store: SessionStore, path: Path, turns: list[TurnRecord]) -> None:
        self._store, self.path = store, path
        self.turns = turns
        """Those that it holds, in order."""
        self.is_good = True
        """Whether it holds all turns so far; once it does not, it is gone."""

    def append(self, turn: TurnRecord) -> None:
        """Keep one more turn, on the disk when this returns. Where that cannot be, the log ends, and that is said."""
        if not self.is_good:
            return
        try:
            self._store.append(self.path, turn.encoded())
        except OSError as error:
            self.give_up(error)
        else:
            self.turns.append(turn)

    def give_up(self, error: OSError) -> None:
        """The disk does not take it: the conversation goes on, and ends with this server."""
        self.is_good = False
        problem = "a conversation goes on, but will not be there after a restart: its log cannot be written"
        log.warning("%s (%s: %s)", problem, self.path, error.strerror or error)
        self.forget()

    def forget(self) -> None:
        """The conversation has ended."""
        self._store.release(self.path, forget=True)

    def release(self) -> None:
        """Nobody goes on with it now; somebody may later."""
        self._store.release(self.path)


class SessionStore:
    """The logs of a server's conversations, in one directory. Safe from any thread."""

    def __init__(self, directory: str | Path, max_bytes: int, identity: str) -> None:
        """`identity` stands for model and cache policy (Engine.identity): conversations of another are not taken up.

        Raises ConfigError where the directory cannot be had, or another server has it.
        """
        self._directory, self._max_bytes, self._identity = Path(directory).expanduser(), max_bytes, identity
        self._guard = threading.Lock()
        self._open: set[Path] = set()
        try:
            self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = (self._directory / "lock").open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            problem, remedy = "is that of a server that is running", "Give each server its own."
            raise ConfigError("server.state_dir", str(directory), problem, remedy) from None
        except OSError as error:
            problem = f"cannot be written to ({error.strerror or error})"
            raise ConfigError("server.state_dir", str(directory), problem, "Name a folder that can be.") from error
        self._sizes = {path: path.stat().st_size for path in self._oldest_first()}

    def begin(self, session_id: str) -> SessionLog:
        """The log of a new conversation; of an older one with this id nothing is left."""
        path = self._path(session_id)
        started = SessionLog(self, path, [])
        head = {"format": FORMAT, "session_id": session_id, "identity": self._identity}
        with self._guard:
            self._open.add(path)
            self._remove(path)
        try:
            self.append(path, json.dumps(head).encode())
        except OSError as error:
            started.give_up(error)
        return started

    def take_up(self, session_id: str, num_turns: int) -> SessionLog:
        """The log of a conversation whose client has so many turns, those behind them taken back.

        Raises LostSessionError where it is not there, or not so far.
        """
        path = self._path(session_id)
        with self._guard:
            if path in self._open:
                raise LostSessionError(f"session {session_id!r} is being taken up already")
            try:
                content = path.read_bytes()
            except OSError:
                raise LostSessionError(f"session {session_id!r} is not known here; begin a new one") from None
            head, turns, ends = _read(content)
            if head is None or head.get("format") != FORMAT or head.get("session_id") != session_id:
                raise LostSessionError(f"the log of session {session_id!r} cannot be read; begin a new one")
            if head["identity"] != self._identity:
                raise LostSessionError(f"session {session_id!r} was had with another model or cache; begin a new one")
            if len(turns) < num_turns:
                known = f"{len(turns)} of its {num_turns} turns"
                raise LostSessionError(f"of session {session_id!r} only {known} are known here; begin a new one")
            os.truncate(path, ends[num_turns])
            self._sizes[path] = ends[num_turns]
            self._open.add(path)
        return SessionLog(self, path, turns[:num_turns])

    def append(self, path: Path, content: bytes) -> None:
        """Write one record whole, or nothing of it. Raises OSError."""
        record = _FRAME.pack(len(content), zlib.crc32(content)) + content
        with self._guard:
            self._make_room(len(record))
            before = self._sizes.get(path, 0)
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            try:
                written = 0
                while written < len(record):
                    written += os.write(fd, record[written:])
                os.fdatasync(fd)
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(fd, before)
                raise
            finally:
                os.close(fd)
            self._sizes[path] = before + len(record)

    def release(self, path: Path, forget: bool = False) -> None:
        """Nobody writes to this log any more; `forget`: nor reads it."""
        with self._guard:
            self._open.discard(path)
            if forget:
                self._remove(path)

    @property
    def num_bytes(self) -> int:
        return sum(self._sizes.values())

    def close(self) -> None:
        """Another server may have the directory. Idempotent."""
        self._lock.close()

    def _path(self, session_id: str) -> Path:
        return self._directory / (hashlib.sha256(session_id.encode()).hexdigest()[:32] + _SUFFIX)

    def _oldest_first(self) -> list[Path]:
        return sorted(self._directory.glob(f"*{_SUFFIX}"), key=lambda path: path.stat().st_mtime_ns)

    def _make_room(self, size: int) -> None:
        """Drop logs that nobody has open, the oldest first. Raises OSError where that is not enough."""
        if self.num_bytes + size <= self._max_bytes:
            return
        for path in self._oldest_first():
            if path not in self._open:
                log.info("the log of a conversation is dropped for the newer ones: %s", path)
                self._remove(path)
                if self.num_bytes + size <= self._max_bytes:
                    return
        raise OSError(f"the logs of the open conversations have all of server.state_bytes = {self._max_bytes}")

    def _remove(self, path: Path) -> None:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        self._sizes.pop(path, None)


def _records(content: bytes) -> Iterator[tuple[bytes, int]]:
    """The whole records at the beginning of a log, and where each ends."""
    start = 0
    while start + _FRAME.size <= len(content):
        length, checksum = _FRAME.unpack_from(content, start)
        end = start + _FRAME.size + length
        record = content[start + _FRAME.size : end]
        if len(record) < length or zlib.crc32(record) != checksum:
            return
        yield record, end
        start = end


def _read(content: bytes) -> tuple[dict[str, object] | None, list[TurnRecord], list[int]]:
    """What a log begins with, its turns, and where the beginning and each of them ends."""
    head: dict[str, object] | None = None
    turns: list[TurnRecord] = []
    ends: list[int] = []
    with contextlib.suppress(ValueError, struct.error):
        for record, end in _records(content):
            if head is None:
                head = json.loads(record)
            else:
                turns.append(TurnRecord.decoded(record))
            ends.append(end)
    return head, turns, ends
