"""Where the answers of a batch go, and how none is lost that was there before or is finished now.

A stream (standard output, a pipe, a device) takes each line as it comes. Of a file OUT, what it has stays until a run
has come to its end:

- OUT is new or empty: lines are written straight into it.
- OUT has something in it: lines go to OUT.new, which becomes OUT.partial with its first answer, and OUT at the end.
- `--resume` goes on from OUT.partial, else from OUT. It writes OUT.resumed: old answers and new ones in the order of
  the input, and behind them the old lines that the input did not name. That becomes OUT at the end; where the run is
  stopped, it takes the place of what it went on from.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import shutil
import stat
import sys
from contextlib import suppress
from pathlib import Path

from cluster.cli.batch.earlier import Earlier, EarlierLines, entries, merge, sync
from cluster.cli.batch.records import descriptor
from runtime.errors import ConfigError, OutriderError

REMEDY = "Name a file that can be written, or - for standard output."


class OutputError(OutriderError):
    """The output takes no more."""


class ClosedError(OutputError):
    """Nobody reads the output any more."""


class Stream:
    """Lines go straight to a stream, and what is written is gone."""

    kept: str = ""
    """Once it is closed: where answers are of a run that did not come to its end."""

    def __init__(self, fd: int, name: str) -> None:
        self._fd, self._name = fd, name

    def earlier(self, record_id: str | int) -> Earlier | None:
        """What an earlier run has written for this record, if it has; each line once. Of equal ids, the first asked for
        gets the first."""
        return None

    def write(self, line: bytes, is_new_answer: bool) -> None:
        """Write a line, whole or not at all where that can be had. Raises OutputError."""
        try:
            self._write(line)
        except BrokenPipeError:
            raise ClosedError(f"{self._name} is closed") from None
        except OSError as error:
            raise OutputError(f"{self._name} cannot be written: {error.strerror}") from error

    def close(self, is_complete: bool) -> None:
        """Nothing more is to come. `is_complete`: the run has come to the end of its input. Raises OutputError."""
        os.close(self._fd)

    def _write(self, line: bytes) -> None:
        rest = memoryview(line)
        while rest:
            try:
                rest = rest[os.write(self._fd, rest) :]
            except BlockingIOError:
                select.select([], [self._fd], [])


class StandardOutput(Stream):
    """Standard output, for answers alone: what else is printed meanwhile goes to standard error."""

    def __init__(self) -> None:
        sys.stdout.flush()
        self._number = sys.stdout.fileno()
        super().__init__(os.dup(self._number), "standard output")
        with suppress(OSError):
            os.dup2(2, self._number)

    def close(self, is_complete: bool) -> None:
        sys.stdout.flush()
        os.dup2(self._fd, self._number)
        super().close(is_complete)


class File(Stream):
    """A file, and what is beside it while a run is not at its end."""

    def __init__(self, target: Path, resume: bool) -> None:
        """Raises ConfigError if it cannot be written, or if another run does so. `target` is no link."""
        self._target = target
        self._partial, self._new, self._resumed = (
            target.with_name(target.name + suffix) for suffix in (".partial", ".new", ".resumed")
        )
        self._begun = False  # whether a new answer has been written
        self._size = 0
        _has_content(self._resumed)  # fails where the name would be too long
        self._created = not target.exists()
        self._held = _opened(target)
        self._base: Path | None = None
        try:
            _lock(self._held, target)
            if resume:
                self._base = next((path for path in (self._partial, target) if _has_content(path)), None)
            self._path = self._resumed if self._base else self._new if _has_content(target) else target
            if self._base is not None:
                for _ in entries(self._base):  # refuses what is not ours to write anew
                    pass
                if _has_content(self._resumed):  # of a run that was killed
                    merge(self._resumed, self._base)
                    self._resumed.replace(self._base)
                self._earlier = EarlierLines(self._base)
            fd = os.dup(self._held) if self._path == target else _opened(self._path)
        except BaseException:
            self._let_go()
            raise
        super().__init__(fd, str(self._path))
        if self._path != target:
            os.ftruncate(fd, 0)
            about = os.fstat(self._held)
            os.fchmod(fd, stat.S_IMODE(about.st_mode))
            with suppress(OSError):
                os.fchown(fd, about.st_uid, about.st_gid)

    def earlier(self, record_id: str | int) -> Earlier | None:
        return self._earlier.take(record_id) if self._base is not None else None

    def write(self, line: bytes, is_new_answer: bool) -> None:
        try:
            super().write(line, is_new_answer)
        except BaseException:  # no half of a line stays
            with suppress(OSError):
                os.ftruncate(self._fd, self._size)
                os.lseek(self._fd, self._size, os.SEEK_SET)
            raise
        self._size += len(line)
        if is_new_answer and not self._begun:
            try:
                self._begin()
            except OSError as error:
                raise OutputError(f"{self._partial} cannot be written: {error.strerror}") from error

    def _begin(self) -> None:
        """With its first answer, a run takes the place of an older one that did not come to its end."""
        self._begun = True
        if self._base is not None:
            return
        if self._path == self._new:
            self._new.replace(self._partial)
            self._path = self._partial
        else:
            self._partial.unlink(missing_ok=True)
        self._resumed.unlink(missing_ok=True)

    def close(self, is_complete: bool) -> None:
        try:
            sync(self._fd)
            if self._base is not None:
                self._close_resumed(self._base, is_complete)
            elif self._path != self._target and is_complete and self._begun:
                _move(self._path, self._target)
            elif self._path == self._new and not self._size:
                self._new.unlink()
        except OSError as error:
            is_complete = False
            raise OutputError(f"{self._target} cannot be written: {error.strerror}") from error
        finally:
            os.close(self._fd)
            self._let_go(is_complete)
            self.kept = self._say_what_is_kept(is_complete)

    def _close_resumed(self, base: Path, is_complete: bool) -> None:
        if not (is_complete or self._begun):
            self._resumed.unlink()
            return
        try:
            merge(self._resumed, base)
        except OSError:
            if is_complete:
                raise
            return  # a full disk: both files stay, and the next run does this first
        _move(self._resumed, self._target if is_complete else base)
        if is_complete:
            self._partial.unlink(missing_ok=True)

    def _let_go(self, is_complete: bool = False) -> None:
        """A file that a run has made and that got nothing goes with it."""
        with suppress(OSError):
            if self._created and not is_complete and not os.fstat(self._held).st_size:
                self._target.unlink()
        os.close(self._held)

    def _say_what_is_kept(self, is_complete: bool) -> str:
        if is_complete:
            if self._path == self._new and self._size:
                return f"{self._target} keeps what it had; the errors are in {self._new}"
            return f"{self._target} keeps what it had" if self._path == self._new else ""
        place = self._base or (self._path if self._begun else self._target)
        if not _has_content(place):
            return ""
        if self._path == self._new:
            return f"{self._target} keeps what it had"
        return f"the answers so far are in {place}; --resume goes on from there"


def open_output(target: Path, source: os.stat_result, resume: bool) -> Stream:
    """The output, checked and open. `source` is what it must not be. Raises ConfigError."""
    inherited, is_standard = descriptor(target), is_standard_output(target)
    about: os.stat_result | None
    try:
        if is_standard:
            is_closed = sys.stdout is None or sys.__stdout__ is None  # the null device may stand in for it
            about = os.fstat(-1 if is_closed else sys.stdout.fileno())
        elif inherited is not None:
            about = os.fstat(inherited)
        else:
            target = Path(os.path.realpath(target))
            about = target.stat() if os.path.lexists(target) else None
            if about is None and not target.parent.is_dir():
                raise ConfigError("OUT", str(target), "its folder does not exist", "Create it first.")
    except (OSError, ValueError) as error:
        raise _unwritable(target, error) from error
    if about is not None and stat.S_ISDIR(about.st_mode):
        raise ConfigError("OUT", str(target), "is a folder", REMEDY)
    is_place = about is not None and (stat.S_ISREG(about.st_mode) or stat.S_ISFIFO(about.st_mode))
    if about is not None and is_place and os.path.samestat(about, source):
        raise ConfigError("OUT", str(target), "is the input file", "Name another file.")
    if inherited is None and not is_standard and (about is None or stat.S_ISREG(about.st_mode)):
        try:
            return File(target, resume)
        except OSError as error:
            raise _unwritable(target, error) from error
    if resume:
        raise ConfigError("OUT", str(target), "is no file that a run could go on from", "Leave out --resume.")
    if is_standard:
        return StandardOutput()
    if inherited is None:
        return Stream(_opened(target, create=False), str(target))
    return Stream(os.dup(inherited), str(target))


def is_standard_output(target: Path) -> bool:
    return str(target) == "-" or descriptor(target) == 1


def _opened(path: Path, create: bool = True) -> int:
    try:
        return os.open(path, os.O_WRONLY | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o666)
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: Exception) -> ConfigError:
    problem = f"cannot be written ({getattr(error, 'strerror', None) or error})"
    return ConfigError("OUT", str(path), problem, REMEDY)


def _lock(fd: int, path: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError("OUT", str(path), "is being written by another run", "Wait for it, or end it.") from None
    except OSError:
        pass  # a file system that has no locks


def _has_content(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _move(path: Path, target: Path) -> None:
    """`path` takes the place of `target`, which keeps its other names, if it has any."""
    try:
        if target.exists() and target.stat().st_nlink > 1:
            raise OSError(errno.EBUSY, "has other names")
        path.replace(target)
    except OSError as error:
        if error.errno not in (errno.EBUSY, errno.EXDEV, errno.EPERM):
            raise
        shutil.copyfile(path, target)  # should this fail, `path` still has everything
        path.unlink()
